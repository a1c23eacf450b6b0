"""Pre-trains arms beside each other and measures them; one line of JSON a run, resumable.

    python -m experiments.run --data-root DIR --study NAME --sets photos camvid --arms mocov2 ours
        --seeds 0 1 2 --steps 400 --split val

A run whose line is in experiments/results/NAME.jsonl is left out, so the same command goes on after
an interruption. Several processes may work on one study: each takes the runs that no other has.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from densecl_ext.backbones import build_backbone
from densecl_ext.data import build_loader
from densecl_ext.evaluate.correspondence import CorrespondenceOptions, Views, correspondence
from densecl_ext.evaluate.dense import DenseData, evaluate_dense
from densecl_ext.evaluate.incontext import InContext, InContextOptions
from densecl_ext.evaluate.segmentation import Linear, SegmentationOptions
from densecl_ext.train.schedule import cosine_lr
from experiments.data import pretraining_folders
from experiments.methods import ARMS

RESULTS = Path(__file__).resolve().parent / "results"
BACKBONE, SIZE, BATCH, WEIGHT_DECAY = "resnet18", 64, 64, 1e-4


@dataclasses.dataclass(frozen=True)
class Run:
    """One line of results."""

    study: str
    set: str
    arm: str
    seed: int
    steps: int
    lr: float
    split: str
    options: str = "{}"  # JSON, on top of the arm's own

    @property
    def key(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


def network(arm: str) -> nn.Module:
    """ResNet-18 up to its second stage: 128 channels, stride 8, 0.7 million weights."""
    padding = "reflect" if arm.endswith("_reflect") else "zeros"
    return build_backbone(BACKBONE, output_stride=8, truncate=True, padding=padding)


def pretrain(run: Run, root: Path, cache: Path) -> tuple[nn.Module, nn.Module | None, dict]:
    """The backbone, the dense head where there is one, and what the training said."""
    torch.manual_seed(run.seed)
    backbone = network(run.arm)
    if run.arm == "random":
        return backbone, None, {}
    method, options, _ = ARMS[run.arm]
    arm = method(backbone, run.steps, **{**options, **json.loads(run.options)})
    arm.to(memory_format=torch.channels_last).train()
    loader = build_loader(
        pretraining_folders(run.set, root, cache), batch_size=BATCH, size=SIZE, backend="memory",
        seed=run.seed, channels_last=True, workers=1, cache_size=96,
    )  # fmt: skip
    weights = [parameter for parameter in arm.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(weights, run.lr, momentum=0.9, weight_decay=WEIGHT_DECAY)
    said: dict[str, Any] = {}
    seconds = time.process_time()
    for step, views in enumerate(epochs(loader, run.steps)):
        for group in optimizer.param_groups:
            group["lr"] = cosine_lr(run.lr, step, run.steps)
        with torch.autocast("cpu", torch.bfloat16):
            loss = arm(views.view_q, views.view_k, views.crop_q, views.crop_k)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == run.steps - 1:
            said = {"loss": round(float(loss.detach()), 3), **getattr(arm, "health", {})}
            print(f"  {run.arm} {run.set} seed {run.seed} step {step}: {said}", flush=True)
    said["train_cpu_seconds"] = round(time.process_time() - seconds, 1)
    loader.close()
    return backbone, getattr(arm, "dense_head", None), said


def epochs(loader: Any, steps: int) -> Iterator[Any]:
    """The given number of batches, epoch after epoch."""
    done = epoch = 0
    while True:
        loader.set_epoch(epoch)
        for views in loader:
            yield views
            done += 1
            if done == steps:
                return
        epoch += 1


@functools.cache
def street(root: Path, split: str) -> tuple[DenseData, list[Any]]:
    """CamVid at 240 x 180 and the protocols on it."""
    shared: dict[str, Any] = {
        "data": str(root / "camvid"),
        "val_split": split,
        "size": (180, 240),
        "recalibrate": 184,
    }
    linear = SegmentationOptions(**shared, solver="lbfgs", iterations=60)
    return DenseData.load(linear), [Linear(linear), InContext(InContextOptions(**shared))]


@functools.cache
def pairs(root: Path) -> tuple[CorrespondenceOptions, Views]:
    """Two crops each of 128 photographs."""
    options = CorrespondenceOptions(data=str(root / "photos/images"), images=128, seed=3)
    return options, Views.load(options)


def measure(
    backbone: nn.Module, dense_head: nn.Module | None, root: Path, split: str
) -> dict[str, Any]:
    """Linear and in-context segmentation, and correspondence, of a frozen backbone."""
    data, protocols = street(root, split)
    options, views = pairs(root)
    backbone.eval()
    numbers: dict[str, Any] = {}
    for name, report in evaluate_dense(backbone, data, protocols).items():
        numbers[name] = round(100 * report.value, 3)
    report = correspondence(backbone, options, dense_head=dense_head, views=views)
    numbers |= {name: round(value, 4) for name, value in report.numbers.items()}
    return numbers


@contextlib.contextmanager
def claimed(run: Run, folder: Path) -> Iterator[bool]:
    """Whether this process has the run for itself."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{run.study}-{run.set}-{run.arm}-{run.seed}-{run.steps}-{run.lr:g}-{run.split}"
    path = folder / f"{name}-{abs(hash(run.options)) % 10**6}.lock"
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        yield False
        return
    try:
        yield True
    finally:
        path.unlink()


def done(study: str) -> set[str]:
    """Keys of the runs that have a line."""
    path = RESULTS / f"{study}.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return {Run(**json.loads(line)["run"]).key for line in lines}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.run", description=__doc__)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("build/experiments"))
    parser.add_argument("--study", default="try")
    parser.add_argument("--sets", nargs="+", default=["photos"])
    parser.add_argument("--arms", nargs="+", default=["ours"], choices=["random", *ARMS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--lr", type=float, help="instead of the arm's own")
    parser.add_argument("--options", default="{}", help="JSON, on top of the arm's own")
    parser.add_argument("--split", default="val", choices=["val", "test"])
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    root, cache = given.data_root.resolve(), given.cache.resolve()
    RESULTS.mkdir(exist_ok=True)
    for seed in given.seeds:
        for set_name in given.sets:
            for arm in given.arms:
                lr = given.lr or (ARMS[arm][2] if arm in ARMS else 0.0)
                steps = given.steps if arm in ARMS else 0
                run = Run(given.study, set_name, arm, seed, steps, lr, given.split, given.options)
                with claimed(run, cache / "running") as mine:
                    if not mine or run.key in done(run.study):
                        continue
                    backbone, dense_head, said = pretrain(run, root, cache)
                    numbers = measure(backbone, dense_head, root, run.split)
                    line = {"run": dataclasses.asdict(run), "numbers": numbers, "training": said}
                    print(json.dumps(line), flush=True)
                    with (RESULTS / f"{run.study}.jsonl").open("a") as file:
                        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
