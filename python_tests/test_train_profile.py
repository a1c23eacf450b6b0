"""`densecl pretrain --profile`: what it measures and writes, and what it leaves alone."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("lightning")  # train_runs

import train_runs as runs
from tiny_models import TinyBackbone

from densecl_ext import cli
from densecl_ext.nn import phases
from densecl_ext.train.profile import profile


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.image_folder(tmp_path_factory.mktemp("photos") / "images")


def test_every_part_of_a_step_is_measured(data: Path, tmp_path: Path) -> None:
    told: list[str] = []
    config = runs.tiny_config(data, tmp_path)
    result = profile(config, steps=4, backbone=TinyBackbone(), message=told.append)  # > 1 epoch
    assert list(result.phases) == [*phases.PHASES, "rest"]
    assert all(seconds > 0 for seconds in list(result.phases.values())[:-1])
    assert sum(result.phases.values()) == pytest.approx(result.step_seconds, rel=1e-6)
    assert result.images_per_second == pytest.approx(runs.BATCH / result.step_seconds)
    assert result.peak_memory > 2**20 and result.graph_step_seconds is None
    assert "4 measured on cpu" in told[0]

    stored = json.loads((tmp_path / "profile" / "profile.json").read_text())
    assert stored["phases"] == result.phases and stored["settings"]["batch"] == runs.BATCH
    table = (tmp_path / "profile" / "profile.md").read_text()
    share = result.phases["backward"] / result.step_seconds
    assert f"| backward | {result.phases['backward'] * 1e3:.2f} | {share:.1%} |" in table
    trace = json.loads(gzip.decompress((tmp_path / "profile/trace.json.gz").read_bytes()))
    named = [event["name"] for event in trace["traceEvents"] if "name" in event]
    assert all(named.count(phases.PREFIX + name) >= 3 for name in phases.PHASES)


def test_lambda_zero_has_no_matching(data: Path, tmp_path: Path) -> None:
    config = runs.tiny_config(data, tmp_path, loss_lambda=0.0)
    assert "matching" not in profile(config, steps=1, backbone=TinyBackbone()).phases


def test_command_leaves_a_run_alone(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs.tiny_run(runs.tiny_config(data, tmp_path, max_steps=2))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    words = ["pretrain", "--data", str(data), "--output", str(run.output), "--backbone", "resnet18"]
    words += [
        "--image-size",
        "32",
        "--batch-size",
        "8",
        "--loader",
        "torchvision",
        "--workers",
        "0",
    ]
    assert cli.main([*words, "--workers", "0", "--device", "cpu", "--profile", "1"]) == 0
    printed = capsys.readouterr().out
    assert "| query forward |" in printed and "images/s, peak memory" in printed
    assert all(path.read_bytes() == content for path, content in before.items())
    assert cli.main([*words, "--profile", "--resume"]) == 2
    assert "neither resumes nor replaces" in capsys.readouterr().err
    assert cli.main([*words, "--profile", "many"]) == 2
    assert "expected a number of steps, got 'many'" in capsys.readouterr().err


def test_what_cannot_be_measured(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        profile(runs.tiny_config(data, tmp_path), steps=0)
    with pytest.raises(ValueError, match="cuda_graph needs a GPU, the run's device is cpu"):
        profile(runs.tiny_config(data, tmp_path, cuda_graph=True))
    with pytest.raises(ValueError, match="data must name a folder"):
        profile(runs.tiny_config("", tmp_path))
    assert not (tmp_path / "profile").exists()


@pytest.mark.gpu
def test_a_gpu_is_measured_by_its_own_clock(data: Path, tmp_path: Path) -> None:
    config = runs.tiny_config(data, tmp_path, device="cuda", cuda_graph=True)
    result = profile(config, steps=4, backbone=TinyBackbone())
    assert sum(result.phases.values()) == pytest.approx(result.step_seconds, rel=0.05)
    assert result.graph_step_seconds and result.peak_memory < torch.cuda.mem_get_info()[1]
