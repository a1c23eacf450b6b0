"""MoCo v2's augmentation, drawn as numbers: what to do to an image, apart from doing it.

All loaders take their randomness from :func:`draw_parameters` or, for many samples at once, from
:func:`draw_batch`, which gives the same. So they agree on every crop, flip,
factor and order by construction and differ only in the arithmetic of the pixels. A draw is
addressed, not sequential: it depends on the seed, the epoch, the sample and the view, and on
nothing that ran before, which is what makes workers, prefetching and resuming irrelevant to the
result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

QUERY_VIEW = 0
KEY_VIEW = 1
_SUBSTITUTE_STREAM = 2
_ORDER_STREAM = 3

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)

_CROP_ATTEMPTS = 10
_UNIFORMS = 2 * _CROP_ATTEMPTS + 16


@dataclass(frozen=True)
class Augmentation:
    """The distribution of the views.

    The defaults are MoCo v2's (Chen et al. 2020, arXiv 2003.04297), which DenseCL keeps.

    Attributes:
        scale: Range of the crop's area as a fraction of the image's area, uniform; 0 < low <= high
            <= 1.
        ratio: Range of the crop's width / height, log-uniform; 0 < low <= high.
        brightness: Factor drawn from [max(0, 1 - brightness), 1 + brightness].
        contrast: The same for the contrast about the image's mean gray.
        saturation: The same for the blend with the image's grayscale.
        hue: Shift in turns drawn from [-hue, hue], in HSV; at most 0.5.
        jitter_probability: How often those of the four above that are not 0 are applied at all, in
            an order drawn anew each time.
        gray_probability: How often the view becomes grayscale (three equal channels).
        blur_sigma: Range of the Gaussian blur's standard deviation in pixels of the view, uniform.
        blur_probability: How often the view is blurred.
        flip_probability: How often the view is mirrored left to right.
        mean: Mean subtracted from each channel after scaling to [0, 1] (ImageNet's R, G, B by
            default).
        std: What the difference is divided by.

    Raises:
        ValueError: A value lies outside its range.
    """

    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    jitter_probability: float = 0.8
    gray_probability: float = 0.2
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    blur_probability: float = 0.5
    flip_probability: float = 0.5
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, tuple):
                # Lists come from YAML; a frozen dataclass should still compare and hash by value.
                value = tuple(float(item) for item in value)
                object.__setattr__(self, field.name, value)
                if field.name in ("mean", "std"):  # one number a channel
                    continue
                if len(value) != len(field.default):
                    raise ValueError(
                        f"Augmentation: {field.name} must have {len(field.default)} numbers, "
                        f"got {value}"
                    )
        for name in ("scale", "ratio", "blur_sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(
                    f"Augmentation: {name} must satisfy 0 < low <= high, got {(low, high)}"
                )
        if self.scale[1] > 1:
            raise ValueError(
                f"Augmentation: scale is a fraction of the area, at most 1, got {self.scale}"
            )
        for name in ("jitter", "gray", "blur", "flip"):
            probability = getattr(self, f"{name}_probability")
            if not 0 <= probability <= 1:
                raise ValueError(
                    f"Augmentation: {name}_probability must lie in [0, 1], got {probability}"
                )
        for name in ("brightness", "contrast", "saturation"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"Augmentation: {name} must be at least 0, got {getattr(self, name)}"
                )
        if not 0 <= self.hue <= 0.5:
            raise ValueError(
                f"Augmentation: hue is in turns and must lie in [0, 0.5], got {self.hue}"
            )
        if not self.mean or len(self.mean) != len(self.std):
            raise ValueError(
                "Augmentation: mean and std must have one number for each channel, got "
                f"{len(self.mean)} and {len(self.std)}"
            )
        if min(self.std) <= 0:
            raise ValueError(f"Augmentation: std must be positive, got {self.std}")


class ViewParameters(NamedTuple):
    """Everything that turns one decoded image into one view.

    Attributes:
        box: x0, y0, x1, y1 of the crop in whole pixels of the decoded image, x1 and y1 exclusive.
        flip: Mirror left to right, last of all.
        order: The colour operations in the order of application (BRIGHTNESS, CONTRAST, SATURATION,
            HUE); empty for none.
        brightness: Factor, 1 for no change.
        contrast: Factor, 1 for no change.
        saturation: Factor, 1 for no change.
        hue: Shift in turns, 0 for no change.
        gray: Make the view grayscale after the colour operations.
        blur_sigma: Standard deviation in pixels of the view; 0 for no blur.
    """

    box: tuple[int, int, int, int]
    flip: bool
    order: tuple[int, ...]
    brightness: float
    contrast: float
    saturation: float
    hue: float
    gray: bool
    blur_sigma: float


def _stream(seed: int, epoch: int, stream: int, sample: int) -> np.random.Generator:
    """The random numbers at one address; Philox counts, so no two addresses overlap."""
    return np.random.Generator(np.random.Philox(key=(seed, epoch), counter=(0, stream, sample, 0)))


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The shuffled file indices of one epoch.

    Args:
        seed: The loader's seed, at least 0.
        epoch: The epoch, at least 0.
        count: The number of files.

    Returns:
        int64 array (count,), a permutation of 0 .. count - 1.
    """
    return _stream(seed, epoch, _ORDER_STREAM, 0).permutation(count)


