"""Backbones read from checkpoints, as plain tensors and as modules."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from densecl_ext.backbones import RESNETS, TORCHVISION, build_backbone
from densecl_ext.backbones.build import meta_backbone
from densecl_ext.backbones.timm import TIMM, create_timm
from densecl_ext.checkpoints.formats import (
    difference,
    extract_backbone,
    extract_named,
    find_architecture,
    find_options,
    find_tensors,
)
from densecl_ext.checkpoints.provenance import origin, unknown_normalisation
from densecl_ext.checkpoints.runs import resolve_checkpoint
from densecl_ext.checkpoints.schema import check_weights
from densecl_ext.checkpoints.storage import load_checkpoint

__all__ = ["BackboneFile", "load_backbone", "read_backbone", "resolve_checkpoint"]


@dataclasses.dataclass(frozen=True)
class BackboneFile:
    """A backbone that was read from or written to a file.

    Attributes:
        path: the file, or the folder.
        architecture: torchvision's name of the network ("resnet50"), or "timm/" and timm's.
        form: whose naming the source used.
        tensors: name in that library's convention -> float32 tensor, without the classifier.
        left_out: names of heads in the source that are no part of the backbone.
        notes: what a person who uses the file should know.
        provenance: where the weights come from, and the normalisation that they expect.
        usage: lines of Python or of a configuration that load the file.
        options: what the backbone was built with beside its name (:func:`build_backbone`), where
            the source says that it is not the plain network.
        missing: parts of the library's network that a truncated backbone does not have.
    """

    path: Path
    architecture: str
    form: str
    tensors: dict[str, Tensor]
    left_out: list[str]
    notes: list[str]
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)
    usage: str = ""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    missing: tuple[str, ...] = ()

    @property
    def in_channels(self) -> int:
        """Channels of the images that it takes."""
        return int(self.options.get("in_channels", 3))

    @property
    def of_timm(self) -> bool:
        """Whether it is a network of timm's, by timm's names."""
        return self.architecture.startswith(TIMM)


def read_backbone(
    path: str | os.PathLike[str],
    *,
    trusted: bool = False,
    architecture: str | None = None,
    prefix: str | None = None,
    container: str | None = None,
) -> BackboneFile:
    """Reads the query backbone out of any known checkpoint.

    `densecl_ext.checkpoints.formats` lists the forms. A ResNet shows by its tensors. Any
    other network must be named: a run and what this project writes do that themselves. Wrappers
    such as `module.` and `_orig_mod.` are taken off the names in any order.

    Args:
        path: the checkpoint, or the folder of a run.
        trusted: see `load_checkpoint`.
        architecture: the name of a network that is no ResNet ("timm/NAME", "convnext_tiny") for a
            file that does not say so itself; None otherwise.
        prefix: what stands before the backbone's names, for a form that no table knows.
        container: where in the file the tensors lie ("state" or "a.b"), likewise.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not readable, of no known form, or not exactly the network.
        ImportError: it holds a timm network, and timm is not installed.
    """
    path = resolve_checkpoint(path)
    content = load_checkpoint(path, trusted=trusted)
    named = architecture or find_architecture(content)
    options = find_options(content)
    missing: tuple[str, ...] = ()
    try:
        found = find_tensors(content, container)
        if named is None or not must_be_named(named, options):
            tensors, left_out, form = extract_backbone(found, content, prefix)
            named = match_architecture(tensors)
            wanted = meta_state(named)
            options |= stem_options(tensors)
        else:
            if named.startswith(TIMM) and not options:
                wanted = meta_state(named)
            else:
                backbone = meta_backbone(named, **options)
                wanted, missing = backbone.state_dict(), backbone.left_out
            shapes = {key: value.shape for key, value in wanted.items()}
            tensors, left_out, form = extract_named(found, shapes, prefix)
        tensors = {key: _count(key, tensor) for key, tensor in tensors.items()}
        check_weights(tensors)
        tensors, notes = _as_float32(tensors, wanted)
    except ValueError as error:
        raise ValueError(f"read_backbone: {path}: {error}") from None
    words = origin(content, path, form, named)
    channels = int(options.get("in_channels", 3))
    if channels != 3:
        notes.append(
            f"it takes images of {channels} channels: a library's network needs a first "
            "convolution for them"
        )
        if len(words["normalisation"]["mean"]) != channels:
            words["normalisation"] = unknown_normalisation(channels)
    return BackboneFile(
        path, named, form, tensors, left_out, notes, words, options=options, missing=missing
    )


_STEM = "conv1.weight"  # of a ResNet by torchvision's names


def load_backbone(path: str | os.PathLike[str], *, trusted: bool = False) -> nn.Module:
    """Loads a checkpoint or an exported file as a backbone.

    Args:
        path: what `read_backbone` reads.
        trusted: see `load_checkpoint`.

    Returns:
        The backbone, (N, 3, H, W) -> (N, C, h, w), or from images of the channels that it was
        trained with, on the CPU in eval mode, with its output stride and padding.

    Raises:
        FileNotFoundError: no such file.
        ValueError: see `read_backbone`.
    """
    source = read_backbone(path, trusted=trusted)
    return build(source, **source.options)


def load_rgb_backbone(path: str | os.PathLike[str], command: str) -> nn.Module:
    """`load_backbone`, for a command that reads RGB images alone.

    Raises:
        ValueError: the backbone takes other images.
    """
    source = read_backbone(path)
    if source.in_channels != 3:
        raise ValueError(
            f"{command}: {path} takes images of {source.in_channels} channels, and {command} reads "
            "RGB images alone; export it and measure it in a program of your own"
        )
    return build(source, **source.options)


def build(source: BackboneFile, **options: Any) -> nn.Module:
    """The backbone with its weights, built with these options, on the CPU in eval mode."""
    with torch.random.fork_rng(devices=[]):  # the random start is thrown away
        backbone = build_backbone(source.architecture, **options)
    backbone.load_state_dict(source.tensors, strict=True)
    return backbone.eval()


def match_architecture(tensors: Mapping[str, Tensor]) -> str:
    """Names the torchvision ResNet whose tensors these are, by names and shapes.

    Args:
        tensors: backbone tensors, without `fc`.

    Raises:
        ValueError: none fits exactly; the message says how the nearest one differs.
    """
    got = _shapes(tensors)
    stem = got.get(_STEM)
    if stem is not None and len(stem) == 4:  # images of other channels than RGB
        got[_STEM] = torch.Size((stem[0], 3, *stem[2:]))
    nearest: tuple[int, str] | None = None
    for name in RESNETS:
        wanted = _shapes(meta_state(name))
        if got == wanted:
            return name
        count, told = difference(got, wanted)
        if nearest is None or count < nearest[0]:
            nearest = (count, f"the nearest is {name}: {told}")
    assert nearest is not None
    raise ValueError(f"not exactly a torchvision ResNet; {nearest[1]}")


def stem_options(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The option of a ResNet whose first convolution takes other images than RGB."""
    channels = tensors[_STEM].shape[1]
    return {} if channels == 3 else {"in_channels": channels}


