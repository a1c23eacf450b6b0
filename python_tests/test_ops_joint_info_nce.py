"""joint_info_nce: bit for bit the two losses that it computes together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_cases import (
    BACKENDS,
    QUEUE_DTYPES,
    one_thread,  # noqa: F401
    randn,
    unit,
    use_backend,
)
from torch import Tensor

from densecl_ext import DenseCLLoss, KeyQueue, ops, reference

pytestmark = pytest.mark.usefixtures("one_thread")


def _step(
    queue_dtype: torch.dtype = torch.float32, device: str = "cpu", *, dim: int = 24
) -> list[Tensor]:
    """Arguments of joint_info_nce; every input asks for a gradient."""
    grid = randn(3, dim, 4, 5, seed=1)
    match = torch.randint(-1, 12, (3, 20), generator=torch.Generator().manual_seed(2))
    arguments = [
        randn(3, dim),
        randn(3, dim, seed=3),
        unit(randn(200, dim, seed=4)).to(queue_dtype),
        grid,
        grid[:, :, :3, :4] + randn(3, dim, 3, 4, seed=5),
        match,
        unit(randn(150, dim, seed=6)).to(queue_dtype),
    ]
    arguments = [tensor.to(device) for tensor in arguments]
    for i in (0, 1, 3, 4):
        arguments[i] = arguments[i].detach().requires_grad_()
    return arguments


def _leaves(arguments: list[Tensor]) -> list[Tensor]:
    return [tensor for tensor in arguments if tensor.requires_grad]


def _apart(arguments: list[Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    dense = {
        name: options.pop(f"dense_{name}")
        for name in ("filled", "row_weight")
        if f"dense_{name}" in options
    }
    shared = {k: v for k, v in options.items() if k not in ("filled", "row_weight")}
    return (
        ops.info_nce(*arguments[:3], **options),
        ops.dense_info_nce(*arguments[3:], **shared, **dense),
    )


def _results(losses: tuple[Tensor, Tensor], arguments: list[Tensor]) -> list[Tensor]:
    """Both losses and all gradients of a sum in which neither has weight 1."""
    total = 0.3 * losses[0].sum() + 0.7 * losses[1].sum()
    leaves = _leaves(arguments)
    gradients = torch.autograd.grad(total, leaves) if leaves else ()
    return [*(loss.detach() for loss in losses), *gradients]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("queue_dtype", QUEUE_DTYPES, ids=str)
@pytest.mark.parametrize("options", [
    {},
    {"temperature": 0.07, "normalize": False, "reduction": "sum", "filled": 130},
    {"reduction": "none", "filled": torch.tensor(77), "dense_filled": torch.tensor(0)},
    {"row_weight": torch.rand(3), "dense_row_weight": torch.rand(3, 20), "dense_filled": 9},
], ids=["plain", "sum", "none", "weighted"])  # fmt: skip
def test_the_same_bits_as_the_two_ops(
    options: dict[str, Any],
    queue_dtype: torch.dtype,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_backend(backend, monkeypatch)
    device = "cuda" if backend.startswith("cuda") else "cpu"
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    arguments = _step(queue_dtype, device)
    together = _results(ops.joint_info_nce(*arguments, **options), arguments)
    apart = _results(_apart(arguments, **options), arguments)
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("queue_dtype", QUEUE_DTYPES, ids=str)
def test_the_same_bits_at_every_call_on_a_gpu(queue_dtype: torch.dtype) -> None:
    """Paper-sized enough for several waves, on two streams, in a graph, and never waiting."""
    arguments = [
        randn(256, 128),
        randn(256, 128, seed=1),
        unit(randn(16384, 128, seed=2)).to(queue_dtype),
        randn(256, 128, 49, seed=3),
        randn(256, 128, 49, seed=4),
        torch.arange(49).flip(0).repeat(256, 1),
        unit(randn(16384, 128, seed=5)).to(queue_dtype),
    ]
    arguments = [tensor.cuda() for tensor in arguments]
    for i in (0, 3):
        arguments[i].requires_grad_()
    expected = _results(_apart(arguments), arguments)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = [_results(ops.joint_info_nce(*arguments), arguments) for _ in range(10)]
        with torch.cuda.stream(stream):
            again += [_results(ops.joint_info_nce(*arguments), arguments) for _ in range(10)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for got in again for a, b in zip(got, expected, strict=True))

    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        captured = ops.joint_info_nce(*arguments)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=False))


def test_against_the_reference_in_float64() -> None:
    arguments = _step()
    got = _results(ops.joint_info_nce(*arguments), arguments)
    double = [t.detach().double() if t.is_floating_point() else t for t in arguments]
    for i in (0, 1, 3, 4):
        double[i].requires_grad_()
    truth = _results(reference.joint_info_nce(*double), double)
    for a, b in zip(got, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kept", [0, 1])
def test_one_of_the_losses_may_go_unused(kept: int) -> None:
    arguments = _step()
    for tensor in (arguments[1], arguments[4]):
        tensor.requires_grad_(False)
    ops.joint_info_nce(*arguments)[kept].backward()
    used, unused = (arguments[0], arguments[3]) if kept == 0 else (arguments[3], arguments[0])
    assert used.grad is not None and used.grad.any()
    assert unused.grad is None or not unused.grad.any()


def test_queues_may_differ_in_everything() -> None:
    arguments = _step()
    other = _step(torch.bfloat16, dim=70)
    mixed = [*arguments[:3], *other[3:]]
    together = _results(ops.joint_info_nce(*mixed), mixed)
    assert all(
        torch.equal(a, b) for a, b in zip(together, _results(_apart(mixed), mixed), strict=True)
    )


def test_errors_carry_the_name_of_the_loss() -> None:
    arguments = _step()
    with pytest.raises(ValueError, match=r"info_nce: queue must be \(K, 24\)"):
        ops.joint_info_nce(*arguments[:2], arguments[2].T, *arguments[3:])
    with pytest.raises(ValueError, match=r"dense_info_nce: match must lie in \[-1, 12\)"):
        ops.joint_info_nce(*arguments[:5], arguments[5] + 5, arguments[6])
    with pytest.raises(RuntimeError, match="no second derivative"):
        losses = ops.joint_info_nce(*arguments)
        torch.autograd.grad(sum(losses), arguments[0], create_graph=True)


def test_autocast_and_compile_change_nothing() -> None:
    arguments = _step(torch.bfloat16)
    expected = _results(ops.joint_info_nce(*arguments), arguments)
    with torch.autocast("cpu", torch.bfloat16):
        losses = ops.joint_info_nce(*arguments)
    assert losses[0].dtype == losses[1].dtype == torch.float32
    compiled = torch.compile(ops.joint_info_nce, fullgraph=True, backend="aot_eager")
    for got in (losses, compiled(*arguments)):
        results = _results(got, arguments)
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_the_loss_module_computes_both_together(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    joint = ops.joint_info_nce
    monkeypatch.setattr(ops, "joint_info_nce", lambda *a, **o: calls.append(1) or joint(*a, **o))
    queues = KeyQueue(64, 24), KeyQueue(64, 24)
    for queue in queues:
        queue.enqueue_(randn(40, 24))
    query, positive, _, query_grid, key_grid, match, _ = _step()
    inputs = (query, positive, query_grid, key_grid, *queues)
    for weight, count in ((0.3, 1), (torch.tensor(0.3), 2), (0.0, 2), (1.0, 2)):
        DenseCLLoss()(*inputs, match=match, loss_lambda=weight)
        assert len(calls) == count
