"""Small backbones and views for the model's tests, so that they need no torchvision."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TinyBackbone(nn.Module):
    """Three strided convolutions with batch norm: (N, 3, H, W) -> (N, 12, H / 8, W / 8)."""

    def __init__(self, channels: int = 12) -> None:
        super().__init__()
        self.out_channels = channels
        widths = (3, 6, 8, channels)
        self.layers = nn.Sequential()
        for before, after in zip(widths[:-1], widths[1:], strict=True):
            self.layers.append(nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False))
            self.layers.append(nn.BatchNorm2d(after))
            self.layers.append(nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def two_views(batch: int, size: int = 32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two noisy versions of the same random images."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, size, size, generator=generator)
    return tuple(  # type: ignore[return-value]
        images + 0.3 * torch.randn(images.shape, generator=generator) for _ in range(2)
    )


def crops(batch: int, seed: int = 0) -> Tensor:
    """Crop boxes and flips (N, 5) inside a source image of 100 x 80 pixels."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(batch, 2, generator=generator) * torch.tensor([40.0, 30.0])
    size = torch.rand(batch, 2, generator=generator) * 20.0 + torch.tensor([40.0, 30.0])
    flip = (torch.rand(batch, 1, generator=generator) < 0.5).float()
    return torch.cat([corner, corner + size, flip], dim=1)
