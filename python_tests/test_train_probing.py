"""Probes along a run: they change nothing, are logged, and choose the best checkpoint."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
import train_runs as runs

pytest.importorskip("torchvision")
pytest.importorskip("lightning")
pytest.importorskip("torchmetrics")

from evaluate_data import write_labelled  # noqa: E402

from densecl_ext.checkpoints import load_checkpoint  # noqa: E402
from densecl_ext.evaluate.probe import Probe  # noqa: E402
from densecl_ext.train import probing  # noqa: E402


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.image_folder(tmp_path_factory.mktemp("probing") / "images")


def rows_of(result: object, column: str) -> dict[int, float]:
    with (result.output / "metrics.csv").open(newline="") as file:  # type: ignore[attr-defined]
        return {
            int(row["step"]): float(row[column]) for row in csv.DictReader(file) if row.get(column)
        }


def test_a_run_with_probes_trains_as_one_without(data: Path, tmp_path: Path) -> None:
    labelled = write_labelled(tmp_path / "labelled", {"train": 4, "val": 2}, size=(32, 48))
    plain = runs.tiny_run(runs.tiny_config(data, tmp_path / "plain", epochs=2))
    probed = runs.tiny_run(
        runs.tiny_config(data, tmp_path / "probed", epochs=2, probe=str(labelled), probe_every=2)
    )
    first, second = (load_checkpoint(one.checkpoint)["model"] for one in (plain, probed))
    assert all(torch.equal(first[name], second[name]) for name in first)
    found = rows_of(probed, "segmentation/miou")
    assert found and set(found) == {*range(2, probed.step + 1, 2), probed.step}
    assert set(rows_of(probed, "correspondence/exact")) == set(found)


def test_the_best_checkpoint_is_kept_also_across_a_resume(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([0.3, 0.7, 0.5, 0.6])
    monkeypatch.setattr(
        Probe, "run", lambda self, backbone, head: {"correspondence/exact": next(values)}
    )
    images = runs.image_folder(tmp_path / "others")
    options = {"epochs": 4, "probe": str(images), "probe_every": 1}
    config = runs.tiny_config(data, tmp_path / "run", **options, max_steps=2)
    result = runs.tiny_run(config)
    assert result.step == 2
    best = tmp_path / "run" / "checkpoints" / probing.BEST
    assert load_checkpoint(best)["step"] == 2
    config = runs.tiny_config(data, tmp_path / "run", **options, max_steps=4)
    runs.tiny_run(config, resume=True)
    assert load_checkpoint(best)["step"] == 2  # 0.5 and 0.6 are not better than 0.7
    assert list(values) == []


def test_a_probe_that_is_no_folder(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="probe must be a folder"):
        runs.tiny_run(runs.tiny_config(data, tmp_path / "run", probe=str(tmp_path / "nowhere")))
