from __future__ import annotations

import pytest
import torch
from tiny_models import crops
from torch import Tensor

from densecl_ext import reference
from densecl_ext.nn.matching import (
    feature_match,
    geometric_match,
    overlap_weight,
    random_match,
    similarity_weight,
)


def brute_force(
    crop_q: Tensor, crop_k: Tensor, grid: tuple[int, int], key: tuple[int, int]
) -> Tensor:
    """Cell by cell: which key cell, a rectangle of the source image, holds the query's centre."""
    rows = []
    for q, k in zip(crop_q.tolist(), crop_k.tolist(), strict=True):
        found = []
        for r in range(grid[0]):
            for c in range(grid[1]):
                column = grid[1] - 1 - c if q[4] else c
                x = q[0] + (q[2] - q[0]) * (column + 0.5) / grid[1]
                y = q[1] + (q[3] - q[1]) * (r + 0.5) / grid[0]
                cell_w, cell_h = (k[2] - k[0]) / key[1], (k[3] - k[1]) / key[0]
                hit = -1
                for kr in range(key[0]):
                    for kc in range(key[1]):
                        left = k[0] + cell_w * (key[1] - 1 - kc if k[4] else kc)
                        top = k[1] + cell_h * kr
                        if left <= x < left + cell_w and top <= y < top + cell_h:
                            hit = kr * key[1] + kc
                found.append(hit)
        rows.append(found)
    return torch.tensor(rows)


def test_geometric_by_hand() -> None:
    # The key crop is the right half of the query crop: source columns 20..40 of 0..40.
    query = torch.tensor([[0.0, 0.0, 40.0, 40.0, 0.0]])
    key = torch.tensor([[20.0, 0.0, 40.0, 40.0, 0.0]])
    # Query centres lie at x = 10, 30 and y = 10, 30. x = 10 is outside; x = 30 is the border of the
    # key's two columns at 20..30 and 30..40 and belongs to the second.
    assert geometric_match(query, key, (2, 2)).tolist() == [[-1, 1, -1, 3]]
    # Moved left by 5, the key crop has x = 30 at three quarters of its width; mirrored, at one.
    key_shifted = torch.tensor([[15.0, 0.0, 35.0, 40.0, 0.0]])
    assert geometric_match(query, key_shifted, (2, 2)).tolist() == [[-1, 1, -1, 3]]
    key_shifted[0, 4] = 1.0
    assert geometric_match(query, key_shifted, (2, 2)).tolist() == [[-1, 0, -1, 2]]
    # A mirrored query view shows x = 30 in its left column.
    query[0, 4] = 1.0
    assert geometric_match(query, key_shifted, (2, 2)).tolist() == [[0, -1, 2, -1]]
    key_shifted[0, 4] = 0.0
    assert geometric_match(query, key_shifted, (2, 2)).tolist() == [[1, -1, 3, -1]]


@pytest.mark.parametrize("grids", [((7, 7), (7, 7)), ((3, 5), (4, 2)), ((1, 1), (14, 14))])
def test_geometric_against_brute_force(
    grids: tuple[tuple[int, int], tuple[int, int]],
) -> None:
    crop_q, crop_k = crops(24, seed=1), crops(24, seed=2)
    match = geometric_match(crop_q, crop_k, *grids)
    assert torch.equal(match, brute_force(crop_q, crop_k, *grids))
    assert (match < 0).any() and (match >= 0).any()
    assert len({*crop_q[:, 4].tolist()}) == 2


def test_equal_views_match_themselves() -> None:
    crop = crops(16)
    for size in (1, 3, 7, 14):
        own = torch.arange(size * size).expand(16, -1)
        assert torch.equal(geometric_match(crop, crop, (size, size)), own)
    mirrored = crop.clone()
    mirrored[:, 4] = 1.0 - mirrored[:, 4]
    expected = torch.arange(25).view(5, 5).flip(1).reshape(1, 25).expand(16, -1)
    assert torch.equal(geometric_match(crop, mirrored, (5, 5)), expected)


