"""Images, their labels and a network's labels side by side."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from densecl_ext.visualize.losses import save

IGNORED = 255


def class_colours(count: int) -> Tensor:
    """float32 (count, 3): colours that neighbours in the list do not share."""
    from matplotlib import colormaps

    table = colormaps["tab20" if count > 10 else "tab10"]
    return torch.tensor([table(index % table.N)[:3] for index in range(count)])


def plot_segmentations(
    images: Tensor,
    labels: Tensor,
    predicted: Tensor,
    class_names: Sequence[str],
    png: str | os.PathLike[str],
    *,
    title: str = "",
) -> Path:
    """Draw a row an image: the image, the labels, the prediction; white does not count.

    Args:
        images: uint8 (N, 3, H, W).
        labels: uint8 (N, H, W), 255 where a pixel does not count.
        predicted: (N, H, W), class ids.
        class_names: for the legend.
        png: the picture to write; its folder is made.
        title: above the picture.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    count, _, height, width = images.shape
    colours = class_colours(len(class_names))
    white = torch.ones(1, 3)
    table = torch.cat([colours, white])
    truth = torch.where(labels == IGNORED, len(class_names), labels.long())
    row = 2.6 * height / width
    figure = Figure(figsize=(8.0, row * count + 1.1), dpi=110, layout="constrained")
    axes = figure.subplots(count, 3, squeeze=False)
    for index in range(count):
        axes[index, 0].imshow(images[index].permute(1, 2, 0).numpy())
        axes[index, 1].imshow(table[truth[index]].numpy(), interpolation="nearest")
        axes[index, 2].imshow(table[predicted[index].long()].numpy(), interpolation="nearest")
        for column in range(3):
            axes[index, column].set_axis_off()
    for column, name in enumerate(("image", "labels", "predicted")):
        axes[0, column].set_title(name, fontsize=10)
    if len(class_names) <= 20:
        patches = [
            Patch(color=tuple(colour.tolist()), label=name)
            for name, colour in zip(class_names, colours, strict=True)
        ]
        figure.legend(
            handles=patches, loc="outside lower center", ncols=6, fontsize=8, frameon=False
        )
    if title:
        figure.suptitle(title, fontweight="bold", fontsize=11)
    return save(figure, Path(png))
