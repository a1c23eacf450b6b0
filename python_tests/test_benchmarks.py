"""The benchmarks' own code: every baseline computes what the op does, and the report reads well."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import report, suites, thresholds
from benchmarks.cases import Case, EmaCase, NotAvailable, resnet50_shapes
from benchmarks.loss_cases import InfoNceCase
from benchmarks.thresholds import ASKED, Asked

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
CASES = {
    f"{type(row.case).__name__}-{getattr(row.case, 'dtype', '')}-{row.case.work > 0}": row.case
    for row in suites.rows()
}
# A quarter of a minute each; the benchmarks check them when they run.
COMPILERS = ("torch.compile", "torch.compile autocast")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_baselines_agree(case: Case, one_thread: None) -> None:
    case = case.shrunk()
    inputs = case.inputs(CPU)
    expected = case.expected(inputs)
    agreed = []
    for name in case.names:
        if name in COMPILERS:
            continue
        try:
            candidate = case.candidate(name, inputs)
        except NotAvailable:
            continue
        case.check(name, candidate.results(), expected)
        agreed.append(candidate)
    assert len(agreed) > 1
    for candidate in agreed:
        candidate.run()  # may write to the inputs, hence after all checks


@pytest.fixture
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_wrong_result_is_noticed() -> None:
    case = InfoNceCase(16, 64, 8)
    inputs = case.inputs(CPU)
    loss, gradient = case.expected(inputs)
    case.check("right", (loss, gradient), (loss, gradient))
    with pytest.raises(AssertionError, match="wrong: gradient is off"):
        case.check("wrong", (loss, 1.001 * gradient), (loss, gradient))
    with pytest.raises(AssertionError, match="wrong: loss is off"):
        case.check("wrong", (loss + 0.001, gradient), (loss, gradient))


def test_cases_survive_the_pipe_to_the_memory_process() -> None:
    for row in suites.rows():
        for case in (row.case, *row.beside.values()):
            assert suites.from_message(json.loads(json.dumps(case.message()))) == case


def test_resnet50_shapes() -> None:
    shapes = resnet50_shapes()
    assert (len(shapes), EmaCase().count) == (161, 161)
    assert sum(torch.Size(shape).numel() for shape in shapes) == 25_557_032
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        parameters = list(torchvision.models.resnet50().parameters())
    assert shapes == [tuple(parameter.shape) for parameter in parameters]


def test_every_demand_is_about_a_measured_row() -> None:
    rows = {row.id: row for row in suites.rows()}
    assert len(rows) == len(suites.rows())
    for asked in ASKED:
        row = rows[asked.row]
        assert asked.against in ("", *row.baselines, *row.beside)
        if asked.measure == "memory":
            assert {"ours", asked.against or "ours"} <= set(row.memory)


def measured(**candidates: tuple[float, int | None, float]) -> dict[str, Any]:
    """results.json of one row: seconds, peak bytes and FLOP of each candidate."""
    info = {
        "row": "row",
        "title": "a row",
        "device": "cpu",
        "isa": None,
        "beside": [],
        "case": InfoNceCase(32, 64, 128).message(),
        "absent": {"lightly": "lightly is not installed"},
        "candidates": {
            name: {"seconds": [9.0, seconds, seconds / 2], "peak_bytes": peak, "work": work}
            for name, (seconds, peak, work) in candidates.items()
        },
    }
    machine = {
        "processor": "some CPU", "cores": 2, "threads": 2, "memory_gb": 8.0, "selected": "avx2",
        "torch": "2", "python_version": "3", "densecl_ext": "0", "gpu": None,
        "ceilings": {"fma": {"avx2": 2e11}, "gemm_float32": 1e11, "copy": 2e10},
    }  # fmt: skip
    return {
        "machine_info": machine,
        "datetime": "2030-01-02T03:04:05",
        "benchmarks": [{"extra_info": info}],
        "skipped": {"test_op[cuda-row]": "no GPU", "test_op[cpu-other]": "this machine lacks avx2"},
    }


@pytest.mark.parametrize(
    ("asked", "ratio", "met"),
    [
        (Asked("row", "speed-up", "eager", at_least=4.0), "4.00x", True),
        (Asked("row", "speed-up", "eager", at_least=4.1), "4.00x", False),
        (Asked("row", "time", "eager", at_most=0.2), "0.25x", False),
        (Asked("row", "rate", "eager", at_least=2.0), "2.00x", True),
        (Asked("row", "memory", "", at_most=1e6), "3 MB", False),
        (Asked("row", "memory", "eager", at_most=0.5), "0.50x", True),
        (Asked("row", "speed-up", "lightly", at_least=1.0), "lightly is not installed", None),
        (Asked("other", "speed-up", "eager", at_least=1.0), "this machine lacks avx2", None),
        (Asked("third", "speed-up", "eager", at_least=1.0), report.NOT_RUN, None),
    ],
)
def test_verdicts(
    asked: Asked, ratio: str, met: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = measured(ours=(0.5, 3_000_000, 1e9), eager=(2.0, 6_000_000, 2e9))
    monkeypatch.setattr(report, "ASKED", (asked,))
    (verdict,) = report.verdicts(report.entries(results), results["skipped"])
    assert (verdict.ratio, verdict.met) == (ratio, met)


def test_table() -> None:
    results = measured(ours=(0.5, 3_000_000, 1e9), eager=(2.0, 6_000_000, 2e9))
    lines = report.markdown(results).splitlines()
    (ours,) = (line for line in lines if line.startswith("| ours"))
    assert [cell.strip() for cell in ours.split("|")[2:-1]] == ["500 ms", "", "2 GFLOP/s", "3 MB"]
    (eager,) = (line for line in lines if line.startswith("| eager"))
    assert "4.00x" in eager
    assert any("lightly is not installed" in line for line in lines)
    assert "- no GPU: test_op[cuda-row]" in lines
    assert f"0 of 0 measured demands are met; {len(thresholds.ASKED)} were not measured." in lines


def test_the_report_imports_nothing_heavy() -> None:
    code = (
        "import sys, benchmarks.report; sys.exit(bool({'torch', 'matplotlib'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_quick_run_writes_everything(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    pytest.importorskip("matplotlib")
    command = [sys.executable, "-m", "benchmarks", "--quick", "--out", str(tmp_path)]
    command += ["-k", "cpu and enqueue"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "enqueue_, B=256" in run.stdout
    (entry,) = report.entries(report.load(tmp_path / "results.json"))
    assert entry.seconds["ours"] > 0.0
    assert entry.peaks["ours"] is None or entry.peaks["ours"] < 10_000_000
    assert "A quick run" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "speedup.png").stat().st_size > 1000
