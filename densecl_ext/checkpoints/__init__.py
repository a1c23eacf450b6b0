"""Checkpoints of runs, and backbones going out of and coming into the project."""

from __future__ import annotations

from densecl_ext.checkpoints.exchange import BackboneFile, load_backbone, read_backbone
from densecl_ext.checkpoints.exporting import TARGETS, export_backbone
from densecl_ext.checkpoints.importing import import_backbone
from densecl_ext.checkpoints.storage import load_checkpoint, save_checkpoint

__all__ = [
    "TARGETS",
    "BackboneFile",
    "export_backbone",
    "import_backbone",
    "load_backbone",
    "load_checkpoint",
    "read_backbone",
    "save_checkpoint",
]