def substitute_order(seed: int, epoch: int, sample: int, count: int, first: int = 16) -> list[int]:
    """Which files to try in place of an unreadable one, before going through all of them.

    Args:
        seed: The loader's seed.
        epoch: The epoch.
        sample: File index of the unreadable file.
        count: The number of files.
        first: How many candidates to draw.

    Returns:
        `first` file indices, repeats possible.
    """
    return _stream(seed, epoch, _SUBSTITUTE_STREAM, sample).integers(count, size=first).tolist()


def _draw_box(
    uniforms: np.ndarray, width: int, height: int, augmentation: Augmentation
) -> tuple[int, int, int, int]:
    """Random resized crop (Szegedy et al. 2015, arXiv 1409.4842), retried until the box fits."""
    log_low, log_high = math.log(augmentation.ratio[0]), math.log(augmentation.ratio[1])
    scale_low, scale_high = augmentation.scale
    for attempt in range(_CROP_ATTEMPTS):
        area = width * height * (scale_low + (scale_high - scale_low) * uniforms[2 * attempt])
        ratio = math.exp(log_low + (log_high - log_low) * uniforms[2 * attempt + 1])
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            x0 = int(uniforms[-2] * (width - box_width + 1))
            y0 = int(uniforms[-1] * (height - box_height + 1))
            return x0, y0, x0 + box_width, y0 + box_height
    # An image longer than the allowed ratios: its largest central box of the nearest allowed ratio.
    ratio = min(max(width / height, augmentation.ratio[0]), augmentation.ratio[1])
    box_width = max(1, min(width, round(height * ratio)))
    box_height = max(1, min(height, round(width / ratio)))
    x0, y0 = (width - box_width) // 2, (height - box_height) // 2
    return x0, y0, x0 + box_width, y0 + box_height


def draw_parameters(
    augmentation: Augmentation,
    *,
    seed: int,
    epoch: int,
    sample: int,
    view: int,
    width: int,
    height: int,
) -> ViewParameters:
    """Draw what happens to one view of one sample; a pure function of its arguments.

    Args:
        augmentation: The distribution.
        seed: The loader's seed, at least 0.
        epoch: The epoch, at least 0.
        sample: The sample's address, its file index.
        view: QUERY_VIEW or KEY_VIEW.
        width: Width of the decoded image in pixels.
        height: Height of the decoded image in pixels.

    Returns:
        The parameters; the box always holds at least one pixel.
    """
    uniforms = _stream(seed, epoch, view, sample).random(_UNIFORMS)
    box_uniforms, rest = (
        uniforms[: 2 * _CROP_ATTEMPTS + 2],
        uniforms[2 * _CROP_ATTEMPTS + 2 :].tolist(),
    )
    box = _draw_box(box_uniforms, width, height, augmentation)

    order: tuple[int, ...] = ()
    factors = [1.0, 1.0, 1.0]
    hue = 0.0
    if rest[0] < augmentation.jitter_probability:
        strengths = (
            augmentation.brightness,
            augmentation.contrast,
            augmentation.saturation,
            augmentation.hue,
        )
        # Sorting four uniforms gives each of the 24 orders the same chance.
        shuffled = sorted(range(4), key=rest[1:5].__getitem__)
        order = tuple(operation for operation in shuffled if strengths[operation] > 0)
        for operation, strength in enumerate(strengths[:HUE]):
            low, high = max(0.0, 1.0 - strength), 1.0 + strength
            factors[operation] = low + (high - low) * rest[5 + operation]
        hue = augmentation.hue * (2.0 * rest[8] - 1.0)
    sigma_low, sigma_high = augmentation.blur_sigma
    blurred = rest[10] < augmentation.blur_probability
    return ViewParameters(
        box=box,
        flip=rest[12] < augmentation.flip_probability,
        order=order,
        brightness=factors[BRIGHTNESS],
        contrast=factors[CONTRAST],
        saturation=factors[SATURATION],
        hue=hue,
        gray=rest[9] < augmentation.gray_probability,
        blur_sigma=sigma_low + (sigma_high - sigma_low) * rest[11] if blurred else 0.0,
    )


