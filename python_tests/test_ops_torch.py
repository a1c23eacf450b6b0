"""The ops as torch's citizens: opcheck, autograd, compile, autocast, determinism."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_cases import ISAS, QUEUE_DTYPES, one_thread, randn, unit  # noqa: F401
from torch import Tensor

from densecl_ext import ops, reference

namespace = torch.ops.densecl_ext


def _rows(dtype: torch.dtype = torch.float32, *, grad: bool = True, m: int = 5, d: int = 8) -> list:
    query, positive = randn(m, d).to(dtype), randn(m, d, seed=1)
    return [query.requires_grad_(grad), positive.requires_grad_(grad), unit(randn(9, d, seed=2))]


def _grids(*, grad: bool = True) -> list:
    return [
        randn(2, 8, 3, 2).requires_grad_(grad),
        randn(2, 8, 5, seed=1).requires_grad_(grad),
        torch.tensor([[0, 1, -1, 4, 4, 2], [3, 3, 3, 0, -1, -1]]),
        unit(randn(9, 8, seed=2)),
    ]


def _native_info_nce(
    dtype: torch.dtype, *, match: bool, wanted: tuple[bool, bool], filled: int | None = None
) -> tuple:
    query = randn(2, 8, 6).to(dtype).requires_grad_(wanted[0])
    positive = randn(2, 8, 5 if match else 6, seed=1).requires_grad_(wanted[1])
    queue = unit(randn(9, 8, seed=2)).to(dtype)
    count = None if filled is None else torch.tensor(filled)
    return (query, positive, _grids()[2] if match else None, queue, count, 0.2, True, *wanted)


def _native_joint_info_nce() -> tuple:
    rows = _native_info_nce(torch.float32, match=False, wanted=(True, False), filled=5)
    grids = _native_info_nce(torch.float32, match=True, wanted=(True, True))
    return (*rows[:2], *rows[3:5], *grids[:5], 0.2, True, True, False, True, True)


OPCHECK: dict[str, Callable[[], tuple[Any, tuple, dict[str, Any]]]] = {
    "info_nce": lambda: (namespace.info_nce, tuple(_rows()), {}),
    "info_nce-options": lambda: (
        namespace.info_nce,
        tuple(_rows(torch.bfloat16)),
        {
            "temperature": 0.1,
            "normalize": False,
            "filled": torch.tensor(4),
            "row_weight": torch.rand(5),
            "reduction": "sum",
        },
    ),
    "info_nce-none": lambda: (namespace.info_nce, tuple(_rows(grad=False)), {"reduction": "none"}),
    "info_nce-transposed": lambda: (
        namespace.info_nce,
        (randn(8, 5).T, randn(8, 5, seed=1).T, randn(8, 9).T),
        {},
    ),
    "dense_info_nce": lambda: (namespace.dense_info_nce, tuple(_grids()), {}),
    "dense_info_nce-options": lambda: (
        namespace.dense_info_nce,
        tuple(_grids()),
        {"filled": torch.tensor(4), "row_weight": torch.rand(2, 6), "reduction": "none"},
    ),
    "joint_info_nce": lambda: (namespace.joint_info_nce, (*_rows(), *_grids()), {}),
    "info_nce.tensor_temperature": lambda: (
        namespace.info_nce.tensor_temperature,
        tuple(_rows()),
        {"temperature": torch.tensor(0.3, requires_grad=True)},
    ),
    "dense_info_nce.tensor_temperature": lambda: (
        namespace.dense_info_nce.tensor_temperature,
        tuple(_grids()),
        {"temperature": torch.tensor(0.3, requires_grad=True), "filled": torch.tensor(4)},
    ),
    "joint_info_nce.tensor_temperature": lambda: (
        namespace.joint_info_nce.tensor_temperature,
        (*_rows(), *_grids()),
        {"temperature": torch.tensor([0.3])},
    ),
    "dense_match": lambda: (namespace.dense_match, (randn(2, 8, 3, 2), randn(2, 8, 5)), {}),
    "dense_match-mutual": lambda: (
        namespace.dense_match,
        (randn(2, 8, 3).requires_grad_(), randn(2, 8, 5).half()),
        {"mutual": True},
    ),
    "ema_update_": lambda: (
        namespace.ema_update_,
        ([randn(3), randn(2, 2).bfloat16()], [randn(3, seed=1), randn(2, 2, seed=1)], 0.9),
        {},
    ),
    "ema_update_.tensor_momentum": lambda: (
        namespace.ema_update_.tensor_momentum,
        ([randn(3), randn(2, 2)], [randn(3, seed=1), randn(2, 2, seed=1)], torch.tensor(0.9)),
        {},
    ),
    "enqueue_": lambda: (
        namespace.enqueue_,
        (randn(5, 8), torch.tensor([4]), randn(3, 8)),
        {"filled": torch.tensor(2)},
    ),
    "enqueue_-plain": lambda: (
        namespace.enqueue_,
        (randn(5, 8).half(), torch.tensor([0]), randn(7, 8).bfloat16()),
        {"normalize": False},
    ),
    "_info_nce": lambda: (
        namespace._info_nce,
        _native_info_nce(torch.float32, match=False, wanted=(True, True)),
        {},
    ),
    "_info_nce-match": lambda: (
        namespace._info_nce,
        _native_info_nce(torch.bfloat16, match=True, wanted=(True, True), filled=3),
        {},
    ),
    "_info_nce-query-only": lambda: (
        namespace._info_nce,
        _native_info_nce(torch.float16, match=True, wanted=(True, False)),
        {},
    ),
    "_info_nce-no-gradient": lambda: (
        namespace._info_nce,
        _native_info_nce(torch.float32, match=False, wanted=(False, False), filled=9),
        {},
    ),
    "_joint_info_nce": lambda: (namespace._joint_info_nce, _native_joint_info_nce(), {}),
    "_key_gradient": lambda: (namespace._key_gradient, (randn(2, 6, 8), _grids()[2], 5), {}),
    "_dense_match": lambda: (namespace._dense_match, (randn(2, 8, 3), randn(2, 8, 5), False), {}),
    "_dense_match-mutual": lambda: (
        namespace._dense_match,
        (randn(2, 8, 3).half(), randn(2, 5, 8).mT, True),
        {},
    ),
    "_ema_update_": lambda: (
        namespace._ema_update_,
        ([randn(3), randn(2, 2).T], [randn(3, seed=1).half(), randn(2, 2, seed=1)], 0.5),
        {},
    ),
    "_ema_update_-tensor": lambda: (
        namespace._ema_update_,
        ([randn(3)], [randn(3, seed=1)], 0.0, torch.tensor(0.9, dtype=torch.float64)),
        {},
    ),
    "_enqueue_": lambda: (
        namespace._enqueue_,
        (randn(5, 8), torch.tensor([4]), randn(3, 8), torch.tensor(2), True),
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OPCHECK)
def test_opcheck(case: str) -> None:
    """Schema (what is mutated, what aliases), autograd's registration, fake kernel, AOT tracing."""
    op, arguments, options = OPCHECK[case]()
    overload = op if isinstance(op, torch._ops.OpOverload) else op.default
    torch.library.opcheck(overload, arguments, options)


