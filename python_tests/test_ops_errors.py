"""What every op says to a bad argument, and that it has written nothing by then."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_cases import assert_same_bits, snapshot
from torch import Tensor

from densecl_ext import ops

Arguments = dict[str, Any]


def info_nce() -> Arguments:
    return {"query": torch.ones(3, 8), "positive": torch.ones(3, 8), "queue": torch.ones(5, 8)}


def dense_info_nce() -> Arguments:
    return {
        "query_grid": torch.ones(2, 8, 2, 3),
        "key_grid": torch.ones(2, 8, 4),
        "match": torch.zeros(2, 6, dtype=torch.int64),
        "queue": torch.ones(5, 8),
    }


def dense_match() -> Arguments:
    return {"query_features": torch.ones(2, 8, 3), "key_features": torch.ones(2, 8, 4)}


def ema_update_() -> Arguments:
    return {
        "targets": [torch.ones(3), torch.ones(2, 2)],
        "sources": [torch.zeros(3), torch.zeros(2, 2)],
        "momentum": 0.5,
    }


def enqueue_() -> Arguments:
    return {
        "queue": torch.ones(5, 8),
        "pointer": torch.tensor([4]),
        "keys": torch.full((2, 8), 3.0),
        "filled": torch.tensor(4),
    }


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def negated(*shape: int) -> Tensor:
    """Ones that lie in memory as -1, as torch has it after conj().imag."""
    return torch.complex(torch.zeros(shape), torch.full(shape, -1.0)).conj().imag


def expanded(*shape: int) -> Tensor:
    return torch.ones(()).expand(*shape)


V, T, R = ValueError, TypeError, RuntimeError
LOSSES = [
    # What both losses check alike: (argument, bad value, error, words of the message).
    ("queue", torch.ones(8, 5), V, r"queue must be \(K, 8\) to match query, got \(8, 5\); did you "
     r"mean queue\.T\?"),
    ("queue", torch.ones(5, 7), V, r"queue must be \(K, 8\) to match query, got \(5, 7\)$"),
    ("queue", torch.ones(5), V, r"queue must be \(K, 8\).*got \(5,\)"),
    ("queue", torch.ones(5, 8, 1), V, r"queue must be \(K, 8\).*got \(5, 8, 1\)"),
    ("queue", torch.ones(0, 8), V, r"queue must have at least one row, got \(0, 8\)"),
    ("queue", torch.ones(5, 8, requires_grad=True), V, r"queue must not require grad.*detach"),
    ("queue", torch.ones(5, 8).double(), T, r"queue must be float32.*got float64; cast"),
    ("queue", torch.ones(5, 8).int(), T, r"queue must be float32.*got int32"),
    ("queue", [[1.0] * 8], T, r"queue must be a tensor, got list"),
    ("queue", meta(5, 8), R, r"queue must be on .*device cpu, got meta"),
    ("temperature", 0.0, V, r"temperature must be positive and finite, got 0\.0"),
    ("temperature", -0.2, V, r"temperature must be positive and finite, got -0\.2"),
    ("temperature", math.nan, V, r"temperature must be positive and finite, got nan"),
    ("temperature", math.inf, V, r"temperature must be positive and finite, got inf"),
    ("temperature", 1e-300, V, r"temperature must lie in \[1e-30, 1e30\].*got 1e-300"),
    ("temperature", 1e300, V, r"temperature must lie in \[1e-30, 1e30\].*got 1e\+300"),
    ("temperature", torch.tensor(0.0), V, r"temperature must be positive and finite, got 0\.0"),
    ("temperature", torch.tensor(1), T, r"temperature must be floating point, got int64"),
    ("temperature", torch.ones(2), V, r"temperature must have one element, got \(2,\)"),
    ("temperature", meta(1), R, r"temperature must be on query's device cpu, got meta"),
    ("filled", -1, V, r"filled must lie in \[0, 5\], got -1"),
    ("filled", 6, V, r"filled must lie in \[0, 5\], got 6"),
    ("filled", torch.tensor(6), V, r"filled must lie in \[0, 5\], got 6"),
    ("filled", torch.tensor(-1), V, r"filled must lie in \[0, 5\], got -1"),
    ("filled", torch.tensor([1, 2]), V, r"filled must have one element, got \(2,\)"),
    ("filled", torch.tensor(3, dtype=torch.int32), T, r"filled must be int64, got int32"),
    ("filled", torch.tensor(3.0), T, r"filled must be int64, got float32"),
    ("filled", 3.0, T, r"filled must be an int or a tensor, got float"),
    ("filled", True, T, r"filled must be an int or a tensor, got bool"),
    ("filled", meta(1, dtype=torch.int64), R, r"filled must be on queue's device cpu, got meta"),
    ("reduction", "avg", V, r"reduction must be one of .*'mean'.*got 'avg'"),
    ("reduction", None, V, r"reduction must be one of .*got None"),
    ("row_weight", [1.0], T, r"row_weight must be a tensor, got list"),
]  # fmt: skip

TABLE: list[tuple[Callable[[], Arguments], str, Any, type[Exception], str]] = [
    *((info_nce, *case) for case in LOSSES),
    *((dense_info_nce, *case) for case in LOSSES),
    (info_nce, "query", torch.ones(8), V, r"query must be \(M, D\), got \(8,\)"),
    (info_nce, "query", torch.ones(3, 8, 1), V, r"query must be \(M, D\), got \(3, 8, 1\); tokens"),
    (info_nce, "query", torch.ones(3, 8).double(), T, r"query must be float32.*float64; cast"),
    (info_nce, "query", torch.ones(3, 8).long(), T, r"query must be float32.*got int64"),
    (info_nce, "query", None, T, r"query must be a tensor, got NoneType"),
    (info_nce, "query", meta(3, 8), R, r"positive must be on query's device meta, got cpu"),
    (info_nce, "positive", torch.ones(4, 8), V, r"positive must be \(3, 8\).*got \(4, 8\)"),
    (info_nce, "positive", torch.ones(3, 1), V, r"positive must be \(3, 8\).*got \(3, 1\)"),
    (info_nce, "positive", torch.ones(3, 8).cfloat(), T, r"positive must be.*got complex64"),
    (info_nce, "positive", meta(3, 8), R, r"positive must be on query's device cpu, got meta"),
    (info_nce, "row_weight", torch.ones(4), V, r"row_weight must be \(3,\), got \(4,\)"),
    (info_nce, "row_weight", torch.ones(3, 1), V, r"row_weight must be \(3,\), got \(3, 1\)"),
    (info_nce, "row_weight", torch.ones(3).long(), T, r"row_weight must be floating point.*int64"),
    (info_nce, "row_weight", meta(3), R, r"row_weight must be on query's device cpu, got meta"),
    (dense_info_nce, "query_grid", torch.ones(2, 8), V, r"query_grid must be \(N, D, \*Sq\)"),
    (dense_info_nce, "query_grid", torch.ones(2, 8, 6).double(), T, r"query_grid must be float32"),
    (dense_info_nce, "key_grid", torch.ones(2, 8), V, r"key_grid must be \(N, D, \*Sk\)"),
    (dense_info_nce, "key_grid", torch.ones(3, 8, 4), V, r"key_grid must be \(2, 8, \*Sk\).*\(3,"),
    (dense_info_nce, "key_grid", torch.ones(2, 7, 4), V, r"key_grid must be \(2, 8, .*\(2, 7"),
    (dense_info_nce, "key_grid", torch.ones(2, 8, 4).bool(), T, r"key_grid must be.*got bool"),
    (dense_info_nce, "key_grid", meta(2, 8, 4), R, r"on query's device cpu, got meta"),
    (dense_info_nce, "match", torch.zeros(2, 5).long(), V, r"match must be \(2, 6\).*got \(2, 5\)"),
    (dense_info_nce, "match", torch.zeros(12).long(), V, r"match must be \(2, 6\).*got \(12,\)"),
    (dense_info_nce, "match", torch.zeros(2, 6).int(), T, r"match must be int64, got int32"),
    (dense_info_nce, "match", torch.zeros(2, 6), T, r"match must be int64, got float32"),
    (dense_info_nce, "match", [[0] * 6] * 2, T, r"match must be a tensor, got list"),
    (dense_info_nce, "match", torch.full((2, 6), 4), V, r"match must lie in \[-1, 4\).*to 4"),
    (dense_info_nce, "match", torch.full((2, 6), -2), V, r"match must lie in \[-1, 4\).*from -2"),
    (dense_info_nce, "match", meta(2, 6, dtype=torch.int64), R, r"match must be on .*got meta"),
    (dense_info_nce, "row_weight", torch.ones(12), V, r"row_weight must be \(2, 6\), got \(12,\)"),
    (dense_match, "key_features", torch.ones(2, 4, 3), V, r"tokens \(N, S, C\).*transpose\(1, 2\)"),
    (dense_match, "query_features", torch.ones(2, 8), V, r"query_features must be \(N, C, \*Sq\)"),
    (dense_match, "query_features", torch.ones(2, 8, 3).int(), T, r"query_features.*got int32"),
    (dense_match, "key_features", torch.ones(8), V, r"key_features must be \(N, C, \*Sk\)"),
    (dense_match, "key_features", torch.ones(1, 8, 4), V, r"key_features must be \(2, 8, \*Sk\)"),
    (dense_match, "key_features", torch.ones(2, 9, 4), V, r"key_features must be \(2, 8, \*Sk\)"),
    (dense_match, "key_features", torch.ones(2, 8, 0), V, r"at least one position.*\(2, 8, 0\)"),
    (dense_match, "key_features", torch.ones(2, 8, 4).double(), T, r"key_features.*got float64"),
    (dense_match, "key_features", "keys", T, r"key_features must be a tensor, got str"),
    (dense_match, "key_features", meta(2, 8, 4), R, r"key_features must be on .*cpu, got meta"),
    (ema_update_, "momentum", -0.1, V, r"momentum must lie in \[0, 1\], got -0\.1"),
    (ema_update_, "momentum", 1.1, V, r"momentum must lie in \[0, 1\], got 1\.1"),
    (ema_update_, "momentum", math.nan, V, r"momentum must lie in \[0, 1\], got nan"),
    (ema_update_, "sources", [torch.zeros(3)], V, r"sources must be as many as targets, 2, got 1"),
    (ema_update_, "sources", [], V, r"sources must be as many as targets, 2, got 0"),
    (ema_update_, "sources", torch.zeros(2, 3), T, r"sources must be a list.*got Tensor"),
    (ema_update_, "targets", iter([torch.ones(3)]), T, r"targets must be a list.*mean list"),
    (ema_update_, "sources", [torch.zeros(3), torch.zeros(4)], V,
     r"sources\[1\] must be \(2, 2\) to match targets\[1\], got \(4,\)"),
    (ema_update_, "sources", [torch.zeros(3), None], T, r"sources\[1\] must be a tensor"),
    (ema_update_, "sources", [torch.zeros(3), torch.zeros(2, 2).double()], T,
     r"sources\[1\] must be float32.*got float64"),
    (ema_update_, "targets", [torch.ones(3), torch.ones(2, 2).long()], T,
     r"targets\[1\] must be float32.*got int64"),
    (ema_update_, "sources", [torch.zeros(3), meta(2, 2)], R,
     r"sources\[1\] must be on targets\[1\]'s device cpu, got meta"),
    (ema_update_, "targets", [torch.ones(3), expanded(2, 2)], V,
     r"targets\[1\] must have a place of its own for every element"),
    (ema_update_, "targets", [negated(3), torch.ones(2, 2)], V,
     r"targets\[0\] must hold its values as they read.*resolve_neg"),
    (ema_update_, "targets", [torch.ones(3), torch.ones(20).as_strided((2, 2), (1, 1))], V,
     r"targets\[1\] must have a place of its own.*strides \(1, 1\)"),
    (ema_update_, "targets", [torch.empty(0, dtype=torch.int64), torch.ones(2, 2)], T,
     r"targets\[0\] must be float32.*got int64"),
    (ema_update_, "targets", torch.nn.Linear(2, 2), T, r"targets must be a list.*two modules"),
    (enqueue_, "queue", negated(5, 8), V, r"queue must hold its values as they read"),
    (enqueue_, "queue", torch.ones(40).as_strided((5, 8), (2, 1)), V,
     r"queue must have a place of its own.*strides \(2, 1\)"),
    (enqueue_, "keys", torch.ones(0, 8).long(), T, r"keys must be float32.*got int64"),
    (enqueue_, "keys", torch.ones(8), V, r"keys must be \(B, D\), got \(8,\)"),
    (enqueue_, "keys", torch.ones(2, 7), V, r"queue must be \(K, 7\) to match keys, got \(5, 8\)"),
    (enqueue_, "keys", torch.ones(2, 5), V, r"to match keys, got \(5, 8\); did you mean queue\.T"),
    (enqueue_, "keys", torch.ones(2, 8).double(), T, r"keys must be float32.*got float64"),
    (enqueue_, "keys", meta(2, 8), R, r"keys must be on queue's device cpu, got meta"),
    (enqueue_, "queue", torch.ones(0, 8), V, r"queue must have at least one row"),
    (enqueue_, "queue", torch.ones(5, 8).half().double(), T, r"queue must be float32.*float64"),
    (enqueue_, "queue", torch.ones(5, 8, requires_grad=True), V, r"queue must not require grad"),
    (enqueue_, "queue", expanded(5, 8), V, r"queue must have a place of its own"),
    (enqueue_, "pointer", 4, T, r"pointer must be an int64 tensor, got int"),
    (enqueue_, "pointer", torch.tensor([4], dtype=torch.int32), T, r"pointer must be int64.*int32"),
    (enqueue_, "pointer", torch.tensor([4.0]), T, r"pointer must be int64, got float32"),
    (enqueue_, "pointer", torch.tensor([4, 4]), V, r"pointer must have one element, got \(2,\)"),
    (enqueue_, "pointer", torch.tensor([5]), V, r"pointer must lie in \[0, 5\), got 5"),
    (enqueue_, "pointer", torch.tensor([-1]), V, r"pointer must lie in \[0, 5\), got -1"),
    (enqueue_, "pointer", meta(1, dtype=torch.int64), R, r"pointer must be on queue's device cpu"),
    (enqueue_, "filled", 4, T, r"filled must be an int64 tensor, got int"),
    (enqueue_, "filled", torch.tensor(4, dtype=torch.int16), T, r"filled must be int64, got int16"),
    (enqueue_, "filled", torch.tensor(6), V, r"filled must lie in \[0, 5\], got 6"),
    (enqueue_, "filled", torch.tensor(-1), V, r"filled must lie in \[0, 5\], got -1"),
    (enqueue_, "filled", torch.tensor([1, 1]), V, r"filled must have one element"),
    (enqueue_, "filled", meta(1, dtype=torch.int64), R, r"filled must be on queue's device cpu"),
]  # fmt: skip


def _tensors(arguments: Arguments) -> list[Tensor]:
    found: list[Tensor] = []
    for value in arguments.values():
        values = value if isinstance(value, list) else [value]
        found += [v for v in values if isinstance(v, Tensor)]
    return found


@pytest.mark.parametrize(
    "good,argument,bad,error,words",
    TABLE,
    ids=[f"{good.__name__}-{argument}-{i}" for i, (good, argument, *_) in enumerate(TABLE)],
)
def test_bad_argument(
    good: Callable[[], Arguments], argument: str, bad: Any, error: type[Exception], words: str
) -> None:
    function = getattr(ops, good.__name__)
    function(**good())  # the arguments are fine but for the bad one
    arguments = good() | {argument: bad}
    before = snapshot(_tensors(arguments))
    versions = [t._version for t in _tensors(arguments)]
    with pytest.raises(error, match=words) as raised:
        function(**arguments)
    assert type(raised.value) is error
    assert str(raised.value).startswith(f"{good.__name__}: ")
    assert_same_bits(_tensors(arguments), before)
    assert versions == [t._version for t in _tensors(arguments)]


@pytest.mark.parametrize("good", [info_nce, dense_info_nce])
@pytest.mark.parametrize("match", [4, -2])
def test_the_native_op_guards_its_memory(good: Callable[[], Arguments], match: int) -> None:
    """Called past the Python checks, as a compiled graph does, it still refuses to read beyond."""
    native = torch.ops.densecl_ext._info_nce
    query, queue = torch.ones(2, 8, 3), torch.ones(5, 8)
    index = torch.full((2, 3), match)
    with pytest.raises(RuntimeError, match="match must lie in"):
        native(query, torch.ones(2, 8, 4), index, queue, None, 0.2, True, True, True)
    bad_calls = [
        (query, torch.ones(2, 8, 4), None, queue, None),
        (query, torch.ones(2, 7, 3), None, queue, None),
        (query, query, None, torch.ones(5, 7), None),
        (query, query, None, queue, torch.tensor(6)),
        (query, query, None, queue, torch.tensor(1.0)),
        (query, query, torch.zeros(2, 2).long(), queue, None),
        (query.double(), query, None, queue, None),
    ]
    for call in bad_calls:
        with pytest.raises(RuntimeError):
            native(*call, 0.2, True, False, False)
    with pytest.raises(RuntimeError, match="temperature"):
        native(query, query, None, queue, None, 0.0, True, False, False)


def test_tokens_are_told_how_to_become_grids() -> None:
    tokens, keys = torch.ones(2, 6, 8), torch.ones(2, 4, 8)
    with pytest.raises(ValueError, match=r"tokens \(N, S, C\) are a grid by \.transpose\(1, 2\)"):
        ops.dense_match(tokens, keys)
    match = torch.zeros(2, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"query_grid must be \(N, 8, .*\.transpose\(1, 2\)"):
        ops.dense_info_nce(tokens, tokens, match, torch.ones(5, 8))
    match = torch.zeros(2, 6, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"query_grid must be \(N, 8, .*\.transpose\(1, 2\)"):
        ops.dense_info_nce(tokens, keys, match, torch.ones(5, 8))
    with pytest.raises(ValueError, match=r"query must be \(M, D\).*tokens.*flatten\(0, 1\)"):
        ops.info_nce(tokens, tokens, torch.ones(5, 8))
