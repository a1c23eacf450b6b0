"""What has to be measured over images before they are read: their range, each channel's mean.

Once, over a sample drawn from a fixed seed: the same images give the same numbers, which then
belong to the run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from densecl_ext.data.bands import decode_bands, read_bands, scaled
from densecl_ext.data.images import Reading
from densecl_ext.data.source import ImageSource

SAMPLE = 256
# Pixels of an image that are looked at, evenly over it.
_PIXELS = 16_384
# Images that may be looked at in search of those that count.
_SEARCH = 2048
# Share of the values that may lie beyond each end of a measured range.
_BEYOND = 1e-3
# A lowest value below this share of the highest becomes 0, so that dark stays dark.
_NEARLY_ZERO = 0.05


class ChannelStatistics(NamedTuple):
    """Mean and deviation of each channel, of values from 0 to 1.

    Attributes:
        mean: C numbers.
        std: C numbers.
        images: How many images were looked at.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    images: int


def measure_range(source: ImageSource, reading: Reading) -> tuple[float, float] | None:
    """Which values should become black and white, of the images with more than 8 bits.

    All but a thousandth of the values at each end lie between, with `reading.channels` of every
    channel by itself, so that one of few large values keeps them; infinite ones and NaN do not
    count.

    Args:
        source: The images.
        reading: Limits and number of channels.

    Returns:
        Low and high, with four digits; None where all images have 8 bits.
    """
    seen = []
    for values in _values(source, reading):
        if values.dtype == np.uint8:
            continue
        seen.append((values if reading.channels else values.reshape(-1, 1)).astype(np.float64))
        if len(seen) == SAMPLE:
            break
    pooled = np.concatenate(seen).T if seen else np.zeros((0, 0))  # (C, n)
    finite = [channel[np.isfinite(channel)] for channel in pooled]
    ends = [np.quantile(channel, (_BEYOND, 1 - _BEYOND)) for channel in finite if channel.size]
    if not ends:
        return None
    low, high = min(end[0] for end in ends), max(end[1] for end in ends)
    if 0 <= low <= _NEARLY_ZERO * high:
        low = 0.0
    step = 10.0 ** (math.floor(math.log10(max(abs(low), abs(high)))) - 3) if high or low else 1.0
    low, high = math.floor(low / step) * step, math.ceil(high / step) * step
    low, high = float(f"{low:.6g}"), float(f"{high:.6g}")
    return low, (high if high > low else low + 1.0)


def measure_channels(source: ImageSource, reading: Reading) -> ChannelStatistics:
    """Mean and deviation of each channel over a sample of the images, with six digits.

    Args:
        source: The images.
        reading: As training reads them, with the range.

    Raises:
        ValueError: No image of the sample reads.
    """
    count, total, squares = 0, 0.0, 0.0
    images = 0
    for index in _order(source):
        try:
            values, stated = decode_bands(source.encoded(index, reading), reading)
        except (MemoryError, ImportError):
            raise
        except Exception:
            continue
        pixels = scaled(_thinned(values), stated).astype(np.float64)  # (n, C)
        count += len(pixels)
        total = total + pixels.sum(axis=0)
        squares = squares + (pixels**2).sum(axis=0)
        images += 1
        if images == SAMPLE:
            break
    if not count:
        raise ValueError("build_loader: no image reads of which to measure mean and deviation")
    mean: Any = total / count
    deviation = np.sqrt(np.maximum(squares / count - mean**2, 0.0))
    # A channel that is the same everywhere says nothing, and must not be divided by nothing.
    deviation = np.where(deviation > 1e-6, deviation, 1.0)
    return ChannelStatistics(_digits(mean), _digits(deviation), images)


def _digits(values: np.ndarray[Any, Any]) -> tuple[float, ...]:
    return tuple(float(f"{value:.6g}") for value in values)


def _order(source: ImageSource) -> list[int]:
    return np.random.default_rng(0).permutation(len(source))[:_SEARCH].tolist()


def _values(source: ImageSource, reading: Reading) -> Iterator[np.ndarray[Any, Any]]:
    for index in _order(source):
        try:
            file = source.encoded(index, reading)
            if file.kind in ("JPEG", "WEBP", "BMP", "GIF"):  # which have 8 bits
                continue
            values = read_bands(file, max_pixels=reading.max_pixels, channels=reading.channels)
        except (MemoryError, ImportError):
            raise
        except Exception:
            continue
        yield _thinned(values)


def _thinned(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """(n, C): some pixels of (H, W, C), evenly over it."""
    pixels = values.reshape(-1, values.shape[2])
    return pixels[:: max(1, len(pixels) // _PIXELS)]
