"""What frozen features are worth: a linear segmentation probe."""

from __future__ import annotations

from densecl_ext.evaluate.features import extract_features, recalibrate_batch_norm
from densecl_ext.evaluate.folder import SegmentationFolder
from densecl_ext.evaluate.metrics import IGNORE_INDEX, SegmentationResult, confusion_matrix
from densecl_ext.evaluate.probe import linear_segmentation

__all__ = [
    "IGNORE_INDEX",
    "SegmentationFolder",
    "SegmentationResult",
    "confusion_matrix",
    "extract_features",
    "linear_segmentation",
    "recalibrate_batch_norm",
]