def test_every_op_is_checked() -> None:
    listed = {
        name.split("::")[1]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("densecl_ext::")
    }
    listed -= {"_split_batch_norm"}  # on a GPU only, where test_batchnorm.py holds it
    assert listed == {case.split("-")[0] for case in OPCHECK}


def test_torch_ops_and_the_functions_are_the_same() -> None:
    rows, grids = _rows(grad=False), _grids(grad=False)
    options = {"filled": torch.tensor(4), "temperature": 0.1}
    assert torch.equal(namespace.info_nce(*rows, **options), ops.info_nce(*rows, **options))
    assert torch.equal(namespace.dense_info_nce(*grids), ops.dense_info_nce(*grids))
    assert torch.equal(
        namespace.dense_match(*grids[:2], mutual=True), ops.dense_match(*grids[:2], mutual=True)
    )
    with pytest.raises(ValueError, match="info_nce: temperature"):
        namespace.info_nce(*rows, temperature=0.0)
    query = rows[0].clone().requires_grad_()
    namespace.info_nce(query, *rows[1:]).backward()
    assert query.grad.any()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("normalize", [True, False])
def test_gradcheck_of_the_reference(normalize: bool) -> None:
    """The truth's own gradients, by finite differences in float64."""
    query, positive, queue = (rows.detach().double() for rows in _rows(m=3, d=5))
    query.requires_grad_()
    positive.requires_grad_()
    weight = torch.rand(3, dtype=torch.float64, requires_grad=True)

    def info_nce(q: Tensor, p: Tensor, w: Tensor) -> Tensor:
        return reference.info_nce(q, p, queue, normalize=normalize, row_weight=w, filled=7)

    assert torch.autograd.gradcheck(info_nce, (query, positive, weight))
    grids = [t.detach().double().requires_grad_() for t in _grids()[:2]]
    match, queue = _grids()[2], _grids()[3].double()

    def dense(q: Tensor, k: Tensor) -> Tensor:
        return reference.dense_info_nce(q, k, match, queue, normalize=normalize)

    assert torch.autograd.gradcheck(dense, tuple(grids))


