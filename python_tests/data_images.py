"""Small images with the statistics of photographs, and folders of them, for the loaders' tests."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter


def scene(seed: int, width: int = 128, height: int = 96) -> Image.Image:
    """Coloured shapes over a colour gradient, with soft shading and grain."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    base = rng.uniform(30, 225, 3) + 120 * (x[..., None] * rng.normal(size=3) + y[..., None])
    for _ in range(6):
        centre, axes = rng.uniform(0, 1, 2), rng.uniform(0.05, 0.35, 2)
        inside = ((x - centre[0]) / axes[0]) ** 2 + ((y - centre[1]) / axes[1]) ** 2 < 1
        base[inside] = rng.uniform(0, 255, 3) + 60 * x[inside, None]
    shade = np.asarray(
        Image.fromarray(rng.integers(0, 255, (height, width), dtype=np.uint8)).filter(
            ImageFilter.GaussianBlur(6)
        ),
        dtype=np.float64,
    )
    pixels = base + (shade[..., None] - 127) + rng.normal(scale=6, size=(height, width, 1))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    """The image as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo_folder(folder: Path, count: int = 24) -> Path:
    """A folder of JPEG scenes, or the folder that DENSECL_TEST_PHOTOS names, where it is set."""
    if os.environ.get("DENSECL_TEST_PHOTOS"):
        return Path(os.environ["DENSECL_TEST_PHOTOS"])
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        width = 112 + 8 * (number % 5)
        data = encode(scene(number, width, 96 + 6 * (number % 3)), "JPEG", quality=92)
        (folder / f"{number:03}.jpg").write_bytes(data)
    return folder
