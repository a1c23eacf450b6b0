"""`densecl export` and `densecl import`."""

from __future__ import annotations

from pathlib import Path

import click

from densecl_ext.cli.command import Word, command

# Those of densecl_ext.checkpoints, which is imported only when it is needed.
TARGETS = ("torchvision", "timm", "backbone", "huggingface", "detectron2", "mmengine", "onnx")

OUTPUT = click.Option(
    ["--output"], required=True, metavar="FILE", type=Word("FILE"), help="file to write"
)


@command(
    "export",
    "Write a run's backbone so that other libraries load it.\n\nThe weights are loaded strictly "
    "into the library's own model and its features compared before the file is kept.",
    "densecl export runs/photos --output backbone.pth --to torchvision",
    click.Argument(["checkpoint"], type=Word("DIR"), help="run folder, or a checkpoint file"),
    OUTPUT,
    click.Option(
        ["--to"],
        type=click.Choice(TARGETS),
        default="torchvision",
        help="torchvision, timm: a state_dict that the library's own model takes strictly; "
        "backbone: for this program; each as .safetensors where the output ends so. huggingface: "
        "a folder for timm and transformers; detectron2: a .pkl or .pth; mmengine: a .pth for "
        "mmdetection and mmsegmentation; onnx: a .onnx program (default: torchvision)",
    ),
    click.Option(
        ["--no-fc"],
        is_flag=True,
        help="leave out fc.weight and fc.bias, which are torchvision's random initialisation",
    ),
)
def export(checkpoint: str, output: str, to: str, no_fc: bool) -> None:
    """Exports."""
    from densecl_ext.checkpoints import export_backbone

    written = export_backbone(checkpoint, output, to, fc=not no_fc)
    name = written.architecture.removeprefix("timm/")
    through_timm = to in ("timm", "huggingface") or name != written.architecture
    library = "timm" if through_timm else "torchvision"
    without = f" without {', '.join(written.missing)}" if written.missing else ""
    print(
        f"wrote {written.path}: {written.architecture}, {len(written.tensors)} tensors; loaded "
        f"{'' if without else 'strictly '}into {library}'s model{without}, features equal"
    )
    for note in written.notes:
        print(f"note: {note}")
    if written.usage:
        print("use it:\n  " + written.usage.replace("\n", "\n  "))


def usage(path: Path, architecture: str, *, strict: bool = True) -> str:
    """How another program loads an exported file and prepares images for it."""
    from densecl_ext.data import Augmentation

    name = architecture.removeprefix("timm/")
    made = f"torchvision.models.{name}()"
    if name != architecture:
        made = f"timm.create_model({name!r}, num_classes=0)"
    load = f"torch.load({str(path)!r}){'' if strict else ', strict=False'}"
    defaults = Augmentation()
    return (
        f"use it:\n  model = {made}\n  model.load_state_dict({load})\n"
        f"  images: RGB, 0 to 1, minus mean {defaults.mean}, divided by deviation {defaults.std}"
    )


@command(
    "import",
    "Turn another project's checkpoint into a backbone file to start from or to evaluate: MoCo "
    "v1 to v3, official DenseCL / OpenSelfSup, mmselfsup, mmpretrain, lightly, solo-learn, "
    "SimSiam, SimCLR, BYOL, SwAV, DINO, PixPro, SlotCon, VICRegL, VISSL, Hugging Face, "
    "detectron2, torchvision, timm.",
    "densecl import moco_v2_800ep_pretrain.pth.tar --output moco.pth\n"
    "  densecl pretrain --data photos --weights moco.pth",
    click.Argument(["source"], type=Word("FILE"), help="the checkpoint"),
    OUTPUT,
    click.Option(
        ["--backbone"],
        metavar="NAME",
        help="the architecture it must have (resnet50); default: any ResNet. A file of another "
        "network needs it (convnext_tiny, timm/vit_small_patch16_224)",
    ),
    click.Option(
        ["--prefix"],
        metavar="TEXT",
        help="what stands before the backbone's names (net.trunk.), where the form is not known",
    ),
    click.Option(
        ["--container"],
        metavar="KEY",
        help="where in the file the tensors lie (state, or a.b), where the form is not known",
    ),
    click.Option(
        ["--trusted"],
        is_flag=True,
        help="accept pickled Python objects, which can run code: only for files whose origin you "
        "trust",
    ),
)
def import_(
    source: str,
    output: str,
    backbone: str | None,
    prefix: str | None,
    container: str | None,
    trusted: bool,
) -> None:
    """Imports."""
    from densecl_ext.checkpoints import import_backbone

    written = import_backbone(
        source,
        output,
        architecture=backbone,
        trusted=trusted,
        prefix=prefix,
        container=container,
    )
    print(
        f"wrote {written.path}: {written.architecture}, {len(written.tensors)} tensors, "
        f"recognised as {written.form}"
    )
    for note in written.notes:
        print(f"note: {note}")
    if written.left_out:
        print(f"left out as heads: {', '.join(written.left_out)}")
