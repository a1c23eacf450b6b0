"""Other projects' checkpoints, turned into backbone files of this one."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from densecl_ext.checkpoints.exchange import BackboneFile, must_be_named, read_backbone
from densecl_ext.checkpoints.runs import resolve_checkpoint
from densecl_ext.checkpoints.verify import check_library
from densecl_ext.checkpoints.writing import check_output, write_weights


def import_backbone(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    architecture: str | None = None,
    trusted: bool = False,
    prefix: str | None = None,
    container: str | None = None,
) -> BackboneFile:
    """Turns another project's checkpoint into a backbone file of this one.

    The result serves as `weights` of a pre-training run, and `load_backbone` reads it.

    Args:
        source: see `read_backbone`.
        output: the file to write: the library's names, no classifier; it also says which network
            it is. Ends in .safetensors for such a file.
        architecture: the architecture it must have, or None to accept what it is. A file of
            anything but a ResNet must be told by it ("timm/vit_small_patch16_224").
        trusted: see `load_checkpoint`.
        prefix: see `read_backbone`.
        container: see `read_backbone`.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not readable, of no known form, not exactly the network, another architecture,
            or an output that would cost a file of a run.
        ImportError: the library is not installed.
        RuntimeError: the check failed; a file that was there is as it was.
        OSError: the output could not be written.
    """
    output = check_output("import_backbone", output, resolve_checkpoint(source))
    named = architecture if architecture and must_be_named(architecture, {}) else None
    read = read_backbone(
        source, trusted=trusted, architecture=named, prefix=prefix, container=container
    )
    if architecture is not None and read.architecture != architecture:
        raise ValueError(
            f"import_backbone: {read.path} holds a {read.architecture}, expected {architecture}"
        )
    check_library(read, "timm" if read.of_timm else "torchvision")
    write_weights(Path(output), read.tensors, read.provenance | {"options": read.options})
    return dataclasses.replace(read, path=Path(output))
