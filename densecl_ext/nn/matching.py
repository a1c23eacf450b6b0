"""Which key position is the positive of which query position (DenseCL, section 3.3).

Every function returns int64 (N, prod(Sq)): for every position of the query grid, in row-major
order, the flat index of its key position, or -1 where it has none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from densecl_ext import ops

MATCHINGS = ("backbone", "dense", "geometric", "random")


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
