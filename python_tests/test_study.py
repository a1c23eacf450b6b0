"""Studies: paired arms over seeds, resumable."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import train_runs as runs
from torch import nn

pytest.importorskip("torchvision")
pytest.importorskip("lightning")

from densecl_ext import study  # noqa: E402
from densecl_ext.study import Line, arm_config, compared, interval, run_study  # noqa: E402
from densecl_ext.train import PretrainConfig  # noqa: E402


def test_every_arm_of_every_study_is_a_configuration() -> None:
    for arms in study.STUDIES.values():
        for own in arms.values():
            arm_config({"data": "x", "epochs": 10}, own)
    assert arm_config({"epochs": 10}, {"epochs": 4.0}).epochs == 40


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.image_folder(tmp_path_factory.mktemp("study") / "images")


def test_a_study_goes_on_where_it_was(data: Path, tmp_path: Path) -> None:
    base = {
        "data": str(data), "backbone": "resnet18", "output_stride": 8, "truncate": True,
        "image_size": 32, "batch_size": 8, "epochs": 1, "dim": 8, "hidden_dim": 8,
        "queue_length": 16, "workers": 0, "tensorboard": False, "device": "cpu",
    }  # fmt: skip
    arms = {"moco": {"loss_lambda": 0.0}, "ours, 0.7": {"loss_lambda": 0.7}}
    seen: list[float] = []

    def measure(backbone: nn.Module) -> dict[str, float]:
        weight = next(backbone.parameters())
        seen.append(float(weight.detach().sum()))
        if len(seen) == 3:
            raise RuntimeError("stopped")
        return {"sum": seen[-1]}

    with pytest.raises(RuntimeError, match="stopped"):
        run_study(arms, base, [0, 1], measure, tmp_path)
    lines = run_study(arms, base, [0, 1], measure, tmp_path)
    assert len(seen) == 5  # two were measured before, the third was trained but not measured
    assert [(line.arm, line.seed) for line in lines] == [
        ("moco", 0), ("ours, 0.7", 0), ("moco", 1), ("ours, 0.7", 1),
    ]  # fmt: skip
    again = study.read_lines(tmp_path / "results.csv")
    assert [line.arm for line in again] == [line.arm for line in lines]
    assert again[0].numbers["sum"] == pytest.approx(seen[0], rel=1e-6)
    assert "ours, 0.7" in compared(lines, "moco")
    with pytest.raises(ValueError, match="holds other arms"):
        run_study({"other": {}}, base, [0], measure, tmp_path)


def test_arms_of_a_seed_start_from_the_same_weights() -> None:
    from densecl_ext.train.build import build_model, starting_backbone
    from densecl_ext.train.run import seed_everything

    starts = []
    for own in ({"loss_lambda": 0.0}, {"positions_per_image": 4}, {"predictor_dim": 16}):
        config = PretrainConfig(backbone="resnet18", queue_length=16, key_momentum=0.9, **own)  # type: ignore[arg-type]
        seed_everything(3)
        model = build_model(config, starting_backbone(config), 10)
        weights = model.state_dict()
        starts.append([weights["backbone.conv1.weight"], weights["neck.dense_head.0.weight"]])
    for start in starts[1:]:
        assert all((a == b).all() for a, b in zip(start, starts[0], strict=True))


def test_the_interval_is_students() -> None:
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(4.303 / math.sqrt(3))
    assert interval([1.0])[1] == math.inf
    lines = [Line("a", s, {"m": float(s)}) for s in range(3)]
    lines += [Line("b", s, {"m": s + 1.0 + s}) for s in range(3)]
    row = compared(lines, "a").splitlines()[2]
    assert "(+2 [-0.484, +4.48])" in row