def test_finite_differences_of_the_native_loss() -> None:
    """No reference in between: the loss along a direction, in float32 with a wide step."""
    query, positive, queue = _rows(m=7, d=12)
    direction = randn(7, 12, seed=5)
    loss = ops.info_nce(query, positive, queue, temperature=0.5, reduction="sum")
    gradient = torch.autograd.grad(loss, query)[0]
    step = 5e-3

    def at(sign: float) -> float:
        moved = query.detach() + sign * step * direction
        losses = ops.info_nce(moved, positive, queue, temperature=0.5, reduction="none")
        return float(losses.double().sum())

    slope = (at(1.0) - at(-1.0)) / (2 * step)
    assert slope == pytest.approx(float((gradient * direction).sum()), rel=2e-3)


@pytest.mark.parametrize("query_dtype", QUEUE_DTYPES, ids=str)
def test_gradient_dtypes_equal_input_dtypes(query_dtype: torch.dtype) -> None:
    query, positive, queue = _rows(query_dtype)
    loss = ops.info_nce(query, positive, queue)
    loss.backward()
    assert loss.dtype == torch.float32
    assert query.grad.dtype == query_dtype and positive.grad.dtype == torch.float32


def test_autocast_keeps_float32() -> None:
    query, positive, queue = _rows()
    expected = ops.info_nce(query, positive, queue)
    expected_grad = torch.autograd.grad(expected, query)[0]
    grids = _grids()
    with torch.autocast("cpu", torch.bfloat16):
        loss = ops.info_nce(query, positive, queue)
        dense = ops.dense_info_nce(*grids)
        match = ops.dense_match(grids[0], grids[1])
    loss.backward()
    dense.backward()
    assert loss.dtype == dense.dtype == torch.float32
    assert torch.equal(loss, expected) and torch.equal(query.grad, expected_grad)
    assert grids[0].grad.dtype == torch.float32
    assert torch.equal(match, ops.dense_match(grids[0], grids[1]))


