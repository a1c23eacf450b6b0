"""Matched positions of two views, as lines between two pictures.

The rule of the authors' figures: positions of the two views that are each other's nearest
neighbour by cosine similarity of the backbone's features, from similarity 0.9 on.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from densecl_ext.nn.matching import feature_match
from densecl_ext.visualize.losses import save

Crop = tuple[float, float, float, float, bool]
"""x0, y0, x1, y1 in pixels of the image, and whether the view is mirrored."""

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Matches:
    """Mutual nearest neighbours of two views, best first.

    Attributes:
        query: (P, 2) centre x, y of each matched cell in the first view, in [0, 1].
        key: (P, 2) the same in the second view.
        similarity: (P,) cosine similarity.
        distance: (P,) how far the key cell's centre lies from where the query cell's centre really
            is in the second view, in cells (largest of both axes).
        true_positions: number of query cells whose centre the second view shows at all.
    """

    query: Tensor
    key: Tensor
    similarity: Tensor
    distance: Tensor
    true_positions: int

    def __len__(self) -> int:
        return len(self.similarity)

    @property
    def right(self) -> Tensor:
        """(P,) bool: the key cell, or one beside it, shows the query cell's centre."""
        return self.distance <= 1.0


def cut_view(image: Tensor, crop: Crop, size: int) -> Tensor:
    """Cut a crop from an image and resize it to a square.

    Args:
        image: uint8 (3, H, W).
        crop: the box; parts outside the image repeat its border.
        size: side of the view in pixels.

    Returns:
        float32 (3, size, size) in [0, 1].
    """
    height, width = image.shape[1:]
    x0, y0, x1, y1, flip = crop
    cells = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    across = 1.0 - cells if flip else cells
    x = (x0 + across * (x1 - x0)) / width * 2.0 - 1.0
    y = (y0 + cells * (y1 - y0)) / height * 2.0 - 1.0
    grid = torch.stack([x.expand(size, size), y[:, None].expand(size, size)], dim=-1)
    view = F.grid_sample(
        image[None].float() / 255.0,
        grid[None].float(),
        mode="bilinear",
        padding_mode="border",
        align_corners=False,
    )
    return view[0]


@torch.no_grad()
def find_matches(
    backbone: nn.Module,
    image: Tensor,
    crops: tuple[Crop, Crop],
    *,
    size: int = 224,
    threshold: float = 0.9,
    top: int | None = None,
) -> tuple[Tensor, Tensor, Matches]:
    """Match the positions of two crops of one image.

    Args:
        backbone: (N, 3, H, W) to (N, C, h, w); used in evaluation mode.
        image: uint8 (3, H, W).
        crops: the two views.
        size: side of a view in pixels.
        threshold: least cosine similarity of a match.
        top: keep this many of the most similar; None keeps all.

    Returns:
        The two views, float32 (3, size, size) in [0, 1], and their matches.

    Raises:
        ValueError: ``image`` is not uint8 (3, H, W), or a crop is empty.
    """
    if image.dim() != 3 or image.shape[0] != 3 or image.dtype != torch.uint8:
        raise ValueError(
            f"find_matches: image must be uint8 (3, H, W), got {image.dtype} {tuple(image.shape)}"
        )
    for crop in crops:
        if crop[2] <= crop[0] or crop[3] <= crop[1]:
            raise ValueError(f"find_matches: crop must have x0 < x1 and y0 < y1, got {crop}")
    views = torch.stack([cut_view(image, crop, size) for crop in crops])  # (2, 3, size, size)
    mean, std = torch.tensor(_MEAN).view(1, 3, 1, 1), torch.tensor(_STD).view(1, 3, 1, 1)
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    try:
        features = backbone((views - mean) / std).float()  # (2, C, h, w)
    finally:
        for module, training in modes:
            module.training = training
    height, width = features.shape[2:]
    match = feature_match(features[:1], features[1:], mutual=True)[0]  # (h * w,), -1: not mutual

    unit = F.normalize(features.flatten(2), dim=1)  # (2, C, h * w)
    from_index = torch.nonzero(match >= 0).flatten()
    to_index = match[from_index]
    similarity = (unit[0][:, from_index] * unit[1][:, to_index]).sum(0)
    centre_x = ((torch.arange(width) + 0.5) / width).repeat(height)
    centre_y = ((torch.arange(height) + 0.5) / height).repeat_interleave(width)
    centres = torch.stack([centre_x, centre_y], dim=1)  # (h * w, 2)
    truth = _carry(centres, *crops)  # where each query centre lies in the key view
    visible = int(((truth >= 0.0) & (truth <= 1.0)).all(dim=1).sum())
    cells = torch.tensor([width, height], dtype=torch.float32)
    error = ((centres[to_index] - truth[from_index]).abs() * cells).amax(dim=1)

    order = similarity.argsort(descending=True, stable=True)
    order = order[similarity[order] >= threshold]
    order = order[:top] if top is not None else order
    matches = Matches(
        centres[from_index[order]],
        centres[to_index[order]],
        similarity[order],
        error[order],
        visible,
    )
    return views[0], views[1], matches


