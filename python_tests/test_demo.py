"""`make demo`, tiny: the whole way from rendering to pictures."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("lightning")
pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("densecl_demo", ROOT / "examples" / "demo.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "densecl_demo", module)
    spec.loader.exec_module(module)
    return module


def test_demo_runs_to_the_end(
    demo: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny = {"image_size": 32, "batch_size": 8, "hidden_dim": 32, "queue_length": 16}
    monkeypatch.setattr(demo, "PRETRAINING", demo.PRETRAINING | tiny)
    words = f"--scenes 16 --val 4 --labelled 8 --epochs 1 --output {tmp_path} --seed 3".split()
    assert demo.main(words) == 0
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if line.startswith("   seed 3: random ")]
    assert "MoCo v2" in line and "ours" in line
    for picture in ("demo_losses.png", "demo_matches.png"):
        assert (tmp_path / picture).stat().st_size > 5000
    (result,) = json.loads((tmp_path / "results.json").read_text())
    assert list(result) == ["random", "MoCo v2", "ours"]
    exported = demo.load_backbone(tmp_path / "seed_3" / "ours" / "backbone.pth")
    assert exported.stride == 8 and exported.left_out == ("layer3", "layer4")


def test_the_network_before_is_what_pre_training_starts_from(demo: ModuleType) -> None:
    from densecl_ext.train.build import starting_backbone
    from densecl_ext.train.run import seed_everything

    config = demo.PretrainConfig.from_mapping({**demo.PRETRAINING, "seed": 5})
    seed_everything(config.seed)
    started = starting_backbone(config).state_dict()
    torch.manual_seed(5)
    before = demo.build_backbone("resnet18", **demo.NETWORK).state_dict()
    assert all(torch.equal(started[name], value) for name, value in before.items())
