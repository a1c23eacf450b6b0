"""What the network sees: images with their two augmented views, on one sheet."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from densecl_ext.data import Augmentation, build_loader
from densecl_ext.data.bands import decode_bands, scaled
from densecl_ext.data.images import Reading, decode
from densecl_ext.data.source import Chosen, ImageSource

if TYPE_CHECKING:
    from PIL import Image

_COLOURS = ((230, 120, 20), (30, 110, 220))  # of the query's and the key's crop
_GAP, _FRAME, _COLUMNS = 8, 3, 2


def contact_sheet(
    source: ImageSource,
    numbers: list[int],
    *,
    size: int,
    reading: Reading,
    augmentation: Augmentation = Augmentation(),  # noqa: B008  (frozen)
    seed: int = 0,
    side: int = 160,
) -> Image.Image:
    """Draw images, each with the places of its crops, beside the two views.

    Args:
        source: The images.
        numbers: Which; those that do not read are replaced as in training.
        size: Side of the views in pixels, as the network gets them.
        reading: How images are read.
        augmentation: The distribution of the views.
        seed: Of the views.
        side: Pixels of a tile on the sheet.

    Returns:
        Two columns of image, query view (orange) and key view (blue).
    """
    from PIL import Image

    chosen = Chosen(source, numbers)
    with build_loader(
        chosen,
        batch_size=len(numbers),
        size=size,
        backend="torchvision",
        workers=0,
        seed=seed,
        augmentation=augmentation,
        drop_last=False,
        max_pixels=reading.max_pixels,
        value_range=reading.value_range,
        channels=reading.channels,
    ) as loader:  # type: ignore[attr-defined]
        batch = next(iter(loader))
        augmentation = loader.augmentation  # of N channels with what was measured
    rows = -(-len(numbers) // _COLUMNS)
    width, height = 3 * (side + _GAP) + 2 * _GAP, side + _GAP
    sheet = Image.new("RGB", (_COLUMNS * width - _GAP, rows * height + _GAP), "white")
    # In the source's order rather than the epoch's.
    for place, row in enumerate(torch.argsort(batch.index, stable=True).tolist()):
        left, top = _GAP + place % _COLUMNS * width, _GAP + place // _COLUMNS * height
        crops = [crop[row].tolist() for crop in (batch.crop_q, batch.crop_k)]
        image = _picture(chosen, int(batch.index[row]), reading)
        sheet.paste(_with_crops(image, crops, side), (left, top))
        for column, view in enumerate((batch.view_q, batch.view_k), start=1):
            tile = _framed(_shown(view[row], augmentation), _COLOURS[column - 1], side)
            sheet.paste(tile, (left + column * (side + _GAP), top))
    return sheet


def three(pixels: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) to look at, of numbers from 0 to 1 (H, W, C): the first three channels."""
    count = pixels.shape[2]
    shown = pixels[..., [0, min(1, count - 1), min(2, count - 1)]]
    return (255 * shown.clip(0, 1) + 0.5).astype(np.uint8)


def _picture(source: ImageSource, index: int, reading: Reading) -> Image.Image:
    from PIL import Image

    file = source.encoded(index, reading)
    if reading.channels is None:
        return decode(file, reading).image
    values, stated = decode_bands(file, reading)
    return Image.fromarray(three(scaled(values, stated)))


def _with_crops(image: Image.Image, crops: list[list[float]], side: int) -> Image.Image:
    """The whole image within a tile, with both crops drawn on it."""
    from PIL import Image, ImageDraw

    scale = side / max(image.size)
    width, height = (max(1, round(edge * scale)) for edge in image.size)
    tile = Image.new("RGB", (side, side), (235, 235, 235))
    left, top = (side - width) // 2, (side - height) // 2
    tile.paste(
        image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2), (left, top)
    )
    draw = ImageDraw.Draw(tile)
    for crop, colour in zip(crops, _COLOURS, strict=True):
        x0, y0, x1, y1 = (scale * edge for edge in crop[:4])
        box = (left + x0, top + y0, left + max(x0, x1 - 1), top + max(y0, y1 - 1))
        draw.rectangle(box, outline=colour, width=2)
    return tile


def _shown(view: Tensor, augmentation: Augmentation) -> Image.Image:
    """A view with the normalisation undone."""
    from PIL import Image

    mean, std = (torch.tensor(part) for part in (augmentation.mean, augmentation.std))
    pixels = view.float().permute(1, 2, 0) * std + mean  # (H, W, C)
    return Image.fromarray(three(pixels.numpy()))


def _framed(view: Image.Image, colour: tuple[int, int, int], side: int) -> Image.Image:
    from PIL import Image

    tile = Image.new("RGB", (side, side), colour)
    inner = side - 2 * _FRAME
    tile.paste(view.resize((inner, inner), Image.Resampling.BICUBIC), (_FRAME, _FRAME))
    return tile
