"""`densecl export` and `densecl import`."""

from __future__ import annotations

import argparse
from typing import Any

from densecl_ext.cli.parser import add_command

# Those of densecl_ext.checkpoints, which is imported only when it is needed.
TARGETS = ("torchvision", "timm", "backbone", "huggingface", "detectron2", "mmengine", "onnx")


def add_export(commands: Any) -> argparse.ArgumentParser:
    """Adds the command."""
    command = add_command(
        commands,
        "export",
        "write a run's backbone so that other libraries load it",
        "densecl export runs/photos --output backbone.pth --to torchvision\n"
        "  densecl export runs/photos --output hub/ --to huggingface",
        "Write a run's backbone so that other libraries load it. The weights are loaded strictly\n"
        "into the library's own model and its features compared before the file is kept.",
    )
    command.add_argument("checkpoint", help="run folder, or a checkpoint file")
    command.add_argument(
        "--output",
        required=True,
        metavar="FILE",
        help="file to write, of tensors alone where it ends in .safetensors; with huggingface a "
        "folder",
    )
    command.add_argument(
        "--to",
        choices=TARGETS,
        default="torchvision",
        help="torchvision, timm: a state_dict that the library's own model takes strictly; "
        "backbone: for this program; huggingface: a folder for timm and transformers; detectron2: "
        "a .pkl or .pth; mmengine: a .pth for mmdetection and mmsegmentation; onnx: a .onnx "
        "program (default: torchvision)",
    )
    command.add_argument(
        "--no-fc",
        action="store_true",
        help="leave out fc.weight and fc.bias, which are torchvision's random initialisation",
    )
    command.set_defaults(run=_export)
    return command


def _export(options: argparse.Namespace) -> int:
    from densecl_ext.checkpoints import export_backbone

    written = export_backbone(options.checkpoint, options.output, options.to, fc=not options.no_fc)
    name = written.architecture.removeprefix("timm/")
    through_timm = options.to in ("timm", "huggingface") or name != written.architecture
    library = "timm" if through_timm else "torchvision"
    print(
        f"wrote {written.path}: {written.architecture}, {len(written.tensors)} tensors; "
        f"loaded strictly into {library}'s model, features equal"
    )
    for note in written.notes:
        print(f"note: {note}")
    if written.usage:
        print("use it:\n  " + written.usage.replace("\n", "\n  "))
    return 0


def add_import(commands: Any) -> argparse.ArgumentParser:
    """Adds the command."""
    command = add_command(
        commands,
        "import",
        "turn another project's checkpoint into a backbone file",
        "densecl import moco_v2_800ep_pretrain.pth.tar --output moco.pth\n"
        "  densecl pretrain --data photos --weights moco.pth",
        "Turn another project's checkpoint (MoCo v1 to v3, official DenseCL / OpenSelfSup,\n"
        "mmselfsup, mmpretrain, lightly, solo-learn, SimSiam, BYOL, SwAV, DINO, PixPro, SlotCon,\n"
        "VICRegL, VISSL, Hugging Face, detectron2, torchvision, timm) into a backbone file to\n"
        "start from or to evaluate.",
    )
    command.add_argument("source", help="the checkpoint")
    command.add_argument("--output", required=True, metavar="FILE", help="file to write")
    command.add_argument(
        "--backbone",
        metavar="NAME",
        help="the architecture it must have (resnet50); default: any ResNet. A file with timm's "
        "names needs it (timm/vit_small_patch16_224)",
    )
    command.add_argument(
        "--prefix",
        metavar="TEXT",
        help="what stands before the backbone's names (net.trunk.), where it is of no known form",
    )
    command.add_argument(
        "--container",
        metavar="KEY",
        help="where in the file the tensors lie (state, or a.b), where it is of no known form",
    )
    command.add_argument(
        "--trusted",
        action="store_true",
        help="accept pickled Python objects, which can run code: only for files whose origin you "
        "trust",
    )
    command.set_defaults(run=_import)
    return command


def _import(options: argparse.Namespace) -> int:
    from densecl_ext.checkpoints import import_backbone

    written = import_backbone(
        options.source,
        options.output,
        architecture=options.backbone,
        trusted=options.trusted,
        prefix=options.prefix,
        container=options.container,
    )
    print(
        f"wrote {written.path}: {written.architecture}, {len(written.tensors)} tensors, "
        f"recognised as {written.form}"
    )
    for note in written.notes:
        print(f"note: {note}")
    if written.left_out:
        print(f"left out as heads: {', '.join(written.left_out)}")
    return 0
