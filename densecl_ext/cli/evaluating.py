"""`densecl evaluate`: linear segmentation of frozen features."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import click
from pydantic import Field

from densecl_ext.cli.command import Word, command, given, options_of
from densecl_ext.options import Natural, Positive, PositiveFloat, Text, build

if TYPE_CHECKING:
    from torch import nn

    from densecl_ext.evaluate import SegmentationFolder, SegmentationResult

CALIBRATION_IMAGES = 256


@dataclass(kw_only=True)
class Segmentation:
    """The options of linear segmentation.

    Attributes:
        data: labelled images.
        train_split: the split to train on.
        val_split: the split to measure on.
        num_classes: default: the lines of classes.txt.
        layers: layers whose outputs are the features (layer4).
        scale: resize images by X.
        epochs: of the linear layer.
        batch_size: images a step.
        limit: use N images of each split, evenly spread.
        seed: seed of everything random.
        device: where to compute.
        compare_random: measure the same network at random initialisation too; both then get
            batch-norm statistics from the training images.
        output: also write the numbers as JSON.
    """

    data: Annotated[Text, Field(json_schema_extra={"metavar": "DIR"})]
    train_split: Annotated[Text, Field(json_schema_extra={"metavar": "NAME"})] = "train"
    val_split: Annotated[Text, Field(json_schema_extra={"metavar": "NAME"})] = "val"
    num_classes: Positive | None = None
    layers: list[str] | None = None
    scale: PositiveFloat = 1.0
    epochs: Positive = 20
    batch_size: Positive = 32
    limit: Positive | None = None
    seed: Natural = 0
    device: Annotated[Text, Field(json_schema_extra={"metavar": "auto|cpu|cuda[:N]"})] = "auto"
    compare_random: bool = False
    output: Annotated[Text, Field(json_schema_extra={"metavar": "FILE"})] | None = None


@command(
    "evaluate",
    "Measure what frozen features are worth: linear segmentation, mIoU.\n\nTrain one linear layer "
    "on the frozen features of labelled images and measure its segmentation. DIR holds images/, "
    "masks/ (PNG of class ids, 255 ignored), splits/NAME.txt (one image a line) and perhaps "
    "classes.txt.",
    "densecl evaluate runs/photos --data camvid --val-split test --compare-random",
    click.Argument(
        ["weights"], type=Word("DIR"), help="run folder, checkpoint, or exported backbone"
    ),
    *options_of(Segmentation),
)
def evaluate(weights: str, **values: Any) -> None:
    """Measures and prints."""
    options = build(Segmentation, given(values), source="densecl evaluate")
    import torch

    from densecl_ext.backbones import build_backbone
    from densecl_ext.checkpoints import load_backbone, read_backbone
    from densecl_ext.checkpoints.exchange import resolve_checkpoint
    from densecl_ext.evaluate import SegmentationFolder, linear_segmentation
    from densecl_ext.evaluate.metrics import results_table
    from densecl_ext.train.machine import pick_device

    path = resolve_checkpoint(weights)
    networks: dict[str, nn.Module] = {"pre-trained": load_backbone(path)}
    train = SegmentationFolder(options.data, options.train_split, limit=options.limit)
    val = SegmentationFolder(options.data, options.val_split, limit=options.limit)
    num_classes = options.num_classes or len(train.class_names)
    if not num_classes:
        raise ValueError(f"{options.data} has no classes.txt: give --num-classes")
    if options.compare_random:
        torch.manual_seed(options.seed)
        read = read_backbone(path)
        networks = {"random": build_backbone(read.architecture, **read.options), **networks}
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