def meta_state(architecture: str) -> dict[str, Tensor]:
    """Names, shapes and dtypes of an architecture's backbone, without allocating its weights."""
    with torch.device("meta"):
        if architecture.startswith(TIMM):
            return dict(create_timm(architecture).state_dict())
        import torchvision

        network = getattr(torchvision.models, architecture)(weights=None)
    return {k: v for k, v in network.state_dict().items() if not k.startswith("fc.")}


def must_be_named(architecture: str, options: Mapping[str, Any]) -> bool:
    """Whether tensors alone do not say that they are of this network, built with these options."""
    if architecture in RESNETS:  # a truncated one has not all of a ResNet's tensors
        return "output_stride" in options
    return architecture.startswith(TIMM) or architecture in TORCHVISION


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    # Files from before torch 0.4.1 have no num_batches_tracked, and batch norm's loading fills it
    # in.
    return {k: v.shape for k, v in tensors.items() if not k.endswith("num_batches_tracked")}


def _count(key: str, tensor: Tensor) -> Tensor:
    """Batch norm's count as an integer again, where a file has turned all its tensors to floats."""
    counts = key.endswith("num_batches_tracked") and tensor.is_floating_point()
    if counts and tensor.numel() == 1 and bool(tensor == tensor.round()):
        return tensor.to(torch.int64)
    return tensor


def _as_float32(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors in the network's own dtypes; raises ValueError for a float where counts are."""
    others = sorted({str(v.dtype) for k, v in tensors.items() if v.dtype != wanted[k].dtype})
    for key, tensor in tensors.items():
        if tensor.dtype.is_floating_point != wanted[key].dtype.is_floating_point:
            raise ValueError(f"{key} has dtype {tensor.dtype}, expected {wanted[key].dtype}")
    notes = [f"stored as {', '.join(others)}, converted to float32"] if others else []
    return {key: tensor.to(wanted[key].dtype) for key, tensor in tensors.items()}, notes