class BatchParameters(NamedTuple):
    """:class:`ViewParameters` of n views, as arrays.

    Attributes:
        box: int64 (n, 4), as there.
        flip: bool (n,).
        order: int64 (n, 4), the colour operations in the order of application; -1 for none.
        factors: float64 (n, 4), what each operation takes, by its number.
        gray: bool (n,).
        blur_sigma: float64 (n,), 0 for no blur.
    """

    box: np.ndarray
    flip: np.ndarray
    order: np.ndarray
    factors: np.ndarray
    gray: np.ndarray
    blur_sigma: np.ndarray


def draw_batch(
    augmentation: Augmentation,
    *,
    seed: int,
    epoch: int,
    samples: Sequence[int],
    sizes: np.ndarray,
) -> BatchParameters:
    """:func:`draw_parameters` for both views of many samples at once.

    Args:
        augmentation: The distribution.
        seed: The loader's seed, at least 0.
        epoch: The epoch, at least 0.
        samples: The n samples' addresses, their file indices.
        sizes: (n, 2), width and height of each decoded image in pixels.

    Returns:
        The same as one call for each: of the n query views, then of the n key views.
    """
    bits = np.random.Philox(key=(seed, epoch))
    generator, state = np.random.Generator(bits), bits.state
    uniforms = np.empty((2 * len(samples), _UNIFORMS))
    addresses = ((view, sample) for view in (QUERY_VIEW, KEY_VIEW) for sample in samples)
    for row, (view, sample) in enumerate(addresses):
        state["state"]["counter"] = np.array((0, view, sample, 0), dtype=np.uint64)
        bits.state = state
        generator.random(out=uniforms[row])
    sizes = np.concatenate([sizes, sizes])
    boxes = _boxes(augmentation, uniforms[:, : 2 * _CROP_ATTEMPTS + 2], sizes)
    rest = uniforms[:, 2 * _CROP_ATTEMPTS + 2 :]
    strengths = np.array(
        [augmentation.brightness, augmentation.contrast, augmentation.saturation, augmentation.hue]
    )
    jitter = rest[:, :1] < augmentation.jitter_probability
    order = np.argsort(rest[:, 1:5], axis=1, kind="stable")
    order[~(jitter & (strengths[order] > 0))] = -1
    low, high = np.maximum(0.0, 1.0 - strengths[:HUE]), 1.0 + strengths[:HUE]
    factors = np.where(jitter, low + (high - low) * rest[:, 5:8], 1.0)
    hue = np.where(jitter, augmentation.hue * (2.0 * rest[:, 8:9] - 1.0), 0.0)
    sigma_low, sigma_high = augmentation.blur_sigma
    sigma = sigma_low + (sigma_high - sigma_low) * rest[:, 11]
    return BatchParameters(
        box=boxes,
        flip=rest[:, 12] < augmentation.flip_probability,
        order=order,
        factors=np.hstack([factors, hue]),
        gray=rest[:, 9] < augmentation.gray_probability,
        blur_sigma=np.where(rest[:, 10] < augmentation.blur_probability, sigma, 0.0),
    )


def _boxes(augmentation: Augmentation, uniforms: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """int64 (n, 4): the first attempt's box that fits, else the largest central one."""
    log_low, log_high = np.log(augmentation.ratio[0]), np.log(augmentation.ratio[1])
    scale_low, scale_high = augmentation.scale
    width, height = sizes[:, :1], sizes[:, 1:]
    tries = uniforms[:, : 2 * _CROP_ATTEMPTS].reshape(-1, _CROP_ATTEMPTS, 2)
    area = width * height * (scale_low + (scale_high - scale_low) * tries[..., 0])
    ratio = np.exp(log_low + (log_high - log_low) * tries[..., 1])
    wide, high = np.round(np.sqrt(area * ratio)), np.round(np.sqrt(area / ratio))
    fits = (wide > 0) & (wide <= width) & (high > 0) & (high <= height)  # (n, attempts)
    first = fits.argmax(axis=1)[:, None]
    wide = np.take_along_axis(wide, first, 1)
    high = np.take_along_axis(high, first, 1)
    x0 = np.floor(uniforms[:, -2:-1] * (width - wide + 1))
    y0 = np.floor(uniforms[:, -1:] * (height - high + 1))
    none = ~fits.any(axis=1, keepdims=True)
    nearest = np.clip(width / height, *augmentation.ratio)
    widest = np.maximum(1, np.minimum(width, np.round(height * nearest)))
    highest = np.maximum(1, np.minimum(height, np.round(width / nearest)))
    wide, high = np.where(none, widest, wide), np.where(none, highest, high)
    x0 = np.where(none, (width - wide) // 2, x0)
    y0 = np.where(none, (height - high) // 2, y0)
    return np.concatenate([x0, y0, x0 + wide, y0 + high], axis=1).astype(np.int64)
