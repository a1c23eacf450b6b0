"""The drawn augmentation for a whole batch of views at once, in torch, on a CPU or a GPU.

Pixels are floating-point numbers that hold whole levels, 0 to 255, after every operation: Pillow's
8-bit arithmetic, operation by operation, as MoCo v2 was trained. Hue turns in HSV without Pillow's
rounding to 8 bits, and blur is a true Gaussian where Pillow approximates one by three box filters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from densecl_ext.data.augmentation import BRIGHTNESS, CONTRAST, HUE, SATURATION, ViewParameters

# Radius of the blur's kernel in standard deviations: less than 0.3 % of the weight lies beyond.
_RADIUS = 3.0


def _gray(pixels: Tensor) -> Tensor:
    """ITU-R BT.601 luma (n, 1, S, S), rounded to levels."""
    red, green, blue = pixels.split(1, dim=1)
    return (0.299 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114).add_(0.5).floor_()


def _levels(pixels: Tensor) -> Tensor:
    """Truncated, as Pillow leaves a blend; a little upwards first, lest whole numbers fall."""
    return pixels.add_(0.002).clamp_(0, 255).floor_()


def _brightness(pixels: Tensor, factor: Tensor) -> Tensor:
    return _levels(pixels * factor)


def _contrast(pixels: Tensor, factor: Tensor) -> Tensor:
    mean = _gray(pixels).mean(dim=(1, 2, 3), keepdim=True).add_(0.5).floor_()
    return _levels(torch.addcmul(mean * (1 - factor), pixels, factor))


def _saturation(pixels: Tensor, factor: Tensor) -> Tensor:
    return _levels(torch.addcmul(_gray(pixels) * (1 - factor), pixels, factor))


def _hue(pixels: Tensor, turns: Tensor) -> Tensor:
    """Rotate the hue in HSV.

    With h the hue in sextants, the channels are v - c * clamp(min(k, 4 - k), 0, 1) at
    k = (n + h) mod 6, n = 5, 3, 1 for R, G, B (Wikipedia, HSL and HSV, "HSV to RGB alternative").
    """
    red, green, blue = pixels.split(1, dim=1)
    value = pixels.amax(dim=1, keepdim=True)
    chroma = value - pixels.amin(dim=1, keepdim=True)
    scale = chroma.clamp(min=1).reciprocal_()  # gray has chroma 0 and any hue
    hue = torch.where(
        value == red,
        (green - blue).mul_(scale),
        torch.where(
            value == green,
            (blue - red).mul_(scale).add_(2),
            (red - green).mul_(scale).add_(4),
        ),
    )
    hue += 6 * turns + 6  # from 2, so that one subtraction of whole circles is enough below
    place = hue + pixels.new_tensor([5.0, 3.0, 1.0]).reshape(1, 3, 1, 1)
    place -= (place / 6).floor_().mul_(6)
    part = torch.minimum(place, 4 - place).clamp_(0, 1)
    return torch.addcmul(value, part, chroma, value=-1).add_(0.5).floor_()


_OPERATIONS: dict[int, Callable[[Tensor, Tensor], Tensor]] = {
    BRIGHTNESS: _brightness,
    CONTRAST: _contrast,
    SATURATION: _saturation,
    HUE: _hue,
}


def _factor(drawn: ViewParameters, operation: int) -> float:
    if operation == HUE:
        return int(drawn.hue * 255) / 256  # as torchvision hands it to Pillow
    return (drawn.brightness, drawn.contrast, drawn.saturation)[operation]


def blur(pixels: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Blur each view by its own Gaussian; edges are repeated outwards.

    Args:
        pixels: (n, 3, S, S), float.
        sigmas: n standard deviations in pixels.

    Returns:
        (n, 3, S, S), rounded to levels.
    """
    count, channels, size, _ = pixels.shape
    radius = max(1, math.ceil(_RADIUS * max(sigmas)))
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32)
    widths = torch.tensor(sigmas, dtype=torch.float32).clamp(min=1e-3).reshape(-1, 1)
    kernels = torch.exp(-0.5 * (offsets / widths) ** 2)
    kernels = (kernels / kernels.sum(dim=1, keepdim=True)).to(pixels.device, non_blocking=True)
    # One axis after the other, each as a product with a matrix that holds the kernel along its
    # diagonal. It serves tiles of the axis rather than all of it, whose matrix is mostly zeros.
    tile = min(size, 2 * radius + 20)
    tiles = math.ceil(size / tile)
    matrix = pixels.new_zeros(count, 1, tile, tile + 2 * radius)
    band = matrix.as_strided(
        (count, tile, 2 * radius + 1),
        (matrix.stride(0), matrix.stride(2) + 1, 1),
    )
    band.copy_(kernels.unsqueeze(1).expand_as(band))
    matrix = matrix.expand(count, channels, tile, tile + 2 * radius)
    rest = tiles * tile - size
    for _ in range(2):
        padded = F.pad(pixels, (0, 0, radius, radius + rest), mode="replicate")
        pixels = torch.cat(
            [
                matrix @ padded[:, :, start : start + tile + 2 * radius]
                for start in range(0, tiles * tile, tile)
            ],
            dim=2,
        )[:, :, :size].mT
    return (pixels + 0.5).floor_()


