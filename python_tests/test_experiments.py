"""The experiments' machinery on tiny data: packing, views, the pool of runs, selection, tables."""

from __future__ import annotations

import dataclasses
import json
import os
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from densecl_ext.data import build_loader
from densecl_ext.evaluate.pixels import resize
from experiments import data, peers, report, run, views
from experiments.methods import ARMS
from experiments.pool import Pool, Setting
from experiments.training import Materials, Run, network

pytest.importorskip("torchmetrics")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few images of every set, laid out as the data."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)

    def picture(path: Path, width: int, height: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(path)

    for index in range(8):
        picture(root / f"photos/images/p{index}.jpg", 130 + index, 110)
        picture(root / f"caltech101/images/c{index}.jpg", 90, 120)
        picture(root / f"camvid/images/s{index}.jpg", 480, 360)
        mask = Image.fromarray(rng.integers(0, 3, (360, 480), dtype=np.uint8))
        (root / "camvid/masks").mkdir(exist_ok=True)
        mask.save(root / f"camvid/masks/s{index}.png")
    labels = "".join(f"c{index}.jpg,{'cup' if index % 2 else 'crab'}\n" for index in range(8))
    (root / "caltech101/labels.csv").write_text("file,label\n" + labels)
    (root / "detect").mkdir()
    for split in ("train", "val"):
        picture(root / f"detect/images/{split}.jpg", 60, 40)
        truth = {
            "images": [{"id": 1, "file_name": f"{split}.jpg", "width": 60, "height": 40}],
            "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 30, 20]}],
            "categories": [{"id": 1, "name": "raccoon"}],
        }
        (root / f"detect/raccoon_{split}.json").write_text(json.dumps(truth))
    (root / "camvid/classes.txt").write_text("road\nsky\ncar\n")
    (root / "camvid/splits").mkdir()
    for split, of in (("train", range(4)), ("val", range(4, 6)), ("test", range(6, 8))):
        names = "".join(f"s{index}\n" for index in of)
        (root / f"camvid/splits/{split}.txt").write_text(names)
    return root


@pytest.fixture(scope="module")
def packed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "WINDOWS", 10)
        data.main(["--data-root", str(root), "--out", str(out)])
    return out


def test_pack_holds_what_the_experiments_read(root: Path, packed: Path, tmp_path: Path) -> None:
    unpacked = data.prepared(packed, tmp_path, {("photos", 64), ("camvid", 64)})
    assert data.prepared(packed, tmp_path, set()) == unpacked  # once
    photos, windows = (
        data.pretraining_folders(n, unpacked, tmp_path) for n in ("photos", "camvid")
    )
    sizes = [Image.open(p).size for folder in photos for p in folder.iterdir()]
    assert len(sizes) == 16
    assert max(min(size) for size in sizes) == 96
    assert len(list(windows[0].iterdir())) == 10
    mask = torch.from_numpy(np.array(Image.open(root / "camvid/masks/s6.png")))
    image = torch.from_numpy(np.array(Image.open(root / "camvid/images/s6.jpg"))).permute(2, 0, 1)
    image, mask = resize(image, mask, data.STREET)
    kept = np.array(Image.open(unpacked / "camvid/masks/s6.png"))
    assert (kept == mask.numpy()).all()
    close = np.array(Image.open(unpacked / "camvid/images/s6.webp"), dtype=float)
    assert np.abs(close - image.permute(1, 2, 0).numpy()).mean() < 3
    whole = data.correspondence_folder(unpacked) / "p3.jpg"
    assert whole.read_bytes() == (root / "photos/images/p3.jpg").read_bytes()
    materials = Materials(unpacked, tmp_path, tmp_path)
    assert [len(part) for part in materials.boxes()[1]] == [1, 1]
    assert materials.labelled()[1].class_names == ("crab", "cup")


