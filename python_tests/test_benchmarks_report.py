"""The benchmarks' report: what is asked and what came of it, on numbers that are known."""

from __future__ import annotations

import copy
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report, verdicts
from benchmarks.cases import sizes
from benchmarks.losses import info_nce
from benchmarks.rows import Asked, Row, rows

ROOT = Path(__file__).resolve().parent.parent
CASE = partial(info_nce, rows=32, queue_length=64)
MACHINE = {
    "processor": "some CPU", "cores": 2, "threads": 2, "memory_gb": 8.0, "selected": "avx2",
    "torch": "2", "python_version": "3", "densecl_ext": "0", "gpu": None,
    "device": {"name": "some GPU", "kind": "cuda", "l2_mb": 50.0}, "state": {"clocks.sm": "1 MHz"},
    "ceilings": {"fma": {"avx2": 2e11}, "gemm_float32": 1e11, "copy": 2e10},
}  # fmt: skip


def measured(suite: str, candidates: dict[str, Any], **info: Any) -> dict[str, Any]:
    """results.json of one row."""
    info = {
        "row": "row", "title": "a row", "device": "cpu", "beside": [],
        "case": sizes(CASE), "absent": {"lightly": "lightly is not installed"},
        "candidates": candidates,
    } | info  # fmt: skip
    return {
        "suite": suite, "machine_info": MACHINE, "datetime": "2030-01-02T03:04:05",
        "rows": [info], "quick": False,
        "skipped": {"other": "this machine lacks avx2"},
    }  # fmt: skip


def on_cpu() -> dict[str, Any]:
    def candidate(seconds: float, peak: int, work: float) -> dict[str, Any]:
        modes = {"calls": [9.0, seconds, seconds / 2]}
        return {"modes": modes, "peak_bytes": peak, "work": work, "missing": {}, "images": 0}

    ours, eager = candidate(0.5, 3_000_000, 1e9), candidate(2.0, 6_000_000, 2e9)
    return measured("cpu", {"ours": ours, "eager": eager})


def on_gpu() -> dict[str, Any]:
    def candidate(**modes: float) -> dict[str, Any]:
        samples = {mode: [seconds] * 3 for mode, seconds in modes.items()}
        return {"modes": samples, "missing": {}, "work": 1e9, "traffic": 1e6, "images": 0,
                "peak_bytes": 5_000_000}  # fmt: skip

    candidates = {
        "ours": candidate(graph=1e-4, cold=3e-4, calls=2e-4),
        "fast": candidate(graph=3e-4, calls=3e-4),
        "slow": candidate(graph=4e-4, calls=4e-4),
        "loop": candidate(calls=8e-4),
    }
    absent = {"cuDNN attention": "no kernel"}
    return measured("gpu", candidates, device="cuda", absent=absent, host_waits="")


def on_step() -> dict[str, Any]:
    def candidate(seconds: float, peak: int) -> dict[str, Any]:
        return {"modes": {"calls": [seconds]}, "work": 0.0, "images": 32, "traffic": 0.0,
                "peak_bytes": peak, "missing": {"graph": "timed as it is called"}}  # fmt: skip

    candidates = {"ours": candidate(0.1, 18 * 10**9), "reference": candidate(0.13, 30 * 10**9)}
    parts = {"momentum": 2e-4, "losses": 3e-4, "backward": 0.05, "step": 0.1}
    return measured("step", candidates, device="cuda", parts={"ours": parts, "reference": {}})


