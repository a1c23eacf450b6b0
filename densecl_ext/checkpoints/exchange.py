"""Backbones out of the project (export) and into it (import), checked before they are written."""

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
from densecl_ext.backbones.timm import (
    TIMM,
    TimmBackbone,
    create_timm,
    intermediate_features,
    timm_shapes,
)
from densecl_ext.checkpoints.formats import (
    difference,
    extract_backbone,
    extract_named,
    find_architecture,
    find_options,
    find_tensors,
    named_backbone,
)
from densecl_ext.checkpoints.run_folder import RunFolder
from densecl_ext.checkpoints.storage import atomic_file, load_checkpoint

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
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    missing: tuple[str, ...] = ()


def read_backbone(
    path: str | os.PathLike[str], *, trusted: bool = False, architecture: str | None = None
) -> BackboneFile:
    """Reads the query backbone out of any known checkpoint.

    Understands runs of this project, its exports, torchvision's files, MoCo, OpenSelfSup /
    mmselfsup / mmpretrain (with them the official DenseCL); `densecl_ext.checkpoints.formats`
    lists the forms. A ResNet shows by its tensors. Any other network must be named: a run and what
    `import_backbone` writes do that themselves.

    Args:
        path: the checkpoint.
        trusted: see `load_checkpoint`.
        architecture: the name of a network that is no ResNet ("timm/NAME", "convnext_tiny") for a
            file that does not say so itself; None otherwise.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not readable, of no known form, or not exactly the network.
        ImportError: it holds a timm network, and timm is not installed.
    """
    path = Path(path)
    content = load_checkpoint(path, trusted=trusted)
    named = architecture or find_architecture(content)
    options = find_options(content)
    missing: tuple[str, ...] = ()
    try:
        if named is None or not _must_be_named(named, options):
            tensors, left_out, form = extract_backbone(find_tensors(content))
            named = match_architecture(tensors)
        else:
            if named.startswith(TIMM) and not options:
                shapes = timm_shapes(named)
            else:
                backbone = meta_backbone(named, **options)
                shapes = {key: value.shape for key, value in backbone.state_dict().items()}
                missing = backbone.left_out
            tensors, left_out, form = extract_named(find_tensors(content), shapes)
    except ValueError as error:
        raise ValueError(f"read_backbone: {path}: {error}") from None
    return BackboneFile(path, named, form.name, tensors, left_out, [], options, missing)


def load_backbone(path: str | os.PathLike[str], *, trusted: bool = False) -> nn.Module:
    """Loads a checkpoint or an exported file as a backbone.

    Args:
        path: what `read_backbone` reads.
        trusted: see `load_checkpoint`.

    Returns:
        The backbone, (N, 3, H, W) -> (N, C, h, w), on the CPU in eval mode, with the output stride
        and the padding that it was trained with.

    Raises:
        FileNotFoundError: no such file.
        ValueError: see `read_backbone`.
    """
    source = read_backbone(path, trusted=trusted)
    return _build(source, **source.options)


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
    read back. Of a backbone with another output stride or padding, both models are compared
    without: its weights are the plain network's, and a note says what the library's does
    otherwise. Of a truncated one, the stages that are there are compared and written; the file
    then takes `strict=False`, and a note names what is missing.

    Args:
        checkpoint: a run's checkpoint (or its folder), or anything `read_backbone` reads.
        output: the file to write.
        to: "torchvision": a state_dict that `torchvision.models.<architecture>().load_state_dict`
            takes strictly; "timm": one that `timm.create_model(<architecture>, num_classes=0)`
            takes strictly, of a ResNet too; "backbone": what `load_backbone` takes (of a ResNet
            torchvision's without `fc`).
        fc: with "torchvision": include the classifier (`fc.weight` and `fc.bias`), which its strict
            loading demands. Pre-training has none, so it is torchvision's own random initialisation
            (1,000 classes, fixed seed): train or replace it before using the network's class
            outputs.

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
    if to == "timm" and not of_timm and source.architecture not in RESNETS:
        raise ValueError(
            f"export_backbone: timm has other names in its {source.architecture} than torchvision "
            f"({source.path}); to must be 'torchvision' or 'backbone'"
        )
    tensors, notes = dict(source.tensors), _notes(source)
    classifier = _verify(source, "timm" if of_timm or to == "timm" else "torchvision")
    if to == "torchvision" and not source.missing:
        if fc:
            tensors |= classifier
            notes.append(
                f"{' and '.join(classifier)} are torchvision's random initialisation (pre-training "
                "has no classifier): train or replace them"
            )
        else:
            notes.append(
                "without fc: load with strict=False, or after `model.fc = torch.nn.Identity()`"
            )
    _write(Path(output), tensors, source if to == "backbone" else None)
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
        output: the file to write: the library's names, no classifier; of a network that is no
            ResNet the file also says which it is.
        architecture: the architecture it must have, or None to accept what it is. A file of
            anything but a ResNet must be told by it ("timm/vit_small_patch16_224").
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
    named = architecture if architecture and _must_be_named(architecture, {}) else None
    read = read_backbone(source, trusted=trusted, architecture=named)
    if architecture is not None and read.architecture != architecture:
        raise ValueError(
            f"import_backbone: {read.path} holds a {read.architecture}, expected {architecture}"
        )
    _verify(read, "timm" if read.architecture.startswith(TIMM) else "torchvision")
    _write(Path(output), read.tensors, read)
    return dataclasses.replace(read, path=Path(output))


def resolve_checkpoint(path: str | os.PathLike[str]) -> Path:
    """Accepts a run folder for its checkpoints/last.pt."""
    path = Path(path)
    return RunFolder(path).last if path.is_dir() else path


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


def _must_be_named(architecture: str, options: Mapping[str, Any]) -> bool:
    """Whether tensors alone do not say that they are of this network, built with these options."""
    if architecture in RESNETS:  # a truncated one has not all of a ResNet's tensors
        return "output_stride" in options
    return architecture.startswith(TIMM) or architecture in TORCHVISION


def _notes(source: BackboneFile) -> list[str]:
    notes = []
    if source.options:
        told = ", ".join(f"{name}={value}" for name, value in source.options.items())
        notes.append(
            f"pre-trained with {told}; the library's own network has its own stride and pads with "
            "zeros, so it computes other features from these weights (`--to backbone` keeps both)"
        )
    if source.missing:
        notes.append(
            f"{', '.join(source.missing)} are missing, since the backbone was truncated: load with "
            "strict=False; the library's network keeps its random start there"
        )
    return notes


def _build(source: BackboneFile, **options: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # the random start is thrown away
        backbone = build_backbone(source.architecture, **options)
    backbone.load_state_dict(source.tensors, strict=True)
    return backbone.eval()


@torch.no_grad()
def _verify(source: BackboneFile, library: str) -> dict[str, Tensor]:
    """Compares the library's model with ours: last features of one random image, bit for bit.

    Returns:
        The classifier of the library's model, from a fixed seed.
    """
    plain: dict[str, Any] = {}
    if source.missing:
        plain = {"output_stride": source.options["output_stride"], "truncate": True}
    backbone: Any = _build(source, **plain)
    network = _library_network(source, backbone, library)
    size = backbone.native_size if isinstance(backbone, TimmBackbone) else (96, 96)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))  # (N, 3, H, W)
    ours, theirs = backbone(images), _features(network, backbone, images)
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
    return _under(network.state_dict(), backbone.classifiers)