def test_disjoint_or_empty_crops_have_no_match() -> None:
    query = torch.tensor([[0.0, 0.0, 10.0, 10.0, 0.0]])
    for box in ([20.0, 0.0, 30.0, 10.0, 0.0], [5.0, 5.0, 5.0, 5.0, 0.0]):
        assert (geometric_match(query, torch.tensor([box]), (3, 3)) == -1).all()


def test_features_match_without_gradient() -> None:
    torch.manual_seed(0)
    query = torch.randn(3, 8, 4, 4, requires_grad=True)
    key = torch.randn(3, 8, 2, 3)
    for mutual in (False, True):
        match = feature_match(query, key, mutual=mutual)
        assert torch.equal(match, reference.dense_match(query, key, mutual=mutual))
        assert not match.requires_grad


def test_random_is_uniform_and_repeatable() -> None:
    torch.manual_seed(5)
    match = random_match(200, (7, 7), (2, 3))
    assert match.shape == (200, 49) and match.dtype == torch.int64
    shares = torch.bincount(match.flatten(), minlength=6) / match.numel()
    assert (shares - 1 / 6).abs().max() < 0.02
    torch.manual_seed(5)
    assert torch.equal(match, random_match(200, (7, 7), (2, 3)))
    own = [random_match(2, (3, 3), generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*own)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"\(N, 5\)"):
        geometric_match(torch.zeros(2, 4), torch.zeros(2, 4), (3, 3))
    with pytest.raises(ValueError, match=r"\(N, 5\)"):
        geometric_match(torch.zeros(2, 5), torch.zeros(3, 5), (3, 3))
    with pytest.raises(ValueError, match="height, width"):
        geometric_match(torch.zeros(2, 5), torch.zeros(2, 5), (3,))


def test_overlap_weight_is_the_cells_intersection_over_union() -> None:
    crop_q = torch.tensor([[0.0, 0.0, 4.0, 4.0, 0.0], [0.0, 0.0, 4.0, 4.0, 1.0]])
    crop_k = torch.tensor([[1.0, 0.0, 5.0, 4.0, 0.0], [0.0, 0.0, 8.0, 8.0, 0.0]])
    match = torch.tensor([[0, -1, 2, 3], [0, 0, 0, 0]])
    weight = overlap_weight(crop_q, crop_k, match, (2, 2))
    # cells of 2 x 2 pixels: shifted by one pixel they share 2 of 6, those of another row nothing
    expected = torch.tensor([[2 / 6, 0.0, 2 / 6, 2 / 6], [4 / 16, 4 / 16, 4 / 16, 4 / 16]])
    torch.testing.assert_close(weight, expected)
    # mirrored, the first column lies on the right: cells (2, 0)..(4, 2) of the image
    right = overlap_weight(crop_q[1:], crop_q[:1], torch.tensor([[1, 0, 3, 2]]), (2, 2))
    torch.testing.assert_close(right, torch.ones(1, 4))
    other = overlap_weight(crop_q[1:], crop_q[:1], torch.tensor([[0, 1, 2, 3]]), (2, 2))
    torch.testing.assert_close(other, torch.zeros(1, 4))


def test_similarity_weight_is_the_cosine_to_a_power() -> None:
    query, key = torch.randn(2, 5, 3, 3), torch.randn(2, 5, 2, 2)
    match = torch.randint(-1, 4, (2, 9))
    weight = similarity_weight(query, key, match, power=3.0)
    for image in range(2):
        for position in range(9):
            at = int(match[image, position])
            if at < 0:
                assert weight[image, position] == 0
                continue
            a, b = query[image].flatten(1)[:, position], key[image].flatten(1)[:, at]
            cosine = torch.nn.functional.cosine_similarity(a, b, dim=0)
            torch.testing.assert_close(weight[image, position], cosine.clamp(min=0) ** 3)
