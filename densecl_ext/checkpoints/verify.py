"""The proof that weights arrive: the library's own model against ours, on one random image."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from densecl_ext.backbones.timm import TIMM, TimmBackbone, create_timm
from densecl_ext.checkpoints.exchange import BackboneFile, build

if TYPE_CHECKING:
    from torchvision.models import ResNet

FC_SEED = 0
Features = Callable[[Tensor], Tensor]


def check_features(source: BackboneFile, features: Features, *, tolerance: float = 0.0) -> None:
    """Compares a library's last features with ours, for one batch of random images.

    Args:
        source: the weights.
        features: (N, 3, H, W) -> what the library's model gives.
        tolerance: largest difference allowed, as a share of the largest feature; 0 asks for the
            same bits.

    Raises:
        RuntimeError: they differ, or are not finite.
    """
    backbone = build(source)
    size = backbone.native_size if isinstance(backbone, TimmBackbone) else (96, 96)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))  # (N, 3, H, W)
    with torch.no_grad():
        ours, theirs = backbone(images), features(images)
    if isinstance(backbone, TimmBackbone):
        theirs = _grid(theirs, ours.shape)
    if not torch.isfinite(ours).all():
        raise RuntimeError(
            f"{source.path}: the backbone's features are not finite; nothing was written"
        )
    error = (theirs - ours).abs().max().item() if theirs.shape == ours.shape else float("inf")
    if not error <= tolerance * ours.abs().max().item():
        raise RuntimeError(
            f"{source.path}: {source.architecture} of its own library computes other features "
            f"from these weights (largest difference {error:.3g}); nothing was written"
        )


def library_features(source: BackboneFile, *, timm: bool = False) -> Features:
    """The last features of torchvision's or timm's own model, with the backbone loaded strictly."""
    if timm or source.of_timm:
        return _timm_features(source)
    return layer4(torchvision_network(source))


def torchvision_network(source: BackboneFile) -> ResNet:
    """Torchvision's model with the backbone loaded strictly and its own fc from a fixed seed."""
    import torchvision

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(FC_SEED)
        network = getattr(torchvision.models, source.architecture)(weights=None)
    fc = {f"fc.{key}": value for key, value in network.fc.state_dict().items()}
    try:
        network.load_state_dict(source.tensors | fc, strict=True)
    except RuntimeError as error:
        raise RuntimeError(
            f"{source.path}: torchvision's {source.architecture} does not load it strictly: {error}"
        ) from None
    return network.eval()


def layer4(network: ResNet) -> Features:
    """The last feature map of torchvision's ResNet, which its forward does not return."""

    def features(images: Tensor) -> Tensor:
        seen: list[Any] = []
        handle = network.layer4.register_forward_hook(
            lambda module, args, output: seen.append(output)
        )
        try:
            network(images)
        finally:
            handle.remove()
        return seen[0]

    return features


def _timm_features(source: BackboneFile) -> Features:
    with torch.random.fork_rng(devices=[]):
        network: Any = create_timm(source.architecture)
    try:
        network.load_state_dict(source.tensors, strict=True)
    except RuntimeError as error:
        raise RuntimeError(
            f"{source.path}: timm's {source.architecture.removeprefix(TIMM)} does not load it "
            f"strictly: {error}"
        ) from None
    return network.eval().forward_features


def _grid(features: Tensor, shape: torch.Size) -> Tensor:
    """What timm's forward_features returned, as (N, C, h, w): the last h * w tokens in rows."""
    images, channels, height, width = shape
    if features.shape == shape:
        return features
    tokens = features.reshape(images, -1, channels)[:, -height * width :]
    return tokens.reshape(images, height, width, channels).permute(0, 3, 1, 2)
