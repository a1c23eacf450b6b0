"""Two augmented views of every image of a folder, a list, shards or tables, with crop boxes."""

from __future__ import annotations

from densecl_ext.data.augmentation import Augmentation
from densecl_ext.data.base import TwoViews, ViewLoader
from densecl_ext.data.folder import ImageFiles, LeftOutWarning, find_images
from densecl_ext.data.images import NarrowRangeWarning, UnreadableImageWarning, read_rgb
from densecl_ext.data.loader import build_loader
from densecl_ext.data.opening import open_images
from densecl_ext.data.source import ImageSource

__all__ = [
    "Augmentation",
    "ImageFiles",
    "ImageSource",
    "LeftOutWarning",
    "NarrowRangeWarning",
    "TwoViews",
    "UnreadableImageWarning",
    "ViewLoader",
    "build_loader",
    "find_images",
    "open_images",
    "read_rgb",
]
