"""The drawn augmentation for a whole batch of views at once, in torch, on a CPU or a GPU.

Pillow's 8-bit arithmetic, operation by operation, as MoCo v2 was trained with: after each, views
are whole levels. Hue alone turns in HSV without Pillow's rounding to 8 bits, and blur is a true
Gaussian where Pillow approximates one by three box filters.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from densecl_ext.data.augmentation import BRIGHTNESS, CONTRAST, HUE, SATURATION, BatchParameters

# Radius of the blur's kernel in standard deviations: less than 0.3 % of the weight lies beyond.
_RADIUS = 3.0

# Pixels that a CPU changes at once: in float32 they stay in a core's second-level cache.
_CHUNK = 192 * 1024

# Added to what is truncated, lest rounding errors make a level of a whole number's predecessor.
_UP = 0.002


def _gray(pixels: Tensor) -> Tensor:
    """ITU-R BT.601 luma (n, 1, S, S), rounded to levels."""
    red, green, blue = pixels.split(1, dim=1)
    return (red * 0.299).add_(green, alpha=0.587).add_(blue, alpha=0.114).round_()


def _brightness(pixels: Tensor, factor: Tensor) -> Tensor:
    return (pixels * factor).add_(_UP)


def _contrast(pixels: Tensor, factor: Tensor) -> Tensor:
    mean = _gray(pixels).mean(dim=(1, 2, 3), keepdim=True).add_(0.5).floor_()
    return (pixels * factor).add_(mean * (1 - factor) + _UP)


def _saturation(pixels: Tensor, factor: Tensor) -> Tensor:
    return (pixels * factor).add_(_gray(pixels).mul_(1 - factor).add_(_UP))


def _hue(pixels: Tensor, turns: Tensor) -> Tensor:
    """Rotate the hue in HSV.

    With the hue in sextants from red, a channel is the minimum plus the chroma times a trapezoid of
    the distance from its own primary colour (Smith 1978, "Color gamut transform pairs").
    """
    red, green, blue = pixels.split(1, dim=1)
    low, high = pixels.amin(dim=1, keepdim=True), pixels.amax(dim=1, keepdim=True)
    chroma = high - low
    # lerp by 0 or 1 chooses, several times faster than where on a CPU.
    hue = torch.lerp(
        (red - green).add_(chroma, alpha=4),
        (blue - red).add_(chroma, alpha=2),
        (high == green).float(),
    )
    hue = torch.lerp(hue, green - blue, (high == red).float())
    # Gray has no chroma and any hue. What is added makes the sum positive for every shift.
    hue = hue.div_(chroma.clamp(min=1)).add_(6 * turns + 6)
    hue = hue.sub_((hue / 6).floor_(), alpha=6)
    low = low + 0.5
    made = torch.empty_like(pixels)
    for channel, (primary, sign, level) in enumerate(((3, 1, -1), (2, -1, 2), (4, -1, 2))):
        part = (hue - primary).abs_()
        part = (part + level if sign > 0 else level - part).clamp_(0, 1)
        torch.addcmul(low, part, chroma, out=made[:, channel : channel + 1])
    return made


def _to_gray(pixels: Tensor, _: Tensor) -> Tensor:
    return _gray(pixels).repeat(1, 3, 1, 1)


def _mirror(pixels: Tensor, _: Tensor) -> Tensor:
    return pixels.flip(-1)


def blur(pixels: Tensor, sigmas: Tensor) -> Tensor:
    """:func:`gaussian`, to be truncated to levels."""
    return gaussian(pixels, sigmas).add_(0.5)


def gaussian(pixels: Tensor, sigmas: Tensor) -> Tensor:
    """Blur each view by its own Gaussian; edges are repeated outwards.

    A view's result does not depend on those beside it: each kernel ends where its own width says,
    and what it is divided by adds up in order.

    Args:
        pixels: (n, C, S, S), float.
        sigmas: (n, 1, 1, 1), standard deviations in pixels, on the CPU.

    Returns:
        (n, C, S, S).
    """
    size = pixels.shape[-1]
    radii = (_RADIUS * sigmas).ceil().clamp(min=1)  # (n, 1, 1, 1)
    radius = int(radii.max())
    offsets = torch.arange(radius + 1, dtype=torch.float32).reshape(-1, 1, 1, 1, 1)
    kernels = torch.exp(-0.5 * (offsets / sigmas.clamp(min=1e-3)) ** 2)
    kernels = kernels * (offsets <= radii)  # (radius + 1, n, 1, 1, 1)
    total = kernels[0].clone()
    for kernel in kernels[1:]:
        total += 2 * kernel
    kernels = kernels / total
    kernels = kernels.to(pixels.device, non_blocking=True)
    for axis, padding in ((2, (0, 0, radius, radius)), (3, (radius, radius, 0, 0))):
        padded = F.pad(pixels, padding, mode="replicate")
        pixels = padded.narrow(axis, radius, size) * kernels[0]
        for offset in range(1, radius + 1):
            before = padded.narrow(axis, radius - offset, size)
            behind = padded.narrow(axis, radius + offset, size)
            pixels.addcmul_(before + behind, kernels[offset])
    return pixels


_OPERATIONS: dict[int, Callable[[Tensor, Tensor], Tensor]] = {
    BRIGHTNESS: _brightness,
    CONTRAST: _contrast,
    SATURATION: _saturation,
    HUE: _hue,
}


def augment(pixels: Tensor, drawn: BatchParameters) -> Tensor:
    """Colour, gray and blur of views that are cropped and resized already, then the flip.

    Args:
        pixels: uint8 (N, 3, S, S); changed in place.
        drawn: What to do to the N views.

    Returns:
        `pixels`.
    """
    factors = drawn.factors.astype(np.float32)
    factors[:, HUE] = np.trunc(drawn.factors[:, HUE] * 255) / 256  # as torchvision tells Pillow
    for step in range(4):
        for operation, function in _OPERATIONS.items():
            rows = np.flatnonzero(drawn.order[:, step] == operation)
            _change(pixels, rows, function, factors[rows, operation])
    rows = np.flatnonzero(drawn.gray)
    _change(pixels, rows, _to_gray, factors[rows, 0])
    # In the order of their widths, so that narrow kernels do not come with wide ones.
    rows = np.argsort(drawn.blur_sigma, kind="stable")
    rows = rows[drawn.blur_sigma[rows] > 0]
    _change(pixels, rows, blur, drawn.blur_sigma[rows].astype(np.float32))
    rows = np.flatnonzero(drawn.flip)
    _change(pixels, rows, _mirror, factors[rows, 0])
    return pixels


def _change(
    pixels: Tensor,
    rows: np.ndarray,
    operation: Callable[[Tensor, Tensor], Tensor],
    values: np.ndarray,
) -> None:
    """Apply an operation to some views, each with its own value."""
    if pixels.device.type == "cpu":
        # NumPy, since torch takes ten times as long to write rows of bytes.
        array, count = pixels.numpy(), max(1, _CHUNK // pixels[0].numel())
        for first in range(0, len(rows), count):
            part = rows[first : first + count]
            numbers = torch.from_numpy(values[first : first + count]).reshape(-1, 1, 1, 1)
            made = operation(torch.from_numpy(array[part]).float(), numbers)
            array[part] = made.clamp_(0, 255).numpy()
    elif len(rows):
        index = torch.from_numpy(rows).to(pixels.device, non_blocking=True)
        numbers = torch.from_numpy(values).reshape(-1, 1, 1, 1)
        if operation is not blur:  # which makes its kernels on the CPU
            numbers = numbers.to(pixels.device, non_blocking=True)
        made = operation(pixels.index_select(0, index).float(), numbers)
        pixels.index_copy_(0, index, made.clamp_(0, 255).to(torch.uint8))


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
        uint8 (n, 3, size, size).
    """
    # One copy; all else is computed on the device. Whole numbers are exact in float64.
    given = torch.from_numpy(np.column_stack([starts, widths, boxes]))
    if store.device.type == "cuda":
        given = given.pin_memory()
    given = given.to(store.device, non_blocking=True)
    whole, (x0, y0, x1, y1) = given[:, :2].long(), given[:, 2:].unbind(1)
    scales = (boxes[:, 2:] - boxes[:, :2]).max(axis=0, initial=0) / size
    taps_x, taps_y = (math.ceil(2 * max(scale, 1.0)) + 1 for scale in scales)
    rows = int((np.ceil(boxes[:, 3]) - np.floor(boxes[:, 1])).max())
    x, x_weights = _taps(x0, x1, size, taps_x)
    y, y_weights = _taps(y0, y1, size, taps_y)
    top = y0.floor().long()
    # Rows beyond a view's last are read, where the store has them, and never used.
    width = whole[:, 1].reshape(-1, 1, 1, 1)
    first = whole[:, 0].reshape(-1, 1, 1, 1) + 3 * width * top.reshape(-1, 1, 1, 1)
    line = torch.arange(rows, device=store.device).reshape(1, -1, 1, 1)
    channel = torch.arange(3, device=store.device)
    base = first + 3 * width * line + channel  # (n, rows, 1, 3)
    wide: Tensor | None = None
    for tap in range(taps_x):
        index = (base + 3 * x[:, None, :, tap, None]).clamp_(max=store.numel() - 1)
        part = store[index] * x_weights[:, None, :, tap, None]  # (n, rows, size, 3)
        wide = part if wide is None else wide.add_(part)
    assert wide is not None
    wide = wide.add_(0.5).floor_()
    y = y - top[:, None, None]
    made: Tensor | None = None
    for tap in range(taps_y):
        index = y[:, :, tap, None, None].expand(-1, -1, size, 3)
        part = wide.gather(1, index) * y_weights[:, :, tap, None, None]
        made = part if made is None else made.add_(part)
    assert made is not None
    return made.add_(0.5).to(torch.uint8).permute(0, 3, 1, 2)


def _taps(low: Tensor, high: Tensor, size: int, taps: int) -> tuple[Tensor, Tensor]:
    """Positions int64 and weights float32 (n, size, taps) of a triangle filter along one axis.

    Args:
        low: float64 (n,), where the box begins.
        high: float64 (n,), where it ends.
        size: Pixels of the view.
        taps: As many as the widest filter may touch.
    """
    low, high = low[:, None], high[:, None]
    first, last = low.floor()[..., None], (high.ceil() - 1)[..., None]
    scale = (high - low) / size
    support = scale.clamp(min=1.0)
    counts = torch.arange(max(size, taps), dtype=torch.float64, device=low.device)
    centre = low + (counts[:size] + 0.5) * scale  # (n, size)
    position = (centre - support + 0.5).floor()[..., None] + counts[:taps]
    weight = 1 - ((position + 0.5 - centre[..., None]) / support[..., None]).abs()
    weight = weight.clamp_(min=0.0).mul_((position >= first) & (position <= last))
    weight = weight / weight.sum(dim=2, keepdim=True)
    return position.clamp(first, last).long(), weight.float()
