"""A run's backbone out to other libraries, each of which must load it before it counts."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from densecl_ext.backbones import RESNETS
from densecl_ext.backbones.build import meta_backbone
from densecl_ext.backbones.convolutions import first_convolution
from densecl_ext.backbones.timm import TIMM
from densecl_ext.checkpoints import folders, onnx
from densecl_ext.checkpoints.exchange import BackboneFile, read_backbone
from densecl_ext.checkpoints.names import from_detectron2, to_detectron2
from densecl_ext.checkpoints.provenance import normalisation_line, summary
from densecl_ext.checkpoints.runs import resolve_checkpoint
from densecl_ext.checkpoints.verify import check_library
from densecl_ext.checkpoints.writing import (
    check_output,
    write_card,
    write_file,
    write_weights,
)

TARGETS = ("torchvision", "timm", "backbone", "huggingface", "detectron2", "mmengine", "onnx")
_DEPTHS = {"resnet18": 18, "resnet34": 34, "resnet50": 50, "resnet101": 101, "resnet152": 152}


def export_backbone(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    to: str = "torchvision",
    *,
    fc: bool = True,
    card: bool = True,
) -> BackboneFile:
    """Writes a run's query backbone for use elsewhere, and proves that it arrives.

    Before a file takes its name, the weights are loaded strictly into the library's own model, and
    both models' feature maps on random images must be equal bit for bit (of transformers and ONNX
    within rounding); what was written is read back. detectron2 and mmengine, which are not asked
    themselves, are held against the map of their names. Of a backbone with another output stride
    or padding, both models are compared without: its weights are the plain network's, and a note
    says what the library's does otherwise. Of a truncated one, the stages that are there are
    compared and written; the file then takes `strict=False`, and a note names what is missing.

    Where the weights come from, and how images must be prepared, is kept inside the file and in a
    model card beside it.

    Args:
        checkpoint: a run's checkpoint (or its folder), or anything `read_backbone` reads.
        output: the file to write; one that ends in .safetensors is such a file. With
            "huggingface" a folder.
        to: "torchvision": a state_dict that `torchvision.models.<architecture>().load_state_dict`
            takes strictly. "timm": one that `timm.create_model(<architecture>, num_classes=0)`
            takes strictly, of a ResNet too. "backbone": what `load_backbone` takes (of a ResNet
            torchvision's without `fc`). "huggingface": a folder for
            `timm.create_model("local-dir:...")` and, of a ResNet, `transformers.ResNetBackbone`.
            "detectron2": a .pkl (or .pth) for MODEL.WEIGHTS. "mmengine": a .pth for
            `init_cfg=dict(type="Pretrained", ...)`. "onnx": a .onnx program from images to the
            feature map, of any batch and image size.
        fc: with "torchvision": include the classifier (`fc.weight` and `fc.bias`), which its strict
            loading demands. Pre-training has none, so it is torchvision's own random initialisation
            (1,000 classes, fixed seed): train or replace it before using the network's class
            outputs.
        card: write the model card.

    Returns:
        What was written, with notes and lines of use for the person who uses it.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: unknown `to`, an ending or a network that the library does not have, no
            exportable backbone in the checkpoint, or an output that would cost a file of a run.
        ImportError: the library is not installed.
        RuntimeError: the check failed; a file that was there is as it was.
        OSError: the output could not be written.
    """
    if to not in TARGETS:
        raise ValueError(f"export_backbone: to must be one of {', '.join(TARGETS)}, got {to!r}")
    output = Path(output)
    resolved = resolve_checkpoint(checkpoint)
    if to != "huggingface":
        output = check_output("export_backbone", output, resolved)
        _require_ending(output, to)
    source = read_backbone(resolved)
    _require_network(source, to)
    written = _WRITERS[to](source, output, fc)
    if card:
        beside = output / "README.md" if to == "huggingface" else Path(f"{output}.md")
        usage = written.usage.replace(str(output), output.name)
        write_card(beside, output.name, source.provenance, usage)
    return dataclasses.replace(
        written,
        notes=[
            *_build_notes(source),
            *written.notes,
            summary(source.provenance),
            f"images: {normalisation_line(source.provenance)}",
        ],
    )


def _require_ending(output: Path, to: str) -> None:
    asked = {"detectron2": (".pkl", ".pth"), "mmengine": (".pth", ".pt"), "onnx": (".onnx",)}
    endings = asked.get(to)
    if endings is not None and output.suffix not in endings:
        raise ValueError(
            f"export_backbone: the output for {to} must end in {' or '.join(endings)}, got {output}"
        )
    if endings is None and output.suffix in (".pkl", ".onnx"):
        raise ValueError(
            f"export_backbone: the output for {to} must end in .pth or .safetensors, got {output}"
        )


def _require_network(source: BackboneFile, to: str) -> None:
    name, resnet = source.architecture, source.architecture in RESNETS
    if source.of_timm and to in ("torchvision", "detectron2", "mmengine"):
        raise ValueError(
            f"export_backbone: {source.path} holds {name}, which {to} does not have; to must be "
            "'timm' or 'backbone', 'huggingface' or 'onnx'"
        )
    if to in ("timm", "huggingface") and not source.of_timm and not resnet:
        raise ValueError(
            f"export_backbone: timm has other names in its {name} than torchvision "
            f"({source.path}); to must be 'torchvision' or 'backbone', or 'onnx'"
        )
    if to in ("detectron2", "mmengine") and not resnet:
        raise ValueError(
            f"export_backbone: {to} has other names in its {name} than torchvision "
            f"({source.path}); to must be 'torchvision' or 'backbone', or 'onnx'"
        )
    if to == "huggingface" and source.missing:
        raise ValueError(
            f"export_backbone: {source.path} holds a truncated {name}, and a hub's folder is "
            "loaded whole; to must be 'torchvision' or 'backbone', or 'onnx'"
        )


def _build_notes(source: BackboneFile) -> list[str]:
    notes = []
    built = {k: v for k, v in source.options.items() if k != "in_channels"}
    if built:
        told = ", ".join(f"{name}={value}" for name, value in built.items())
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


def _written(source: BackboneFile, output: Path, usage: str, *notes: str) -> BackboneFile:
    return dataclasses.replace(
        source, path=output, usage=usage, notes=[*source.notes, *(note for note in notes if note)]
    )


def _load_line(output: Path) -> str:
    if output.suffix == ".safetensors":
        return f"safetensors.torch.load_file({str(output)!r})"
    return f"torch.load({str(output)!r})"


def _torchvision(source: BackboneFile, output: Path, fc: bool) -> BackboneFile:
    classifier = check_library(source, "torchvision")
    tensors, note = dict(source.tensors), ""
    strict = "" if not source.missing else ", strict=False"
    if not source.missing and fc:
        tensors |= classifier
        note = (
            f"{' and '.join(classifier)} are torchvision's random initialisation (pre-training "
            "has no classifier): train or replace them"
        )
    elif not source.missing:
        note = "without fc: load with strict=False, or after `model.fc = torch.nn.Identity()`"
        strict = ", strict=False"
    write_weights(output, tensors, source.provenance)
    usage = (
        f"model = torchvision.models.{source.architecture}()\n{_first_line(source)}"
        f"model.load_state_dict({_load_line(output)}{strict})"
    )
    return dataclasses.replace(_written(source, output, usage, note), tensors=tensors)


def _first_line(source: BackboneFile) -> str:
    """The line that gives torchvision's network the first convolution, of other images than RGB."""
    if source.in_channels == 3:
        return ""
    name, first = first_convolution(meta_backbone(source.architecture, **source.options))
    parts = [part if not part.isdigit() else f"[{part}]" for part in name.split(".")]
    path = "".join(part if part.startswith("[") else f".{part}" for part in parts)
    settings = repr(first).removeprefix("Conv2d")
    return f"model{path} = torch.nn.Conv2d{settings}\n"


def _in_chans(source: BackboneFile) -> str:
    return "" if source.in_channels == 3 else f", in_chans={source.in_channels}"


def _timm(source: BackboneFile, output: Path, fc: bool) -> BackboneFile:
    check_library(source, "timm")
    write_weights(output, source.tensors, source.provenance)
    name = source.architecture.removeprefix(TIMM)
    usage = (
        f"model = timm.create_model({name!r}, num_classes=0{_in_chans(source)})\n"
        f"model.load_state_dict({_load_line(output)}{', strict=False' if source.missing else ''})"
    )
    return _written(source, output, usage)


def _backbone(source: BackboneFile, output: Path, fc: bool) -> BackboneFile:
    check_library(source, _own(source))
    write_weights(output, source.tensors, source.provenance | {"options": source.options})
    usage = f"backbone = densecl_ext.checkpoints.load_backbone({str(output)!r})"
    return _written(source, output, usage)


def _own(source: BackboneFile) -> str:
    return "timm" if source.of_timm else "torchvision"


def _mmengine(source: BackboneFile, output: Path, fc: bool) -> BackboneFile:
    check_library(source, "torchvision")
    write_weights(
        output,
        source.tensors,
        source.provenance,
        wrap=lambda state: {"meta": {"densecl_ext": source.provenance}, "state_dict": state},
    )
    depth = _DEPTHS.get(source.architecture)
    kind = f'type="ResNet", depth={depth}' if depth else f"# {source.architecture}"
    if source.in_channels != 3:
        kind += f", in_channels={source.in_channels}"
    values = source.provenance["normalisation"]
    usage = (
        f'backbone = dict({kind}, style="pytorch",\n'
        f'    init_cfg=dict(type="Pretrained", checkpoint={str(output)!r}))\n'
        f"data_preprocessor = dict(mean={_pixels(values)}, std={_pixels(values, 'std')}"
        f"{', bgr_to_rgb=True' if source.in_channels == 3 else ''})"
    )
    return _written(source, output, usage)


def _detectron2(source: BackboneFile, output: Path, fc: bool) -> BackboneFile:
    check_library(source, "torchvision")
    named = {
        to_detectron2(name): tensor
        for name, tensor in source.tensors.items()
        if not name.endswith("num_batches_tracked")
    }
    if {from_detectron2(name) for name in named} != {
        name for name in source.tensors if not name.endswith("num_batches_tracked")
    }:
        raise RuntimeError(f"{source.path}: detectron2's names do not lead back; nothing written")
    folders.write_detectron2(output, named, source.provenance)
    values = source.provenance["normalisation"]
    usage = (
        f"cfg.MODEL.WEIGHTS = {str(output)!r}\n"
        f"cfg.MODEL.RESNETS.DEPTH = {_DEPTHS.get(source.architecture, source.architecture)}\n"
        "cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False\n"
        f"cfg.MODEL.PIXEL_MEAN = {_pixels(values)}\n"
        f"cfg.MODEL.PIXEL_STD = {_pixels(values, 'std')}\n"
        + (
            'cfg.INPUT.FORMAT = "RGB"'
            if source.in_channels == 3
            else f"# a DatasetMapper of yours reads the {source.in_channels} channels"
        )
    )
    return dataclasses.replace(_written(source, output, usage), tensors=named)


def _huggingface(source: BackboneFile, output: Path, fc: bool) -> BackboneFile:
    check_library(source, "timm")
    loads = folders.write_huggingface(source, output)
    usage = f'model = timm.create_model("local-dir:{output}", num_classes=0)'
    note = ""
    if "transformers" in loads:
        usage += f"\nmodel = transformers.ResNetBackbone.from_pretrained({str(output)!r})"
    if loads.get("transformers") == "names":
        note = "transformers is not installed: its names were checked, not its loading"
    return _written(source, output, usage, note)


def _onnx(source: BackboneFile, output: Path, fc: bool) -> BackboneFile:
    data, note = onnx.program(source)
    write_file(output, lambda file: file.write(data), None)
    usage = (
        f"session = onnxruntime.InferenceSession({str(output)!r})\n"
        '(features,) = session.run(None, {"images": images})'
        f"  # (N, {source.in_channels}, H, W) float32"
    )
    return _written(source, output, usage, note)


def _pixels(normalisation: Mapping[str, Any], name: str = "mean") -> list[float]:
    """Mean or deviation in the files' own values: of RGB 0 to 255, else of the stated range."""
    low, high = normalisation.get("value_range") or (0.0, 255.0)
    start = low if name == "mean" else 0.0
    return [float(f"{start + (high - low) * value:.6g}") for value in normalisation[name]]


_WRITERS = {
    "torchvision": _torchvision,
    "timm": _timm,
    "backbone": _backbone,
    "huggingface": _huggingface,
    "detectron2": _detectron2,
    "mmengine": _mmengine,
    "onnx": _onnx,
}
