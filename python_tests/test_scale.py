"""The arithmetic of tools.scale, and that docs/scale.md says what it prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")

from densecl_ext import DenseCL
from tools import scale
from tools import scale as model

ROOT = Path(__file__).resolve().parent.parent
H100 = model.MACHINES["h100"]


@pytest.fixture(scope="module")
def network():
    return model.count()


def test_the_network_is_the_models(network):
    with torch.device("meta"):
        net = DenseCL("resnet50", queue_length=8)
    assert network.parameters == sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert network.positions == 49
    heads = 2048 * 2048 + 2048 * 128  # of one position
    assert network.macs - 50 * heads == pytest.approx(4.09e9, rel=2e-3)  # torchvision's own number


@pytest.fixture
def exact(monkeypatch):
    """Links at their full speed."""
    monkeypatch.setattr(model, "LINK", 1.0)
    monkeypatch.setattr(model, "LATENCY", 0.0)


def ring(size, peers, speed):
    """Seconds of a ring all-reduce: 2 (P - 1) rounds, each moving a P-th part."""
    return sum(size / peers / speed for _ in range(2 * (peers - 1)))


def test_all_reduce_adds_up_round_by_round(exact):
    size = 130e6
    assert model.exchange(size, 8, H100, "sum") == pytest.approx(ring(size, 8, H100.local))
    assert model.exchange(size, 4, H100, "sum") == pytest.approx(ring(size, 4, H100.local))
    # Eight nodes: every GPU sums an eighth with its seven twins.
    expected = ring(size, 8, H100.local) + ring(size / 8, 8, H100.remote)
    assert model.exchange(size, 64, H100, "sum") == pytest.approx(expected)
    one_a_node = H100._replace(per_node=1)
    assert model.exchange(size, 16, one_a_node, "sum") == pytest.approx(ring(size, 16, H100.remote))


def test_all_gather_delivers_every_byte(exact, monkeypatch):
    size = 1e6
    inside = model.exchange(size, 8, H100, "gather")
    assert inside * H100.local == pytest.approx(7 * size)
    fast = H100._replace(remote=1e30)
    assert model.exchange(size, 64, fast, "gather") * H100.local == pytest.approx(56 * size)
    fast = H100._replace(local=1e30)
    assert model.exchange(size, 64, fast, "gather") * H100.remote == pytest.approx(7 * size)
    monkeypatch.setattr(model, "LINK", 0.5)
    monkeypatch.setattr(model, "LATENCY", 1e-3)
    assert model.exchange(size, 8, H100, "gather") == pytest.approx(2 * inside + 3e-3)


def test_a_step(network, monkeypatch):
    rate = 2000.0
    alone = model.step_of(1, 32, rate, network, H100)
    fixed = 32 * network.parameters / H100.memory
    assert alone.seconds == alone.compute == pytest.approx(32 / rate + fixed)
    assert alone.efficiency == 1.0 and alone.gradients == alone.keys == alone.shuffle == 0.0
    many = model.step_of(64, 32, rate, network, H100)
    assert many.gradients == model.exchange(4 * network.parameters, 64, H100, "sum")
    assert many.keys == model.exchange(32 * 256 * 4, 64, H100, "gather")
    assert many.shuffle == model.exchange(32 * 3 * 224 * 224 * 4, 64, H100, "gather")
    assert many.shown == 0.0  # behind the backward pass
    assert many.seconds == many.compute + many.keys
    assert many.images_per_second == pytest.approx(64 * 32 / many.seconds)
    monkeypatch.setattr(model, "HIDDEN", 0.0)
    bare = model.step_of(64, 32, rate, network, H100)
    assert bare.seconds == pytest.approx(many.seconds + many.gradients)


def test_roofline(network):
    arithmetic, traffic = model.roofline(network, H100)
    flop = 8 * network.macs + 4 * 50 * 65536 * 128
    assert arithmetic == pytest.approx(flop / 989e12)
    assert traffic == pytest.approx(26 * 2 * network.activations / 3.35e12)


def test_the_papers_own_hours():
    """Its 8 V100 at its own time for an epoch take the days that it reports."""
    coco, _ = model.RECIPES
    assert pytest.approx(1116, abs=1) == scale.PUBLISHED * 8
    assert model.hours(coco, scale.PUBLISHED * 8) == pytest.approx(800 * 106 / 3600)
    assert model.hours(coco, scale.PUBLISHED * 8) == pytest.approx(24 * 1.0, rel=0.05)


def test_a_measured_step_is_read(tmp_path, capsys):
    def row(id, **rates):
        candidates = {
            who: {"images": 32, "modes": {"calls": [32 / rate for rate in found]}}
            for who, found in rates.items()
        }
        return {"row": id, "title": id, "case": {}, "absent": {}, "device": "cuda",
                "candidates": candidates}  # fmt: skip

    rows = [row("step-32", ours=[90.0, 110.0, 100.0], reference=[900.0]),
            row("step-256", graph=[120.0])]  # fmt: skip
    path = tmp_path / "step.json"
    path.write_text(json.dumps({"rows": rows}))
    assert scale.measured(path) == (pytest.approx(120.0), 32, "step-256, graph")
    pytest.importorskip("matplotlib")
    assert scale.main(["--machine", "h100", "--step", str(path), "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "measured: step-256, graph" in text and "estimate" not in text
    assert (tmp_path / "scale.png").is_file()
    with pytest.raises(SystemExit):
        scale.main(["--step", str(path)])  # whose rate?
    path.write_text(json.dumps({"rows": rows[:0]}))
    with pytest.raises(ValueError, match="no measured step of ours"):
        scale.measured(path)


def test_the_page_says_what_the_command_prints(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    scale.main(["--out", str(tmp_path)])
    page = (ROOT / "docs" / "scale.md").read_text()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("|", "Ro"))]
    assert len(rows) > 30
    missing = [row for row in rows if row not in page]
    assert not missing, "run python -m tools.scale and take its tables over"
