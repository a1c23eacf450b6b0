"""What a backbone says of its feature map, and how it is found out where it says nothing."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn


class Backbone(Protocol):
    """What :func:`densecl_ext.backbones.build_backbone` returns, besides being an ``nn.Module``.

    Attributes:
        out_channels: C of the feature map.
        stride: pixels between neighbouring positions of the grid.
        native_size: height and width of the images that the network was made for.
        in_channels: channels of the images; a module that does not say takes three.
    """

    out_channels: int
    stride: int
    native_size: tuple[int, int]

    def __call__(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) to a feature map (N, C, h, w)."""
        ...


class FeatureGrid(NamedTuple):
    """The numbers of a :class:`Backbone`; ``native_size`` is None where nobody states it."""

    out_channels: int
    stride: int
    native_size: tuple[int, int] | None


def feature_grid(backbone: nn.Module, image_size: int = 64) -> FeatureGrid:
    """Find out C, the stride and the native size of any module that makes a feature map.

    Taken from the attributes of :class:`Backbone` where they are there, else from one forward of a
    zero image of ``native_size``, or else (1, 3, size, size), in evaluation mode without gradient,
    after which every layer has its former mode. ``num_features`` counts as ``out_channels``.
    The module is not changed: keep the answer.

    Args:
        backbone: images (N, 3, H, W) to (N, C, h, w).
        image_size: side of the image where the module states no native size.

    Raises:
        ValueError: the forward fails or does not return (N, C, h, w).
    """
    channels, stride = _stated_channels(backbone), _stated(backbone, "stride")
    native: Any = getattr(backbone, "native_size", None)
    if channels is None or stride is None:
        height, width = native or (image_size, image_size)
        features = _dry_forward(backbone, (height, width), "feature_grid")
        channels = features.shape[1] if channels is None else channels
        stride = max(1, round(height / features.shape[2])) if stride is None else stride
    return FeatureGrid(channels, stride, tuple(native) if native else None)


def feature_channels(backbone: nn.Module, image_size: int = 64) -> int:
    """Find out C of a backbone's feature map.

    Taken from the attribute ``out_channels`` or ``num_features`` where that is an int, else from
    one forward as in :func:`feature_grid`.

    Raises:
        ValueError: the forward fails or does not return (N, C, H, W); state ``backbone_channels=``.
    """
    channels = _stated_channels(backbone)
    if channels is not None:
        return channels
    try:
        return _dry_forward(backbone, (image_size, image_size), "DenseCL").shape[1]
    except ValueError as error:
        raise ValueError(f"{error}; state backbone_channels=") from error.__cause__


def _stated(backbone: nn.Module, attribute: str) -> int | None:
    value = getattr(backbone, attribute, None)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _stated_channels(backbone: nn.Module) -> int | None:
    channels = _stated(backbone, "out_channels")
    return _stated(backbone, "num_features") if channels is None else channels


def _dry_forward(backbone: nn.Module, size: tuple[int, int], caller: str) -> Tensor:
    first = next(backbone.parameters(), None)
    device = torch.device("cpu") if first is None else first.device
    dtype = torch.float32 if first is None else first.dtype
    channels = _stated(backbone, "in_channels") or 3
    image = torch.zeros(1, channels, *size, device=device, dtype=dtype)
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    try:
        with torch.no_grad():
            features: Any = backbone(image)
    except Exception as error:
        raise ValueError(
            f"{caller}: the backbone does not state out_channels and stride as ints, and fails on "
            f"an image of shape {tuple(image.shape)}: {error}"
        ) from error
    finally:
        for module, training in modes:
            module.training = training
    if not isinstance(features, Tensor) or features.dim() != 4:
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"{caller}: the backbone must return a tensor (N, C, H, W), got {got}")
    return features