@pytest.mark.parametrize(
    ("results", "asked", "ours", "ratio", "met"),
    [
        (on_cpu(), Asked("speed-up", "eager", 4.0), "500 ms", "4.00x", True),
        (on_cpu(), Asked("speed-up", "eager", 4.1), "500 ms", "4.00x", False),
        (on_cpu(), Asked("time", "eager", 0.2), "500 ms", "0.25x", False),
        (on_cpu(), Asked("rate", "eager", 2.0), "2 GFLOP/s", "2.00x", True),
        (on_cpu(), Asked("extra", "", 1e6), "3 MB extra", "3 MB", False),
        (on_cpu(), Asked("memory", "eager", 0.5), "3 MB extra", "0.50x", True),
        (on_cpu(), Asked("speed-up", "lightly", 1.0), "", "lightly is not installed", None),
        (on_cpu(), Asked("syncs", "", 0), "", "not measured", None),
        (on_gpu(), Asked("seconds", "", 1e-4), "100 us", "", True),
        (on_gpu(), Asked("seconds", "", 0.9e-4), "100 us", "", False),
        (on_gpu(), Asked("speed-up", "slow | fast", 2.9), "100 us", "3.00x", True),
        (on_gpu(), Asked("speed-up", "cuDNN attention | slow", 4.1), "100 us", "4.00x",
         False),
        (on_gpu(), Asked("speed-up", "loop", 3.9), "200 us, called from Python", "4.00x",
         True),
        (on_gpu(), Asked("speed-up", "cuDNN attention", 1.0), "", "no kernel", None),
        (on_gpu(), Asked("copy", "", 0.4), "10 GB/s", "50 %", True),
        (on_gpu(), Asked("copy", "", 0.6), "10 GB/s", "50 %", False),
        (on_gpu(), Asked("syncs", "", 0), "the host never waits", "", True),
        (on_gpu(), Asked("rate", "slow", 3.9), "10 TFLOP/s", "4.00x", True),
        (on_gpu(), Asked("speed-up", "slow", 1.3, "fast"), "fast: 300 us", "1.33x", True),
        (on_step(), Asked("speed-up", "reference", 1.2), "100 ms", "1.30x", True),
        (on_step(), Asked("saved", "reference", 10e9), "18 GB extra", "12 GB", True),
        (on_step(), Asked("parts", "", 0.02), "500 us", "0.5 %", True),
    ],
)  # fmt: skip
def test_verdicts(
    results: dict[str, Any],
    asked: Asked,
    ours: str,
    ratio: str,
    met: bool | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lost = [Row(name, CASE, asked=(asked,)) for name in ("other", "third")]
    monkeypatch.setattr(verdicts, "rows", lambda suite: [Row("row", CASE, asked=(asked,)), *lost])
    (verdict, *missing) = verdicts.verdicts(results)
    assert (verdict.ours, verdict.ratio, verdict.met) == (ours, ratio, met)
    assert [v.ratio for v in missing] == ["this machine lacks avx2", verdicts.NOT_RUN]
    assert "| a row" in report.asked_table(results)


def test_tables() -> None:
    lines = report.markdown(on_cpu()).splitlines()
    (ours,) = (line for line in lines if line.startswith("| ours"))
    assert [cell.strip() for cell in ours.split("|")[2:-1]] == ["500 ms", "", "2 GFLOP/s", "3 MB"]
    (eager,) = (line for line in lines if line.startswith("| eager"))
    assert "4.00x" in eager
    assert any("lightly is not installed" in line for line in lines)
    assert "- this machine lacks avx2: other" in lines
    asked = sum(len(row.asked) for row in rows("cpu"))
    assert f"0 of 0 measured demands are met; {asked} were not measured." in lines
    text = report.markdown(on_gpu())
    assert "| 100 us (100 us to 100 us) | 300 us (300 us to 300 us) |" in text
    text = report.markdown(on_step())
    assert "no loader takes part" in text and "320 images/s" in text and "200 us, 0.2 %" in text
    empty = on_step() | {"machine_info": {}, "rows": []}
    assert "The machine is not known" in report.markdown(empty)


def test_a_row_without_ours_still_shows_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    results = on_gpu()
    info = results["rows"][0]
    del info["candidates"]["ours"]
    info["absent"]["ours"] = "wrong: gradient is off"
    asked = (Asked("seconds", "", 1.0),)
    monkeypatch.setattr(verdicts, "rows", lambda suite: [Row("row", CASE, asked=asked)])
    (verdict,) = verdicts.verdicts(results)
    assert (verdict.ratio, verdict.met) == ("wrong: gradient is off", None)
    assert "| fast" in report.markdown(results)
    results["skipped"]["third"] = "failed: no answer within 60 s"
    assert verdicts.failures(results) == [
        "third: failed: no answer within 60 s",
        "row: ours: wrong: gradient is off",
    ]


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("epyc-zen4-2cores/results.json", "table.md"),
        ("xeon-emerald-rapids-2cores/results.json", "table.md"),
        ("nvidia-h200/results.json", "table.md"),
        ("nvidia-h200/step.json", "step.md"),
    ],
)
def test_committed_results_give_their_committed_tables(name: str, table: str) -> None:
    path = ROOT / "benchmarks" / "results" / name

    def cells(text: str) -> set[str]:
        lines = (re.sub(r"[ -]+", " ", line) for line in text.splitlines())
        return {line for line in lines if line.strip("| ")}

    fresh = report.markdown(json.loads(path.read_text(encoding="utf-8")))
    assert cells(fresh) == cells((path.parent / table).read_text(encoding="utf-8"))
    for picture in re.findall(r"!\[.*\]\((.*)\)", fresh):  # one that cannot be drawn is not shown
        assert (path.parent / picture).is_file()


@pytest.mark.parametrize("suite", ["cpu", "gpu"], ids=str.upper)
def test_every_row_of_a_suite_can_be_written(suite: str, tmp_path: Path) -> None:
    """A row of each id, whatever its dtype; the charts are drawn from those that have a place."""
    pytest.importorskip("matplotlib")
    results = on_gpu() if suite == "gpu" else on_cpu()
    (info,) = results["rows"]
    results["rows"] = [info | {"row": row.id, "case": sizes(row.case)} for row in rows(suite)]
    report.write(tmp_path, results, last=True)
    prefix = "cuda_" if suite == "gpu" else ""
    for name in ("speedup", "scaling_m", "scaling_k"):
        assert (tmp_path / f"{prefix}{name}.png").is_file()


def test_a_chart_keeps_the_point_that_knows_its_memory() -> None:
    charts = pytest.importorskip("benchmarks.charts")
    (row,) = verdicts.entries(on_gpu())
    known, unknown = row, verdicts.Entry(copy.deepcopy(row.info))
    unknown.found["ours"]["peak_bytes"] = None
    for order in ((known, unknown), (unknown, known)):
        assert charts.losses(order) == [known]
