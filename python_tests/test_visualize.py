"""The pictures, and the matches that one of them shows."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from densecl_ext.visualize import find_matches, plot_losses, plot_matches
from densecl_ext.visualize.losses import read_metrics, smooth


class Patches(nn.Module):
    """Every 8 x 8 patch, as it is: the features of a network that sees pixels alone."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pixel_unshuffle(x, 8)


@pytest.fixture
def image() -> Tensor:
    return torch.randint(0, 256, (3, 96, 96), dtype=torch.uint8)


def test_shifted_views_match_where_geometry_says(image: Tensor) -> None:
    crops = ((0.0, 0.0, 64.0, 64.0, False), (16.0, 8.0, 80.0, 72.0, False))  # 2 and 1 cells
    first, second, matches = find_matches(Patches(), image, crops, size=64, threshold=0.99)
    torch.testing.assert_close(first[:, 8:, 16:], second[:, :-8, :-16], rtol=0, atol=1e-3)
    assert len(matches) == matches.true_positions == 6 * 7
    assert matches.right.all() and float(matches.distance.max()) < 1e-4
    shift = torch.tensor([2 / 8, 1 / 8]).expand(len(matches), 2)
    torch.testing.assert_close(matches.query - matches.key, shift)


def test_mirrored_view_matches_mirrored(image: Tensor) -> None:
    class Columns(nn.Module):  # mirror-invariant features of each cell
        def forward(self, x: Tensor) -> Tensor:
            patches = nn.functional.pixel_unshuffle(x, 8).unflatten(1, (3, 8, 8))
            return (patches + patches.flip(3)).flatten(1, 3)

    box = (8.0, 8.0, 72.0, 72.0)
    crops = ((*box, False), (*box, True))
    _, _, matches = find_matches(Columns(), image, crops, size=64, threshold=0.99)
    assert len(matches) == 64 and float(matches.distance.max()) < 1e-4
    torch.testing.assert_close(matches.key[:, 0], 1.0 - matches.query[:, 0])


def test_threshold_top_and_order(image: Tensor) -> None:
    crops = ((0.0, 0.0, 60.0, 60.0, False), (20.0, 20.0, 90.0, 90.0, False))
    every = find_matches(Patches(), image, crops, size=64, threshold=-1.0)[2]
    assert (every.similarity[:-1] >= every.similarity[1:]).all()
    some = find_matches(Patches(), image, crops, size=64, threshold=-1.0, top=3)[2]
    assert len(some) == 3 < len(every)
    assert torch.equal(some.similarity, every.similarity[:3])
    assert len(find_matches(Patches(), image, crops, size=64, threshold=1.01)[2]) == 0


def test_backbone_keeps_its_mode(image: Tensor) -> None:
    backbone = nn.Sequential(Patches(), nn.BatchNorm2d(192)).train()
    crops = ((0.0, 0.0, 64.0, 64.0, False), (16.0, 8.0, 80.0, 72.0, False))
    find_matches(backbone, image, crops, size=64)
    assert backbone.training and backbone[1].training
    assert int(backbone[1].num_batches_tracked) == 0


def test_find_matches_refuses(image: Tensor) -> None:
    crops = ((0.0, 0.0, 64.0, 64.0, False), (16.0, 8.0, 16.0, 72.0, False))
    with pytest.raises(ValueError, match="x0 < x1"):
        find_matches(Patches(), image, crops)
    with pytest.raises(ValueError, match="uint8"):
        find_matches(Patches(), image.float(), (crops[0], crops[0]))


def test_matches_picture(image: Tensor, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = pytest.importorskip("PIL.Image")
    file = tmp_path / "image.png"
    picture.fromarray(image.permute(1, 2, 0).numpy()).save(file)
    png = tmp_path / "new" / "matches.png"
    results = plot_matches(Patches(), [image, file], png, size=64, threshold=0.0, title="matches")
    assert len(results) == 2
    torch.testing.assert_close(results[0].query, results[1].query)
    with picture.open(png) as drawn:
        assert drawn.width > drawn.height > 200
        assert 60 < len(drawn.convert("RGB").getcolors(1 << 24)) <= 128
    assert png.stat().st_size < 200_000
    with pytest.raises(ValueError, match="got none"):
        plot_matches(Patches(), [], png)


def test_losses_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = pytest.importorskip("PIL.Image")
    lines = ["step,epoch,loss,loss_global,loss_dense,lr"]
    lines += [f"{s},{s / 50},{6 - s / 100},{6 - s / 90},,0.1" for s in range(10, 210, 10)]
    (tmp_path / "metrics.csv").write_text("\n".join(lines) + "\n")
    columns = read_metrics(tmp_path / "metrics.csv")
    assert columns["step"][:2] == [10.0, 20.0] and math.isnan(columns["loss_dense"][0])
    png = plot_losses(tmp_path, tmp_path / "losses.png")
    with picture.open(png) as drawn:
        assert drawn.width > drawn.height > 200
    (tmp_path / "empty.csv").write_text("step,loss\n")
    with pytest.raises(ValueError, match="at least one row"):
        plot_losses(tmp_path / "empty.csv", png)
    (tmp_path / "other.csv").write_text("step,lr\n1,2\n")
    with pytest.raises(ValueError, match="none of the columns"):
        plot_losses(tmp_path / "other.csv", png)


def test_smooth_keeps_length_and_a_line() -> None:
    line = [float(i) for i in range(100)]
    assert smooth(line, share=0.2) == pytest.approx(line)
    assert smooth([1.0, math.nan, 3.0], share=1.0)[1] == pytest.approx(2.0)
