"""`make demo`, tiny: the whole way from rendering to pictures."""

from __future__ import annotations

import importlib.util
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
    tiny = {"image_size": 32, "batch_size": 8, "hidden_dim": 32, "loader": "torchvision",
            "workers": 0, "queue_length": 16}  # fmt: skip
    monkeypatch.setattr(demo, "PRETRAINING", demo.PRETRAINING | tiny)
    monkeypatch.setattr(demo, "PROBE", demo.PROBE | {"epochs": 1})
    words = f"--scenes 16 --val 4 --labelled 8 --epochs 1 --output {tmp_path} --seed 3".split()
    assert demo.main(words) == 0
    printed = capsys.readouterr().out
    assert "seed 3: random initialisation" in printed and "pre-trained" in printed
    for picture in ("demo_losses.png", "demo_matches.png"):
        assert (tmp_path / picture).stat().st_size > 5000
    from torchvision.models import resnet18

    resnet18().load_state_dict(torch.load(tmp_path / "seed_3" / "resnet18.pth"), strict=True)
