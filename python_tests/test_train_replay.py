"""A run that diverged is taken again from its replay file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("torchvision")

import train_runs as runs
from tiny_models import TinyBackbone

from densecl_ext import cli
from densecl_ext.checkpoints import load_checkpoint
from densecl_ext.train import TrainingDiverged, replay
from densecl_ext.train.recipes import dump_recipe


def own(folder: Path) -> torch.nn.Module:
    torch.manual_seed(5)
    return TinyBackbone()


def test_the_step_the_images_and_the_weights_are_found_again(tmp_path: Path) -> None:
    data = runs.image_folder(tmp_path / "images")
    # Weights grow by a factor in every step, until a number is too large.
    options = {"weight_decay": 1e12, "base_lr": 3.0, "checkpoint_every": 2, "log_every": 3}
    output = tmp_path / "run"
    with pytest.raises(TrainingDiverged, match=r"--replay .*/replay\.json"):
        runs.tiny_run(runs.tiny_config(data, output, **options))
    words = json.loads((output / "replay.json").read_text())
    kept = load_checkpoint(output / "checkpoints" / "replay.pt")
    assert kept["step"] < words["step"]
    messages = runs.CallAt(-1, None)
    found = replay(output / "replay.json", backbone=own(output), progress=messages)
    assert not found.finite and kept["step"] < found.step <= words["step"]
    assert found.images == words["images"][str(found.step)] and len(found.images) == 8
    assert all(Path(name).is_file() for name in found.images)
    assert messages.messages.count("step ") >= found.step - kept["step"]
    again = replay(output / "replay.json", {"lr": 1e-30}, backbone=own(output))
    assert again.finite and again.step == words["step"]
    (output / "replay.json").write_text("[]")
    with pytest.raises(ValueError, match="is no replay file"):
        replay(output / "replay.json")


def test_the_command_tells_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    data = runs.image_folder(tmp_path / "images")
    config = runs.tiny_config(
        data, tmp_path / "run", backbone="resnet18", base_lr=1e30, log_every=1, epochs=1
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_recipe(config))
    try:
        assert cli.main(["pretrain", "--recipe", str(recipe)]) == 2
        told = capsys.readouterr().err
        file = told.split("--replay ")[1].split()[0]
        assert cli.main(["pretrain", "--replay", file]) == 0
        out = capsys.readouterr().out
        assert "not finite: " in out and out.count(".png") == 8
        assert cli.main(["pretrain", "--replay", file, "--overwrite"]) == 2
    finally:
        torch.set_num_threads(threads)
        shutil.rmtree(tmp_path / "run")
