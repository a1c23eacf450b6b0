"""Images of any number of channels, with the values that their files hold.

The other way in, :func:`densecl_ext.data.images.decode`, makes 8-bit RGB of everything. Here
nothing is converted: a file's channels and depth stay, and a stated range makes numbers from 0 to 1
of them in float32.
"""

from __future__ import annotations

import io
import math
import zipfile
from typing import Any

import numpy as np

from densecl_ext.data.images import (
    _SAMPLES_TAG,
    Encoded,
    Reading,
    _low_bytes,
    _more_than_8_bits,
    _open,
    is_gray_with_alpha,
)

# Axes that tifffile names; all others are flattened into channels, in the file's order.
_Y, _X = "Y", "X"
_ORIENTATION_TAG = 274


def read_bands(
    file: Encoded, *, max_pixels: int, channels: int | None = None
) -> np.ndarray[Any, Any]:
    """A file's pixels as they are stored, turned upright.

    Grayscale has one channel, gray with alpha two, RGB three, RGBA and CMYK four; a palette is
    resolved to RGB. Of a TIFF all bands and pages of its first series count. An array has the
    shape (H, W), (H, W, C) or (C, H, W): the axis of `channels` entries is that of the channels,
    the last one where both fit, and the shortest where `channels` is not given. An .npz holds one
    array, or names the image "image".

    Args:
        file: What passed the gate.
        max_pixels: Width times height above which a file is refused.
        channels: How many are expected; None takes what comes.

    Returns:
        (H, W, C), of the file's own dtype.

    Raises:
        ImportError: The file is a TIFF that Pillow does not read in full, and tifffile is missing.
        Exception: The bytes do not decode, or hold another number of channels.
    """
    readers = {"TIFF": _from_tiff, "NPY": _from_npy, "NPZ": _from_npz}
    values = readers.get(file.kind, _from_pillow)(file, max_pixels, channels)
    if values.dtype == bool:
        values = values.astype(np.uint8) * np.uint8(255)
    if values.dtype.kind not in "uif":
        raise ValueError(f"pixels of dtype {values.dtype}, expected integers or floats")
    if channels is not None and values.shape[2] != channels:
        raise ValueError(f"{values.shape[2]} channels, expected {channels}")
    return _upright(values, file.orientation)


def decode_bands(
    file: Encoded, reading: Reading
) -> tuple[np.ndarray[Any, Any], tuple[float, float]]:
    """A file's pixels, and the values of them that become 0 and 1.

    Files of 8 bits have 0 and 255; `reading.value_range` is for all others, and None means the
    whole range of their integers.

    Args:
        file: What passed the gate.
        reading: Limits, range and the number of channels.

    Returns:
        (H, W, C) of the file's own dtype, and the range; :func:`scaled` applies it.

    Raises:
        Exception: As :func:`read_bands`; ValueError for floating point without a range.
    """
    values = read_bands(file, max_pixels=reading.max_pixels, channels=reading.channels)
    natural = natural_range(values.dtype)
    stated = natural if values.dtype == np.uint8 else reading.value_range or natural
    if stated is None:
        raise ValueError(
            "floating-point pixels have no fixed range; state one by value_range, or have it "
            "measured (auto)"
        )
    return values, stated


def natural_range(dtype: np.dtype[Any]) -> tuple[float, float] | None:
    """What black and white are where nothing else is stated; None for floating point."""
    if dtype.kind == "f":
        return None
    return 0.0, float(np.iinfo(dtype).max)


def scaled(values: np.ndarray[Any, Any], value_range: tuple[float, float]) -> np.ndarray[Any, Any]:
    """Numbers from 0 to 1 in float32: low becomes 0, high 1, what lies beyond is cut, NaN is 0."""
    low, high = value_range
    made = (values.astype(np.float32) - np.float32(low)) * np.float32(1 / (high - low))
    return np.clip(np.nan_to_num(made, copy=False, nan=0.0), 0.0, 1.0)


def _require_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ValueError(
            f"{width} x {height} pixels, more than max_pixels = {max_pixels:,}; "
            "raise that option to use the image"
        )
    if width < 1 or height < 1:
        raise ValueError(f"{width} x {height} pixels")


def _from_pillow(file: Encoded, max_pixels: int, _: int | None) -> np.ndarray[Any, Any]:
    opened = _open(file)
    _require_pixels(*opened.size, max_pixels)
    deep, gray_alpha = _more_than_8_bits(opened), is_gray_with_alpha(opened)
    opened.load()
    if opened.mode in ("P", "PA", "YCbCr", "LAB", "HSV"):
        opened = opened.convert("RGB")
    elif opened.mode == "1":
        opened = opened.convert("L")
    values = np.asarray(opened)
    if deep and opened.mode[:1] not in ("I", "F"):
        # Pillow keeps the high bytes of 16-bit colours; read in the other order, it keeps the low.
        values = values.astype(np.uint16) << 8 | np.asarray(_low_bytes(file))
    if gray_alpha:
        values = values[..., (0, 3)]
    if opened.mode == "I" and values.min() >= 0 and values.max() < 65536:
        values = values.astype(np.uint16)  # Pillow's form of 16 bits
    return values.reshape(*values.shape[:2], -1)