def test_autocast_features_reach_the_loss() -> None:
    """bfloat16 out of a layer under autocast: float32 loss, float32 weight gradient."""
    layer = torch.nn.Linear(6, 8, bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        features = layer(randn(5, 6))
        assert features.dtype == torch.bfloat16
        loss = ops.info_nce(features, randn(5, 8, seed=1), unit(randn(9, 8, seed=2)))
    loss.backward()
    assert loss.dtype == torch.float32 and layer.weight.grad.dtype == torch.float32
    assert layer.weight.grad.any()


@pytest.mark.parametrize("op", ["info_nce", "dense_info_nce"])
def test_second_derivatives_are_refused(op: str) -> None:
    arguments = _rows() if op == "info_nce" else _grids()
    loss = getattr(ops, op)(*arguments)
    with pytest.raises(RuntimeError, match="no second derivative.*densecl_ext.reference"):
        torch.autograd.grad(loss, arguments[0], create_graph=True)


def test_backward_twice_through_one_graph() -> None:
    query, positive, queue = _rows()
    loss = ops.info_nce(query, positive, queue)
    first = torch.autograd.grad(loss, query, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, query)[0], first)


def test_gradients_accumulate_over_uses() -> None:
    query, positive, queue = _rows()
    ops.info_nce(query, positive, queue).backward()
    once = query.grad.clone()
    (3.0 * ops.info_nce(query, positive, queue)).backward()
    torch.testing.assert_close(query.grad, 4.0 * once)


def test_query_as_its_own_positive() -> None:
    """Both gradients reach the one tensor."""
    query, _, queue = _rows()
    ops.info_nce(query, query, queue, normalize=False).backward()
    exact = query.detach().double().requires_grad_()
    reference.info_nce(exact, exact, queue.double(), normalize=False).backward()
    torch.testing.assert_close(query.grad.double(), exact.grad, atol=1e-6, rtol=1e-5)


def test_no_grad_and_inference_mode() -> None:
    query, positive, queue = _rows()
    expected = ops.info_nce(query, positive, queue)
    with torch.no_grad():
        loss = ops.info_nce(query, positive, queue)
    assert not loss.requires_grad and torch.equal(loss, expected)
    with torch.inference_mode():
        assert torch.equal(ops.info_nce(query, positive, queue), expected)
        assert torch.equal(ops.dense_info_nce(*_grids()), ops.dense_info_nce(*_grids(grad=False)))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(use_reentrant: bool) -> None:
    """Recomputed in the backward pass: the same loss, the same gradients."""
    query, positive, queue = _rows()
    expected = torch.autograd.grad(ops.info_nce(query, positive, queue), [query, positive])
    loss = torch.utils.checkpoint.checkpoint(
        ops.info_nce, query, positive, queue, use_reentrant=use_reentrant
    )
    loss.backward()
    assert torch.equal(query.grad, expected[0]) and torch.equal(positive.grad, expected[1])


def _step(
    query_grid: Tensor,
    key_grid: Tensor,
    queue: Tensor,
    pointer: Tensor,
    filled: Tensor,
    key_weight: Tensor,
    weight: Tensor,
) -> Tensor:
    """Every op once, as a training step calls them."""
    match = ops.dense_match(query_grid, key_grid, mutual=True)
    loss = ops.dense_info_nce(query_grid, key_grid, match, queue, filled=filled)
    query, key = query_grid.mean(2), key_grid.mean(2)
    loss = loss + ops.info_nce(query, key, queue, filled=filled, temperature=0.1)
    ops.ema_update_([key_weight], [weight], 0.9)
    ops.enqueue_(queue, pointer, key.detach(), filled=filled)
    return loss


