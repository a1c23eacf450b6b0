"""What an op that writes in place must refuse, also when called past the Python checks.

Overlaps are drawn at random views of one memory and compared with a list of every element's bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import assert_same_bits, randn, snapshot
from test_ops_errors import negated
from test_ops_properties import quick
from torch import Tensor, nn

from densecl_ext import ops

native = torch.ops.densecl_ext
int64 = {"dtype": torch.int64}


def conjugated(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.complex64).conj()


def lazy_calls() -> list[tuple[Callable[..., None], tuple]]:
    """Every writing op, native and public, with one lazily negated or conjugated tensor."""
    pointer, count = torch.zeros(1, **int64), torch.tensor(0)
    calls: list[tuple[Callable[..., None], tuple]] = []
    for lazy in (negated, conjugated):
        calls += [
            (native._enqueue_, (lazy(4, 3), pointer, torch.ones(2, 3), None, True)),
            (native._enqueue_, (torch.ones(4, 3), pointer, lazy(2, 3), count, True)),
            (native._ema_update_, ([lazy(4)], [torch.ones(4)], 0.5)),
            (native._ema_update_, ([torch.ones(4)], [lazy(4)], 0.5)),
            (native.enqueue_, (lazy(4, 3), pointer, torch.ones(2, 3))),
            (native.ema_update_, ([lazy(4)], [torch.ones(4)], 0.5)),
            (ops.enqueue_, (lazy(4, 3), pointer, torch.ones(2, 3))),
            (ops.ema_update_, ([lazy(4)], [torch.ones(4)], 0.5)),
        ]
    minus = torch._neg_view(pointer)
    calls += [
        (native._enqueue_, (torch.ones(4, 3), minus, torch.ones(2, 3), None, True)),
        (native._enqueue_, (torch.ones(4, 3), pointer, torch.ones(2, 3), minus, True)),
        (ops.enqueue_, (torch.ones(4, 3), minus, torch.ones(2, 3))),
    ]
    return calls


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("case", range(len(lazy_calls())))
def test_lazily_negated_or_conjugated_tensors_are_refused(case: int, inference: bool) -> None:
    function, arguments = lazy_calls()[case]
    tensors = [t for a in arguments for t in (a if isinstance(a, list) else [a])]
    tensors = [t for t in tensors if isinstance(t, Tensor)]
    before = snapshot([t.resolve_neg().resolve_conj() for t in tensors])
    with torch.inference_mode(inference), pytest.raises((RuntimeError, ValueError, TypeError)):
        function(*arguments)
    assert_same_bits([t.resolve_neg().resolve_conj() for t in tensors], before)


def test_what_is_only_read_may_be_lazily_negated() -> None:
    torch.manual_seed(0)
    grid = torch.complex(torch.zeros(2, 8, 5), torch.randn(2, 8, 5)).conj().imag
    plain = grid.resolve_neg().clone()
    queue = plain[0].T.contiguous()
    match = ops.dense_match(plain, plain.flip(0))
    assert grid.is_neg()
    assert torch.equal(ops.dense_match(grid, grid.flip(0)), match)
    got, expected = grid.detach().requires_grad_(), plain.clone().requires_grad_()
    for leaf in (got, expected):
        loss = ops.dense_info_nce(leaf, leaf.flip(0), match, grid[0].T if leaf is got else queue)
        loss = loss + ops.info_nce(leaf[:, :, 0], leaf[:, :, 1], queue)
        loss.backward()
    assert (
        got.grad is not None and expected.grad is not None and torch.equal(got.grad, expected.grad)
    )
    kept, twin, pointer = torch.zeros(6, 5), torch.zeros(6, 5), torch.zeros(2, **int64)
    ops.enqueue_(kept, pointer[:1], grid[0])
    ops.enqueue_(twin, pointer[1:], plain[0])
    assert torch.equal(kept, twin) and kept.any()
    ops.ema_update_([kept], [grid[0, :6]], 0.5)
    ops.ema_update_([twin], [plain[0, :6]], 0.5)
    assert torch.equal(kept, twin)


def test_tensors_that_share_memory_are_refused() -> None:
    base = torch.arange(24.0)
    once, counter = torch.zeros(3), torch.zeros(2, **int64)
    words = torch.zeros(20, **int64)
    queue = words.view(torch.float32).view(10, 4)
    keys = torch.ones(2, 4)
    momentum = torch.tensor(0.5, dtype=torch.float64)
    in_momentum = momentum.reshape(1).view(torch.float32)
    calls: list[tuple[Callable[..., None], tuple, str]] = [
        (
            native._ema_update_,
            ([once, once], [torch.ones(3)] * 2, 0.5),
            r"targets\[[01]\].*targets",
        ),
        (native._ema_update_, ([base[:9]], [base[1:10]], 0.5), r"targets\[0\].*sources\[0\]"),
        (native._ema_update_, ([base[:9].view(3, 3)], [base[:9].view(3, 3).T], 0.5), "sources"),
        (native._ema_update_, ([base[:4], base[4:8]], [base[4:8], base[:4]], 0.5), "sources"),
        (native._ema_update_, ([in_momentum], [torch.ones(2)], 0.0, momentum), "momentum"),
        (native._enqueue_, (torch.ones(4, 4), counter[:1], keys, counter[0], True), "pointer"),
        (native._enqueue_, (queue, words[:1], keys, None, True), "pointer.*queue"),
        (native._enqueue_, (queue, counter[:1], keys, words[19], True), "filled.*queue"),
        (native._enqueue_, (torch.ones(4, 4), words[:1], queue[:3], None, True), "pointer.*keys"),
        (native._enqueue_, (torch.ones(4, 4), counter[:1], queue, words[3], True), "filled.*keys"),
    ]
    for function, arguments, words_of_error in calls:
        before = snapshot([base, once, counter, words, momentum])
        with pytest.raises(RuntimeError, match=words_of_error):
            function(*arguments)
        assert_same_bits([base, once, counter, words, momentum], before)
    for public in (ops.enqueue_, native.enqueue_):
        with pytest.raises(RuntimeError, match="filled must not share memory with pointer"):
            public(torch.ones(4, 4), counter[:1], keys, filled=counter[:1])
    with pytest.raises(RuntimeError, match="must not share memory"):
        ops.ema_update_([base[:9]], [base[1:10]], 0.5)


def test_neighbours_and_the_queues_own_rows_are_fine() -> None:
    base, other = randn(6, 8), randn(6, 8, seed=1)
    expected = 0.5 * base + 0.5 * other
    # Columns that lie between each other, and a target that is its own source.
    ops.ema_update_([base[:, ::2], base[:, 1::2]], [other[:, ::2], other[:, 1::2]], 0.5)
    torch.testing.assert_close(base, expected)
    ops.ema_update_([base[:, :4]], [base[:, 4:]], 0.5)
    ops.ema_update_([base, other], [base, other], 0.5)
    queue, pointer = randn(5, 3), torch.tensor([1])
    rows = queue[:3].clone()
    ops.enqueue_(queue, pointer, queue[:3], normalize=False)
    assert torch.equal(queue[1:4], rows)


def test_empty_tensors_have_dtypes_too() -> None:
    empty = torch.empty(0, **int64)
    for targets, sources in (([empty], [torch.empty(0)]), ([torch.empty(0)], [empty])):
        with pytest.raises(RuntimeError, match="must be float32, bfloat16 or float16"):
            native._ema_update_(targets, sources, 0.5)
        with pytest.raises(TypeError, match=r"\[0\] must be float32.*got int64"):
            ops.ema_update_(targets, sources, 0.5)
    with pytest.raises(RuntimeError, match="keys must be float32"):
        native._enqueue_(
            torch.ones(4, 3), torch.zeros(1, **int64), torch.empty(0, 3).double(), None, True
        )


def test_the_native_writers_guard_their_memory() -> None:
    queue, keys = torch.ones(5, 8), torch.zeros(2, 8)
    for pointer, rows, filled in (
        (5, keys, None),
        (-1, keys, None),
        (0, torch.zeros(2, 7), None),
        (0, keys, torch.tensor(-5)),
        (0, keys, torch.tensor(6)),
    ):
        with pytest.raises(RuntimeError):
            native._enqueue_(queue, torch.tensor([pointer]), rows, filled, True)
    with pytest.raises(RuntimeError, match="several elements in one place"):
        wide = torch.ones(20).as_strided((5, 4), (2, 1))
        native._enqueue_(wide, torch.tensor([0]), torch.zeros(2, 4), None, True)
    assert (queue == 1.0).all()
    target = torch.ones(3)
    for sources in ([], [torch.zeros(4)], [torch.zeros(3).double()]):
        with pytest.raises(RuntimeError):
            native._ema_update_([target], sources, 0.5)
    for momentum in (7.0, -0.1, math.nan):
        with pytest.raises(RuntimeError, match="momentum must lie"):
            native._ema_update_([target], [torch.zeros(3)], momentum)
        with pytest.raises(RuntimeError, match="momentum must lie"):
            scheduled = torch.tensor(momentum, dtype=torch.float64)
            native._ema_update_([target], [torch.zeros(3)], 0.0, scheduled)
    assert (target == 1.0).all()
    with pytest.raises(RuntimeError):
        native._dense_match(torch.ones(1, 2, 3), torch.ones(1, 3, 3), False)
    with pytest.raises(RuntimeError):
        native._dense_match(torch.ones(1, 2, 3), torch.ones(1, 2, 0), False)


@pytest.mark.parametrize("value", [-5, 6])
def test_a_compiled_enqueue_looks_at_filled(value: int) -> None:
    """While torch.compile traces there are no values to look at; the native op looks."""
    torch._dynamo.reset()
    compiled = torch.compile(ops.enqueue_, fullgraph=True, backend="aot_eager")
    queue, pointer, filled = torch.zeros(5, 3), torch.tensor([0]), torch.tensor(value)
    with pytest.raises(RuntimeError, match=rf"filled must lie in \[0, 5\], got {value}"):
        compiled(queue, pointer, torch.ones(2, 3), filled=filled)
    assert not queue.any() and filled == value
    torch._dynamo.reset()


def test_a_compiled_ema_update_looks_at_its_momentum() -> None:
    torch._dynamo.reset()
    target = torch.ones(3)
    compiled = torch.compile(
        lambda a, b, m: ops.ema_update_([a], [b], m), fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(RuntimeError, match=r"momentum must lie in \[0, 1\], got 7"):
        compiled(target, torch.zeros(3), torch.tensor(7.0))
    assert (target == 1.0).all()
    compiled(target, torch.zeros(3), torch.tensor(0.5))
    assert (target == 0.5).all()
    torch._dynamo.reset()


def test_inference_tensors_are_written_inside_and_outside_of_inference_mode() -> None:
    with torch.inference_mode():
        queue, target = torch.zeros(4, 3), torch.zeros(3)
        ops.ema_update_([target], [torch.ones(3)], 0.5)
    ops.enqueue_(queue, torch.tensor([0]), torch.ones(2, 3), normalize=False)
    ops.ema_update_([target], [torch.ones(3)], 0.5)
    assert (queue[:2] == 1.0).all() and (target == 0.75).all()


def test_two_modules() -> None:
    key, query = nn.Linear(3, 2), nn.Linear(3, 2)
    expected = [0.5 * (a + b) for a, b in zip(key.parameters(), query.parameters(), strict=True)]
    ops.ema_update_(key, query, 0.5)
    for parameter, mean in zip(key.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.data, mean.data)
    with pytest.raises(ValueError, match=r"ema_update_: .*lacks \['bias'\]"):
        ops.ema_update_(key, nn.Linear(3, 2, bias=False), 0.5)


views = st.integers(0, 4).flatmap(
    lambda dims: st.tuples(
        st.lists(st.integers(0, 4), min_size=dims, max_size=dims),
        st.lists(st.integers(0, 9), min_size=dims, max_size=dims),
        st.integers(0, 40),
        st.sampled_from([torch.float32, torch.bfloat16]),
    )
)
View = tuple[list[int], list[int], int, torch.dtype]


def view_of(memory: Tensor, view: View) -> Tensor:
    shape, strides, offset, dtype = view
    return memory.view(dtype).as_strided(shape, strides, offset)


def places(view: View) -> list[range]:
    """The bytes of every element."""
    shape, strides, offset, dtype = view
    size = dtype.itemsize
    firsts = [
        size * (offset + sum(i * s for i, s in zip(index, strides, strict=True)))
        for index in product(*(range(n) for n in shape))
    ]
    return [range(first, first + size) for first in firsts]


def test_overlaps_are_found_and_nothing_else() -> None:
    """One target, its source and a second source, anywhere in one memory."""
    seen = set()

    @quick
    @given(views, views, st.booleans())
    def check(target: View, source: View, own: bool) -> None:
        source = target if own else (target[0], *source[1:])
        if len(source[1]) < len(source[0]):
            source = (source[0], source[1] + [1] * len(source[0]), *source[2:])
        source = (source[0], source[1][: len(source[0])], *source[2:])
        memory = torch.arange(400, dtype=torch.float32)
        before = memory.clone()
        written = places(target)
        distinct = {byte for place in written for byte in place}
        alone = len(distinct) == sum(len(place) for place in written)
        apart = source == target or not any(b in distinct for p in places(source) for b in p)
        seen.add((alone, apart))
        targets, sources = [view_of(memory, target)], [view_of(memory, source)]
        if alone and apart:
            expected = (0.5 * targets[0].double() + 0.5 * sources[0].double()).to(target[3])
            ops.ema_update_(targets, sources, 0.5)
            torch.testing.assert_close(targets[0], expected, equal_nan=True)
            untouched = torch.ones(1600, dtype=torch.bool)
            untouched[list(distinct)] = False
            same = memory.view(torch.uint8) == before.view(torch.uint8)
            assert same[untouched].all()
        else:
            with pytest.raises((ValueError, RuntimeError), match="place of its own|share memory"):
                ops.ema_update_(targets, sources, 0.5)
            with pytest.raises(RuntimeError, match="in one place|share memory"):
                native._ema_update_(targets, sources, 0.5)
            assert_same_bits([memory], [before])

    check()
    assert len(seen) == 4  # every combination was drawn