def _carry(points: Tensor, source: Crop, target: Crop) -> Tensor:
    """Points (P, 2) of one view, in its own [0, 1] coordinates, in those of another view."""
    u = 1.0 - points[:, 0] if source[4] else points[:, 0]
    x = source[0] + u * (source[2] - source[0])
    y = source[1] + points[:, 1] * (source[3] - source[1])
    u = (x - target[0]) / (target[2] - target[0])
    v = (y - target[1]) / (target[3] - target[1])
    return torch.stack([1.0 - u if target[4] else u, v], dim=1)


def default_crops(width: int, height: int) -> tuple[Crop, Crop]:
    """Two overlapping views of an image: its left part, and its right part a little nearer."""
    side = 0.84 * min(width, height)
    near = 0.72 * min(width, height)
    x, y = (width - side) / 2.0, (height - side) / 2.0
    spread = 0.08 * min(width, height)
    first = (x - spread, y - spread, x - spread + side, y - spread + side, False)
    second = (x + 2.0 * spread, y + spread, x + 2.0 * spread + near, y + spread + near, False)
    return first, second


def plot_matches(
    backbone: nn.Module,
    image: Tensor | str | os.PathLike[str] | Sequence[Tensor | str | os.PathLike[str]],
    png: str | os.PathLike[str],
    *,
    crops: tuple[Crop, Crop] | None = None,
    size: int = 224,
    threshold: float = 0.9,
    top: int | None = 40,
    title: str = "",
) -> list[Matches]:
    """Draw two views of each image side by side, with lines between the positions that match.

    Green lines end where they should by the crops' geometry, in the right cell or one beside it;
    red ones do not.

    Args:
        backbone: (N, 3, H, W) to (N, C, h, w).
        image: one image or several, each an uint8 tensor (3, H, W) or a file.
        png: the picture to write; its folder is made.
        crops: the two views, the same for all images; None takes :func:`default_crops`.
        size: side of a view in pixels as the backbone sees it.
        threshold: least cosine similarity of a match (the authors draw from 0.9 on).
        top: draw this many of the most similar; None draws all.
        title: above the picture.

    Returns:
        The matches of each image.

    Raises:
        ValueError: no image, or one that is not uint8 (3, H, W).
        OSError: a file that cannot be read.
        ImportError: matplotlib, or for files Pillow, is not installed.
    """
    from matplotlib.figure import Figure

    listed = [image] if isinstance(image, (Tensor, str, os.PathLike)) else list(image)
    if not listed:
        raise ValueError("plot_matches: image must be one image or more, got none")
    columns = min(2, len(listed))
    rows = -(-len(listed) // columns)
    figure = Figure(figsize=(4.9 * columns, 2.62 * rows + 0.35), dpi=100, layout="constrained")
    results = []
    for index, item in enumerate(listed):
        pixels = item if isinstance(item, Tensor) else _read(item)
        pair = crops or default_crops(pixels.shape[2], pixels.shape[1])
        left, right, matches = find_matches(
            backbone, pixels, pair, size=size, threshold=threshold, top=top
        )
        _draw(figure.add_subplot(rows, columns, index + 1), left, right, matches)
        results.append(matches)
    if title:
        figure.suptitle(title, fontweight="bold", fontsize=11)
    save(figure, png)
    return results


def plot_found(
    query: Tensor,
    key: Tensor,
    found: Tensor,
    distance: Tensor,
    grid: tuple[int, int],
    png: str | os.PathLike[str],
) -> Path:
    """Draw where every visible position of a view was found in the other.

    Green lines end in the right cell or one beside it, red ones do not.

    Args:
        query: uint8 (N, 3, S, S), first views.
        key: uint8 (N, 3, S, S), second views.
        found: (N, h * w), index of the most similar position.
        distance: (N, h * w), how far it is off in cells, each way; -1 where the other view does not
            show the position.
        grid: (h, w).
        png: the picture to write; its folder is made.
    """
    from matplotlib.figure import Figure

    height, width = grid
    centre_x = ((torch.arange(width) + 0.5) / width).repeat(height)
    centre_y = ((torch.arange(height) + 0.5) / height).repeat_interleave(width)
    centres = torch.stack([centre_x, centre_y], dim=1)  # (h * w, 2)
    columns = min(2, len(query))
    rows = -(-len(query) // columns)
    figure = Figure(figsize=(4.9 * columns, 2.62 * rows), dpi=100, layout="constrained")
    for index in range(len(query)):
        shown = torch.nonzero(distance[index] >= 0).flatten()
        shown = shown[:: max(1, len(shown) // 40)]
        matches = Matches(
            centres[shown],
            centres[found[index][shown]],
            torch.ones(len(shown)),
            distance[index][shown].float(),
            int((distance[index] >= 0).sum()),
        )
        axes = figure.add_subplot(rows, columns, index + 1)
        _draw(axes, query[index].float() / 255.0, key[index].float() / 255.0, matches)
    return save(figure, png)


def _draw(axes: object, left: Tensor, right: Tensor, matches: Matches) -> None:
    size = left.shape[1]
    gap = size // 12
    canvas = torch.ones(size, 2 * size + gap, 3)
    canvas[:, :size] = left.permute(1, 2, 0)
    canvas[:, size + gap :] = right.permute(1, 2, 0)
    axes.imshow(canvas.clamp(0.0, 1.0).numpy(), interpolation="bilinear")  # type: ignore[attr-defined]
    good = matches.right
    for i in range(len(matches) - 1, -1, -1):  # the most similar on top
        colour = "#34c759" if good[i] else "#ff3b30"
        x = [float(matches.query[i, 0]) * size, float(matches.key[i, 0]) * size + size + gap]
        y = [float(matches.query[i, 1]) * size, float(matches.key[i, 1]) * size]
        for line_colour, width in (("white", 2.6), (colour, 1.3)):
            axes.plot(x, y, color=line_colour, linewidth=width, alpha=0.85)  # type: ignore[attr-defined]
        axes.scatter(x, y, s=16, color=colour, edgecolors="white", linewidths=0.7, zorder=3)  # type: ignore[attr-defined]
    axes.set_title(  # type: ignore[attr-defined]
        f"{int(good.sum())} of {len(matches)} matches right"
        f" ({matches.true_positions} cells seen in both)",
        fontsize=9,
    )
    axes.set_axis_off()  # type: ignore[attr-defined]


def _read(path: str | os.PathLike[str]) -> Tensor:
    import numpy as np

    from densecl_ext.data.images import read_rgb

    pixels = np.array(read_rgb(path))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
