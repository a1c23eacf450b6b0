"""Which key position is the positive of which query position (DenseCL, section 3.3).

Every function returns int64 (N, prod(Sq)): for every position of the query grid, in row-major
order, the flat index of its key position, or -1 where it has none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from densecl_ext import ops

MATCHINGS = ("backbone", "dense", "geometric", "random")
ROW_WEIGHTS = ("none", "overlap", "similarity")


def feature_match(query_features: Tensor, key_features: Tensor, *, mutual: bool = False) -> Tensor:
    """Match by cosine similarity within each image pair (section 3.3, eq. 3); no gradient.

    With backbone features this is the paper's matching, with the dense head's output its
    ablation (table 6).

    Args:
        query_features: (N, C, *Sq).
        key_features: (N, C, *Sk).
        mutual: -1 where the best match is not mutual.
    """
    return ops.dense_match(query_features.detach(), key_features.detach(), mutual=mutual)


def geometric_match(
    crop_q: Tensor,
    crop_k: Tensor,
    query_grid: Sequence[int],
    key_grid: Sequence[int] | None = None,
) -> Tensor:
    """Match by where the two crops show the same point of the source image.

    The centre of each query cell is carried into the source image, undoing the query view's flip,
    and from there into the key view; the key cell that contains it is the match, -1 where the
    point lies outside the key crop.

    Args:
        crop_q: (N, 5): x0, y0, x1, y1 of the query view's crop box in pixels of the source image
            (continuous coordinates, x to the right, y down) and 1.0 where the view was mirrored
            horizontally after cropping, else 0.0.
        crop_k: (N, 5) of the key view.
        query_grid: (height, width) of the query grid.
        key_grid: (height, width) of the key grid; the query's where None.

    Raises:
        ValueError: crops that are not (N, 5) or of different N, or a grid of other than 2 sizes.
    """
    if crop_q.dim() != 2 or crop_q.shape[1] != 5 or crop_q.shape != crop_k.shape:
        raise ValueError(
            "geometric_match: crop_q and crop_k must both be (N, 5): x0, y0, x1, y1, flip; got "
            f"{tuple(crop_q.shape)} and {tuple(crop_k.shape)}"
        )
    key_grid = query_grid if key_grid is None else key_grid
    if len(query_grid) != 2 or len(key_grid) != 2:
        raise ValueError(
            "geometric_match: query_grid and key_grid must be (height, width), got "
            f"{tuple(query_grid)} and {tuple(key_grid)}"
        )
    height, width = query_grid
    key_height, key_width = key_grid
    # float64: centres that fall on the border of two key cells should not depend on the image size
    from_crop, to_crop = crop_q.double(), crop_k.double()
    column = (torch.arange(width, device=crop_q.device, dtype=torch.float64) + 0.5) / width
    row = (torch.arange(height, device=crop_q.device, dtype=torch.float64) + 0.5) / height

    u = torch.where(from_crop[:, 4:] > 0.5, 1.0 - column, column)  # (N, W) across the crop
    x = from_crop[:, 0:1] + u * (from_crop[:, 2:3] - from_crop[:, 0:1])  # source pixels
    y = from_crop[:, 1:2] + row * (from_crop[:, 3:4] - from_crop[:, 1:2])  # (N, H)

    u = (x - to_crop[:, 0:1]) / (to_crop[:, 2:3] - to_crop[:, 0:1])  # (N, W) across the key crop
    v = (y - to_crop[:, 1:2]) / (to_crop[:, 3:4] - to_crop[:, 1:2])  # (N, H)
    u = torch.where(to_crop[:, 4:] > 0.5, 1.0 - u, u)
    inside = ((v >= 0) & (v <= 1)).unsqueeze(2) & ((u >= 0) & (u <= 1)).unsqueeze(1)  # (N, H, W)
    key_column = (u.nan_to_num().clamp(0, 1) * key_width).long().clamp(max=key_width - 1)
    key_row = (v.nan_to_num().clamp(0, 1) * key_height).long().clamp(max=key_height - 1)
    index = key_row.unsqueeze(2) * key_width + key_column.unsqueeze(1)  # (N, H, W)
    return torch.where(inside, index, -1).flatten(1)


def random_match(
    images: int,
    query_grid: Sequence[int],
    key_grid: Sequence[int] | None = None,
    *,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Match every query position to a uniformly random key position (the ablation of table 6).

    Args:
        images: N.
        query_grid: sizes of the query grid.
        key_grid: sizes of the key grid; the query's where None.
        device: where the result is wanted, and drawn.
        generator: of that device or of the CPU; the device's global one where None.
    """
    key_positions = math.prod(query_grid if key_grid is None else key_grid)
    shape = images, math.prod(query_grid)
    if generator is None:
        return torch.randint(key_positions, shape, device=device)
    match = torch.randint(key_positions, shape, generator=generator, device=generator.device)
    return match.to(device)


