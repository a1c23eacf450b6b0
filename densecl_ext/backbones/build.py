"""The one door: a backbone by its name, with the weights to start from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from densecl_ext.backbones.convolutions import (
    adapt_weight,
    check_options,
    first_convolution,
    set_in_channels,
)
from densecl_ext.backbones.timm import TIMM, TimmBackbone
from densecl_ext.backbones.torchvision import TORCHVISION, TorchvisionBackbone, create_torchvision

_WEIGHT_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".tar")


def build_backbone(
    name: str,
    *,
    weights: str | Path | None = None,
    output_stride: int | None = None,
    padding: str = "zeros",
    truncate: bool = False,
    in_channels: int = 3,
) -> TorchvisionBackbone | TimmBackbone:
    """Build a network of torchvision or timm as a backbone.

    The options change no weight and no name of one: the state dict is that of the plain network,
    less the stages that truncation leaves out.

    Args:
        name: one of :data:`TORCHVISION`, or ``timm/`` and the name of any network of timm
            (:class:`densecl_ext.backbones.timm.TimmBackbone`).
        weights: None for a random start; the path of a file that ``torch.save`` wrote of a
            state dict with the library's own names, with or without the classifier; or, for a
            network of torchvision, the name of its weights such as ``"DEFAULT"`` or
            ``"IMAGENET1K_V1"``, which torchvision may download.
        output_stride: 8, 16 or 32 pixels between neighbouring positions, or None for the network's
            own. Strides of the last stages become dilation where the network can do that (ResNet,
            RegNet, timm's ``output_stride``). Where it cannot, the last stages are left out, with a
            warning; the attribute ``left_out`` names them.
        padding: "zeros", "reflect" or "replicate": what convolutions see beyond the border.
            Zeros tell every position how far it is from the border, which dense matching can take
            a shortcut by. Max pooling has nothing to change (:func:`set_padding` says why).
        truncate: reach the output stride by leaving the last stages out, even where they could be
            dilated: cheaper, with fewer channels and a smaller field of view. No warning then.
        in_channels: channels of the images. The first convolution is made for them, and weights
            for RGB are adapted to it (:func:`adapt_weight`).

    Returns:
        A module with the attributes of :class:`densecl_ext.backbones.Backbone`.

    Raises:
        ValueError: an unknown name, weights that do not fit, or an option that the network cannot
            have.
        FileNotFoundError: ``weights`` names a file that does not exist.
        ImportError: torchvision or timm is not installed.
    """
    check_options(output_stride, padding)
    if in_channels < 1:
        raise ValueError(f"build_backbone: in_channels must be at least 1, got {in_channels}")
    of_timm = name.startswith(TIMM)
    if not of_timm and name not in TORCHVISION:
        raise ValueError(
            f"build_backbone: name must be one of {', '.join(TORCHVISION)}, or {TIMM}NAME, got "
            f"{name!r}; any other backbone can be passed to DenseCL as an nn.Module"
        )
    path = _weights_path(weights)
    options: dict[str, Any] = {
        "output_stride": output_stride,
        "padding": padding,
        "truncate": truncate,
        "in_channels": in_channels,
    }
    backbone: TorchvisionBackbone | TimmBackbone
    if of_timm:
        if weights is not None and path is None:
            raise ValueError(
                f"build_backbone: weights of {name} must be a file, got {str(weights)!r}; nothing "
                "is downloaded for timm's networks"
            )
        backbone = TimmBackbone(name, **options)
    else:
        named = str(weights) if weights is not None and path is None else None
        network = create_torchvision(name, named)
        set_in_channels(network, in_channels, pretrained=named is not None)
        backbone = TorchvisionBackbone(name, network, **options)
    if path is not None:
        _load_file(backbone, path)
    return backbone


def meta_backbone(name: str, **options: Any) -> TorchvisionBackbone | TimmBackbone:
    """Build a backbone for its names, shapes and numbers, without memory for its weights."""
    # RegNet's constructor computes its widths with tensors, which need values.
    device = torch.device("cpu" if name.startswith("regnet") else "meta")
    with torch.random.fork_rng(devices=[]), device:
        return build_backbone(name, **options)


def load_weights(backbone: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load a state dict strictly, but for what the backbone does not have by intention.

    Left aside are the classifier and, of a truncated backbone, the stages that were left out, so
    that weights of the plain network serve with every option of :func:`build_backbone`. Weights for
    RGB images are adapted to a first convolution of other channels.

    Args:
        backbone: what :func:`build_backbone` returned, or any module.
        tensors: names of the library -> tensors.

    Raises:
        RuntimeError: a name is missing or unexpected, or a shape is another.
    """
    aside = (*getattr(backbone, "classifiers", ()), *getattr(backbone, "left_out", ()))
    prefixes = tuple(f"{name}." for name in aside)
    kept = {k: v for k, v in tensors.items() if k not in aside and not k.startswith(prefixes)}
    wanted = int(getattr(backbone, "in_channels", 3))
    if wanted != 3:
        _, convolution = first_convolution(backbone)
        key = next(
            k for k, v in backbone.state_dict(keep_vars=True).items() if v is convolution.weight
        )
        weight = kept.get(key)
        if weight is not None and weight.dim() == 4 and weight.shape[1] == 3:
            kept[key] = adapt_weight(weight, wanted)
    backbone.load_state_dict(kept, strict=True)


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


def _load_file(backbone: nn.Module, path: Path) -> None:
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(
            f"build_backbone: {path} must hold a state dict of tensors with the library's own "
            "names; `densecl export` writes such a file from a checkpoint"
        )
    try:
        load_weights(backbone, state)
    except RuntimeError as error:
        raise ValueError(f"build_backbone: {path} does not fit: {error}") from error