def augment(pixels: Tensor, drawn: Sequence[ViewParameters]) -> Tensor:
    """Colour, gray, blur and flip of views that are cropped and resized already.

    Args:
        pixels: (N, 3, S, S), float, whole levels; may be changed in place.
        drawn: What to do to each.

    Returns:
        (N, 3, S, S), whole levels.
    """
    device = pixels.device

    def change(
        rows: list[int],
        operation: Callable[..., Tensor],
        values: list[float] | None = None,
    ) -> None:
        if not rows:
            return
        index = torch.tensor(rows).to(device, non_blocking=True)
        picked = pixels.index_select(0, index)
        if values is None:
            made = operation(picked)
        else:
            numbers = torch.tensor(values, dtype=torch.float32).reshape(-1, 1, 1, 1)
            made = operation(picked, numbers.to(device, non_blocking=True))
        pixels.index_copy_(0, index, made)

    for step in range(4):
        for operation, function in _OPERATIONS.items():
            rows = [
                row
                for row, one in enumerate(drawn)
                if len(one.order) > step and one.order[step] == operation
            ]
            change(rows, function, [_factor(drawn[row], operation) for row in rows])
    change(
        [row for row, one in enumerate(drawn) if one.gray],
        lambda picked: _gray(picked).expand_as(picked),
    )
    rows = [row for row, one in enumerate(drawn) if one.blur_sigma > 0]
    change(rows, lambda picked: blur(picked, [drawn[row].blur_sigma for row in rows]))
    change([row for row, one in enumerate(drawn) if one.flip], lambda picked: picked.flip(-1))
    return pixels


def resample(
    store: Tensor, starts: np.ndarray, widths: np.ndarray, boxes: np.ndarray, size: int
) -> Tensor:
    """Cut and resize boxes of many images of different sizes, without a loop over them.

    Pillow's antialiased bilinear filter: a triangle as wide as a view's pixel, or as the image's
    where that is larger, over the pixels that the box touches.

    Args:
        store: uint8 (bytes,), the images' RGB rows one behind the other.
        starts: int64 (n,), where each view's image begins in the store.
        widths: int64 (n,), width of each view's image.
        boxes: float64 (n, 4), x0, y0, x1, y1 in pixels of the image.
        size: Height and width of the views.

    Returns:
        float32 (n, 3, size, size), whole levels.
    """
    columns, column_weights = _taps(boxes[:, 0], boxes[:, 2], size)
    lines, line_weights = _taps(boxes[:, 1], boxes[:, 3], size)
    top = lines.min(axis=(1, 2))
    rows = int((lines.max(axis=(1, 2)) - top).max()) + 1

    def there(values: np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(values).to(store.device, dtype, non_blocking=True)

    # Rows beyond a view's last are read, where the store has them, and never used.
    first = there(starts + top * widths * 3, torch.int64).reshape(-1, 1, 1, 1)
    width = there(widths, torch.int64).reshape(-1, 1, 1, 1)
    line = torch.arange(rows, device=store.device).reshape(1, -1, 1, 1)
    channel = torch.arange(3, device=store.device)
    base = first + 3 * width * line + channel  # (n, rows, 1, 3)
    x, x_weights = there(columns, torch.int64), there(column_weights, torch.float32)
    wide: Tensor | None = None
    for tap in range(columns.shape[2]):
        index = (base + 3 * x[:, None, :, tap, None]).clamp_(max=store.numel() - 1)
        part = store[index] * x_weights[:, None, :, tap, None]  # (n, rows, size, 3)
        wide = part if wide is None else wide.add_(part)
    assert wide is not None
    wide = wide.add_(0.5).floor_()
    y, y_weights = (
        there(lines - top[:, None, None], torch.int64),
        there(line_weights, torch.float32),
    )
    made: Tensor | None = None
    for tap in range(lines.shape[2]):
        index = y[:, :, tap, None, None].expand(-1, -1, size, 3)
        part = wide.gather(1, index) * y_weights[:, :, tap, None, None]
        made = part if made is None else made.add_(part)
    assert made is not None
    return made.add_(0.5).floor_().permute(0, 3, 1, 2)


def _taps(low: np.ndarray, high: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions int64 and weights float64 (n, size, taps) of a triangle filter along one axis."""
    low, high = low[:, None], high[:, None]
    first, last = np.floor(low), np.ceil(high) - 1
    scale = (high - low) / size
    support = np.maximum(scale, 1.0)
    centre = low + (np.arange(size) + 0.5) * scale  # (n, size)
    begin = np.floor(centre - support + 0.5)
    position = begin[..., None] + np.arange(int(np.ceil(2 * support.max())) + 1)
    weight = np.maximum(0.0, 1 - np.abs((position + 0.5 - centre[..., None]) / support[..., None]))
    weight[(position < first[..., None]) | (position > last[..., None])] = 0.0
    weight /= weight.sum(axis=2, keepdims=True)
    position = np.clip(position, first[..., None], last[..., None])
    return position.astype(np.int64), weight
