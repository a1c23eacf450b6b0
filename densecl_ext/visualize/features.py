"""Features as colours: their first three principal components over several images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from densecl_ext.visualize.images import grid_features, read_image
from densecl_ext.visualize.losses import save


def feature_colours(features: Tensor) -> tuple[Tensor, float]:
    """Colour feature maps by their first three principal components, shared by all of them.

    Args:
        features: (N, C, h, w) with C of 3 or more.

    Returns:
        float32 (N, h, w, 3) in [0, 1]: each component between its 2 % and 98 % quantiles; and the
        share of the variance that the three explain.

    Raises:
        ValueError: fewer than 3 channels or 4 positions.
    """
    n, c, h, w = features.shape
    if c < 3 or n * h * w < 4:
        raise ValueError(
            f"feature_colours: features must have 3 channels and 4 positions, got {(n, c, h, w)}"
        )
    rows = features.float().permute(0, 2, 3, 1).flatten(0, 2)
    rows = rows - rows.mean(0)
    covariance = (rows.T @ rows).double() / len(rows)
    variance, axes = torch.linalg.eigh(covariance)  # ascending
    axes = axes[:, -3:].flip(1)
    # An axis has no sign of its own: its largest entry is positive.
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    scores = rows @ axes.float()  # (R, 3)
    low, high = scores.quantile(torch.tensor([0.02, 0.98]), dim=0)
    colours = ((scores - low) / (high - low).clamp(min=1e-12)).clamp(0.0, 1.0)
    total = float(variance.sum())
    explained = float(variance[-3:].sum()) / total if total > 0.0 else 0.0
    return colours.view(n, h, w, 3), explained


def plot_features(
    backbone: nn.Module,
    images: Sequence[Tensor | str | os.PathLike[str]],
    png: str | os.PathLike[str],
    *,
    size: int = 320,
    title: str = "",
) -> float:
    """Draw images above the colours of their features.

    Equal colours are similar features, within and across the images. A network that tells where
    rather than what shows the same gradient of colours for every image.

    Args:
        backbone: (N, 3, H, W) to (N, C, h, w); used in evaluation mode.
        images: uint8 (3, H, W) each, or files.
        png: the picture to write; its folder is made.
        size: the images' centre is cut and resized to this many pixels a side.
        title: above the picture.

    Returns:
        The share of the features' variance that the three colours explain.

    Raises:
        ValueError: no image, or features with fewer than 3 channels.
        ImportError: matplotlib, or for files Pillow, is not installed.
    """
    from matplotlib.figure import Figure

    if not images:
        raise ValueError("plot_features: images must be one or more, got none")
    squares = torch.stack([read_image(image, size) for image in images])
    colours, explained = feature_colours(grid_features(backbone, squares))
    count = len(squares)
    figure = Figure(figsize=(2.3 * count + 0.2, 5.2), dpi=100, layout="constrained")
    axes = figure.subplots(2, count, squeeze=False)
    for index in range(count):
        axes[0, index].imshow(squares[index].permute(1, 2, 0).numpy())
        axes[1, index].imshow(colours[index].numpy(), interpolation="nearest")
        for row in (0, 1):
            axes[row, index].set_axis_off()
    grid = f"{colours.shape[1]} x {colours.shape[2]}"
    told = f"three principal components of {grid} features: {100 * explained:.0f} % of the variance"
    figure.suptitle(f"{title}\n{told}" if title else told, fontsize=10)
    save(figure, Path(png))
    return explained
