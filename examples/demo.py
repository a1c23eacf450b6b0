"""`make demo`: pre-train a small network on rendered scenes and show what it learned.

Renders the embedded data set, then pre-trains a ResNet-18 up to its second stage (stride 8) on the
images alone, once by MoCo v2 and once by this package's defaults: same weights to start from, same
images, views and steps. Both, and the network before, are measured by the same linear segmentation
of frozen features and by how often a position of one view finds its own place in another. Writes
pictures and all results to demo_output/.

    python examples/demo.py [--seed 0] [--seeds 3] [--output DIR]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from scenes import CLASS_NAMES, write_scenes
from torch import nn

from densecl_ext.backbones import build_backbone
from densecl_ext.checkpoints import export_backbone, load_backbone
from densecl_ext.evaluate import SegmentationFolder
from densecl_ext.evaluate.correspondence import CorrespondenceOptions, Views, correspondence
from densecl_ext.evaluate.dense import evaluate_dense
from densecl_ext.evaluate.pixels import DenseData, read_all
from densecl_ext.evaluate.segmentation import Linear, SegmentationOptions
from densecl_ext.train import PretrainConfig, pretrain
from densecl_ext.train.progress import ConsoleProgress
from densecl_ext.visualize import plot_losses, plot_matches

NETWORK: dict[str, Any] = {"output_stride": 8, "truncate": True}
PRETRAINING: dict[str, Any] = {
    "backbone": "resnet18",
    **NETWORK,
    "image_size": 64,
    "loader": "memory",
    "epochs": 8,
    "batch_size": 64,
    "lr": 0.2,
    "key_momentum": 0.99,
    "key_bn_groups": 4,
    "hidden_dim": 512,
    "tensorboard": False,
    "checkpoint_every": "100ep",
    "log_every": 5,
}
# What each arm is: the options that it does not share with the other.
ARMS = {"MoCo v2": {"loss_lambda": 0.0}, "ours": {"loss_lambda": 0.7, "positions_per_image": 4}}
BEFORE = "random"
DATA_SEED = 0


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
    exam = Exam(scenes, options.labelled)  # pre-training never sees the images of scenes/val

    results = []
    for seed in range(options.seed, options.seed + options.seeds):
        results.append(one_seed(output / f"seed_{seed}", scenes / "train", exam, seed, options))
        (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")

    say("4. pictures")
    first = output / f"seed_{options.seed}" / "ours"
    pictures = [plot_losses(first, output / "demo_losses.png"), output / "demo_matches.png"]
    plot_matches(
        load_backbone(first / "backbone.pth"),
        exam.pictures,
        pictures[1],
        title="Mutual nearest neighbours of the pre-trained features",
    )
    for picture in pictures:
        print(f"   {picture}")

    say("Linear segmentation of frozen features (mIoU) and exact correspondence, in percent")
    for number, result in enumerate(results):
        told = ", ".join(
            f"{name} {100 * found['miou']:.1f} / {100 * found['correspondence']:.1f}"
            for name, found in result.items()
        )
        print(f"   seed {options.seed + number}: {told}")
    print(f"   all of it in {time.perf_counter() - started:.0f} s")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Pre-train on rendered scenes and evaluate.")
    parser.add_argument("--seed", type=int, default=0, help="seed of the network and the views")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds to repeat with")
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


class Exam:
    """The same two measurements for every network: labels of scenes, and crops of others."""

    def __init__(self, scenes: Path, labelled: int) -> None:
        train = SegmentationFolder(scenes / "train", "train", limit=labelled)
        val = SegmentationFolder(scenes / "val", "val")
        self.pictures = [val[i][0] for i in range(min(4, len(val)))]
        self.data = DenseData(read_all(train), read_all(val), CLASS_NAMES)
        self.linear = Linear(SegmentationOptions(solver="lbfgs", recalibrate=min(320, len(train))))
        self.crops = CorrespondenceOptions(data=str(scenes / "val" / "images"), images=128)
        self.views = Views.load(self.crops)

    def __call__(self, name: str, network: nn.Module) -> dict[str, float]:
        linear = evaluate_dense(network, self.data, [self.linear])["segmentation"]
        found = correspondence(network, self.crops, views=self.views).numbers
        result = {
            "miou": linear.value,
            "correspondence": found["exact"],
            "same_index": found["same_index"],
            "same_index_base": found["same_index_base"],
        }
        print(f"   {name}: " + ", ".join(f"{key} {100 * v:.1f} %" for key, v in result.items()))
        return result


def one_seed(
    folder: Path, scenes: Path, exam: Exam, seed: int, options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Pre-train and export every arm; measure them and the network before."""
    torch.manual_seed(seed)  # as pre-training does: the weights that every arm starts from
    networks: dict[str, nn.Module] = {BEFORE: build_backbone(PRETRAINING["backbone"], **NETWORK)}
    for name, own in ARMS.items():
        say(f"2. {name}: pre-training on the images alone, seed {seed}")
        run = folder / name.lower().replace(" ", "_")
        values = {
            **PRETRAINING,
            **own,
            "data": str(scenes / "images"),
            "output": str(run),
            "epochs": options.epochs,
            "seed": seed,
        }
        start = time.perf_counter()
        config = PretrainConfig.from_mapping(values)
        result = pretrain(config, overwrite=True, progress=ConsoleProgress(sys.stdout))
        if result.interrupted:
            raise SystemExit(f"stopped at step {result.step} of {result.total_steps}: no result")
        print(f"   {result.step} steps in {time.perf_counter() - start:.0f} s", flush=True)
        export_backbone(result.checkpoint, run / "backbone.pth", to="backbone")
        networks[name] = load_backbone(run / "backbone.pth")

    say(f"3. measuring, seed {seed}")
    return {name: exam(name, network) for name, network in networks.items()}


if __name__ == "__main__":
    sys.exit(main())
