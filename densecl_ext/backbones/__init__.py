"""Backbones: modules from images (N, 3, H, W) to a feature map (N, C, h, w)."""

from densecl_ext.backbones.torchvision import (
    RESNETS,
    ResNetBackbone,
    build_backbone,
    feature_channels,
)

__all__ = ["RESNETS", "ResNetBackbone", "build_backbone", "feature_channels"]
