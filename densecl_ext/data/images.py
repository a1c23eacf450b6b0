"""The one way in which image files are read: what is let in, and how it becomes 8-bit RGB."""

from __future__ import annotations

import importlib
import io
import os
import stat
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from densecl_ext.data.metadata import Stripped, strip_jpeg, strip_png, strip_webp

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 178_956_970  # Pillow's own limit: 512 MiB of RGB

# The formats that are read. Pillow is asked for these decoders alone, by the file's first bytes:
# what it would do with others goes as far as starting programs.
_DECODERS = {
    "JPEG": ("PIL.JpegImagePlugin", "JpegImageFile"),
    "PNG": ("PIL.PngImagePlugin", "PngImageFile"),
    "WEBP": ("PIL.WebPImagePlugin", "WebPImageFile"),
    "BMP": ("PIL.BmpImagePlugin", "BmpImageFile"),
    "TIFF": ("PIL.TiffImagePlugin", "TiffImageFile"),
    "GIF": ("PIL.GifImagePlugin", "GifImageFile"),
}
_SAMPLES_TAG = 277  # SamplesPerPixel of TIFF
_GRAY_ALPHA = "LA;16B"  # how Pillow calls PNG's 16-bit gray with alpha
_STRIP = {"JPEG": strip_jpeg, "PNG": strip_png, "WEBP": strip_webp}
_HEAD = 16

# A 16-bit image with fewer of 256 levels than this is reported to use almost none of its range.
_NARROW = 32


class UnreadableImageWarning(UserWarning):
    """An image file could not be read and was skipped."""


class NarrowRangeWarning(UserWarning):
    """An image of more than 8 bits uses almost none of the range that its values are read in."""


@dataclass(frozen=True)
class Reading:
    """How image files are read.

    Attributes:
        max_pixels: Width times height above which a file is refused.
        value_range: The values of 16-bit, 32-bit and floating-point files that become black and
            white; None takes 0 to 65535, and refuses floating point.
        channels: How many channels images have, as stored; None makes RGB of all.
        reduced_jpeg: Decode JPEG files at 1/2, 1/4 or 1/8 where no more is needed.

    Raises:
        ValueError: A value lies outside its range.
    """

    max_pixels: int = MAX_PIXELS
    value_range: tuple[float, float] | None = None
    channels: int | None = None
    reduced_jpeg: bool = False

    def __post_init__(self) -> None:
        if self.max_pixels < 1:
            raise ValueError(f"max_pixels must be at least 1, got {self.max_pixels}")
        if self.channels is not None and self.channels < 1:
            raise ValueError(f"channels must be at least 1, got {self.channels}")
        if self.value_range is not None:
            low, high = (float(value) for value in self.value_range)
            if not -np.inf < low < high < np.inf:
                raise ValueError(
                    f"value_range must be two finite numbers, low < high, got {self.value_range}"
                )
            object.__setattr__(self, "value_range", (low, high))


DEFAULT = Reading()


class Encoded(NamedTuple):
    """An image file's bytes, after the gate and without metadata.

    Attributes:
        kind: "JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", or of arrays "NPY" or "NPZ".
        data: What a decoder gets.
        orientation: EXIF's, 1 to 8; 1 for kinds whose decoder turns the image.
        whole: Whether everything that can be checked without decoding is in order.
    """

    kind: str
    data: bytes
    orientation: int
    whole: bool


def _kind_of(head: bytes) -> str:
    if head[:3] == b"\xff\xd8\xff":
        return "JPEG"
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        return "PNG"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[:2] == b"BM":
        return "BMP"
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "TIFF"
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    if head[:6] == b"\x93NUMPY":
        return "NPY"
    if head[:4] == b"PK\3\4":
        return "NPZ"
    raise ValueError(f"not an image, or of none of the formats {', '.join(_DECODERS)}")


def encoded(data: bytes) -> Encoded:
    """Let a file's content through the gate.

    Args:
        data: The content.

    Returns:
        The content without metadata.

    Raises:
        ValueError: The file is empty or of no format that is read.
    """
    if not data:
        raise ValueError("the file is empty")
    kind = _kind_of(data[:_HEAD])
    strip = _STRIP.get(kind)
    stripped = strip(data) if strip else Stripped(data, 1, False)
    return Encoded(kind, *stripped)


