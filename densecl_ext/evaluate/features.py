"""Frozen features of a backbone, and batch-norm statistics to go with them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from densecl_ext.backbones.timm import TimmBackbone

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def input_size(backbone: nn.Module, size: tuple[int, int], scale: float = 1.0) -> tuple[int, int]:
    """The size nearest to an image's that a backbone takes.

    Args:
        backbone: a timm network takes multiples of its stride, any other every size.
        size: height and width of the image.
        scale: factor to resize by.

    Returns:
        Height and width for :func:`prepare_images`.
    """
    step = backbone.stride if isinstance(backbone, TimmBackbone) else 1
    height, width = (max(1, round(side * scale / step)) * step for side in size)
    return height, width


def prepare_images(
    images: Tensor, size: tuple[int, int] | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    """Turn stored images into a network's input.

    Args:
        images: uint8 (N, 3, H, W).
        size: height and width to resize to (bilinear, antialiased); None keeps the size.
        device: where the result is wanted.

    Returns:
        float32 (N, 3, h, w), normalised by ImageNet's mean and deviation as in pre-training.
    """
    x = images.to(device).float() / 255.0
    if size is not None and tuple(x.shape[2:]) != tuple(size):
        x = F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=True)
    mean = torch.tensor(IMAGENET_MEAN, device=x.device).view(1, 3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=x.device).view(1, 3, 1, 1)
    return (x - mean) / std


@contextlib.contextmanager
def _evaluation_mode(module: nn.Module) -> Iterator[None]:
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for child, training in modes:
            child.training = training


@torch.no_grad()
def extract_features(
    backbone: nn.Module,
    inputs: Tensor,
    layers: Sequence[str] | None = None,
    *,
    precision: str = "float32",
) -> Tensor:
    """Feature maps of a frozen backbone in evaluation mode.

    Args:
        backbone: (N, 3, H, W) to (N, C, h, w).
        inputs: float32 (N, 3, H, W), see :func:`prepare_images`.
        layers: names of submodules (``backbone.named_modules()``) whose outputs are wanted; None
            is the backbone's own output. Of several, the smaller maps are enlarged (bilinear) to
            the largest and all are concatenated, in the order given.
        precision: "bfloat16" runs the backbone under autocast.

    Returns:
        float32 (N, C, h, w).

    Raises:
        ValueError: there is no such layer, or a layer's output is not (N, C, h, w).
    """
    caught: dict[str, Tensor] = {}
    hooks = []
    modules = dict(backbone.named_modules())
    for name in layers or ():
        if name not in modules:
            known = ", ".join(n for n, _ in backbone.named_children())
            raise ValueError(f"extract_features: the backbone has no layer {name!r}; has {known}")

        def keep(_m: nn.Module, _i: object, output: Tensor, name: str = name) -> None:
            caught[name] = output

        hooks.append(modules[name].register_forward_hook(keep))
    try:
        with (
            _evaluation_mode(backbone),
            torch.autocast(inputs.device.type, torch.bfloat16, enabled=precision == "bfloat16"),
        ):
            output = backbone(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    maps = [caught[name] for name in layers] if layers else [output]
    for feature in maps:
        if not isinstance(feature, Tensor) or feature.dim() != 4:
            raise ValueError("extract_features: a layer's output must be a tensor (N, C, h, w)")
    height = max(feature.shape[2] for feature in maps)
    width = max(feature.shape[3] for feature in maps)
    enlarged = [
        feature.float()
        if feature.shape[2:] == (height, width)
        else F.interpolate(
            feature.float(), size=(height, width), mode="bilinear", align_corners=False
        )
        for feature in maps
    ]
    return torch.cat(enlarged, dim=1)


@torch.no_grad()
def recalibrate_batch_norm(
    backbone: nn.Module, batches: Sequence[Tensor], *, precision: str = "float32"
) -> None:
    """Replace the running statistics of all batch norms by those of the given images, in place.

    A network at random initialisation has mean 0 and variance 1 there, which belong to no data: in
    evaluation mode its activations would grow from layer to layer. As a baseline it deserves
    statistics of its own. Weights stay as they are.

    Args:
        backbone: the network.
        batches: inputs (N, 3, H, W), whose statistics are averaged with equal weight.
        precision: "bfloat16" runs the backbone under autocast.

    Raises:
        ValueError: no batch.
    """
    if not batches:
        raise ValueError("recalibrate_batch_norm: needs at least one batch of images")
    norms = [module for module in backbone.modules() if isinstance(module, _NORMS)]
    momenta = [norm.momentum for norm in norms]
    bfloat16 = precision == "bfloat16"
    try:
        with _evaluation_mode(backbone):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # cumulative average
                norm.train()
            for batch in batches:
                with torch.autocast(batch.device.type, torch.bfloat16, enabled=bfloat16):
                    backbone(batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


@contextlib.contextmanager
def untouched(backbone: nn.Module) -> Iterator[None]:
    """Give a network's buffers and modes back afterwards as they were; weights are not copied."""
    buffers = {name: buffer.clone() for name, buffer in backbone.named_buffers()}
    try:
        with _evaluation_mode(backbone):
            yield
    finally:
        with torch.no_grad():
            for name, buffer in backbone.named_buffers():
                buffer.copy_(buffers[name])


def device_of(backbone: nn.Module) -> torch.device:
    """Where a network's first weight lies; the CPU where it has none."""
    first = next(backbone.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def has_batch_norm(backbone: nn.Module) -> bool:
    """Whether a network has batch norms to recalibrate."""
    return any(isinstance(module, _NORMS) for module in backbone.modules())
