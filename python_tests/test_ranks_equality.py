"""1, 2 and 4 processes that share a batch compute the same, step by step."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("lightning")
pytest.importorskip("torchvision")
if not dist.is_available():
    pytest.skip("torch was built without distributed", allow_module_level=True)

import train_runs as runs
from rank_processes import run_ranks
from torch import nn

from densecl_ext.checkpoints import load_checkpoint
from densecl_ext.train import pretrain

STEPS = 3
COMMON: dict[str, Any] = {
    "key_bn": "sync",
    "log_every": 1,
    "checkpoint_every": 1,
    "max_steps": STEPS,
    "base_lr": 1.0,
    "queue_init": "random",  # the first step has negatives, and gradients
    "timeout": 60,
}
CASES: dict[str, dict[str, Any]] = {
    "torchvision": {},
    "memory, in parts": {"loader": "memory", "accumulate": 2, "matching": "random"},
    "symmetric": {
        "symmetric": True, "positions_per_image": 2, "predictor_dim": 8, "matching": "backbone",
        "lambda_warmup": 1, "row_weight": "similarity",
    },
}  # fmt: skip
if find_spec("timm"):
    CASES["timm"] = {"backbone": "timm/test_resnet", "image_size": 64, "loader": "memory"}
if find_spec("nvidia") and find_spec("nvidia.dali"):
    CASES["dali"] = {"loader": "dali", "workers": 1, "dense_negatives": "pooled"}


COMPILED = {"compile": True, "matching": "dense", "mutual_matching": True}


def train(data: str, output: str, name: str) -> dict[str, Any]:
    """Rows and last checkpoint of a run, and the momentum of its optimizer after one step."""
    options = CASES.get(name, COMPILED)
    config = runs.tiny_config(data, f"{output}/{name}", **(COMMON | options))
    compile_before = nn.Module.compile
    nn.Module.compile = lambda self: compile_before(self, fullgraph=True, backend="aot_eager")
    try:
        run = pretrain if "backbone" in options else runs.tiny_run
        one = run(config.__class__(**{**config.to_mapping(), "max_steps": 1}))
        gradients = load_checkpoint(one.checkpoint)["optimizer"]["state"]
        result = run(config, resume=True)
    finally:
        nn.Module.compile = compile_before
        torch._dynamo.reset()
    return {
        "rows": runs.rows(result),
        "gradients": {key: state["momentum_buffer"] for key, state in gradients.items()},
        "model": load_checkpoint(result.checkpoint)["model"],
    }


def train_all(data: str, output: str, names: list[str]) -> dict[str, Any]:
    return {name: train(data, output, name) for name in names}


def trained_by(world: int, names: list[str], data: str, folder: Path) -> dict[str, Any]:
    every = run_ranks(world, folder / "meeting", train_all, data, str(folder), names)
    for result in every:
        if isinstance(result, Exception):
            raise result
    return every[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(runs.image_folder(tmp_path_factory.mktemp("photos") / "images"))


@pytest.fixture(scope="module")
def trained(data: str, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    results = {}
    for world in (1, 2, 4):
        folder = tmp_path_factory.mktemp(f"of{world}")
        results[world] = trained_by(world, list(CASES), data, folder)
    return results


def close(got: torch.Tensor, expected: torch.Tensor, what: str, scale: float) -> None:
    """Within float32's rounding, of numbers of this size, after some steps."""
    if expected.is_floating_point():
        worst = float((got - expected).abs().max()) / scale
        assert worst <= 2e-5 * STEPS, f"{what}: {worst:.1e}"
    else:
        assert torch.equal(got, expected), what


@pytest.mark.parametrize(("name", "world"), list(product(CASES, (2, 4))))
def test_ranks_that_share_a_batch_equal_one(
    name: str, world: int, trained: dict[int, dict[str, Any]]
) -> None:
    assert_equal(trained[world][name], trained[1][name])


@pytest.mark.slow
def test_compiled_ranks_equal_one(data: str, tmp_path: Path) -> None:
    one, two, four = (
        trained_by(world, ["compiled"], data, tmp_path / f"{world}")["compiled"]
        for world in (1, 2, 4)
    )
    assert_equal(two, one)
    assert_equal(four, one)


def assert_equal(got: dict[str, Any], expected: dict[str, Any]) -> None:
    for step, (row, one) in enumerate(zip(got["rows"], expected["rows"], strict=True), 1):
        for column in ("loss", "loss_global", "loss_dense", "gradient_norm", "lr", "matched"):
            assert float(row[column]) == pytest.approx(float(one[column]), rel=2e-5, abs=1e-6), (
                step,
                column,
            )
    largest = max(float(gradient.abs().max()) for gradient in expected["gradients"].values())
    assert largest > 1e-3
    for key, gradient in expected["gradients"].items():
        close(got["gradients"][key], gradient, f"gradient {key}", largest)
    for key, value in expected["model"].items():
        close(got["model"][key], value, key, max(0.1, float(value.abs().max())))
