"""Views of images with any number of channels, in float32.

Cropping, resizing, mirroring and blur mean the same for every channel. Brightness scales all
channels by one factor, contrast turns each about its own mean. Saturation, hue and grayscale are of
red, green and blue alone: no view of other channels has them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from densecl_ext.data.augmentation import BRIGHTNESS, CONTRAST, Augmentation, ViewParameters
from densecl_ext.data.bands import scaled
from densecl_ext.data.batch_augmentation import gaussian


def without_colour(augmentation: Augmentation) -> Augmentation:
    """The distribution without what red, green and blue alone have."""
    return dataclasses.replace(augmentation, saturation=0.0, hue=0.0, gray_probability=0.0)


def render_bands(
    values: np.ndarray[Any, Any],
    value_range: tuple[float, float],
    parameters: ViewParameters,
    size: int,
) -> np.ndarray[Any, Any]:
    """Turn a decoded image into one view.

    Args:
        values: (H, W, C), as the file has them.
        value_range: The values that become 0 and 1.
        parameters: What to do.
        size: Height and width of the view in pixels.

    Returns:
        float32 (C, size, size), from 0 to 1.
    """
    x0, y0, x1, y1 = parameters.box
    crop = scaled(values[y0:y1, x0:x1], value_range)
    pixels = torch.from_numpy(np.ascontiguousarray(crop.transpose(2, 0, 1)))[None]  # (1, C, h, w)
    pixels = F.interpolate(
        pixels, size=(size, size), mode="bilinear", align_corners=False, antialias=True
    )
    for operation in parameters.order:
        if operation == BRIGHTNESS:
            pixels = pixels.mul_(parameters.brightness).clamp_(0, 1)
        elif operation == CONTRAST:
            mean = pixels.mean(dim=(2, 3), keepdim=True)
            pixels = torch.lerp(mean, pixels, parameters.contrast).clamp_(0, 1)
    if parameters.blur_sigma > 0:
        pixels = gaussian(pixels, torch.tensor(parameters.blur_sigma).reshape(1, 1, 1, 1))
    if parameters.flip:
        pixels = pixels.flip(-1)
    return pixels[0].contiguous().numpy()