def _library_network(source: BackboneFile, backbone: Any, library: str) -> Any:
    """The library's model with the backbone loaded strictly and its own start for the rest."""
    name = source.architecture.removeprefix(TIMM)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(FC_SEED)
        if library == "timm":
            network = create_timm(name)
        else:
            import torchvision

            network = torchvision.models.get_model(name, weights=None)
    own = _under(network.state_dict(), (*backbone.classifiers, *source.missing))
    try:
        network.load_state_dict(own | source.tensors, strict=True)
    except RuntimeError as error:
        raise RuntimeError(
            f"{source.path}: {library}'s {name} does not load it strictly: {error}"
        ) from None
    return network.eval()


def _under(tensors: Mapping[str, Tensor], parts: tuple[str, ...]) -> dict[str, Tensor]:
    return {k: v for k, v in tensors.items() if f"{k}.".startswith(tuple(f"{p}." for p in parts))}


def _features(network: Any, backbone: Any, images: Tensor) -> Tensor:
    """The feature map that the backbone should give, by the library's own forward."""
    if isinstance(backbone, TimmBackbone):
        if backbone.last_index is not None:
            return intermediate_features(network, backbone.last_index, images)
        return _grid(network.forward_features(images), backbone(images).shape)
    seen: list[Tensor] = []
    stage = network.get_submodule(backbone.last_stage)
    handle = stage.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        network(images)
    finally:
        handle.remove()
    return seen[0]


def _grid(features: Tensor, shape: torch.Size) -> Tensor:
    """What timm's forward_features returned, as (N, C, h, w): the last h * w tokens in rows."""
    images, channels, height, width = shape
    if features.shape == shape:
        return features
    tokens = features.reshape(images, -1, channels)[:, -height * width :]
    return tokens.reshape(images, height, width, channels).permute(0, 3, 1, 2)


def _write(output: Path, tensors: dict[str, Tensor], named: BackboneFile | None) -> None:
    """Writes the state_dict, or a file that says whose it is, atomically and reads it back."""
    output.parent.mkdir(parents=True, exist_ok=True)
    plain = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    content: dict[str, Any] = plain
    if named is not None and (named.options or named.architecture not in RESNETS):
        content = named_backbone(named.architecture, plain, named.options)
    with atomic_file(output) as file:
        torch.save(content, file)
    read = find_tensors(load_checkpoint(output))
    if read.keys() != plain.keys() or not all(torch.equal(read[k], v) for k, v in plain.items()):
        raise RuntimeError(f"{output}: reading the file back gave other weights")
