"""A folder of small images, and tiny runs over it, for the trainer's tests."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch
from data_images import scene
from tiny_models import TinyBackbone

from densecl_ext.train import PretrainConfig, PretrainResult, pretrain
from densecl_ext.train.progress import Progress

IMAGES = 26
BATCH = 8
STEPS_PER_EPOCH = 3  # two images are left over


def image_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for index in range(IMAGES):
        scene(index, 48, 40).save(folder / f"{index:02}.png")
    return folder


def tiny_config(data: Path | str, output: Path, **options: Any) -> PretrainConfig:
    values: dict[str, Any] = {
        "data": str(data),
        "output": str(output),
        "image_size": 32,
        "batch_size": BATCH,
        "epochs": 3,
        "dim": 8,
        "hidden_dim": 16,
        "queue_length": 20,
        "key_bn_groups": 2,
        "base_lr": 3.0,
        "log_every": 2,
        "precision": "fp32",
        "device": "cpu",
        "workers": 0,
        "threads": 1,
        "loader": "torchvision",
        "tensorboard": False,
    }
    return PretrainConfig(**(values | options))


def tiny_run(config: PretrainConfig, **arguments: Any) -> PretrainResult:
    torch.manual_seed(5)
    return pretrain(config, backbone=TinyBackbone(), **arguments)


def rows(result: PretrainResult) -> list[dict[str, str]]:
    with (result.output / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


class CallAt(Progress):
    """Calls a function right after a step."""

    def __init__(self, step: int, call: Any) -> None:
        self.step, self.call, self.messages = step, call, ""

    def update(self, step: int) -> None:
        if step == self.step:
            self.call()

    def message(self, text: str) -> None:
        self.messages += text + "\n"


def assert_same(first: Any, second: Any, where: str = "checkpoint") -> None:
    """Equal to the last bit, through dicts and lists."""
    assert type(first) is type(second), where
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype and torch.equal(first, second), where
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_same(first[key], second[key], f"{where}[{key!r}]")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for index, (a, b) in enumerate(zip(first, second, strict=True)):
            assert_same(a, b, f"{where}[{index}]")
    else:
        assert first == second, where
