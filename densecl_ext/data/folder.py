"""Images in a folder: finding them, and reading one as RGB with Pillow."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
)

_EXIF_ORIENTATION = 0x0112


class UnreadableImageWarning(UserWarning):
    """An image file could not be read and was skipped."""


def find_images(root: str | os.PathLike[str]) -> list[Path]:
    """List the image files under a folder, in any directory tree.

    Files count by extension (JPEG, PNG, WebP, BMP, TIFF, GIF; any case). Names that begin with a
    dot are left out, files and folders alike. Symbolic links are followed, each folder once.
    Nothing is opened.

    Args:
        root: The folder.

    Returns:
        The paths, `root` included, sorted by their parts, so that the list is the same on every
        file system.

    Raises:
        ValueError: `root` is no folder, or holds no image file.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"find_images: root must be a folder, got {str(root)!r}, which is none")
    found: list[Path] = []
    visited: set[tuple[int, int]] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in visited:
            subfolders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        # os.walk follows this list: sorted, of two links to a folder the same one wins everywhere.
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        found.extend(
            Path(folder, name)
            for name in names
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS
        )
    if not found:
        raise ValueError(
            f"find_images: no image under {str(root)!r}; looked in every subfolder for "
            + ", ".join(sorted(EXTENSIONS))
        )
    return sorted(found, key=lambda path: path.parts)


def orientation_of(image: Image.Image) -> int:
    """EXIF orientation of an opened image: 1 is upright, from 5 on width and height swap."""
    orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def decode_rgb(data: bytes) -> Image.Image:
    """Decode an image file's bytes to 8-bit RGB, turned upright by its EXIF orientation.

    Grayscale is repeated over three channels, palettes are resolved, CMYK is converted, an alpha
    channel is dropped (the stored colours count, whatever their transparency), 16-bit gray keeps
    its high byte, and of an animation the first frame is taken.

    Args:
        data: The file's content.

    Returns:
        A loaded image of mode RGB.

    Raises:
        Exception: The bytes do not decode; Pillow's plugins raise many kinds (OSError, SyntaxError,
            ValueError, ...).
    """
    from PIL import Image, ImageOps

    if not data:
        raise ValueError("the file is empty")
    with Image.open(io.BytesIO(data)) as opened:
        opened.load()
        image: Image.Image = opened
        if orientation_of(opened) != 1:
            image = ImageOps.exif_transpose(opened)
        return _to_rgb(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    import numpy as np
    from PIL import Image

    if image.mode == "RGB":
        return image.copy()
    if image.mode.startswith("I"):
        # Pillow clips 16-bit gray at 255 when it converts, which would turn such images white.
        gray = np.asarray(image).astype(np.int64)
        image = Image.fromarray(np.clip(gray >> 8, 0, 255).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError(
            "floating-point pixels have no fixed range; convert the file to 8 or 16 bits"
        )
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def reason_of(error: BaseException) -> str:
    """One line that says why a file did not read, without its path."""
    if isinstance(error, OSError) and error.strerror:
        return f"{type(error).__name__}: {error.strerror}"
    text = " ".join(str(error).split())
    if "cannot identify image file" in text:
        return "not an image, or a format that Pillow does not know"
    return f"{type(error).__name__}: {text}"[:200]
