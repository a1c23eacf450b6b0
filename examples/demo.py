"""`make demo`: pre-train a small network on rendered scenes and show what it learned.

Renders the embedded data set, pre-trains a ResNet-18 with DenseCL on the CPU (images only), exports
it to torchvision's format, and trains the same linear segmentation probe on the frozen features
of the network before and after. Writes pictures and all results to demo_output/.

    python examples/demo.py [--seed 0] [--seeds 3] [--output DIR]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from scenes import CLASS_NAMES, NUM_CLASSES, write_scenes
from torch import nn

from densecl_ext.backbones import build_backbone
from densecl_ext.checkpoints import export_backbone, load_backbone
from densecl_ext.evaluate import (
    SegmentationFolder,
    SegmentationResult,
    linear_segmentation,
    recalibrate_batch_norm,
)
from densecl_ext.evaluate.features import prepare_images
from densecl_ext.evaluate.metrics import results_table
from densecl_ext.train import PretrainConfig, pretrain
from densecl_ext.train.progress import ConsoleProgress
from densecl_ext.visualize import plot_losses, plot_matches

BACKBONE = "resnet18"
PRETRAINING = {
    "backbone": BACKBONE,
    "image_size": 64,
    "epochs": 8,
    "batch_size": 64,
    "lr": 0.1,
    "key_momentum": 0.99,
    "queue_length": 256,
    "key_bn_groups": 4,
    "hidden_dim": 512,
    "tensorboard": False,
    "checkpoint_every": "100ep",
    "log_every": 5,
}
PROBE = {"scale": 4 / 3, "epochs": 15, "label_stride": 2}
DATA_SEED = 0
FEATURES = ("colour", "random", "pre-trained")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    started = time.perf_counter()
    output = Path(options.output)

    say(f"1. {options.scenes} scenes of textured objects, drawn from seed {DATA_SEED}")
    scenes = output / "scenes"
    render(scenes / "train", options.scenes, DATA_SEED, val=0)
    render(scenes / "val", options.val, DATA_SEED + 1, val=options.val)
    train = SegmentationFolder(scenes / "train", "train", limit=options.labelled)
    val = SegmentationFolder(scenes / "val", "val")  # pre-training never sees these images

    results: list[dict[str, SegmentationResult]] = []
    for seed in range(options.seed, options.seed + options.seeds):
        run = output / f"seed_{seed}"
        results.append(one_seed(run, scenes / "train", train, val, seed, options))
        print(results_table(results[-1]), flush=True)

    say("5. pictures")
    first = output / f"seed_{options.seed}"
    images = [val[i][0] for i in range(min(4, len(val)))]
    pictures = [
        plot_losses(first / "run", output / "demo_losses.png"),
        output / "demo_matches.png",
    ]
    plot_matches(
        load_backbone(first / "resnet18.pth"),
        images,
        pictures[1],
        title="Mutual nearest neighbours of the pre-trained features",
    )
    for picture in pictures:
        print(f"   {picture}")

    say("Linear segmentation of frozen features, mIoU in percent")
    for number, result in enumerate(results):
        colour, before, after = (result[name].miou * 100 for name in FEATURES)
        print(
            f"   seed {options.seed + number}: random initialisation {before:.1f}, "
            f"pre-trained {after:.1f} ({after - before:+.1f}); colours alone {colour:.1f}"
        )
    print(f"   all of it in {time.perf_counter() - started:.0f} s")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Pre-train on rendered scenes and evaluate.")
    parser.add_argument("--seed", type=int, default=0, help="seed of the network and the views")
    parser.add_argument("--seeds", type=int, default=1, help="repeat with so many seeds")
    parser.add_argument("--output", default="demo_output", help="folder of all results")
    parser.add_argument("--scenes", type=int, default=3000, help="unlabelled scenes")
    parser.add_argument("--val", type=int, default=300, help="scenes to measure on")
    parser.add_argument("--labelled", type=int, default=600, help="labelled scenes of the probe")
    parser.add_argument("--epochs", type=int, default=PRETRAINING["epochs"])
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 is torch's choice")
    return parser.parse_args(arguments)


def say(text: str) -> None:
    print(f"\n{text}", flush=True)


def render(folder: Path, count: int, seed: int, val: int) -> None:
    start = time.perf_counter()

    def tell(done: int) -> None:
        end = "\n" if done == count else ""
        print(f"\r   {done}/{count} scenes", end=end, flush=True)

    write_scenes(folder, count, seed, val=val, progress=tell)
    print(f"   {folder} in {time.perf_counter() - start:.0f} s", flush=True)


def one_seed(
    run: Path,
    scenes: Path,
    train: SegmentationFolder,
    val: SegmentationFolder,
    seed: int,
    options: argparse.Namespace,
) -> dict[str, SegmentationResult]:
    """Pre-train, export, and probe the network before and after."""
    say(f"2. pre-training {BACKBONE} on the images alone, seed {seed}")
    values = PRETRAINING | {
        "data": str(scenes / "images"),
        "output": str(run / "run"),
        "epochs": options.epochs,
        "seed": seed,
    }
    torch.manual_seed(seed)
    random_network = build_backbone(BACKBONE)
    values["weights"] = str(run / "initial.pth")
    run.mkdir(parents=True, exist_ok=True)
    torch.save(random_network.state_dict(), values["weights"])
    start = time.perf_counter()
    config = PretrainConfig.from_mapping(values)
    result = pretrain(config, overwrite=True, progress=ConsoleProgress(sys.stdout))
    if result.interrupted:
        raise SystemExit(f"stopped at step {result.step} of {result.total_steps}: no result")
    print(f"   {result.step} steps in {time.perf_counter() - start:.0f} s", flush=True)

    say("3. export to torchvision")
    exported = run / "resnet18.pth"
    export_backbone(result.checkpoint, exported, to="torchvision")
    print(f"   {exported}: torchvision.models.resnet18() loads it strictly", flush=True)

    say(f"4. linear segmentation: {len(train)} labelled scenes to learn, {len(val)} to measure")
    networks = (
        nn.AvgPool2d(32),  # what mean colours tell on the same grid
        random_network,  # the very weights that pre-training started from
        load_backbone(exported),
    )
    pairs = zip(FEATURES, networks, strict=True)
    return {name: probe(name, network, train, val) for name, network in pairs}


def probe(
    name: str, network: nn.Module, train: SegmentationFolder, val: SegmentationFolder
) -> SegmentationResult:
    """The same for all features: batch-norm statistics of the scenes, then the linear layer."""
    size = round(train[0][0].shape[-1] * PROBE["scale"])
    chosen = torch.stack([train[i][0] for i in range(min(len(train), 320))])
    inputs = prepare_images(chosen, (size, size))
    recalibrate_batch_norm(network, inputs.split(64))
    result = linear_segmentation(
        network,
        train,
        val,
        num_classes=NUM_CLASSES,
        class_names=CLASS_NAMES,
        report=lambda line: print(f"   {name}: {line}", flush=True),
        **PROBE,
    )
    print(f"   {name}: mIoU {100 * result.miou:.1f} % in {result.seconds:.0f} s", flush=True)
    return result


if __name__ == "__main__":
    sys.exit(main())
