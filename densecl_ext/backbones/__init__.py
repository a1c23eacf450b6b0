"""Backbones: modules from images (N, 3, H, W) to a feature map (N, C, h, w)."""

from densecl_ext.backbones.build import build_backbone, load_weights
from densecl_ext.backbones.convolutions import OUTPUT_STRIDES, PADDINGS
from densecl_ext.backbones.grid import Backbone, FeatureGrid, feature_channels, feature_grid
from densecl_ext.backbones.timm import TimmBackbone
from densecl_ext.backbones.torchvision import RESNETS, TORCHVISION, TorchvisionBackbone

__all__ = [
    "OUTPUT_STRIDES",
    "PADDINGS",
    "RESNETS",
    "TORCHVISION",
    "Backbone",
    "FeatureGrid",
    "TimmBackbone",
    "TorchvisionBackbone",
    "build_backbone",
    "feature_channels",
    "feature_grid",
    "load_weights",
]