def test_stream_gives_the_loaders_batches_and_keeps_the_first(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = build_loader(
        root / "photos/images", batch_size=2, size=32, backend="memory", seed=5, workers=1
    )
    loader._move()  # as on a GPU
    expected = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        expected += list(loader)
    monkeypatch.setattr(views, "KEPT_BYTES", 5 * views.size_of(expected[0]))
    stream = views.Stream(loader, 5)
    for steps in (2, 7, 8, 3):
        found = list(stream(steps))
        assert len(found) == steps
        for one, other in zip(found, expected, strict=False):
            assert torch.equal(one.crop_q, other.crop_q)
            assert torch.equal(one.crop_k, other.crop_k)
            assert torch.equal(one.index, other.index)
            assert torch.equal(one.view_q, other.view_q)
            assert torch.equal(one.view_k, other.view_k)
    assert len(stream.kept) == 5


def test_lines_written_before_an_option_came_keep_their_key() -> None:
    old = dict(study="s", set="photos", arm="ours", seed=0, steps=400, lr=0.2, split="test")
    options = '{"loss_lambda": 0.5, "hidden_dim": 2048}'
    assert Run(**old, options=options).key == Run(**old, options=run.merged(options), size=64).key
    assert Run(**old).key != Run(**old, size=96).key
    sets, arms = ["photos", "camvid"], ["random", "mocov2", "densecl_paper", "ours"]
    arguments = ["--data-root", "x", "--study", "final", "--split", "test", "--sets", *sets]
    _, entries = run.parsed([*arguments, "--arms", *arms, "--seeds", *"01234"])
    assert not list(run.jobs(entries))


def line(arm: str, seed: int, lr: float, miou: float, **more: Any) -> dict[str, Any]:
    given = dict(study="t", set="photos", arm=arm, seed=seed, steps=4, lr=lr, split="val") | more
    numbers = {"segmentation": miou, "incontext": miou, "exact": 0.1, "position_share": 0.1}
    return {"run": given, "numbers": numbers, "training": {}}


def test_a_run_may_have_views_of_its_own(root: Path, tmp_path: Path) -> None:
    materials = Materials(root, tmp_path, tmp_path)
    usual = Run("s", "photos", "ours", 0, 1, 0.1, "val", size=32, batch=2)
    wide = dataclasses.replace(usual, views='{"scale": [0.8, 1.0]}')
    scales = [materials.images(one).augmentation.scale for one in (usual, wide, usual)]
    assert scales == [(0.2, 1.0), (0.8, 1.0), (0.2, 1.0)]
    assert usual.key != wide.key
    assert report.network(wide) == "32 pixels, batch 2, views scale=[0.8, 1.0]"


def test_peers_are_told_where_the_views_lie() -> None:
    crop_q = torch.tensor([[10.0, 20.0, 60.0, 80.0, 0.0], [0.0, 0.0, 50.0, 40.0, 1.0]])
    crop_k = torch.tensor([[30.0, 0.0, 90.0, 50.0, 1.0], [60.0, 0.0, 90.0, 40.0, 0.0]])
    assert peers.mirrored(crop_k).tolist() == [[90.0, 0.0, 30.0, 50.0], [60.0, 0.0, 90.0, 40.0]]
    low = torch.maximum(crop_q[:, :2], crop_k[:, :2])[:1]  # (30, 20) to (60, 50)
    high = torch.minimum(crop_q[:, 2:4], crop_k[:, 2:4])[:1]
    expected_q, expected_k = [[0.4, 0.0, 1.0, 0.5]], [[0.5, 0.4, 1.0, 1.0]]  # k is flipped
    torch.testing.assert_close(peers.common(low, high, crop_q[:1]), torch.tensor(expected_q))
    torch.testing.assert_close(peers.common(low, high, crop_k[:1]), torch.tensor(expected_k))


@pytest.mark.parametrize("arm", ["pixpro", "slotcon"])
def test_peers_train_the_backbone(arm: str) -> None:
    pytest.importorskip({"pixpro": "contrast", "slotcon": "models.slotcon"}[arm])
    backbone = network(Run("s", "photos", arm, 0, 4, 0.1, "val"))
    method = ARMS[arm][0](backbone, 4).train()
    q, k = torch.randn(2, 4, 3, 32, 32)
    crops = torch.tensor([[0.0, 0.0, 40.0, 40.0, 1.0]]).repeat(4, 1)
    try:
        method(q, k, crops, crops + torch.tensor([[8.0, 8.0, 8.0, 8.0, -1.0]])).backward()
    finally:
        torch.distributed.destroy_process_group()
    assert all(weight.grad is not None for weight in backbone.parameters())


def test_best_compares_on_common_seeds() -> None:
    tuned = [line("ours", 0, 0.1, 20), line("ours", 1, 0.1, 30), line("ours", 0, 0.4, 21)]
    tuned += [line("ours", 0, 0.2, float("nan")), line("ours", 0, 0.3, 99, split="test")]
    assert run.best(tuned, "photos", "ours", plain=False) == (0.4, "{}")  # seed 0 alone is common
    own = '{"loss_lambda": 1.0}'
    tuned += [line("ours", 0, 0.1, 22, options=own)]
    assert run.best(tuned, "photos", "ours", plain=False) == (0.1, own)
    assert run.best(tuned, "photos", "ours", plain=True) == (0.4, "{}")
    assert run.best(tuned, "camvid", "ours", plain=False) == (0.2, "{}")  # not measured
    tuned = [line("mocov2", 0, 0.05, 9)]
    assert run.best(tuned, "photos", "mocov2_reflect", plain=False)[0] == 0.05


def plan(tmp_path: Path, entries: list[dict[str, Any]]) -> str:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(entries))
    return str(path)


