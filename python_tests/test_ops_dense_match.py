"""dense_match against float64: the best value within rounding, ties, layouts, bad values."""

from __future__ import annotations

import math

import pytest
import torch
from op_cases import (
    BACKENDS,
    ISAS,
    QUEUE_DTYPES,
    assert_best,
    assert_mutual,
    on_device,
    one_thread,  # noqa: F401
    randn,
    use_backend,
)
from torch import Tensor

from densecl_ext import ops, reference

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.parametrize("backend", BACKENDS),
]

dense_match = on_device(ops.dense_match)


@pytest.fixture(autouse=True)
def chosen_backend(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_backend(backend, monkeypatch)


@pytest.mark.parametrize(
    "shape",
    [  # (N, C, Sq, Sk): one to many positions on both sides of a block of 64, odd channels
        (1, 1, 1, 1),
        (3, 2, 5, 1),
        (2, 3, 1, 7),
        (2, 16, 49, 49),
        (2, 100, 63, 65),
        (1, 128, 64, 64),
        (1, 129, 65, 63),
        (1, 127, 66, 129),
        (1, 257, 100, 200),
        (1, 64, 200, 33),
        (2, 2048, 49, 50),
        (1, 1000, 13, 150),
    ],
    ids=str,
)
def test_sizes(shape: tuple[int, int, int, int]) -> None:
    n, c, sq, sk = shape
    query, key = randn(n, c, sq), randn(n, c, sk, seed=1)
    key[:, :, ::3] += query[:, :, torch.arange(0, sk, 3) % sq]
    assert_best(query, key, dense_match(query, key))
    if c >= 16:
        assert_mutual(query, key, dense_match(query, key, mutual=True))


@pytest.mark.parametrize("key_dtype", QUEUE_DTYPES, ids=str)
@pytest.mark.parametrize("query_dtype", QUEUE_DTYPES, ids=str)
def test_dtypes(query_dtype: torch.dtype, key_dtype: torch.dtype, backend: str) -> None:
    query, key = randn(2, 70, 30).to(query_dtype), randn(2, 70, 90, seed=1).to(key_dtype)
    match = dense_match(query, key)
    assert_best(query, key, match)
    if backend in ISAS:
        # 16-bit features are widened, not computed with: the same bits as their float32 copies.
        assert torch.equal(match, dense_match(query.float(), key.float()))


def test_lengths_do_not_matter() -> None:
    """Keys of very different lengths: the longest is not the most similar."""
    query, key = randn(2, 20, 40), randn(2, 20, 70, seed=1)
    scaled = key * torch.logspace(-6, 6, 70)
    match = dense_match(query, scaled)
    assert_best(query, scaled, match)
    assert_best(query, key, match)
    assert not torch.equal(match, (query.transpose(1, 2) @ scaled).argmax(dim=2))


@pytest.mark.parametrize("scale", [1e-18, 1e-15, 1e-11, 1e-6, 1e6, 1e11, 1e15, 1e18])
def test_scales(scale: float, backend: str) -> None:
    """From 1e-18 to 1e18: beyond, products of float32 vectors leave float32."""
    if backend not in ISAS and scale == 1e-18:
        pytest.skip("the lower parts of a GPU's split products leave float32 below 1e-15")
    query, key = randn(1, 12, 9), randn(1, 12, 80, seed=1)
    assert_best(query, key, dense_match(query * scale, key * scale))
    assert_best(query, key, dense_match(query, key * scale))


@pytest.mark.parametrize("first,second", [(0, 1), (3, 17), (15, 16), (63, 64), (5, 130), (64, 149)])
def test_equal_keys_give_the_lowest_index(first: int, second: int) -> None:
    """Anywhere: within a vector, across vectors and across the blocks of 64."""
    for c in (1, 7, 128, 300):
        twin = randn(1, c, seed=2).abs()
        query = twin.unsqueeze(2) * (1.0 + 0.3 * randn(1, c, 40).clamp(-2, 2))
        key = -randn(1, c, 150, seed=1).abs()
        key[:, :, first] = twin
        for scale in (1.0, 4.0):  # a power of two: the same direction to the last bit
            key[:, :, second] = scale * twin
            assert (dense_match(query, key) == first).all(), c


def test_all_keys_equal() -> None:
    key = randn(2, 50, 1).expand(2, 50, 130)
    assert not dense_match(randn(2, 50, 70, seed=1), key).any()


def test_equal_queries_give_equal_matches() -> None:
    """Wherever they stand among the rows."""
    query, key = randn(1, 60, 1).expand(1, 60, 130), randn(1, 60, 90, seed=1)
    assert len(dense_match(query, key).unique()) == 1


def test_zero_vectors() -> None:
    """Similar to nothing, 0: above what points away, below what points along."""
    query = torch.zeros(1, 4, 3)
    query[0, 0, 1:] = 1.0
    key = torch.zeros(1, 4, 100)
    assert not dense_match(query, key).any()
    key[0, 0] = -1.0
    key[0, :, 70] = 0.0
    assert dense_match(query, key).tolist() == [[0, 70, 70]]
    key[0, 0, 71] = 1e-3
    assert dense_match(query, key).tolist() == [[0, 71, 71]]


def test_no_channels() -> None:
    """No feature at all: every similarity is 0, the first position wins."""
    assert not dense_match(torch.empty(2, 0, 5), torch.empty(2, 0, 70)).any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_key_counts_as_the_highest(bad: float) -> None:
    query, key = randn(2, 30, 20), randn(2, 30, 150, seed=1)
    clean = dense_match(query, key)
    for where in ([7], [64], [100, 140]):
        dirty = key.clone()
        dirty[0, 11, where] = bad
        match = dense_match(query, dirty)
        assert (match[0] == where[0]).all()  # the first of several
        assert torch.equal(match[1], clean[1])
        assert torch.equal(match[0], reference.dense_match(query, dirty)[0])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_query_touches_no_other(bad: float) -> None:
    query, key = randn(1, 30, 70), randn(1, 30, 90, seed=1)
    clean = dense_match(query, key)
    query[0, 3, 66] = bad
    match = dense_match(query, key)
    assert match[0, 66] == 0
    assert torch.equal(match[0, :66], clean[0, :66])
    assert torch.equal(match[0, 67:], clean[0, 67:])
    back = dense_match(query, key, mutual=True)
    assert ((back >= -1) & (back < 90)).all()


def _layouts(grid: Tensor) -> dict[str, Tensor]:
    n, c, h, w = grid.shape
    wide = torch.full((n, c + 2, 2 * h, w + 3), math.nan, dtype=grid.dtype)
    sliced = wide[:, 1:-1, ::2, 2:-1]
    sliced.copy_(grid)
    offset = torch.cat([torch.full((1,), math.nan, dtype=grid.dtype), grid.flatten()])[1:]
    return {
        "channels_last": grid.contiguous(memory_format=torch.channels_last),
        "sliced": sliced,
        "transposed": grid.transpose(0, 3).contiguous().transpose(0, 3),
        "offset": offset.view(n, c, h, w),
    }


@pytest.mark.parametrize("dtype", QUEUE_DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["channels_last", "sliced", "transposed", "offset"])
def test_layouts_give_the_same_match(layout: str, dtype: torch.dtype) -> None:
    query, key = randn(2, 40, 7, 6).to(dtype), randn(2, 40, 9, 8, seed=1).to(dtype)
    for mutual in (False, True):
        expected = dense_match(query, key, mutual=mutual)
        assert expected.shape == (2, 42)
        got = dense_match(_layouts(query)[layout], _layouts(key)[layout], mutual=mutual)
        assert torch.equal(got, expected)


def test_position_axes_are_flattened_in_order() -> None:
    query, key = randn(2, 16, 24), randn(2, 16, 30, seed=1)
    expected = dense_match(query, key)
    got = dense_match(query.view(2, 16, 2, 3, 4), key.view(2, 16, 5, 6))
    assert torch.equal(got, expected)


def test_expanded_images() -> None:
    query, key = randn(3, 16, 10), randn(1, 16, 20, seed=1).expand(3, 16, 20)
    assert torch.equal(dense_match(query, key), dense_match(query, key.contiguous()))


def test_empty() -> None:
    for mutual in (False, True):
        match = dense_match(torch.empty(0, 8, 3), torch.empty(0, 8, 5), mutual=mutual)
        assert match.shape == (0, 3) and match.dtype == torch.int64
        match = dense_match(torch.empty(2, 8, 0), randn(2, 8, 5), mutual=mutual)
        assert match.shape == (2, 0)


def test_mutual_on_ties() -> None:
    """Two equal queries, one key: the lower query keeps it. Two equal keys: the lower key wins."""
    query = torch.tensor([[[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]])  # (1, 2, 3)
    key = torch.tensor([[[0.0, 2.0, 2.0], [1.0, 0.0, 0.0]]])
    assert dense_match(query, key).tolist() == [[1, 1, 0]]
    assert dense_match(query, key, mutual=True).tolist() == [[1, -1, 0]]


def test_mutual_keeps_at_most_one_query_per_key() -> None:
    query, key = randn(3, 8, 150), randn(3, 8, 70, seed=1)
    plain, mutual = (dense_match(query, key, mutual=m) for m in (False, True))
    kept = mutual >= 0
    assert torch.equal(mutual[kept], plain[kept]) and 0 < kept.sum() < kept.numel()
    for image in range(3):
        chosen = mutual[image][kept[image]]
        assert len(chosen.unique()) == len(chosen)
    # Turned round, the mutual pairs are the same pairs.
    back = dense_match(key, query, mutual=True)
    for n, i in kept.nonzero().tolist():
        assert back[n, mutual[n, i]] == i


def test_there_is_no_gradient() -> None:
    query = randn(1, 4, 3).requires_grad_()
    match = dense_match(query, query.detach())
    assert not match.requires_grad and match.tolist() == [[0, 1, 2]]
