"""The protocols behind `densecl evaluate`; a new one is a file in evaluate/ and a line here.

Imports nothing heavy: the command line lists protocols without torch.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from densecl_ext.evaluate.report import Report

PROTOCOLS = {
    # name: (file, its dataclass of options, its function (backbone, options) -> Report), one clause
    "segmentation": (
        ("segmentation", "SegmentationOptions", "segmentation"),
        "linear segmentation of frozen features",
    ),
    "incontext": (
        ("incontext", "InContextOptions", "incontext"),
        "nearest-neighbour segmentation of frozen features",
    ),
    "correspondence": (
        ("correspondence", "CorrespondenceOptions", "correspondence"),
        "exact correspondence of two views under known crops; no labels",
    ),
    "knn": (
        ("classification", "KnnOptions", "knn"),
        "classification by the nearest neighbours of pooled features",
    ),
    "linear": (
        ("classification", "LinearOptions", "linear"),
        "classification by a linear layer on pooled features, solved by L-BFGS",
    ),
    "finetune": (
        ("finetune", "FinetuneOptions", "finetune"),
        "segmentation with an FCN head, the whole network trained",
    ),
    "detection": (
        ("detection", "DetectionOptions", "detection"),
        "object detection: Faster R-CNN with FPN, the whole network trained",
    ),
}


@dataclasses.dataclass(frozen=True)
class Protocol:
    """One way to measure a network.

    Attributes:
        name: as `densecl evaluate` knows it.
        options: its dataclass of options.
        run: ``(backbone, options) -> Report``.
        help: one clause for lists of protocols.
    """

    name: str
    options: type
    run: Callable[..., Report]
    help: str


def find_protocol(name: str) -> Protocol:
    """Import a protocol.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"evaluate: protocol must be one of {', '.join(PROTOCOLS)}, got {name!r}")
    (file, options, function), help = PROTOCOLS[name]
    module: Any = importlib.import_module(f"densecl_ext.evaluate.{file}")
    return Protocol(name, getattr(module, options), getattr(module, function), help)