def _state(n: int, s: int) -> list[Tensor]:
    return [
        randn(n, 8, s).requires_grad_(),
        randn(n, 8, s, seed=1).requires_grad_(),
        unit(randn(10, 8, seed=2)),
        torch.tensor([9]),
        torch.tensor(6),
        randn(3, 4, seed=3),
        randn(3, 4, seed=4),
    ]


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_a_whole_step(dynamic: bool) -> None:
    """One graph, forward and backward, losses, gradients and buffers as in eager mode."""
    torch._dynamo.reset()
    compiled = torch.compile(_step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n, s in ((2, 5), (3, 7), (4, 6)) if dynamic else ((2, 5),):
        eager_state, compiled_state = _state(n, s), _state(n, s)
        for _ in range(2):
            eager, traced = _step(*eager_state), compiled(*compiled_state)
            eager.backward()
            traced.backward()
            assert torch.equal(traced, eager)
        for a, b in zip(compiled_state, eager_state, strict=True):
            assert torch.equal(a, b)
            if a.requires_grad:
                assert a.grad.any() and torch.equal(a.grad, b.grad)
    torch._dynamo.reset()


def test_compile_with_int_filled_and_reductions() -> None:
    def loss(query: Tensor, positive: Tensor, queue: Tensor, weight: Tensor) -> Tensor:
        each = ops.info_nce(query, positive, queue, filled=4, reduction="none")
        return each.sum() + ops.info_nce(query, positive, queue, row_weight=weight)

    torch._dynamo.reset()
    query, positive, queue = _rows()
    weight = torch.rand(5)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, got = loss(query, positive, queue, weight), compiled(query, positive, queue, weight)
    assert torch.equal(got, expected)
    torch.testing.assert_close(
        torch.autograd.grad(got, query)[0], torch.autograd.grad(expected, query)[0]
    )
    torch._dynamo.reset()


def test_fake_tensors_carry_shapes_and_dtypes() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        query, queue = torch.empty(4, 8, dtype=torch.bfloat16), torch.empty(9, 8)
        loss = ops.info_nce(query, query, queue, reduction="none")
        assert loss.shape == (4,) and loss.dtype == torch.float32
        match = ops.dense_match(torch.empty(2, 8, 3, 3), torch.empty(2, 8, 5))
        assert match.shape == (2, 9) and match.dtype == torch.int64
        grid = torch.empty(2, 8, 9)
        assert ops.dense_info_nce(grid, grid, match, queue).shape == ()
        ops.enqueue_(queue, torch.zeros(1, dtype=torch.int64), torch.empty(3, 8))
        ops.ema_update_([queue], [torch.empty(9, 8)], 0.5)


def test_meta_tensors_carry_shapes() -> None:
    query = torch.empty(4, 8, device="meta", requires_grad=True)
    queue = torch.empty(9, 8, device="meta")
    loss = ops.info_nce(query, query, queue)
    loss.backward()
    assert loss.shape == () and query.grad.shape == (4, 8)
    assert ops.dense_match(query.unsqueeze(2), query.unsqueeze(2)).shape == (4, 1)


def _all_results(seed: int) -> list[Tensor]:
    """Every op at a size that several threads share."""
    query, positive = randn(700, 40, seed=seed), randn(700, 40, seed=seed + 1)
    queue = unit(randn(3000, 40, seed=seed + 2))
    results = []
    for dtype in QUEUE_DTYPES:
        q, p = query.clone().requires_grad_(), positive.clone().requires_grad_()
        loss = ops.info_nce(q, p, queue.to(dtype), reduction="none")
        loss.sum().backward()
        results += [loss.detach(), q.grad, p.grad]
    grid_q, grid_k = query.view(10, 40, 70), positive.view(10, 40, 70)
    match = ops.dense_match(grid_q, grid_k, mutual=True)
    q, k = grid_q.clone().requires_grad_(), grid_k.clone().requires_grad_()
    ops.dense_info_nce(q, k, ops.dense_match(grid_q, grid_k), queue).backward()
    results += [match, q.grad, k.grad]
    targets = [randn(100_000), randn(7), randn(33, 50).bfloat16()]
    ops.ema_update_(targets, [randn(100_000, seed=1), randn(7, seed=1), randn(33, 50)], 0.9)
    pointer = torch.tensor([2990])
    ops.enqueue_(queue, pointer, query)
    return [*results, *targets, queue, pointer]


@pytest.mark.parametrize("isa", ISAS)
def test_the_same_bits_at_every_call_and_number_of_threads(
    isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DENSECL_CPU_ISA", isa)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = _all_results(0)
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            got = _all_results(0)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    finally:
        torch.set_num_threads(threads)
