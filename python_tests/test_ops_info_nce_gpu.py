"""What only a GPU's info_nce can do or get wrong: streams, graphs, waiting, its plan and limits.

That its numbers are right is tested with every other backend's, in test_ops_info_nce.py.
"""

from __future__ import annotations

import pytest
import torch
from op_cases import QUEUE_DTYPES, randn, unit
from torch import Tensor

from densecl_ext import _host, ops


@pytest.mark.parametrize("sixteen_bit", [True, False])
def test_gpu_plan_covers_the_queue_in_little_memory(sixteen_bit: bool) -> None:
    for rows in (1, 49, 128, 129, 256, 3136, 12544, 50176):
        for length in (0, 1, 127, 129, 1000, 65536, 1 << 20):
            for features in (1, 64, 65, 128, 256):
                plan = _host.info_nce_cuda_plan(rows, length, features, sixteen_bit)
                slices, slice_rows = plan["queue_slices"], plan["slice_rows"]
                assert slices * slice_rows >= length > (slices - 1) * slice_rows or length == 0
                alone = _host.info_nce_cuda_plan(rows, length, features, sixteen_bit, False)
                assert alone["queue_slices"] == slices  # the loss is the same bits
                assert alone["workspace_bytes"] <= plan["workspace_bytes"]
    plan = _host.info_nce_cuda_plan(12544, 65536, 128)
    assert plan["queue_slices"] == 4 and plan["workspace_bytes"] < 30e6  # logits: 3.3 GB
    assert _host.info_nce_cuda_plan(256, 65536, 128)["queue_slices"] == 64
    with pytest.raises(ValueError, match="features must lie in"):
        _host.info_nce_cuda_plan(1, 1, 257)


def _on_gpu(queue_dtype: torch.dtype) -> list[Tensor]:
    query, positive, queue = randn(300, 128), randn(300, 128, seed=1), unit(randn(5000, 128))
    return [query.cuda().requires_grad_(), positive.cuda(), queue.to(queue_dtype).cuda()]


@pytest.mark.gpu
@pytest.mark.parametrize("queue_dtype", QUEUE_DTYPES, ids=str)
def test_gpu_repeats_its_bits_without_waiting(queue_dtype: torch.dtype) -> None:
    """Again and on another stream, with a count that lies on the device."""
    query, positive, queue = _on_gpu(queue_dtype)
    filled = torch.tensor(4321, device="cuda")

    def once() -> list[Tensor]:
        loss = ops.info_nce(query, positive, queue, filled=filled)
        return [loss.detach(), *torch.autograd.grad(loss, query)]

    expected = once()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = [once() for _ in range(20)]
        with torch.cuda.stream(stream):
            again += [once() for _ in range(20)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for got in again for a, b in zip(got, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("queue_dtype", QUEUE_DTYPES, ids=str)
def test_gpu_graph_follows_its_inputs(queue_dtype: torch.dtype) -> None:
    """A captured call computes from what the tensors hold when it is replayed."""
    query, positive, queue = _on_gpu(queue_dtype)
    filled = torch.tensor(100, device="cuda")

    def once() -> Tensor:
        return ops.info_nce(query, positive, queue, filled=filled, reduction="none")

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        once()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = once()
    for count in (0, 1, 4999, 5000):
        filled.fill_(count)
        queue.copy_(queue.flip(0))
        graph.replay()
        assert torch.equal(loss, once())


@pytest.mark.gpu
def test_gpu_says_how_many_features_it_takes() -> None:
    rows = torch.zeros(3, 257, device="cuda")
    with pytest.raises(RuntimeError, match="info_nce: .* at most 256 features, got 257"):
        ops.info_nce(rows, rows, rows)


@pytest.mark.gpu
def test_gpu_says_which_kernels_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DENSECL_CUDA_KERNEL", "fastest")
    rows = torch.zeros(3, 8, device="cuda")
    with pytest.raises(RuntimeError, match="DENSECL_CUDA_KERNEL .* expected portable or sm90"):
        ops.info_nce(rows, rows, rows)
