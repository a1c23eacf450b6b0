"""Colours of features, matches between images, segmentations, and the report of a run."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("matplotlib")
picture = pytest.importorskip("PIL.Image")

from data_images import scene

from densecl_ext import cli
from densecl_ext.visualize import (
    feature_colours,
    plot_features,
    plot_pair_matches,
    plot_segmentations,
    write_report,
)


class Patches(nn.Module):
    """Every 16 x 16 patch, as it is."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pixel_unshuffle(x, 16)


def test_colours_are_principal_components() -> None:
    """Features on three known axes of falling variance: red, green and blue are these axes."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4, 3, 6, 5, generator=generator) * torch.tensor([9.0, 3, 1])[:, None, None]
    axes = torch.linalg.qr(torch.randn(8, 3, generator=generator))[0]
    colours, explained = feature_colours(torch.einsum("nahw,ca->nchw", scores, axes) + 7.0)
    assert colours.shape == (4, 6, 5, 3) and explained > 0.9999
    assert float(colours.min()) >= 0.0 and float(colours.max()) <= 1.0
    for axis in range(3):
        pair = torch.stack([scores[:, axis].flatten(), colours[..., axis].flatten()])
        assert abs(float(torch.corrcoef(pair)[0, 1])) > 0.9
    with pytest.raises(ValueError, match="3 channels"):
        feature_colours(torch.zeros(1, 2, 4, 4))


def test_pictures_of_features_and_pairs(tmp_path: Path) -> None:
    images = [torch.randint(0, 256, (3, 80, 100), dtype=torch.uint8) for _ in range(3)]
    plot_features(Patches(), images, tmp_path / "f.png", size=64)
    same = plot_pair_matches(Patches(), [images[0], images[0]], tmp_path / "p.png", size=64)
    assert len(same[0]) == 16 and float(same[0].min()) > 0.9999  # an image with itself
    for name in ("f.png", "p.png"):
        with picture.open(tmp_path / name) as drawn:
            assert drawn.width > 200
    with pytest.raises(ValueError, match="two or more"):
        plot_pair_matches(Patches(), images[:1], tmp_path / "p.png")
    with pytest.raises(ValueError, match="got none"):
        plot_features(Patches(), [], tmp_path / "f.png")
    with pytest.raises(ValueError, match="uint8"):
        plot_features(Patches(), [images[0].float()], tmp_path / "f.png")


def test_picture_of_a_segmentation(tmp_path: Path) -> None:
    labels = torch.randint(0, 3, (2, 20, 30), dtype=torch.uint8)
    labels[:, 0] = 255
    images = torch.randint(0, 256, (2, 3, 20, 30), dtype=torch.uint8)
    plot_segmentations(images, labels, labels.clamp(max=2), ("a", "b", "c"), tmp_path / "s.png")
    with picture.open(tmp_path / "s.png") as drawn:
        assert drawn.width > drawn.height > 100


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "run & <name>"
    (run / "evaluate").mkdir(parents=True)
    lines = ["step,epoch,loss,loss_global,loss_dense,lr,position_share,segmentation/miou"]
    for s in range(1, 41):
        probe = f"{s / 200}" if s % 20 == 0 else ""
        lines.append(f"{s * 10},{s / 10},{6 - s / 50},{6 - s / 60},{5 - s / 50},0.1,0.71,{probe}")
    (run / "metrics.csv").write_text("\n".join(lines) + "\n")
    (run / "config.yaml").write_text("data: photos\nlr: 0.1\n")
    report = {"protocol": "knn", "line": "knn: data=x, seed=0", "accuracy": 0.5, "seconds": 3.0}
    report["head_position_share"] = 0.82
    (run / "evaluate" / "knn.json").write_text(json.dumps({"pre-trained": report}))
    scene(0, 40, 30).save(run / "matches.png")
    return run


def test_report_is_one_file_without_a_network(run: Path, tmp_path: Path) -> None:
    files = []
    for index in range(2):
        files.append(tmp_path / f"{index}.png")
        scene(index, 96, 96).save(files[-1])
    html = write_report(run, tmp_path / "new" / "r.html", backbone=Patches(), images=files)
    text = html.read_text()
    assert "run &amp; &lt;name&gt;" in text and "<name>" not in text
    for heading in ("Loss", "Health and speed", "Probes", "Evaluation", "Pictures", "Recipe"):
        assert f"<h2>{heading}</h2>" in text
    assert "knn: data=x, seed=0" in text and "50.00" in text and "photos" in text
    assert "segmentation/miou" in text and "400 steps" in text
    assert "position_share is 0.71" in text  # the shortcut is called out, with the way out
    assert "knn: head_position_share is 0.82" in text
    assert text.count("Geometric matching") == 2
    pictures = re.findall(r'src="([^"]+)"', text)
    assert len(pictures) >= 6 and all(p.startswith("data:image/png;base64,") for p in pictures)
    for source in pictures:
        assert base64.b64decode(source.partition(",")[2]).startswith(b"\x89PNG")
    assert not re.search(r"https?:|url\(|@import|<script|<link", text)


def test_report_of_a_young_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_report(tmp_path, tmp_path / "r.html")
    (tmp_path / "metrics.csv").write_text("step,loss\n1,nan\n")
    (tmp_path / "notes.csv").write_text("some,other\ntable,here\n")
    text = write_report(tmp_path, tmp_path / "r.html").read_text()
    assert "no finite value" in text and "<h2>Recipe</h2>" not in text


def test_the_commands(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchvision")
    from densecl_ext.backbones import build_backbone

    torch.save(build_backbone("resnet18").state_dict(), tmp_path / "b.pth")
    files = []
    for index in range(2):
        files.append(str(tmp_path / f"{index}.png"))
        scene(index, 96, 96).save(files[-1])
    for kind in ("features", "pairs"):
        png = tmp_path / f"{kind}.png"
        words = ["visualize", kind, str(tmp_path / "b.pth"), *files, "--output", str(png)]
        assert cli.main(words) == 0 and png.read_bytes().startswith(b"\x89PNG")
    html = tmp_path / "r.html"
    assert cli.main(["visualize", "report", str(run), "--output", str(html)]) == 0
    assert "wrote" in capsys.readouterr().out and html.stat().st_size > 10_000
