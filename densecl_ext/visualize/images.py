"""Images for pictures, and the features of a frozen network on them."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def read_image(image: Tensor | str | os.PathLike[str], size: int | None = None) -> Tensor:
    """An image as uint8 (3, H, W), from memory or a file.

    Args:
        image: uint8 (3, H, W), or a file.
        size: its largest central square is resized to this many pixels a side; None keeps all.

    Raises:
        ValueError: a tensor that is not uint8 (3, H, W), or a file that does not decode.
    """
    if isinstance(image, Tensor):
        if image.dim() != 3 or image.shape[0] != 3 or image.dtype != torch.uint8:
            raise ValueError(
                f"visualize: image must be uint8 (3, H, W), got {image.dtype} {tuple(image.shape)}"
            )
        pixels = image
    else:
        import numpy as np

        from densecl_ext.data.images import read_rgb, reason_of

        try:
            pixels = torch.tensor(np.array(read_rgb(image))).permute(2, 0, 1)
        except Exception as error:
            raise ValueError(f"visualize: {image}: {reason_of(error)}") from None
    if size is None:
        return pixels.contiguous()
    height, width = pixels.shape[1:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = pixels[None, :, top : top + side, left : left + side].float()
    resized = F.interpolate(
        square, size=(size, size), mode="bilinear", align_corners=False, antialias=True
    )
    return resized[0].round().clamp(0, 255).byte()


@torch.no_grad()
def grid_features(backbone: nn.Module, images: Tensor) -> Tensor:
    """Features (N, C, h, w), float32 on the CPU, of uint8 images (N, 3, H, W).

    The network runs in evaluation mode and gets its modes back.
    """
    first = next(backbone.parameters(), None)
    device = torch.device("cpu") if first is None else first.device
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (MEAN, STD))
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    try:
        return backbone((images.to(device).float() / 255.0 - mean) / std).float().cpu()
    finally:
        for module, training in modes:
            module.training = training
