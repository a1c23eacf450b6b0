"""The DALI graph that turns encoded images and drawn parameters into two views.

Nothing random happens here: crops, factors and orders come in as numbers from
:func:`densecl_ext.data.augmentation.draw_parameters`, one row for each view. The operators are
chosen to follow Pillow's 8-bit arithmetic, which MoCo v2 was trained with, operation by operation:

- on a CPU images come decoded by Pillow; resizing is antialiased bilinear, within a level of
  Pillow's but for the outermost pixels, where DALI repeats the crop's edge;
- brightness, contrast and saturation round towards zero, and contrast turns about the rounded mean
  gray of the image as it is at that moment;
- hue is rotated in HSV. DALI's own hue operator rotates in YIQ, which on photographs lies further
  from torchvision's result than leaving the hue alone does;
- blur is a true Gaussian, where Pillow approximates one by three box filters.

With `device="gpu"` the same graph decodes by nvJPEG and runs every pixel operator on the GPU. Only
the drawn numbers go there and nothing comes back, so that no thread of DALI waits for its GPU in
the middle of a batch. That path has not yet run on a GPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from nvidia.dali import fn, math, pipeline_def
from nvidia.dali.types import Constant, DALIDataType, DALIImageType, DALIInterpType

from densecl_ext.data.augmentation import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    SATURATION,
    Augmentation,
    ViewParameters,
)

ENCODED = "encoded"
VIEW_INPUTS = ("query_parameters", "key_parameters")

# Columns of a view's row of numbers. Hue is the expensive operation and has one place in the graph;
# of the other three, those that come before it fill the first three steps, the rest the last three.
_Y0, _X0, _HEIGHT, _WIDTH, _FLIP, _JITTER, _HUE, _GRAY, _SIGMA = range(9)
_OPERATION = 9  # six columns: the operation of each step
_FACTOR = 15  # six columns: its factor
_NOTHING = -1

# Added to results that DALI rounds, so that they come out truncated, as Pillow leaves them. A
# little short of one half, lest whole numbers fall below themselves.
_TRUNCATE = -0.498


def row_of(parameters: ViewParameters) -> np.ndarray:
    """Lay out a view's parameters for the graph.

    Args:
        parameters: The drawn parameters.

    Returns:
        float32 (21,).
    """
    x0, y0, x1, y1 = parameters.box
    factors = (parameters.brightness, parameters.contrast, parameters.saturation)
    operations, values = [_NOTHING] * 6, [1.0] * 6
    after_hue = False
    for place, operation in enumerate(parameters.order):
        if operation == HUE:
            after_hue = True
        else:
            step = place + 2 if after_hue else place
            operations[step], values[step] = operation, factors[operation]
    # Pillow holds hue in 256 steps a turn, and torchvision truncates the shift to 1/255 turns.
    hue = int(parameters.hue * 255) / 256
    return np.array(
        [y0, x0, y1 - y0, x1 - x0, parameters.flip, bool(parameters.order), 6 * hue]
        + [parameters.gray, parameters.blur_sigma, *operations, *values],
        dtype=np.float32,
    )


def _gray(image: Any) -> Any:
    """ITU-R BT.601 luma (H, W, 1)."""
    return fn.color_space_conversion(
        image, image_type=DALIImageType.RGB, output_type=DALIImageType.GRAY
    )


def _beside(number: Any, device: str) -> Any:
    """A number of each sample where arithmetic with its image takes it."""
    return number.gpu() if device == "gpu" else number


def _rotate_hue(image: Any, sextants: Any, most: float) -> Any:
    """Rotate the hue in HSV by a signed number of sextants of at most `most`, itself at most 3.

    Value and chroma stay. Works with hue times chroma, which needs no division and is 0 for gray.
    With `red` the signed distance of a hue from red on a circle of 6 chroma, each channel is the
    minimum plus a trapezoid of its own primary's distance: whole up to 1 chroma away, nothing from
    2 on. Every operator is a pass over the batch in memory, so there are few and their integers are
    short: 8 bits where nothing is negative or above 255, else 16.
    """
    zero, one, two = (Constant(value, dtype=DALIDataType.INT16) for value in range(3))
    r, g, b = (image[:, :, channel : channel + 1] for channel in range(3))
    high, between = math.max(g, b), math.min(g, b)
    value, low = math.max(high, r), math.min(between, r)
    chroma = value - low
    chroma2 = chroma * two
    chroma4 = chroma2 * two
    # |g - b| where red leads, one chroma and more where it does not.
    distance = (value - r) + (math.max(between, r) - r) * two + (high - between)
    red = distance * (one - (b > g) * two) + fn.cast(chroma * sextants, dtype=DALIDataType.INT16)

    if most > 1:
        # Beyond one sextant a hue may leave the range where one fold of the distances is enough.
        chroma3 = chroma2 + chroma
        red = red + (chroma3 * two) * ((red < zero - chroma3) - (red > chroma3) * one)

    def channel_at(distance: Any) -> Any:
        # The second term serves distances that went round the circle.
        rise = math.max(chroma2 - distance, distance - chroma4)
        return fn.cast(low + math.clamp(rise, zero, chroma), dtype=DALIDataType.UINT8)

    distances = (math.abs(red), math.abs(red - chroma2), math.abs(red + chroma2))
    return fn.cat(*(channel_at(distance) for distance in distances), axis=2)


def _adjust(image: Any, operation: Any, factor: Any, device: str) -> Any:
    """Brightness, contrast, saturation or nothing, chosen for each sample."""
    if operation == BRIGHTNESS:
        image = fn.brightness_contrast(
            image, contrast=factor, contrast_center=0.0, brightness_shift=_TRUNCATE / 255
        )
    elif operation == CONTRAST:
        # Not brightness_contrast: its centre is an argument, and those live on the CPU, so that a
        # GPU's mean would have to be waited for.
        factor = _beside(factor, device)
        center = math.floor(fn.reductions.mean(_gray(image), axes=(0, 1, 2)) + 0.5)
        image = fn.cast(
            image * factor + (center * (1.0 - factor) + _TRUNCATE), dtype=DALIDataType.UINT8
        )
    elif operation == SATURATION:
        factor = _beside(factor, device)
        image = fn.cast(
            image * factor + (_gray(image) * (1.0 - factor) + _TRUNCATE), dtype=DALIDataType.UINT8
        )
    return image


def _view(
    image: Any,
    row: Any,
    size: int,
    augmentation: Augmentation,
    device: str,
    layout: str,
    half: bool,
) -> Any:
    """Crop, resize, colour, gray, blur, mirror, normalise: one view in its last layout and type."""
    view = fn.slice(
        image,
        row[_Y0:_HEIGHT],
        row[_HEIGHT:_FLIP],
        axes=(0, 1),
        normalized_anchor=False,
        normalized_shape=False,
    )
    view = fn.resize(
        view, size=(size, size), interp_type=DALIInterpType.INTERP_LINEAR, antialias=True
    )
    if row[_JITTER] > 0.0:
        for step in range(3):
            view = _adjust(view, row[_OPERATION + step], row[_FACTOR + step], device)
        if augmentation.hue > 0:
            view = _rotate_hue(view, _beside(row[_HUE], device), 6 * augmentation.hue)
        for step in range(3, 6):
            view = _adjust(view, row[_OPERATION + step], row[_FACTOR + step], device)
    if row[_GRAY] > 0.0:
        gray = _gray(view)
        view = fn.cat(gray, gray, gray, axis=2)
    if row[_SIGMA] > 0.0:
        view = fn.gaussian_blur(view, sigma=row[_SIGMA])
    return fn.crop_mirror_normalize(
        view,
        dtype=DALIDataType.FLOAT16 if half else DALIDataType.FLOAT,
        output_layout=layout,
        mirror=fn.cast(row[_FLIP], dtype=DALIDataType.INT32),
        mean=[255 * value for value in augmentation.mean],
        std=[255 * value for value in augmentation.std],
    )


def _decoded(device: str) -> Any:
    encoded = fn.external_source(name=ENCODED, dtype=DALIDataType.UINT8, ndim=1)
    return fn.decoders.image(
        encoded,
        device="mixed" if device == "gpu" else "cpu",
        output_type=DALIImageType.RGB,
        # As libjpeg and so Pillow do it. Where a GPU's decoding engine cannot, others decode.
        jpeg_fancy_upsampling=True,
    )


@pipeline_def(enable_conditionals=True)
def two_view_pipeline(
    size: int, augmentation: Augmentation, device: str, layout: str = "CHW", half: bool = False
) -> Any:
    """The graph: encoded images and one row of parameters for each view, to two batches of views.

    Args:
        size: Height and width of the views in pixels.
        augmentation: Gives mean and standard deviation; the rest comes drawn.
        device: "cpu" or "gpu".
        layout: "CHW", or "HWC" for what torch calls channels-last.
        half: float16 instead of float32.

    Returns:
        Two outputs (N, 3, size, size) or (N, size, size, 3). The image is decoded once for both.
    """
    image = _decoded(device)
    rows = [fn.external_source(name=name, dtype=DALIDataType.FLOAT, ndim=1) for name in VIEW_INPUTS]
    return tuple(_view(image, row, size, augmentation, device, layout, half) for row in rows)


@pipeline_def
def decode_pipeline(device: str) -> Any:
    """Decoding alone, to find out which file of a failed batch it was.

    Args:
        device: "cpu" or "gpu".

    Returns:
        The shape of the decoded image.
    """
    return _decoded(device).shape()
