"""Backbones out of the project (export) and into it (import), checked before they are written."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from densecl_ext.backbones import RESNETS, build_backbone
from densecl_ext.backbones.timm import TIMM, TimmBackbone, create_timm, timm_shapes
from densecl_ext.checkpoints.formats import (
    difference,
    extract_backbone,
    extract_named,
    find_architecture,
    find_tensors,
    named_backbone,
)
from densecl_ext.checkpoints.runs import resolve_checkpoint
from densecl_ext.checkpoints.storage import atomic_file, load_checkpoint

if TYPE_CHECKING:
    from torchvision.models import ResNet

TARGETS = ("torchvision", "timm", "backbone")
FC_SEED = 0


@dataclasses.dataclass(frozen=True)
class BackboneFile:
    """A backbone that was read from or written to a file.

    Attributes:
        path: the file.
        architecture: torchvision's name of the network ("resnet50"), or "timm/" and timm's.
        form: whose naming the source used.
        tensors: name in that library's convention -> tensor, without the classifier.
        left_out: names of heads in the source that are no part of the backbone.
        notes: what a person who uses the file should know.
    """

    path: Path
    architecture: str
    form: str
    tensors: dict[str, Tensor]
    left_out: list[str]
    notes: list[str]


def read_backbone(
    path: str | os.PathLike[str], *, trusted: bool = False, architecture: str | None = None
) -> BackboneFile:
    """Reads the query backbone out of any known checkpoint.

    Understands runs of this project, its exports, torchvision's files, MoCo, OpenSelfSup /
    mmselfsup / mmpretrain (with them the official DenseCL); `densecl_ext.checkpoints.formats`
    lists the forms. A ResNet shows by its tensors. A timm network must be named: a run and what
    `import_backbone` writes do that themselves.

    Args:
        path: the checkpoint.
        trusted: see `load_checkpoint`.
        architecture: "timm/NAME" for a file that does not say so itself; None otherwise.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not readable, of no known form, or not exactly the network.
        ImportError: it holds a timm network, and timm is not installed.
    """
    path = Path(path)
    content = load_checkpoint(path, trusted=trusted)
    try:
        named = architecture or find_architecture(content)
        if named is not None and named.startswith(TIMM):
            tensors, left_out, form = extract_named(find_tensors(content), timm_shapes(named))
            architecture = named
        else:
            tensors, left_out, form = extract_backbone(find_tensors(content))
            architecture = match_architecture(tensors)
    except ValueError as error:
        raise ValueError(f"read_backbone: {path}: {error}") from None
    return BackboneFile(path, architecture, form.name, tensors, left_out, [])


def load_backbone(path: str | os.PathLike[str], *, trusted: bool = False) -> nn.Module:
    """Loads a checkpoint or an exported file as a backbone.

    Args:
        path: what `read_backbone` reads.
        trusted: see `load_checkpoint`.

    Returns:
        The backbone, (N, 3, H, W) -> (N, C, h, w), on the CPU in eval mode.

    Raises:
        FileNotFoundError: no such file.
        ValueError: see `read_backbone`.
    """
    return _build(read_backbone(path, trusted=trusted))


def export_backbone(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    to: str = "torchvision",
    *,
    fc: bool = True,
) -> BackboneFile:
    """Writes a run's query backbone for use elsewhere, and proves that it arrives.

    Before the file takes its name, the weights are loaded strictly into the library's own model,
    and both models' feature maps on a random image must be equal bit for bit; what was written is
    read back.

    Args:
        checkpoint: a run's checkpoint (or its folder), or anything `read_backbone` reads.
        output: the file to write.
        to: "torchvision": a state_dict that `torchvision.models.<architecture>().load_state_dict`
            takes strictly; "timm": one that `timm.create_model(<architecture>, num_classes=0)`
            takes strictly, of a ResNet too; "backbone": what `load_backbone` takes (of a ResNet
            torchvision's without `fc`).
        fc: with "torchvision": include `fc.weight` and `fc.bias`, which its strict loading
            demands. Pre-training has no classifier, so they are torchvision's own random
            initialisation (1,000 classes, fixed seed): train or replace them before using the
            network's class outputs.

    Returns:
        What was written, with notes for the person who uses it.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: unknown `to`, no exportable backbone in the checkpoint, or a timm network to
            torchvision.
        ImportError: the library is not installed.
        RuntimeError: the check failed; nothing was written.
        OSError: the output could not be written.
    """
    if to not in TARGETS:
        raise ValueError(f"export_backbone: to must be one of {', '.join(TARGETS)}, got {to!r}")
    source = read_backbone(resolve_checkpoint(checkpoint))
    of_timm = source.architecture.startswith(TIMM)
    if of_timm and to == "torchvision":
        raise ValueError(
            f"export_backbone: {source.path} holds {source.architecture}, which torchvision does "
            "not have; to must be 'timm' or 'backbone'"
        )
    tensors, notes = dict(source.tensors), []
    if of_timm or to == "timm":
        _verify(source, _timm_features(source))
    else:
        network = _torchvision_network(source)
        _verify(source, _layer4(network))
        if to == "torchvision" and fc:
            tensors |= {f"fc.{key}": value for key, value in network.fc.state_dict().items()}
            notes.append(
                "fc.weight and fc.bias are torchvision's random initialisation (pre-training has "
                "no classifier): train or replace them"
            )
        elif to == "torchvision":
            notes.append(
                "without fc: load with strict=False, or after `model.fc = torch.nn.Identity()`"
            )
    _write(Path(output), tensors, source.architecture if of_timm and to == "backbone" else None)
    return dataclasses.replace(source, path=Path(output), tensors=tensors, notes=notes)


def import_backbone(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    architecture: str | None = None,
    trusted: bool = False,
) -> BackboneFile:
    """Turns another project's checkpoint into a backbone file of this one.

    The result serves as `weights` of a pre-training run, and `load_backbone` reads it.

    Args:
        source: see `read_backbone`.
        output: the file to write: the library's names, no classifier; of a timm network the file
            also says which it is.
        architecture: the architecture it must have, or None to accept what it is. A file with
            timm's own names must be told by it ("timm/vit_small_patch16_224").
        trusted: see `load_checkpoint`.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not readable, of no known form, not exactly the network, or another
            architecture.
        ImportError: the library is not installed.
        RuntimeError: the check failed; nothing was written.
        OSError: the output could not be written.
    """
    timm_name = architecture if architecture and architecture.startswith(TIMM) else None
    read = read_backbone(source, trusted=trusted, architecture=timm_name)
    if architecture is not None and read.architecture != architecture:
        raise ValueError(
            f"import_backbone: {read.path} holds a {read.architecture}, expected {architecture}"
        )
    of_timm = read.architecture.startswith(TIMM)
    _verify(read, _timm_features(read) if of_timm else _layer4(_torchvision_network(read)))
    _write(Path(output), read.tensors, read.architecture if of_timm else None)
    return dataclasses.replace(read, path=Path(output))


def match_architecture(tensors: Mapping[str, Tensor]) -> str:
    """Names the torchvision ResNet whose tensors these are, by names and shapes.

    Args:
        tensors: backbone tensors, without `fc`.

    Raises:
        ValueError: none fits exactly; the message says how the nearest one differs.
    """
    got = _shapes(tensors)
    nearest: tuple[int, str] | None = None
    for name in RESNETS:
        wanted = _shapes(_meta_state(name))
        if got == wanted:
            return name
        count, told = difference(got, wanted)
        if nearest is None or count < nearest[0]:
            nearest = (count, f"the nearest is {name}: {told}")
    assert nearest is not None
    raise ValueError(f"not exactly a torchvision ResNet; {nearest[1]}")


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    # Files from before torch 0.4.1 have no num_batches_tracked, and batch norm's loading fills it
    # in.
    return {k: v.shape for k, v in tensors.items() if not k.endswith("num_batches_tracked")}


def _meta_state(architecture: str) -> dict[str, Tensor]:
    """Names and shapes of an architecture's backbone, without allocating its weights."""
    import torchvision

    with torch.device("meta"):
        network = getattr(torchvision.models, architecture)(weights=None)
    return {k: v for k, v in network.state_dict().items() if not k.startswith("fc.")}


def _build(source: BackboneFile) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # the random start is thrown away
        backbone = build_backbone(source.architecture)
    backbone.load_state_dict(source.tensors, strict=True)
    return backbone.eval()


def _torchvision_network(source: BackboneFile) -> ResNet:
    """Torchvision's model with the backbone loaded strictly and its own fc from a fixed seed."""
    import torchvision

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(FC_SEED)
        network = getattr(torchvision.models, source.architecture)(weights=None)
    fc = {f"fc.{key}": value for key, value in network.fc.state_dict().items()}
    try:
        network.load_state_dict(source.tensors | fc, strict=True)
    except RuntimeError as error:
        raise RuntimeError(
            f"{source.path}: torchvision's {source.architecture} does not load it strictly: {error}"
        ) from None
    return network.eval()


def _layer4(network: ResNet) -> Callable[[Tensor], Tensor]:
    """The last feature map of torchvision's ResNet, which its forward does not return."""

    def features(images: Tensor) -> Tensor:
        seen: list[Any] = []
        handle = network.layer4.register_forward_hook(
            lambda module, args, output: seen.append(output)
        )
        try:
            network(images)
        finally:
            handle.remove()
        return seen[0]

    return features


def _timm_features(source: BackboneFile) -> Callable[[Tensor], Tensor]:
    """The last features of timm's own model, with the backbone loaded strictly."""
    with torch.random.fork_rng(devices=[]):
        network: Any = create_timm(source.architecture)
    try:
        network.load_state_dict(source.tensors, strict=True)
    except RuntimeError as error:
        raise RuntimeError(
            f"{source.path}: timm's {source.architecture.removeprefix(TIMM)} does not load it "
            f"strictly: {error}"
        ) from None
    return network.eval().forward_features


@torch.no_grad()
def _verify(source: BackboneFile, features: Callable[[Tensor], Tensor]) -> None:
    """Compares the library's model with ours: last features of one random image, bit for bit."""
    backbone = _build(source)
    size = backbone.native_size if isinstance(backbone, TimmBackbone) else (96, 96)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))  # (N, 3, H, W)
    ours, theirs = backbone(images), features(images)
    if isinstance(backbone, TimmBackbone):
        theirs = _grid(theirs, ours.shape)
    if not torch.equal(theirs, ours):
        error = (theirs - ours).abs().max().item()
        raise RuntimeError(
            f"{source.path}: {source.architecture} of its own library computes other features "
            f"from these weights (largest difference {error:.3g}); nothing was written"
        )
    if not torch.isfinite(ours).all():
        raise RuntimeError(
            f"{source.path}: the backbone's features are not finite; nothing was written"
        )


def _grid(features: Tensor, shape: torch.Size) -> Tensor:
    """What timm's forward_features returned, as (N, C, h, w): the last h * w tokens in rows."""
    images, channels, height, width = shape
    if features.shape == shape:
        return features
    tokens = features.reshape(images, -1, channels)[:, -height * width :]
    return tokens.reshape(images, height, width, channels).permute(0, 3, 1, 2)


def _write(output: Path, tensors: dict[str, Tensor], architecture: str | None) -> None:
    """Writes the state_dict, or a file that says whose it is, atomically and reads it back."""
    output.parent.mkdir(parents=True, exist_ok=True)
    plain = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    content = plain if architecture is None else named_backbone(architecture, plain)
    with atomic_file(output) as file:
        torch.save(content, file)
    read = find_tensors(load_checkpoint(output))
    if read.keys() != plain.keys() or not all(torch.equal(read[k], v) for k, v in plain.items()):
        raise RuntimeError(f"{output}: reading the file back gave other weights")