def _from_tiff(file: Encoded, max_pixels: int, channels: int | None) -> np.ndarray[Any, Any]:
    try:
        import tifffile
    except ImportError:
        opened: Any = _open(file)
        samples = opened.tag_v2.get(_SAMPLES_TAG, 1)
        if getattr(opened, "n_frames", 1) == 1 and samples == len(opened.getbands()):
            return _from_pillow(file, max_pixels, channels)
        raise ImportError(
            "TIFF files with several bands or pages need tifffile, which is not installed: "
            "pip install 'densecl_ext[images]'"
        ) from None
    with tifffile.TiffFile(io.BytesIO(file.data)) as tiff:
        series = tiff.series[0]
        axes = series.axes
        if _Y not in axes or _X not in axes:
            raise ValueError(f"a TIFF with the axes {axes}, expected rows and columns (Y, X)")
        height, width = series.shape[axes.index(_Y)], series.shape[axes.index(_X)]
        _require_pixels(width, height, max_pixels)
        depth = math.prod(series.shape) // (height * width)
        if channels is not None and depth != channels:
            raise ValueError(f"{depth} channels, expected {channels}")
        values = series.asarray()
        tag = series.keyframe.tags.get(_ORIENTATION_TAG)
    values = np.moveaxis(values, (axes.index(_Y), axes.index(_X)), (0, 1))
    return _upright(values.reshape(height, width, -1), int(tag.value) if tag else 1)


def _from_npy(file: Encoded, max_pixels: int, channels: int | None) -> np.ndarray[Any, Any]:
    return _array(io.BytesIO(file.data), len(file.data), max_pixels, channels)


def _from_npz(file: Encoded, max_pixels: int, channels: int | None) -> np.ndarray[Any, Any]:
    with zipfile.ZipFile(io.BytesIO(file.data)) as archive:
        members = [name for name in archive.namelist() if name.endswith(".npy")]
        if len(members) > 1 and "image.npy" in members:
            members = ["image.npy"]
        if len(members) != 1:
            names = ", ".join(name.removesuffix(".npy") for name in members[:8]) or "nothing"
            raise ValueError(f'an .npz must hold one array or one named "image", got {names}')
        size = archive.getinfo(members[0]).file_size
        with archive.open(members[0]) as stream:
            return _array(stream, size, max_pixels, channels)


def _array(stream: Any, size: int, max_pixels: int, channels: int | None) -> np.ndarray[Any, Any]:
    """An array (H, W, C) whose header promises no more than there is."""
    form = np.lib.format
    version = form.read_magic(stream)
    read = form.read_array_header_1_0 if version == (1, 0) else form.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if dtype.hasobject:
        raise ValueError("an array of Python objects, expected numbers")
    if len(shape) not in (2, 3):
        raise ValueError(f"an array of shape {shape}, expected (H, W), (H, W, C) or (C, H, W)")
    axis = _channel_axis(shape, channels)
    sides = [side for place, side in enumerate(shape) if place != axis]
    _require_pixels(sides[1], sides[0], max_pixels)
    count = math.prod(shape)
    needed = count * dtype.itemsize
    data = stream.read(needed) if needed <= size else b""
    if len(data) < needed:
        raise ValueError(f"an array of shape {shape} is cut off")
    flat = np.frombuffer(data, dtype=dtype, count=count)
    values = flat.reshape(shape, order="F" if fortran else "C")
    values = values[..., None] if axis is None else np.moveaxis(values, axis, 2)
    return values.astype(dtype.newbyteorder("="), copy=False)


def _channel_axis(shape: tuple[int, ...], channels: int | None) -> int | None:
    if len(shape) == 2:
        return None
    if channels is None:
        return 0 if shape[0] < min(shape[1:]) else 2
    fitting = [axis for axis in (2, 0) if shape[axis] == channels]
    if not fitting:
        raise ValueError(f"an array of shape {shape} has no axis of {channels} channels")
    return fitting[0]


def _upright(values: np.ndarray[Any, Any], orientation: int) -> np.ndarray[Any, Any]:
    """EXIF's orientation 1 to 8 undone, of (H, W, C)."""
    if orientation in (5, 6, 7, 8):
        values = values.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        values = values[:, ::-1]
    if orientation in (3, 4, 7, 8):
        values = values[::-1]
    return values
