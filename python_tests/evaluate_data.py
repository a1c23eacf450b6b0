"""Labelled images and networks with known answers, for the tests of the protocols."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

COLOURS = ((200, 30, 30), (30, 200, 30), (30, 30, 200))


def write_labelled(
    root: Path, counts: dict[str, int], *, size: tuple[int, int] = (32, 48), seed: int = 0
) -> Path:
    """DIR of images whose colour is their label: vertical stripes of three classes."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    for name in ("images", "masks", "splits"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for split, count in counts.items():
        names = []
        for index in range(count):
            names.append(f"{split}{index}")
            edges = sorted(rng.integers(4, size[1] - 4, 2).tolist())
            label = np.digitize(np.arange(size[1]), edges).astype(np.uint8)
            mask = np.broadcast_to(label, size).copy()
            pixels = np.array(COLOURS)[mask] + rng.integers(-20, 21, (*size, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(
                root / "images" / f"{names[-1]}.png"
            )
            mask[0] = 255
            Image.fromarray(mask).save(root / "masks" / f"{names[-1]}.png")
        (root / "splits" / f"{split}.txt").write_text("\n".join(names) + "\n")
    (root / "classes.txt").write_text("red\ngreen\nblue\n")
    return root


class MeanColour(nn.Module):
    """The mean colour of every 4 x 4 patch: features that hold the labels of `write_labelled`."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(x, 4)


class PositionCode(nn.Module):
    """Its own coordinates and nothing of the image: the shortcut, in full."""

    def __init__(self, stride: int = 8, dim: int = 32) -> None:
        super().__init__()
        self.stride = stride
        self.register_buffer(
            "code", torch.randn(dim, 64, generator=torch.Generator().manual_seed(0))
        )

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[2] // self.stride, x.shape[3] // self.stride
        return self.code[:, : h * w].reshape(1, -1, h, w).expand(len(x), -1, -1, -1).clone()


class Normed(nn.Module):
    """A small convolutional network with batch norms."""

    def __init__(self, stride: int = 4, channels: int = 8) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, channels, 3, 2, 1), nn.BatchNorm2d(channels), nn.ReLU(),
            nn.Conv2d(channels, channels, 3, stride // 2, 1), nn.BatchNorm2d(channels), nn.ReLU(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)
