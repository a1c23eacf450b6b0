"""The proof that weights arrive: the library's own model against ours, on random images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from densecl_ext.backbones.convolutions import set_in_channels
from densecl_ext.backbones.timm import TIMM, TimmBackbone, create_timm, intermediate_features
from densecl_ext.checkpoints.exchange import BackboneFile, build

FC_SEED = 0
Features = Callable[[Tensor], Tensor]


@torch.no_grad()
def check_library(source: BackboneFile, library: str) -> dict[str, Tensor]:
    """Compares the library's model with ours: last features of random images, bit for bit.

    Of a backbone with another output stride or padding, both without; of a truncated one, the
    stages that are there.

    Args:
        source: the weights.
        library: "torchvision" or "timm".

    Returns:
        The classifier of the library's model, from a fixed seed.

    Raises:
        RuntimeError: they differ, or are not finite.
    """
    backbone = plain_backbone(source)
    network = _library_network(source, backbone, library)
    _compare(source, backbone, lambda images: _features(network, backbone, images), 0.0)
    return _under(network.state_dict(), backbone.classifiers)


@torch.no_grad()
def check_features(
    source: BackboneFile, backbone: Any, features: Features, tolerance: float
) -> None:
    """Compares what another program computes with a backbone of ours.

    Args:
        source: the weights.
        backbone: ours.
        features: (N, 3, H, W) -> what the other program gives.
        tolerance: largest difference allowed, as a share of the largest feature.

    Raises:
        RuntimeError: they differ, or are not finite.
    """
    _compare(source, backbone, features, tolerance)


def plain_backbone(source: BackboneFile) -> Any:
    """Our backbone as the library's network is: its own stride and padding."""
    options = {key: value for key, value in source.options.items() if key == "in_channels"}
    if source.missing:
        options |= {"output_stride": source.options["output_stride"], "truncate": True}
    return build(source, **options)


def last_features(network: Any, backbone: Any) -> Features:
    """The feature map that the backbone should give, by a library's own forward."""
    return lambda images: _features(network, backbone, images)


def _compare(source: BackboneFile, backbone: Any, features: Features, tolerance: float) -> None:
    size = backbone.native_size if isinstance(backbone, TimmBackbone) else (96, 96)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, source.in_channels, *size, generator=generator)  # (N, C, H, W)
    ours, theirs = backbone(images), features(images)
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


def _library_network(source: BackboneFile, backbone: Any, library: str) -> Any:
    """The library's model with the backbone loaded strictly and its own start for the rest."""
    name = source.architecture.removeprefix(TIMM)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(FC_SEED)
        if library == "timm":
            network = create_timm(name, in_chans=source.in_channels)
        else:
            import torchvision

            network = torchvision.models.get_model(name, weights=None)
            set_in_channels(network, source.in_channels, pretrained=False)
    own = _under(network.state_dict(), (*backbone.classifiers, *source.missing))
    try:
        network.load_state_dict(own | source.tensors, strict=True)
    except RuntimeError as error:
        raise RuntimeError(
            f"{source.path}: {library}'s {name} does not load it strictly: {error}"
        ) from None
    return network.eval()


def _under(tensors: Mapping[str, Tensor], parts: tuple[str, ...]) -> dict[str, Tensor]:
    return {k: v for k, v in tensors.items() if f"{k}.".startswith(tuple(f"{p}." for p in parts))}


def _features(network: Any, backbone: Any, images: Tensor) -> Tensor:
    """The feature map that the backbone should give, by the library's own forward."""
    if isinstance(backbone, TimmBackbone):
        if backbone.last_index is not None:
            return intermediate_features(network, backbone.last_index, images)
        return _grid(network.forward_features(images), backbone(images).shape)
    seen: list[Tensor] = []
    stage = network.get_submodule(backbone.last_stage)
    handle = stage.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        network(images)
    finally:
        handle.remove()
    return seen[0]


def _grid(features: Tensor, shape: torch.Size) -> Tensor:
    """What timm's forward_features returned, as (N, C, h, w): the last h * w tokens in rows."""
    images, channels, height, width = shape
    if features.shape == shape:
        return features
    tokens = features.reshape(images, -1, channels)[:, -height * width :]
    return tokens.reshape(images, height, width, channels).permute(0, 3, 1, 2)
