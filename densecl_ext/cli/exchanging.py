"""`densecl export` and `densecl import`."""

from __future__ import annotations

import argparse
from typing import Any

from densecl_ext.cli.parser import add_command


def add_export(commands: Any) -> argparse.ArgumentParser:
    """Adds the command."""
    command = add_command(
        commands,
        "export",
        "write a run's backbone so that other libraries load it",
        "densecl export runs/photos --output backbone.pth --to torchvision",
        "Write a run's backbone so that other libraries load it. The weights are loaded strictly\n"
        "into the library's own model and its features compared before the file is kept.",
    )
    command.add_argument("checkpoint", help="run folder, or a checkpoint file")
    command.add_argument("--output", required=True, metavar="FILE", help="file to write")
    command.add_argument(
        "--to",
        choices=("torchvision", "timm", "backbone"),
        default="torchvision",
        help="torchvision, timm: a state_dict that the library's own model takes strictly; "
        "backbone: for this program (default: torchvision)",
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
    library = "timm" if options.to == "timm" or name != written.architecture else "torchvision"
    print(
        f"wrote {written.path}: {written.architecture}, {len(written.tensors)} tensors; "
        f"loaded strictly into {library}'s model, features equal"
    )
    for note in written.notes:
        print(f"note: {note}")
    if options.to == "torchvision" and not options.no_fc:
        print(
            f"use it:\n  model = torchvision.models.{written.architecture}()\n"
            f"  model.load_state_dict(torch.load({str(written.path)!r}))"
        )
    elif options.to == "timm":
        print(
            f"use it:\n  model = timm.create_model({name!r}, num_classes=0)\n"
            f"  model.load_state_dict(torch.load({str(written.path)!r}))"
        )
    return 0


def add_import(commands: Any) -> argparse.ArgumentParser:
    """Adds the command."""
    command = add_command(
        commands,
        "import",
        "turn another project's checkpoint into a backbone file",
        "densecl import moco_v2_800ep_pretrain.pth.tar --output moco.pth\n"
        "  densecl pretrain --data photos --weights moco.pth",
        "Turn another project's checkpoint (MoCo, official DenseCL / OpenSelfSup, mmselfsup,\n"
        "mmpretrain, torchvision, timm) into a backbone file to start from or to evaluate.",
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
        options.source, options.output, architecture=options.backbone, trusted=options.trusted
    )
    print(
        f"wrote {written.path}: {written.architecture}, {len(written.tensors)} tensors, "
        f"recognised as {written.form}"
    )
    if written.left_out:
        print(f"left out as heads: {', '.join(written.left_out)}")
    return 0