def read_encoded(path: str | os.PathLike[str], reading: Reading = DEFAULT) -> Encoded:
    """Read an image file's content through the gate.

    Neither pipes nor devices are opened for reading, and no more is read of a file than an image of
    `max_pixels` can take.

    Args:
        path: The file.
        reading: The limits.

    Returns:
        The content without metadata.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no regular file, empty, too large, or of no format that is read.
    """
    _require_regular(os.stat(path))
    # The name may mean another file by now; opening a pipe must not wait for its other end.
    number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    with open(number, "rb", buffering=0) as file:
        status = os.fstat(number)
        _require_regular(status)
        head = file.read(_HEAD)
        if not head:
            raise ValueError("the file is empty")
        _kind_of(head)
        require_size(status.st_size, reading)
        # Room is made for as much as is asked for, which the limit of many channels would not get.
        return encoded(head + file.read(min(_limit(reading), status.st_size)))


def require_size(size: int, reading: Reading) -> None:
    """Raises ValueError for more bytes than an image of `max_pixels` can take."""
    if size > _limit(reading):
        raise ValueError(
            f"{size:,} bytes, more than an image of max_pixels = {reading.max_pixels:,} takes"
        )


def _limit(reading: Reading) -> int:
    # 16-bit RGBA or 64 bits a channel, and metadata
    return 8 * (reading.channels or 1) * reading.max_pixels + (64 << 20)


def _require_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kinds = {
            stat.S_IFIFO: "a named pipe",
            stat.S_IFCHR: "a device",
            stat.S_IFBLK: "a device",
            stat.S_IFSOCK: "a socket",
            stat.S_IFDIR: "a folder",
        }
        kind = kinds.get(stat.S_IFMT(status.st_mode), "none")
        raise ValueError(f"expected a regular file, got {kind}")


class Decoded(NamedTuple):
    """A decoded image.

    Attributes:
        image: Mode RGB, upright.
        narrow: What it uses of its range where that is almost nothing, else "".
    """

    image: Image.Image
    narrow: str


