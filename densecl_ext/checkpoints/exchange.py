"""Backbones out of the project (export) and into it (import), checked before they are written."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from densecl_ext.backbones import RESNETS, build_backbone
from densecl_ext.checkpoints.formats import extract_backbone, find_tensors
from densecl_ext.checkpoints.storage import atomic_file, load_checkpoint

if TYPE_CHECKING:
    from torchvision.models import ResNet

TARGETS = ("torchvision", "backbone")
FC_SEED = 0


@dataclasses.dataclass(frozen=True)
class BackboneFile:
    """A backbone that was read from or written to a file.

    Attributes:
        path: the file.
        architecture: torchvision's name of the network ("resnet50").
        form: whose naming the source used.
        tensors: name in torchvision's convention -> tensor, without the classifier `fc`.
        left_out: names of heads in the source that are no part of the backbone.
        notes: what a person who uses the file should know.
    """

    path: Path
    architecture: str
    form: str
    tensors: dict[str, Tensor]
    left_out: list[str]
    notes: list[str]


def read_backbone(path: str | os.PathLike[str], *, trusted: bool = False) -> BackboneFile:
    """Reads the query backbone out of any known checkpoint.

    Understands runs of this project, its exports, torchvision's files, MoCo, OpenSelfSup /
    mmselfsup / mmpretrain (with them the official DenseCL); `densecl_ext.checkpoints.formats`
    lists the forms.

    Args:
        path: the checkpoint.
        trusted: see `load_checkpoint`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not readable, of no known form, or not exactly a torchvision ResNet.
    """
    path = Path(path)
    content = load_checkpoint(path, trusted=trusted)
    try:
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

    Before the file takes its name, the weights are loaded strictly into torchvision's own model,
    and both models' feature maps on a random image must be equal bit for bit; what was written is
    read back.

    Args:
        checkpoint: a run's checkpoint (or its folder), or anything `read_backbone` reads.
        output: the file to write.
        to: "torchvision": a state_dict that `torchvision.models.<architecture>().load_state_dict`
            takes strictly; "backbone": the same without `fc`, which `load_backbone` takes.
        fc: with "torchvision": include `fc.weight` and `fc.bias`, which its strict loading
            demands. Pre-training has no classifier, so they are torchvision's own random
            initialisation (1,000 classes, fixed seed): train or replace them before using the
            network's class outputs.

    Returns:
        What was written, with notes for the person who uses it.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: unknown `to`, or no exportable backbone in the checkpoint.
        RuntimeError: the check failed; nothing was written.
        OSError: the output could not be written.
    """
    if to not in TARGETS:
        raise ValueError(f"export_backbone: to must be one of {', '.join(TARGETS)}, got {to!r}")
    source = read_backbone(resolve_checkpoint(checkpoint))
    network = _torchvision_network(source)
    tensors, notes = dict(source.tensors), []
    if to == "torchvision" and fc:
        tensors |= {f"fc.{key}": value for key, value in network.fc.state_dict().items()}
        notes.append(
            "fc.weight and fc.bias are torchvision's random initialisation (pre-training has no "
            "classifier): train or replace them"
        )
    elif to == "torchvision":
        notes.append(
            "without fc: load with strict=False, or after `model.fc = torch.nn.Identity()`"
        )
    _verify(source, network)
    _write(Path(output), tensors)
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
        output: the file to write: torchvision's names, no `fc`.
        architecture: the architecture it must have, or None to accept what it is.
        trusted: see `load_checkpoint`.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not readable, of no known form, not exactly a torchvision ResNet, or another
            architecture.
        RuntimeError: the check failed; nothing was written.
        OSError: the output could not be written.
    """
    read = read_backbone(source, trusted=trusted)
    if architecture is not None and read.architecture != architecture:
        raise ValueError(
            f"import_backbone: {read.path} holds a {read.architecture}, expected {architecture}"
        )
    _verify(read, _torchvision_network(read))
    _write(Path(output), read.tensors)
    return dataclasses.replace(read, path=Path(output))


def resolve_checkpoint(path: str | os.PathLike[str]) -> Path:
    """Accepts a run folder for its checkpoints/last.pt."""
    path = Path(path)
    return path / "checkpoints" / "last.pt" if path.is_dir() else path


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
        missing = sorted(wanted.keys() - got.keys())
        unexpected = sorted(got.keys() - wanted.keys())
        reshaped = sorted(k for k in got.keys() & wanted.keys() if got[k] != wanted[k])
        difference = len(missing) + len(unexpected) + len(reshaped)
        if nearest is None or difference < nearest[0]:
            parts = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
            told = "; ".join(
                f"{len(names)} {word} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
                for word, names in parts.items()
                if names
            )
            nearest = (difference, f"the nearest is {name}: {told}")
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


@torch.no_grad()
def _verify(source: BackboneFile, network: ResNet) -> None:
    """Compares both models' last feature maps on one random image, bit for bit."""
    views = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))  # (N, 3, H, W)
    seen: list[Any] = []
    handle = network.layer4.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        network(views)
    finally:
        handle.remove()
    ours = _build(source)(views)
    if not torch.equal(seen[0], ours):
        error = (seen[0] - ours).abs().max().item()
        raise RuntimeError(
            f"{source.path}: torchvision's {source.architecture} computes other features from "
            "these weights "
            f"(largest difference {error:.3g}); nothing was written"
        )
    if not torch.isfinite(ours).all():
        raise RuntimeError(
            f"{source.path}: the backbone's features are not finite; nothing was written"
        )


def _write(output: Path, tensors: dict[str, Tensor]) -> None:
    """Writes the state_dict atomically and reads it back."""
    output.parent.mkdir(parents=True, exist_ok=True)
    plain = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    with atomic_file(output) as file:
        torch.save(plain, file)
    read = load_checkpoint(output)
    if read.keys() != plain.keys() or not all(torch.equal(read[k], v) for k, v in plain.items()):
        raise RuntimeError(f"{output}: reading the file back gave other weights")