@torch.no_grad()
def overlap_weight(
    crop_q: Tensor,
    crop_k: Tensor,
    match: Tensor,
    query_grid: Sequence[int],
    key_grid: Sequence[int] | None = None,
) -> Tensor:
    """How well a query cell and its matched key cell cover each other in the source image.

    Args:
        crop_q: (N, 5), as of :func:`geometric_match`.
        crop_k: (N, 5) of the key view.
        match: (N, prod(Sq)) int64, flat key position or -1.
        query_grid: (height, width) of the query grid.
        key_grid: (height, width) of the key grid; the query's where None.

    Returns:
        float32 (N, prod(Sq)): intersection over union of the two cells' rectangles, in [0, 1]; 0
        where there is no match.
    """
    key_grid = query_grid if key_grid is None else key_grid
    own = _cells(crop_q, query_grid)  # (N, Sq, 4)
    index = match.clamp(min=0).unsqueeze(2).expand(-1, -1, 4)
    other = _cells(crop_k, key_grid).gather(1, index)
    low, high = torch.maximum(own, other)[..., :2], torch.minimum(own, other)[..., 2:]
    shared = (high - low).clamp(min=0.0).prod(dim=2)
    area = (own[..., 2:] - own[..., :2]).prod(dim=2) + (other[..., 2:] - other[..., :2]).prod(dim=2)
    return torch.where(match >= 0, shared / (area - shared), 0.0).float()


def _cells(crop: Tensor, grid: Sequence[int]) -> Tensor:
    """The grid's cells in the source image, float64 (N, prod(S), 4): x0, y0, x1, y1."""
    height, width = grid
    crop = crop.double()
    column = torch.arange(width, device=crop.device, dtype=torch.float64).expand(len(crop), width)
    column = torch.where(crop[:, 4:] > 0.5, width - 1 - column, column)  # (N, W)
    cell_w = (crop[:, 2:3] - crop[:, 0:1]) / width
    cell_h = (crop[:, 3:4] - crop[:, 1:2]) / height
    x0 = (crop[:, 0:1] + column * cell_w).unsqueeze(1).expand(-1, height, -1)  # (N, H, W)
    row = torch.arange(height, device=crop.device, dtype=torch.float64)
    y0 = (crop[:, 1:2] + row * cell_h).unsqueeze(2).expand(-1, -1, width)
    w, h = cell_w.unsqueeze(2), cell_h.unsqueeze(2)
    return torch.stack([x0, y0, x0 + w, y0 + h], dim=3).flatten(1, 2)


@torch.no_grad()
def similarity_weight(
    query_features: Tensor, key_features: Tensor, match: Tensor, power: float = 2.0
) -> Tensor:
    """Cosine similarity of every position to its match, raised to a power (as PixCon weights rows).

    Args:
        query_features: (N, C, *Sq).
        key_features: (N, C, *Sk).
        match: (N, prod(Sq)) int64, flat key position or -1.
        power: at least 0; negative similarities count as 0.

    Returns:
        float32 (N, prod(Sq)), 0 where there is no match.
    """
    query = F.normalize(query_features.float().flatten(2), dim=1)
    key = F.normalize(key_features.float().flatten(2), dim=1)
    index = match.clamp(min=0).unsqueeze(1).expand(-1, key.shape[1], -1)
    similarity = (query * key.gather(2, index)).sum(dim=1).clamp(min=0.0)
    return torch.where(match >= 0, similarity**power, 0.0)