def decode(file: Encoded, reading: Reading = DEFAULT, shrink: int = 1) -> Decoded:
    """Decode to 8-bit RGB, turned upright.

    Grayscale is repeated over three channels, palettes are resolved, CMYK is converted, an alpha
    channel is dropped (the stored colours count, whatever their transparency), and of an animation
    the first frame is taken. Of more than 8 bits `reading.value_range` becomes 0 to 255.

    Args:
        file: What passed the gate.
        reading: Limits and range.
        shrink: 2, 4 or 8 decodes a JPEG file at that fraction of its size, by fewer frequencies of
            its blocks, which takes less time; other formats stay as they are.

    Returns:
        The image.

    Raises:
        Exception: The bytes do not decode; Pillow's plugins raise many kinds (OSError, SyntaxError,
            ValueError, ...).
    """
    opened = _open(file)
    width, height = opened.size
    if width * height > reading.max_pixels:
        raise ValueError(
            f"{width} x {height} pixels, more than max_pixels = {reading.max_pixels:,}; "
            "raise that option to use the image"
        )
    _require_all_bands(opened, file.kind)
    if shrink > 1 and file.kind == "JPEG":
        opened.draft(None, (max(1, width // shrink), max(1, height // shrink)))
    deep = _more_than_8_bits(opened)
    opened.load()
    narrow = ""
    if deep:
        image, narrow = _from_many_bits(opened, file, reading)
    elif opened.mode == "P" and "transparency" in opened.info:
        image = opened.convert("RGBA").convert("RGB")
    else:
        image = opened if opened.mode == "RGB" else opened.convert("RGB")
    return Decoded(_upright(image, file.orientation), narrow)


def _require_all_bands(opened: Any, kind: str) -> None:
    """Refuse a TIFF of several bands of which Pillow would take the first alone."""
    samples = opened.tag_v2.get(_SAMPLES_TAG, 1) if kind == "TIFF" else 1
    if samples > 1 and len(opened.getbands()) == 1:
        raise ValueError(
            f"a TIFF of {samples} bands, which cannot be read as RGB; channels {samples} reads it"
        )


def header_size(file: Encoded) -> tuple[int, int, str]:
    """Width and height as displayed, and Pillow's mode, from the header alone.

    Raises:
        Exception: As :func:`decode`.
    """
    opened = _open(file)
    width, height = opened.size
    return (width, height, opened.mode) if file.orientation < 5 else (height, width, opened.mode)


def decode_rgb(data: bytes, reading: Reading = DEFAULT) -> Image.Image:
    """:func:`decode` a file's content; warns where it uses almost none of its range."""
    return _warned(decode(encoded(data), reading))


def read_rgb(path: str | os.PathLike[str], reading: Reading = DEFAULT) -> Image.Image:
    """Read and decode an image file through the gate.

    Args:
        path: The file.
        reading: Limits and range.

    Returns:
        A loaded image of mode RGB, upright.

    Raises:
        Exception: As :func:`read_encoded` and :func:`decode`; :func:`reason_of` makes one line.
    """
    return _warned(decode(read_encoded(path, reading), reading))


def _warned(decoded: Decoded) -> Image.Image:
    if decoded.narrow:
        warnings.warn(decoded.narrow, NarrowRangeWarning, stacklevel=3)
    return decoded.image


def _open(file: Encoded) -> Image.Image:
    if file.kind not in _DECODERS:
        raise ValueError(
            "no image: an array or an archive, and arrays are read with channels N alone"
        )
    # Not Image.open: its limit on pixels is global, and does not say how to raise it.
    module, name = _DECODERS[file.kind]
    return getattr(importlib.import_module(module), name)(io.BytesIO(file.data))


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    from PIL.Image import Transpose

    methods = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return image.transpose(methods[orientation]) if orientation in methods else image


# ---------------------------------------------------------------- more than 8 bits


def _raw_mode(image: Image.Image) -> str:
    """How Pillow is going to unpack the pixels, such as "RGB;16B"."""
    for tile in getattr(image, "tile", ()):
        args = tile[3]
        first = args[0] if isinstance(args, (tuple, list)) and args else args
        return first if isinstance(first, str) else ""
    return ""


def _more_than_8_bits(image: Image.Image) -> bool:
    return image.mode[:1] in ("I", "F") or ";16" in _raw_mode(image)


def _from_many_bits(image: Image.Image, file: Encoded, reading: Reading) -> tuple[Image.Image, str]:
    """8-bit RGB, and what is used of the range if that is almost nothing."""
    from PIL import Image as pillow

    stated = reading.value_range
    if image.mode == "F" and stated is None:
        raise ValueError(
            "floating-point pixels have no fixed range; state one by value_range, or convert the "
            "file to 8 or 16 bits"
        )
    if image.mode[:1] in ("I", "F"):
        values = np.asarray(image)
    else:
        # Pillow keeps the high bytes of 16-bit colours. Read in the other order of bytes, the same
        # file yields the low ones.
        values = np.asarray(image.convert("RGB")).astype(np.uint16) << 8
        if stated is not None:
            values |= np.asarray(_low_bytes(file).convert("RGB"))
    if stated is None:
        levels = np.clip(values.astype(np.int64) >> 8, 0, 255).astype(np.uint8)
    else:
        low, high = stated
        scaled = (values.astype(np.float64) - low) * (255 / (high - low))
        levels = np.clip(np.nan_to_num(scaled, nan=0.0) + 0.5, 0, 255).astype(np.uint8)
    narrow = ""
    used = int(levels.max()) - int(levels.min()) + 1
    if used <= _NARROW:
        low, high = stated or (0, 65535)
        narrow = (
            f"an image of more than 8 bits with values from {values.min():g} to {values.max():g} "
            f"becomes {used} of 256 levels, because {low:g} to {high:g} are read as black to "
            "white; state the range of such images by value_range"
        )
    return pillow.fromarray(levels).convert("RGB"), narrow


def is_gray_with_alpha(image: Image.Image) -> bool:
    """Whether it is 16-bit gray with alpha, which Pillow makes RGBA of 8 bits."""
    return _raw_mode(image) == _GRAY_ALPHA


def _low_bytes(file: Encoded) -> Image.Image:
    image = _open(file)
    mode = _raw_mode(image)
    # Pillow has no other order for gray with alpha; its four bytes are read as they lie.
    gray_alpha = mode == _GRAY_ALPHA
    other = mode[:-1] + {"B": "L", "L": "B", "N": "B"}.get(mode[-1:], "")
    other = "RGBA" if gray_alpha else other
    tiles = []
    for tile in image.tile:  # type: ignore[attr-defined]
        args = tile[3]
        args = (other, *args[1:]) if isinstance(args, (tuple, list)) else other
        tiles.append((*tile[:3], args) if type(tile) is tuple else tile._replace(args=args))
    image.tile = tiles  # type: ignore[attr-defined]
    try:
        image.load()
    except (ValueError, OSError) as error:
        raise ValueError(f"value_range: {mode} cannot be read in full: {error}") from None
    if gray_alpha:
        from PIL import Image as pillow

        _, gray, _, alpha = image.split()
        return pillow.merge("RGBA", (gray, gray, gray, alpha))
    return image


# ---------------------------------------------------------------- words


def reason_of(error: BaseException) -> str:
    """One line that says why a file did not read, without its path."""
    if isinstance(error, OSError) and error.strerror:
        return f"{type(error).__name__}: {error.strerror}"
    text = printable(" ".join(str(error).split()))
    if "cannot identify image file" in text or isinstance(error, SyntaxError) and not text:
        return "not an image, or damaged at its beginning"
    return f"{type(error).__name__}: {text}"[:240]


def printable(text: object) -> str:
    """A name for terminals and logs: control and other invisible characters escaped."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape", "replace").decode()
        for letter in str(text)
    )
