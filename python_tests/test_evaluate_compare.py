"""Paired intervals on planted differences, the probe inside a training run, the commands."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("PIL")
pytest.importorskip("torchvision")
pytest.importorskip("torchmetrics")

from densecl_ext.cli.comparing import protocol_options
from evaluate_data import MeanColour, Normed, write_labelled

from densecl_ext import cli
from densecl_ext.evaluate import SegmentationOptions
from densecl_ext.evaluate.compare import compare_reports
from densecl_ext.evaluate.probe import Probe, ProbeOptions
from densecl_ext.evaluate.report import Report


def accuracy(hits: Tensor) -> Report:
    """A report of 0 / 1 terms."""
    terms = torch.stack([hits.long(), torch.ones_like(hits).long()], 1)
    return Report(
        "knn", {"accuracy": float(hits.double().mean())}, {"seed": 0}, terms=terms,
        headline=lambda sums: sums[:, 0].double() / sums[:, 1],
    )  # fmt: skip


def test_intervals_over_seeds_are_student_s() -> None:
    base = [Report("p", {"x": v}, {}) for v in (0.1, 0.2, 0.3)]
    ours = [Report("p", {"x": v}, {}) for v in (0.12, 0.23, 0.34)]
    comparison = compare_reports({"base": base, "ours": ours})
    d = comparison.differences["ours"]  # differences .02, .03, .04: deviation .01
    assert d.by == "seeds" and math.isclose(d.mean, 0.03)
    assert math.isclose(d.high - d.mean, 4.303 * 0.01 / math.sqrt(3), rel_tol=1e-6)
    assert "Student's t over paired seeds" in comparison.line
    table = comparison.table()
    assert "+3.00" in table and "[+0.52, +5.48]" in table


def test_bootstrap_over_images_is_paired() -> None:
    generator = torch.Generator().manual_seed(0)
    hits = torch.rand(400, generator=generator) < 0.5
    better = hits.clone()
    better[torch.nonzero(~hits).flatten()[:40]] = True  # 10 % more, on the same images
    d = compare_reports({"a": [accuracy(hits)], "b": [accuracy(better)]}).differences["b"]
    assert d.by == "images" and math.isclose(d.mean, 0.1)
    half = 1.96 * math.sqrt(0.1 * 0.9 / 400)  # of a paired difference of 0 or 1
    assert abs(d.low - (0.1 - half)) < 0.005 and abs(d.high - (0.1 + half)) < 0.005
    same = compare_reports({"a": [accuracy(hits)], "b": [accuracy(hits)]}).differences["b"]
    assert same.low == same.high == 0.0


def test_compare_refuses() -> None:
    one = Report("p", {"x": 0.1}, {})
    with pytest.raises(ValueError, match="two arms"):
        compare_reports({"a": [one]})
    with pytest.raises(ValueError, match="as many seeds"):
        compare_reports({"a": [one], "b": [one, one]})
    with pytest.raises(ValueError, match="one protocol"):
        compare_reports({"a": [one], "b": [Report("q", {"x": 0.1}, {})]})
    unknown = compare_reports({"a": [one], "b": [one]}).differences["b"]
    assert unknown.by == "" and math.isnan(unknown.low)


def test_a_probe_leaves_no_trace(tmp_path: Path) -> None:
    root = write_labelled(tmp_path, {"train": 8, "val": 4}, size=(64, 64))
    probe = Probe(ProbeOptions(data=str(root), rows=200, bank=50, recalibrate=4, view_size=32))
    torch.manual_seed(0)
    network, head = Normed().train(), nn.Conv2d(8, 4, 1).train()
    network.layers[1].eval()  # a frozen layer stays frozen, the others go on training
    state = {name: value.clone() for name, value in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    random_state = torch.get_rng_state()
    numbers = probe.run(network, head)
    assert torch.equal(random_state, torch.get_rng_state())
    assert modes == [module.training for module in network.modules()]
    assert all(torch.equal(state[k], v) for k, v in network.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    assert 0.0 < numbers["segmentation/miou"] <= 1.0 and 0.0 < numbers["incontext/miou"] <= 1.0
    assert "correspondence/head_position_share" in numbers
    assert probe.run(network, head) == numbers and len(probe.lines()) == 3
    alone = Probe(ProbeOptions(data=str(root), probes=("incontext",), rows=200, bank=50))
    assert set(alone.run(MeanColour())) == {
        "incontext/miou", "incontext/pixel_accuracy", "incontext/frequency_weighted_iou",
    }  # fmt: skip
    with pytest.raises(ValueError, match="probes must be some of"):
        ProbeOptions(probes=("knn",))


def test_words_to_options() -> None:
    options = protocol_options(
        SegmentationOptions, "x", ("size=4,6", "label-stride=3", "lr=1e-2", "solver=lbfgs")
    )
    assert options.size == (4, 6) and options.label_stride == 3 and options.lr == 0.01
    for word, message in (("sise=3", "mean size"), ("epochs=x", "expected an integer"), ("a", "=")):
        with pytest.raises(ValueError, match=message):
            protocol_options(SegmentationOptions, "x", (word,))


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    from densecl_ext.backbones import build_backbone

    root = write_labelled(tmp_path / "data", {"train": 4, "val": 2}, size=(64, 64))
    weights = tmp_path / "a.pth"
    torch.save(build_backbone("resnet18").state_dict(), weights)
    numbers, picture = tmp_path / "n.json", tmp_path / "c.png"
    words = ["compare", "random", f"ours={weights}", "--data", str(root), "--set", "solver=lbfgs"]
    assert cli.main([*words, "--output", str(numbers), "--picture", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "bootstrap over images" in out and "solver=lbfgs" in out and "ours" in out
    told = json.loads(numbers.read_text())
    assert set(told["arms"]) == {"random", "ours"} and told["differences"]["ours"]["by"] == "images"
    assert picture.read_bytes().startswith(b"\x89PNG")
    for protocol, extra in (
        ("incontext", ["--bank", "8", "--neighbours", "3", "--size", "32", "48"]),
        ("correspondence", ["--view-size", "96", "--no-colour"]),
    ):
        assert cli.main(["evaluate", protocol, str(weights), "--data", str(root), *extra]) == 0
        assert f"{protocol}: data=data" in capsys.readouterr().out
    assert cli.main(["compare", "random", str(weights), "--data", str(root), "--set", "a=1"]) == 2
    assert "with an option of" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "incontxt", str(weights), "--data", str(root)])
    assert "did you mean incontext?" in capsys.readouterr().err


def test_pictures_of_reports(tmp_path: Path) -> None:
    picture = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    from densecl_ext.evaluate import CorrespondenceOptions, correspondence, segmentation

    root = write_labelled(tmp_path, {"train": 4, "val": 5}, size=(64, 64))
    reports = [
        segmentation(MeanColour(), SegmentationOptions(data=str(root), epochs=1, batch_size=2)),
        segmentation(MeanColour(), SegmentationOptions(data=str(root), solver="lbfgs")),
        correspondence(MeanColour(), CorrespondenceOptions(data=str(root / "images"), images=5)),
    ]
    for report in reports:
        assert report.draw is not None
        report.draw(tmp_path / "p.png")
        with picture.open(tmp_path / "p.png") as drawn:
            assert drawn.width > 300 and drawn.height > 300
