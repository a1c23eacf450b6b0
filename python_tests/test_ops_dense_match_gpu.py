"""What only a GPU's dense_match can do or get wrong: its plan, layouts, streams, graphs, waiting.

That its matches are right is tested with every other backend's, in test_ops_dense_match.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from op_cases import QUEUE_DTYPES, assert_best, randn
from torch import Tensor

from densecl_ext import _host, ops


def test_gpu_plan_covers_everything_in_little_memory() -> None:
    for images in (0, 1, 7, 256, 4096):
        for features in (0, 1, 63, 64, 2048):
            for queries in (0, 1, 49, 65, 784):
                for keys in (1, 49, 57, 784):
                    plan = _host.dense_match_cuda_plan(images, features, queries, keys, True)
                    assert 64 * (plan["query_tiles"] - 1) < queries <= 64 * plan["query_tiles"]
                    assert 56 * (plan["key_tiles"] - 1) < keys <= 56 * plan["key_tiles"]
                    chunks, slices = plan["feature_chunks"], plan["feature_slices"]
                    assert 64 * (chunks - 1) < features <= 64 * chunks
                    assert max(slices, 1) * plan["slice_chunks"] >= chunks
                    assert (slices - 1) * plan["slice_chunks"] < chunks or chunks == 0
                    assert plan["workspace_bytes"] < 40e6
                    assert (plan["workspace_bytes"] > 0) == (slices > 0)
    # The model's batch: one launch, no memory; few images: slices fill the chip.
    assert _host.dense_match_cuda_plan(256, 2048, 49, 49)["feature_slices"] == 0
    assert _host.dense_match_cuda_plan(8, 2048, 49, 49)["feature_slices"] > 4
    with pytest.raises(ValueError, match="key_positions in"):
        _host.dense_match_cuda_plan(1, 1, 1, 0)


def _strided(grid: Tensor) -> dict[str, Tensor]:
    """The same grid on the GPU in other layouts; NaN lies in the gaps."""
    n, c, h, w = grid.shape
    wide = torch.full((n, c + 2, 2 * h, w + 3), math.nan, dtype=grid.dtype, device="cuda")
    sliced = wide[:, 1:-1, ::2, 2:-1]
    sliced.copy_(grid)
    flat = torch.full((grid.numel() + 1,), math.nan, dtype=grid.dtype, device="cuda")
    flat[1:] = grid.flatten()
    return {
        "contiguous": grid.cuda(),
        "channels_last": grid.cuda().contiguous(memory_format=torch.channels_last),
        "sliced": sliced,
        "transposed": grid.cuda().transpose(0, 3).contiguous().transpose(0, 3),
        "offset": flat[1:].view(n, c, h, w),
    }


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", QUEUE_DTYPES, ids=str)
@pytest.mark.parametrize("side", [6, 7, 8, 9])
def test_gpu_any_layout_of_either_side(side: int, dtype: torch.dtype) -> None:
    query, key = randn(3, 70, side, side).to(dtype), randn(3, 70, 7, 7, seed=1).to(dtype)
    for query_layout, strided_query in _strided(query).items():
        for key_layout, strided_key in _strided(key).items():
            match = ops.dense_match(strided_query, strided_key).cpu()
            assert_best(query, key, match)
            mutual = ops.dense_match(strided_query, strided_key, mutual=True).cpu()
            kept = mutual >= 0
            assert torch.equal(mutual[kept], match[kept]), (query_layout, key_layout)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", QUEUE_DTYPES, ids=str)
@pytest.mark.parametrize("images", [2, 256])
def test_gpu_takes_the_cpus_matches(images: int, dtype: torch.dtype) -> None:
    """At the model's size, in slices and in one launch; noisy copies leave no near-ties."""
    query = randn(images, 2048, 49)
    key = (query[:, :, torch.randperm(49)] + 0.5 * randn(images, 2048, 49, seed=1)).to(dtype)
    query = query.to(dtype)
    for mutual in (False, True):
        got = ops.dense_match(query.cuda(), key.cuda(), mutual=mutual)
        assert torch.equal(got.cpu(), ops.dense_match(query, key, mutual=mutual))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", QUEUE_DTYPES, ids=str)
def test_gpu_repeats_its_bits_without_waiting(dtype: torch.dtype) -> None:
    """Again and on another stream: in slices, in whole blocks, mutual by one pass and by two."""
    grids = [
        (randn(*query).to(dtype).cuda(), randn(*key, seed=1).to(dtype).cuda())
        for query, key in (((4, 512, 49), (4, 512, 49)), ((300, 64, 49), (300, 64, 80)))
    ]

    def once() -> list[Tensor]:
        return [ops.dense_match(*pair, mutual=mutual) for pair in grids for mutual in (False, True)]

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
@pytest.mark.parametrize("mutual", [False, True])
def test_gpu_graph_follows_its_inputs(mutual: bool) -> None:
    """A captured call matches what the tensors hold when it is replayed."""
    query, key = randn(4, 512, 49).cuda(), randn(4, 512, 80, seed=1).cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ops.dense_match(query, key, mutual=mutual)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        match = ops.dense_match(query, key, mutual=mutual)
    for seed in range(3):
        query.copy_(randn(4, 512, 49, seed=seed))
        graph.replay()
        assert torch.equal(match, ops.dense_match(query, key, mutual=mutual))
