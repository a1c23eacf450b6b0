"""Two augmented views of every image of a folder, with their crop boxes."""

from __future__ import annotations

from densecl_ext.data.augmentation import Augmentation
from densecl_ext.data.base import TwoViews, ViewLoader
from densecl_ext.data.folder import UnreadableImageWarning, find_images
from densecl_ext.data.loader import build_loader

__all__ = [
    "Augmentation",
    "TwoViews",
    "UnreadableImageWarning",
    "ViewLoader",
    "build_loader",
    "find_images",
]
