"""Optimizers and schedules from a configuration."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import TinyBackbone
from torch import nn

pytest.importorskip("pydantic")

from densecl_ext import DenseCL  # noqa: E402
from densecl_ext.train.build import build_model, build_optimizer, layer_numbers  # noqa: E402
from densecl_ext.train.config import PretrainConfig  # noqa: E402
from densecl_ext.train.schedule import cosine_lr  # noqa: E402
from densecl_ext.train.step import TrainingStep  # noqa: E402


def config(**options: object) -> PretrainConfig:
    given = {"data": "x", "dim": 8, "hidden_dim": 8, "queue_length": 16, "key_momentum": 0.9}
    return PretrainConfig(**{**given, "lr": 0.1, **options})  # type: ignore[arg-type]


class Blocks(nn.Module):
    """A stem, three blocks and a norm, named as timm's transformers name them."""

    out_channels = 4

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 4, 8, stride=8)
        self.blocks = nn.Sequential(*(nn.Conv2d(4, 4, 1) for _ in range(3)))
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.blocks(self.patch_embed(x)))


def scales(model: DenseCL, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    by_id = {id(p): g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
    return {name: by_id[id(p)] for name, p in model.named_parameters() if p.requires_grad}


def test_sgd_has_one_group_as_the_paper() -> None:
    model = build_model(config(), TinyBackbone(), 10)
    (group,) = build_optimizer(config(), model).param_groups
    assert group["weight_decay"] == 1e-4 and group["momentum"] == 0.9
    assert len(group["params"]) == sum(p.requires_grad for p in model.parameters())


def test_layers_learn_more_slowly_towards_the_input() -> None:
    given = config(layer_decay=0.5, optimizer="adamw", weight_decay=0.1)
    model = build_model(given, Blocks(), 10)
    optimizer = build_optimizer(given, model)
    found = scales(model, optimizer)
    assert found["backbone.patch_embed.weight"] == 0.5**4
    assert found["backbone.blocks.0.weight"] == 0.5**3
    assert found["backbone.blocks.2.weight"] == found["backbone.norm.weight"] == 0.5
    assert found["neck.dense_head.0.weight"] == 1.0
    decayed = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decayed[id(model.backbone.norm.weight)] == 0.0  # type: ignore[union-attr]
    assert decayed[id(model.backbone.patch_embed.weight)] == 0.1  # type: ignore[union-attr]
    TrainingStep(model, optimizer).schedule(lr=0.2)
    assert {g["lr"] for g in optimizer.param_groups} == {0.2 * 0.5**n for n in (0, 1, 2, 3, 4)}


def test_depth_of_a_resnets_parameters() -> None:
    names = ["backbone.conv1.weight", "backbone.layer1.0.conv1.weight"]
    names += ["backbone.layer1.0.bn1.bias", "backbone.layer1.1.conv1.weight"]
    assert list(layer_numbers(names).values()) == [0, 1, 1, 2]


def test_the_rate_rises_then_falls() -> None:
    rates = [cosine_lr(1.0, step, 100, warmup=10) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates.index(max(rates)) == 9
    assert rates[50] == pytest.approx(0.5) == 0.5 * (1 + math.cos(math.pi / 2))
    assert cosine_lr(1.0, 0, 100) == 1.0


def test_options_reach_the_model() -> None:
    given = config(
        matching="backbone", geometric_share=0.25, epochs=8, mutual_matching=True,
        row_weight="similarity", dense_negatives="position", positions_per_image=3,
        symmetric=True, predictor_dim=16, dense_temperature=0.5,
    )  # fmt: skip
    model = build_model(given, TinyBackbone(), steps_per_epoch=10)
    assert model.matcher.geometric_steps == 20 and model.matcher.mutual
    assert model.matcher.row_weight == "similarity" and model.symmetric
    assert (model.dense_negatives, model.positions_per_image) == ("position", 3)
    assert model.predictor is not None and model.criterion.dense_temperature == 0.5
