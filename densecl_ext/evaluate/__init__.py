"""What a network is worth: protocols with fixed splits and seeds, and reports that say how.

A protocol is a file here: a dataclass of options, and a function ``(backbone, options) -> Report``;
:data:`densecl_ext.protocols.PROTOCOLS` lists them.
"""

from __future__ import annotations

from densecl_ext.evaluate.correspondence import CorrespondenceOptions, Views, correspondence
from densecl_ext.evaluate.dense import DenseData, evaluate_dense
from densecl_ext.evaluate.features import extract_features, recalibrate_batch_norm
from densecl_ext.evaluate.folder import SegmentationFolder
from densecl_ext.evaluate.incontext import InContext, InContextOptions, incontext
from densecl_ext.evaluate.linear import linear_segmentation
from densecl_ext.evaluate.metrics import IGNORE_INDEX, SegmentationResult, confusion_matrix
from densecl_ext.evaluate.report import Report, reports_table
from densecl_ext.evaluate.segmentation import Linear, SegmentationOptions, segmentation

__all__ = [
    "IGNORE_INDEX",
    "CorrespondenceOptions",
    "DenseData",
    "InContext",
    "InContextOptions",
    "Linear",
    "Report",
    "SegmentationFolder",
    "SegmentationOptions",
    "SegmentationResult",
    "Views",
    "confusion_matrix",
    "correspondence",
    "evaluate_dense",
    "extract_features",
    "incontext",
    "linear_segmentation",
    "recalibrate_batch_norm",
    "reports_table",
    "segmentation",
]