def test_pool_runs_a_plan_selects_survives_a_failure_and_resumes(
    packed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny = {"steps": [2], "batch": 4, "size": 32}
    entries = [
        {**tiny, "study": "a", "arms": ["ours", "random"], "lr": [0.1, 0.2], "seeds": [0]},
        {**tiny, "study": "a", "arms": ["ours"], "options": [{"loss_lambda": 7}]},
        {**tiny, "study": "a", "arms": ["ours"], "rate_of": "a.jsonl",
         "options": [{"loss_lambda": 1}]},
        {**tiny, "study": "b", "arms": ["ours"], "select": "a.jsonl", "split": "test",
         "sets": ["photos", "camvid"]},
        {**tiny, "study": "c", "arms": ["ours"], "start": "b-photos-ours-2", "also": ["knn"],
         "lr": [0.0]},
    ]  # fmt: skip
    results = tmp_path / "results"
    arguments = ["--data-root", str(packed), "--cache", str(tmp_path / "cache"), "--results",
                 str(results), "--processes", "2", "--plan", plan(tmp_path, entries)]  # fmt: skip
    assert run.main([*arguments, "--seconds", "0"]) == 0
    assert not run.lines(results / "a.jsonl")
    assert run.main(arguments) == 1
    said = capfd.readouterr().out
    assert "7 runs finished, 1 failed" in said
    assert "DenseCL" in said and "loss_lambda must lie in [0, 1], got 7" in said
    a, b, (c,) = (run.lines(results / f"{study}.jsonl") for study in "abc")
    assert 0 <= c["numbers"]["knn"] <= 100
    assert [(r["run"]["arm"], r["run"]["steps"]) for r in a].count(("random", 0)) == 1
    rate = run.best(a, "photos", "ours", plain=True)[0]
    assert [r["run"]["lr"] for r in a if r["run"]["options"] == '{"loss_lambda": 1}'] == [rate]
    chosen = run.best(a, "photos", "ours", plain=False)
    runs = {one["run"]["set"]: one["run"] for one in b}
    assert (runs["photos"]["lr"], runs["photos"]["options"]) == chosen
    assert (runs["camvid"]["lr"], runs["camvid"]["options"]) == (0.2, "{}")
    assert all(np.isfinite(one["numbers"]["segmentation"]) for one in a + b)

    lines = (results / "b.jsonl").read_text().splitlines()
    (results / "b.jsonl").write_text(lines[0] + "\n")
    run.main(arguments)  # the missing one again, and the one that fails
    assert "1 runs finished, 1 failed" in capfd.readouterr().out
    again = run.lines(results / "b.jsonl")
    assert again[1]["run"] == json.loads(lines[1])["run"]
    assert again[1]["numbers"] == json.loads(lines[1])["numbers"]  # repeats


def faulty(pipe: Connection, materials: object, setting: Setting) -> None:
    """Dies of seed 1, and of graphs at seed 2."""
    pipe.send(("ready", None))
    while (given := pipe.recv()) is not None:
        if given.seed == 1:
            os._exit(3)
        if given.seed == 2 and setting.graph:
            pipe.send(("uncaptured", "no graph"))
            return
        training = {"seconds": 0.1, "graph": setting.graph}
        pipe.send(("line", {"run": dataclasses.asdict(given), "training": training}))


def test_pool_replaces_workers_that_cannot_go_on(tmp_path: Path) -> None:
    materials = Materials(tmp_path, tmp_path, tmp_path)
    pool = Pool(2, materials, Setting(), tmp_path, target=faulty)
    given = [Run("s", "photos", "ours", seed, 1, 0.1, "val") for seed in range(7)]
    try:
        pool.run(iter(given))
    finally:
        pool.close()
    assert (pool.finished, pool.failed) == (6, 1)
    found = {one["run"]["seed"]: one for one in run.lines(tmp_path / "s.jsonl")}
    assert sorted(found) == [0, 2, 3, 4, 5, 6]
    assert not found[2]["training"]["graph"]


def test_plans_of_the_project_name_known_arms(tmp_path: Path) -> None:
    for path in sorted((Path(run.__file__).parent / "plans").glob("*.json")):
        _, entries = run.parsed(
            ["--data-root", "x", "--results", str(tmp_path), "--plan", str(path)]
        )
        found = list(run.jobs(entries))
        assert {one.arm for one in found} <= {"random", *run.ARMS}


def test_tables_pair_with_the_tuned_baseline() -> None:
    tuned = '{"temperature": 0.1}'
    found = [line("mocov2", seed, 0.1, 20 + seed, options=tuned) for seed in range(3)]
    found += [line("ours", seed, 0.2, 22 + seed) for seed in range(3)]
    found += [line("ours", 0, 0.2, 25, backbone="resnet50", output_stride=16)]
    grouped = report.groups(found)
    assert list(grouped) == [
        ("val", "photos", 4, ""),
        ("val", "photos", 4, "resnet50, stride 16"),
    ]
    whole = Run("s", "photos", "ours", 0, 4, 0.2, "val", truncate=False)
    assert report.network(whole) == "all stages, stride 8"  # which is the usual one, cut short
    text = report.table(grouped["val", "photos", 4, ""])
    assert "ours | 3 | 23.0 (+2.0 [+2.0, +2.0])" in text
    assert "MoCo v2 (temperature=0.1, lr=0.1) | 3 | 21.0 |" in text
    assert "ours | 3 | 23.0 |" in report.table(grouped["val", "photos", 4, ""], "ours")
    found += [line("mocov2", seed, 0.4, 21 + seed, options=tuned) for seed in range(2)]
    rows = report.groups(found)["val", "photos", 4, ""]
    assert "ours | 3 | 23.0 (+1.0 [+1.0, +1.0])" in report.table(
        rows, "mocov2 temperature=0.1, lr=0.4"
    )


def test_tables_tell_shared_settings_once_and_what_was_measured() -> None:
    options = '{"hidden_dim": 2048}'
    found = [line(arm, 0, 0.2, 20, options=options) for arm in ("ours", "mocov2")]
    found[0]["numbers"]["ap"] = 31.0
    ((key, rows),) = report.groups(found).items()
    assert key == ("val", "photos", 4, "hidden_dim=2048")
    assert set(rows) == {"ours", "mocov2"}
    text = report.table(rows)
    assert "raccoons AP" in text and "k-NN" not in text
    assert "| 31.0 |" in text and "nan" not in text


def test_a_mark_may_name_the_arm_that_its_table_compares_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [
        line(arm, s, 0.2, miou + s) for arm, miou in (("ours", 22), ("mocov2", 20)) for s in (0, 1)
    ]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(one) + "\n" for one in found))
    page = tmp_path / "page.md"
    marks = ("s", "s against ours")
    page.write_text("".join(f"<!-- {mark} -->\nold\n<!-- /{mark} -->\n" for mark in marks))
    monkeypatch.setattr(report, "PAGE", page)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["report", "--write"])
    report.main()
    usual, other = page.read_text().split("<!-- /s -->")
    assert "| ours | 2 | 22.5 (+2.0 [+2.0, +2.0]) |" in usual and "| MoCo v2 | 2 | 20.5 |" in usual
    assert "| MoCo v2 | 2 | 20.5 (-2.0 [-2.0, -2.0]) |" in other and "| ours | 2 | 22.5 |" in other
    assert "old" not in page.read_text()
