"""`densecl evaluate`: linear segmentation of frozen features."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from densecl_ext.cli.parser import add_command

if TYPE_CHECKING:
    from torch import nn

    from densecl_ext.evaluate import SegmentationFolder, SegmentationResult

CALIBRATION_IMAGES = 256


def add_evaluate(commands: Any) -> argparse.ArgumentParser:
    """Adds the command."""
    command = add_command(
        commands,
        "evaluate",
        "measure what frozen features are worth: linear segmentation, mIoU",
        "densecl evaluate runs/photos --data camvid --val-split test --compare-random",
        "Train one linear layer on the frozen features of labelled images and measure its\n"
        "segmentation. DIR holds images/, masks/ (PNG of class ids, 255 ignored),\n"
        "splits/NAME.txt (one image a line) and perhaps classes.txt.",
    )
    command.add_argument("weights", help="run folder, checkpoint, or exported backbone")
    command.add_argument("--data", required=True, metavar="DIR", help="labelled images")
    command.add_argument("--train-split", default="train", metavar="NAME", help="(default: train)")
    command.add_argument("--val-split", default="val", metavar="NAME", help="(default: val)")
    command.add_argument(
        "--num-classes", type=int, metavar="N", help="default: the lines of classes.txt"
    )
    command.add_argument(
        "--layers", nargs="+", metavar="NAME", help="layers whose outputs are the features (layer4)"
    )
    command.add_argument(
        "--scale", type=float, default=1.0, metavar="X", help="resize images by X (default: 1)"
    )
    command.add_argument(
        "--epochs", type=int, default=20, metavar="N", help="of the linear layer (default: 20)"
    )
    command.add_argument("--batch-size", type=int, default=32, metavar="N", help="(default: 32)")
    command.add_argument(
        "--limit", type=int, metavar="N", help="use N images of each split, evenly spread"
    )
    command.add_argument("--seed", type=int, default=0, metavar="N", help="(default: 0)")
    command.add_argument(
        "--device", default="auto", metavar="auto|cpu|cuda[:N]", help="(default: auto)"
    )
    command.add_argument(
        "--compare-random",
        action="store_true",
        help="measure the same network at random initialisation too; both then get batch-norm "
        "statistics from the training images",
    )
    command.add_argument("--output", metavar="FILE", help="also write the numbers as JSON")
    command.set_defaults(run=_evaluate)
    return command


def _evaluate(options: argparse.Namespace) -> int:
    import torch

    from densecl_ext.backbones import build_backbone
    from densecl_ext.checkpoints import load_backbone, read_backbone
    from densecl_ext.checkpoints.exchange import resolve_checkpoint
    from densecl_ext.evaluate import SegmentationFolder, linear_segmentation
    from densecl_ext.evaluate.metrics import results_table
    from densecl_ext.train.machine import pick_device

    path = resolve_checkpoint(options.weights)
    networks: dict[str, nn.Module] = {"pre-trained": load_backbone(path)}
    train = SegmentationFolder(options.data, options.train_split, limit=options.limit)
    val = SegmentationFolder(options.data, options.val_split, limit=options.limit)
    num_classes = options.num_classes or len(train.class_names)
    if not num_classes:
        raise ValueError(f"{options.data} has no classes.txt: give --num-classes")
    if options.compare_random:
        torch.manual_seed(options.seed)
        networks = {"random": build_backbone(read_backbone(path).architecture), **networks}
    device = pick_device(options.device)
    results: dict[str, SegmentationResult] = {}
    for name, network in networks.items():
        if options.compare_random:
            _calibrate(network, train, options.scale)
        results[name] = linear_segmentation(
            network,
            train,
            val,
            num_classes=num_classes,
            class_names=train.class_names if len(train.class_names) == num_classes else (),
            layers=options.layers,
            scale=options.scale,
            epochs=options.epochs,
            batch_size=options.batch_size,
            seed=options.seed,
            device=device,
            report=lambda line, name=name: print(f"{name}: {line}", file=sys.stderr),  # type: ignore[misc]
        )
    print(results_table(results))
    if options.output:
        _write(options.output, results)
    return 0


def _calibrate(network: nn.Module, train: SegmentationFolder, scale: float) -> None:
    """Gives batch norms the statistics of training images: fair to a network that never saw any."""
    import torch

    from densecl_ext.evaluate import recalibrate_batch_norm
    from densecl_ext.evaluate.features import input_size, prepare_images

    images = torch.stack([train[i][0] for i in range(min(len(train), CALIBRATION_IMAGES))])
    size = input_size(network, (images.shape[2], images.shape[3]), scale)
    batches = [prepare_images(part, size) for part in images.split(32)]
    recalibrate_batch_norm(network, batches)


def _write(output: str, results: dict[str, SegmentationResult]) -> None:
    from pathlib import Path

    from densecl_ext.checkpoints.storage import atomic_file

    numbers = {
        name: {
            "miou": result.miou,
            "pixel_accuracy": result.pixel_accuracy,
            # A class without any pixel has no IoU, and JSON no NaN.
            "iou": {
                label: iou if iou == iou else None
                for label, iou in zip(result.class_names, result.iou_per_class, strict=True)
            },
        }
        for name, result in results.items()
    }
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(output) as file:
        file.write((json.dumps(numbers, indent=2) + "\n").encode())
