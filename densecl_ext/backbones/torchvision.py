"""Torchvision's convolutional networks without their pooling and classifier."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn

from densecl_ext.backbones.convolutions import (
    dilate,
    explain_reflection,
    keep_until,
    left_out_parts,
    set_padding,
    warn_truncated,
)
from densecl_ext.backbones.grid import feature_grid


@dataclasses.dataclass(frozen=True)
class Family:
    """Networks of one build: where their parts are.

    Attributes:
        names: torchvision's names of the networks.
        head: attributes that come after the feature map.
        stages: the modules after which the map has the strides of ``STAGE_STRIDES``.
        dilates: its stages can be dilated (:func:`densecl_ext.backbones.convolutions.dilate`).
    """

    names: tuple[str, ...]
    head: tuple[str, ...]
    stages: tuple[str, str, str, str]
    dilates: bool


STAGE_STRIDES = (4, 8, 16, 32)
FAMILIES = (
    Family(
        names=(
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
        ),
        head=("avgpool", "fc"),
        stages=("layer1", "layer2", "layer3", "layer4"),
        dilates=True,
    ),
    Family(
        names=(
            *(f"regnet_x_{size}" for size in ("400mf", "800mf", "1_6gf", "3_2gf")),
            *(f"regnet_x_{size}" for size in ("8gf", "16gf", "32gf")),
            *(f"regnet_y_{size}" for size in ("400mf", "800mf", "1_6gf", "3_2gf")),
            *(f"regnet_y_{size}" for size in ("8gf", "16gf", "32gf", "128gf")),
        ),
        head=("avgpool", "fc"),
        stages=(
            "trunk_output.block1",
            "trunk_output.block2",
            "trunk_output.block3",
            "trunk_output.block4",
        ),
        dilates=True,
    ),
    # Between its stages ConvNeXt has unpadded 2 x 2 convolutions, which lose a row and a column
    # when they are dilated.
    Family(
        names=tuple(f"convnext_{size}" for size in ("tiny", "small", "base", "large")),
        head=("avgpool", "classifier"),
        stages=("features.1", "features.3", "features.5", "features.7"),
        dilates=False,
    ),
)
RESNETS = FAMILIES[0].names
TORCHVISION = tuple(name for family in FAMILIES for name in family.names)


class TorchvisionBackbone(nn.Module):
    """A network of torchvision without its pooling and classifier.

    The state dict has torchvision's own keys, less those of the classifier and of stages that were
    left out. ConvNeXt's last norm comes after its pooling and belongs to the classifier.

    Args:
        name: one of :data:`TORCHVISION`.
        network: torchvision's module of that name, whose layers are taken over, not copied.
        output_stride: 8, 16 or 32, or None for the network's own 32. The last stages are dilated;
            where the network has no way to, they are left out, with a warning.
        padding: "zeros", "reflect" or "replicate", of all convolutions.
        truncate: leave the last stages out even where they could be dilated.
        in_channels: channels of the images, which the network's first convolution takes already.

    Attributes:
        name: torchvision's name.
        out_channels: C of the feature map.
        stride: pixels between neighbouring positions of the grid.
        native_size: (224, 224), the size of the images that torchvision's weights were made for;
            all others can be taken too.
        padding: as given.
        left_out: names of the stages that a truncated network does not have.
        last_stage: name of the module whose output the feature map is.
        in_channels: as given.

    Shape:
        (N, in_channels, H, W) to (N, C, h, w): h = ceil(H / stride); ConvNeXt's h = floor(H /
        stride).
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        *,
        output_stride: int | None = None,
        padding: str = "zeros",
        truncate: bool = False,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        family = next(family for family in FAMILIES if name in family.names)
        self.name, self.padding = name, padding
        self.native_size = (224, 224)
        self._head = family.head
        # registered in the order in which torchvision's forward runs them
        for child, module in network.named_children():
            if child not in family.head:
                self.add_module(child, module)
        self.last_stage = family.stages[-1]
        self.left_out: tuple[str, ...] = ()
        if output_stride is not None and output_stride < STAGE_STRIDES[-1]:
            kept = STAGE_STRIDES.index(output_stride) + 1
            if family.dilates and not truncate:
                dilation = 1
                for stage in family.stages[kept:]:
                    dilation = dilate(self.get_submodule(stage), dilation)
            else:
                self._truncate(family.stages[kept - 1])
                if not truncate:
                    warn_truncated(name, output_stride, self.left_out)
        self.out_channels, self.stride, _ = feature_grid(self)
        set_padding(self, padding, name)

    def forward(self, images: Tensor) -> Tensor:
        """Feature map of the last stage."""
        x = images
        try:
            for stage in self.children():
                x = stage(x)
        except RuntimeError as error:
            explain_reflection(error, self.name, self.padding, images)
            raise
        return x

    @property
    def classifiers(self) -> tuple[str, ...]:
        """Where torchvision's own weights files keep what is left out here."""
        return self._head

    def _truncate(self, stage: str) -> None:
        before = list(self.state_dict())
        keep_until(self, stage)
        self.last_stage, self.left_out = stage, left_out_parts(before, self.state_dict())


def create_torchvision(name: str, weights: str | None = None) -> Any:
    """Build torchvision's network, by default at a random start.

    Args:
        name: one of :data:`TORCHVISION`.
        weights: name of torchvision weights, which torchvision may download.

    Raises:
        ValueError: torchvision has no such weights of this network.
        ImportError: torchvision is not installed.
    """
    try:
        from torchvision import models
    except ImportError as error:
        raise ImportError(
            f"build_backbone: {name!r} needs torchvision, which cannot be imported ({error}); "
            "install the extra: pip install 'densecl_ext[train]'"
        ) from error
    try:
        return models.get_model(name, weights=weights)
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"build_backbone: weights must be a file or the name of torchvision weights for "
            f"{name}, got {weights!r}"
        ) from error
