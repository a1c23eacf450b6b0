"""Matches between two different images: which places a network takes for the same thing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from densecl_ext.nn.matching import feature_match
from densecl_ext.visualize.images import grid_features, read_image
from densecl_ext.visualize.losses import save


def plot_pair_matches(
    backbone: nn.Module,
    images: Sequence[Tensor | str | os.PathLike[str]],
    png: str | os.PathLike[str],
    *,
    size: int = 224,
    top: int = 30,
    title: str = "",
) -> list[Tensor]:
    """Draw the mutual nearest neighbours between the first image and each other one.

    Nobody knows the right matches of two images, so lines are coloured by similarity: yellow is
    the most similar.

    Args:
        backbone: (N, 3, H, W) to (N, C, h, w); used in evaluation mode.
        images: two or more, uint8 (3, H, W) each, or files.
        png: the picture to write; its folder is made.
        size: the images' centre is cut and resized to this many pixels a side.
        top: lines a pair, the most similar.
        title: above the picture.

    Returns:
        For each pair the cosine similarities drawn, best first.

    Raises:
        ValueError: fewer than two images.
        ImportError: matplotlib, or for files Pillow, is not installed.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    if len(images) < 2:
        raise ValueError(f"plot_pair_matches: images must be two or more, got {len(images)}")
    squares = torch.stack([read_image(image, size) for image in images])
    features = grid_features(backbone, squares)
    h, w = features.shape[2:]
    unit = F.normalize(features.flatten(2), dim=1)  # (N, C, h * w)
    pairs = len(images) - 1
    figure = Figure(figsize=(5.4, 2.8 * pairs + 0.4), dpi=100, layout="constrained")
    gap = size // 12
    drawn = []
    for index in range(1, len(images)):
        match = feature_match(features[:1], features[index : index + 1], mutual=True)[0]
        source = torch.nonzero(match >= 0).flatten()
        target = match[source]
        cosine = (unit[0][:, source] * unit[index][:, target]).sum(0)
        best = cosine.argsort(descending=True, stable=True)[:top]
        source, target, cosine = source[best], target[best], cosine[best]
        canvas = torch.full((size, 2 * size + gap, 3), 255, dtype=torch.uint8)
        canvas[:, :size] = squares[0].permute(1, 2, 0)
        canvas[:, size + gap :] = squares[index].permute(1, 2, 0)
        axes = figure.add_subplot(pairs, 1, index)
        axes.imshow(canvas.numpy())
        low, high = (float(cosine.min()), float(cosine.max())) if len(cosine) else (0.0, 1.0)
        for a, b, c in zip(
            source.flip(0).tolist(), target.flip(0).tolist(), cosine.flip(0).tolist(), strict=True
        ):
            colour = colormaps["plasma"]((c - low) / max(high - low, 1e-9))
            x = [(a % w + 0.5) / w * size, (b % w + 0.5) / w * size + size + gap]
            y = [(a // w + 0.5) / h * size, (b // w + 0.5) / h * size]
            axes.plot(x, y, color="white", linewidth=2.4, alpha=0.7)
            axes.plot(x, y, color=colour, linewidth=1.3, marker="o", markersize=3)
        axes.set_title(f"{len(best)} of {h * w} cells, cosine {low:.2f} to {high:.2f}", fontsize=9)
        axes.set_axis_off()
        drawn.append(cosine)
    if title:
        figure.suptitle(title, fontweight="bold", fontsize=11)
    save(figure, Path(png))
    return drawn
