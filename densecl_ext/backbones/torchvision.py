"""Backbones: modules from images (N, 3, H, W) to a feature map (N, C, h, w)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from densecl_ext.backbones.timm import TIMM, TimmBackbone

RESNETS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)
_HEAD = ("avgpool", "fc")
_WEIGHT_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".tar")


class ResNetBackbone(nn.Module):
    """A torchvision ResNet without its pooling and classifier.

    The state dict has torchvision's own keys, less ``fc.weight`` and ``fc.bias``.

    Args:
        resnet: a ``torchvision.models.ResNet``, whose layers are taken over, not copied.

    Attributes:
        out_channels: C of the feature map: 512 for resnet18 and resnet34, else 2,048.

    Shape:
        (N, 3, H, W) to (N, C, ceil(H / 32), ceil(W / 32)).
    """

    def __init__(self, resnet: nn.Module) -> None:
        super().__init__()
        self.out_channels = int(resnet.fc.in_features)  # type: ignore[union-attr, arg-type]
        # registered in the order in which ResNet.forward runs them: stem, then the four stages
        for name, child in resnet.named_children():
            if name not in _HEAD:
                self.add_module(name, child)

    def forward(self, images: Tensor) -> Tensor:
        """Feature map of the last stage."""
        x = images
        for stage in self.children():
            x = stage(x)
        return x


def build_backbone(name: str, *, weights: str | Path | None = None) -> nn.Module:
    """Build a torchvision ResNet or a timm network as a backbone.

    Args:
        name: one of :data:`RESNETS`, or ``timm/`` and the name of any network of timm
            (:class:`densecl_ext.backbones.timm.TimmBackbone`).
        weights: None for a random start; the path of a file that ``torch.save`` wrote of a
            state dict with the library's own names, with or without the classifier; or, for a
            ResNet, the name of torchvision weights such as ``"DEFAULT"`` or ``"IMAGENET1K_V1"``,
            which torchvision may download.

    Returns:
        A module with the attribute ``out_channels``.

    Raises:
        ValueError: an unknown name, or weights that do not fit.
        FileNotFoundError: ``weights`` names a file that does not exist.
        ImportError: torchvision or timm is not installed.
    """
    if name.startswith(TIMM):
        return _build_timm(name, weights)
    if name not in RESNETS:
        raise ValueError(
            f"build_backbone: name must be one of {', '.join(RESNETS)}, or {TIMM}NAME, got "
            f"{name!r}; any other backbone can be passed to DenseCL as an nn.Module"
        )
    try:
        from torchvision import models
    except ImportError as error:
        raise ImportError(
            f"build_backbone: {name!r} needs torchvision, which cannot be imported ({error}); "
            "install the extra: pip install 'densecl_ext[train]'"
        ) from error
    path = _weights_path(weights)
    if weights is None or path is not None:
        resnet = models.get_model(name, weights=None)
    else:
        try:
            resnet = models.get_model(name, weights=str(weights))
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"build_backbone: weights must be a file or the name of torchvision weights for "
                f"{name}, got {str(weights)!r}"
            ) from error
    backbone = ResNetBackbone(resnet)
    if path is not None:
        _load_file(backbone, path)
    return backbone


def _build_timm(name: str, weights: str | Path | None) -> TimmBackbone:
    path = _weights_path(weights)
    if weights is not None and path is None:
        raise ValueError(
            f"build_backbone: weights of {name} must be a file, got {str(weights)!r}; nothing is "
            "downloaded for timm's networks"
        )
    backbone = TimmBackbone(name)
    if path is not None:
        _load_file(backbone, path, backbone.classifiers)
    return backbone


def feature_channels(backbone: nn.Module, image_size: int = 64) -> int:
    """Find out C of a backbone's feature map.

    Taken from the attribute ``out_channels`` or ``num_features`` where that is an int, else from
    one forward of a zero image (1, 3, size, size) in evaluation mode without gradient, after which
    every layer has its former mode.

    Raises:
        ValueError: the forward fails or does not return (N, C, H, W); state ``backbone_channels=``.
    """
    for attribute in ("out_channels", "num_features"):
        channels = getattr(backbone, attribute, None)
        if isinstance(channels, int) and not isinstance(channels, bool):
            return channels
    first = next(backbone.parameters(), None)
    device = torch.device("cpu") if first is None else first.device
    dtype = torch.float32 if first is None else first.dtype
    image = torch.zeros(1, 3, image_size, image_size, device=device, dtype=dtype)
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    try:
        with torch.no_grad():
            features: Any = backbone(image)
    except Exception as error:
        raise ValueError(
            f"DenseCL: the backbone has no int attribute out_channels and fails on an image of "
            f"shape {tuple(image.shape)}: {error}; state backbone_channels="
        ) from error
    finally:
        for module, training in modes:
            module.training = training
    if not isinstance(features, Tensor) or features.dim() != 4:
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"DenseCL: the backbone must return a tensor (N, C, H, W), got {got}")
    return features.shape[1]


def _weights_path(weights: str | Path | None) -> Path | None:
    """The file that ``weights`` means, or None where it is no file but a name."""
    if weights is None:
        return None
    path = Path(weights)
    if path.is_file():
        return path
    looks_like_path = isinstance(weights, Path) or len(path.parts) > 1
    if looks_like_path or path.suffix in _WEIGHT_SUFFIXES:
        raise FileNotFoundError(f"build_backbone: there is no weights file {path}")
    return None


def _load_file(backbone: nn.Module, path: Path, classifiers: tuple[str, ...] = ("fc",)) -> None:
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(
            f"build_backbone: {path} must hold a state dict of tensors with the library's own "
            "names; `densecl export` writes such a file from a checkpoint"
        )
    dropped = tuple(f"{classifier}." for classifier in classifiers)
    state = {name: value for name, value in state.items() if not name.startswith(dropped)}
    try:
        backbone.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ValueError(f"build_backbone: {path} does not fit: {error}") from error
