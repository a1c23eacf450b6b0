"""The protocols behind `densecl evaluate`; a new one is a file here and a line of PROTOCOLS."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

from densecl_ext.evaluate.report import Report

PROTOCOLS = {
    # name: file, its dataclass of options, its function (backbone, options) -> Report
    "segmentation": ("segmentation", "SegmentationOptions", "segmentation"),
    "incontext": ("incontext", "InContextOptions", "incontext"),
    "correspondence": ("correspondence", "CorrespondenceOptions", "correspondence"),
    "knn": ("classification", "KnnOptions", "knn"),
    "linear": ("classification", "LinearOptions", "linear"),
    "finetune": ("finetune", "FinetuneOptions", "finetune"),
    "detection": ("detection", "DetectionOptions", "detection"),
}


@dataclasses.dataclass(frozen=True)
class Protocol:
    """One way to measure a network.

    Attributes:
        name: as `densecl evaluate` knows it.
        options: its dataclass of options.
        run: ``(backbone, options) -> Report``.
        help: one clause: the first line of the options' docstring.
    """

    name: str
    options: type
    run: Callable[..., Report]

    @property
    def help(self) -> str:
        """One clause for lists of protocols."""
        line = (self.options.__doc__ or self.name).partition("\n")[0].removesuffix(".")
        return line[0].lower() + line[1:] if line[1:2].islower() else line


def find_protocol(name: str) -> Protocol:
    """Import a protocol.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"evaluate: protocol must be one of {', '.join(PROTOCOLS)}, got {name!r}")
    file, options, function = PROTOCOLS[name]
    module: Any = importlib.import_module(f"densecl_ext.evaluate.{file}")
    return Protocol(name, getattr(module, options), getattr(module, function))
