"""The GPU's benchmark without a GPU: timing on a clock of ours, small sizes, verdicts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import gpu, gpu_machine, gpu_report, gpu_rows, gpu_suites, report, suites
from benchmarks.cases import Candidate, Case, NotAvailable
from benchmarks.child import Child, Lost
from benchmarks.gpu_thresholds import ASKED_GPU
from benchmarks.gpu_timing import HostClock, measure, spread
from benchmarks.loss_cases import (
    AttentionLoss,
    InfoNceCase,
    attention_formulation,
    cudnn_attention,
    flash_attention,
    in_chunks,
)
from benchmarks.thresholds import Asked

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
CASES = {row.id: row.case for row in gpu_suites.rows() if not row.id.startswith("scale")}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_baselines_agree(case: Case) -> None:
    case = case.shrunk()
    inputs = case.inputs(CPU)
    expected = case.expected(inputs)
    agreed = 0
    for name in case.names:
        if name.startswith("torch.compile"):  # compiles for a quarter of a minute
            continue
        try:
            candidate = case.candidate(name, inputs)
        except NotAvailable:
            continue
        case.check(name, candidate.results(), expected)
        agreed += 1
    assert agreed > 1


def test_reference_of_the_large_sizes_is_the_formula_in_chunks() -> None:
    case = InfoNceCase(50, 64, 16)
    inputs = case.inputs(CPU)
    expected = case.candidate("eager", inputs).results()
    loss, gradient = in_chunks(inputs, logits=640)  # ten rows at a time
    torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(gradient, expected[1])


def test_attention_takes_the_log_sum_exp_as_either_kernel_gives_it() -> None:
    """Flash attention's is (1, 1, M), cuDNN's (1, 1, M, 1)."""
    case = InfoNceCase(20, 64, 16)
    inputs = case.inputs(CPU)

    def like_cudnn(rows: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output, lse = flash_attention(rows, keys)
        return output, lse.unsqueeze(-1)

    losses = []
    for kernel in (flash_attention, like_cudnn):
        loss = attention_formulation(kernel)(inputs.query, inputs.positive, inputs.queue)
        (gradient,) = torch.autograd.grad(loss, inputs.query)
        losses.append((loss.detach(), gradient))
    torch.testing.assert_close(losses[0], losses[1], rtol=0.0, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_on_a_gpu_by_shape(dtype: torch.dtype) -> None:
    """On tensors without numbers: what torch's GPU kernels return fits what is made of it."""
    with FakeTensorMode(), torch.no_grad():
        query, positive = (torch.empty(100, 64, device="cuda") for _ in range(2))
        queue = torch.empty(256, 64, device="cuda", dtype=dtype)
        for kernel in (flash_attention, cudnn_attention)[: 2 if dtype == torch.bfloat16 else 1]:
            context = SimpleNamespace()
            loss = AttentionLoss.forward(context, query, positive, queue, kernel)
            assert loss.shape == () and context.gradient.shape == query.shape


class TestClock:
    """Time passes where a candidate says so; a captured call takes no launch, a cold one more."""

    __test__ = False
    LAUNCH, COLD = 5e-6, 3e-6

    def __init__(self) -> None:
        self.now = 0.0
        self.captured = self.flushed = False
        self.ran: list[str] = []

    def kernel(self, name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.ran.append(name)
            self.now += seconds + (self.COLD if self.flushed else 0.0)
            self.now += 0.0 if self.captured else self.LAUNCH
            self.flushed = False

        return run

    def seconds(self, run: Callable[[], Any], calls: int) -> float:
        before = self.now
        for _ in range(calls):
            run()
        return self.now - before

    def capture(self, run: Callable[[], Any], calls: int) -> Callable[[], None]:
        def replay() -> None:
            self.captured = True
            for _ in range(calls):
                run()
            self.captured = False

        return replay

    def flush(self) -> None:
        self.flushed = True
        self.now += 1.0


def candidate(run: Callable[[], Any], waits: str = "") -> Candidate:
    return Candidate(run, lambda: (), waits)


def test_every_mode_measures_what_it_says() -> None:
    clock = TestClock()
    timed, failed = measure(
        {"a": candidate(clock.kernel("a", 1e-4)), "b": candidate(clock.kernel("b", 2.0))},
        clock, seconds=20.0, least=3, most=9,
    )  # fmt: skip
    assert not failed
    a, b = timed["a"].samples, timed["b"].samples
    assert a["graph"] == pytest.approx([1e-4] * len(a["graph"]))
    assert a["cold"] == pytest.approx([1e-4 + clock.COLD] * len(a["cold"]))
    assert a["calls"] == pytest.approx([1e-4 + clock.LAUNCH] * len(a["calls"]))
    assert b["graph"] == pytest.approx([2.0] * len(b["graph"]))
    assert len(a["graph"]) == len(b["graph"]) == 3  # 20 s hold no more rounds
    order = [name for i, name in enumerate(clock.ran) if i == 0 or clock.ran[i - 1] != name]
    assert order == ["a", "b"] * 4  # both are warmed up, then take turns


def test_what_cannot_be_captured_is_still_called_and_what_fails_harms_nobody() -> None:
    clock = TestClock()

    def refuses(run: Callable[[], Any], calls: int) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    def fails() -> None:
        raise torch.OutOfMemoryError("no memory\nfor this")

    timed, failed = measure(
        {"waits": candidate(clock.kernel("a", 1e-4), "reads the pointer"), "no": candidate(fails)},
        clock, seconds=1.0, least=3, most=3,
    )  # fmt: skip
    assert failed == {"no": "no memory"}
    assert timed["waits"].missing == {"graph": "reads the pointer", "cold": "reads the pointer"}
    assert list(timed["waits"].samples) == ["calls"]
    clock.capture = refuses  # type: ignore[method-assign]
    run = candidate(clock.kernel("a", 1e-4))
    timed, _ = measure({"a": run, "b": run}, clock, seconds=1.0, least=1, most=1)
    assert timed["a"].missing["graph"] == (
        "capture failed: operation not permitted when stream is capturing"
    )
    assert timed["b"].missing["graph"] == "not captured, since that of a had failed"
    assert len(timed["a"].samples["calls"]) == len(timed["b"].samples["calls"]) == 1


def test_a_failed_capture_costs_the_others_theirs_only_once() -> None:
    """Of three candidates the second cannot be captured, which breaks the process."""

    class Worker:
        killed = 0

        def ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
            waits = request["waits"]
            behind = {"graph": "not captured"} if "b" not in waits else {}
            missing = {"graph": waits.get("b", "capture failed: syncs")}
            candidates = {"a": {}, "b": missing, "c": behind}
            rows = {name: {"missing": why} for name, why in candidates.items()}
            return {"info": {"candidates": rows}, "works": True}

        def kill(self) -> None:
            self.killed += 1

    worker = Worker()
    found = gpu_rows.ask_row(worker, gpu_suites.rows()[0])["info"]["candidates"]  # type: ignore[arg-type]
    assert found["b"]["missing"]["graph"] == "syncs"
    assert found["c"]["missing"] == {}
    assert worker.killed == 1


def test_spread() -> None:
    assert spread([float(i) for i in range(11)]) == (5.0, 1.0, 9.0)
    assert spread([2.0]) == (2.0, 2.0, 2.0)


def test_ceilings_that_fail_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> float:
        raise RuntimeError("cuBLAS is not itself")

    monkeypatch.setattr(gpu_machine, "gemm", fails)
    found = gpu_machine.ceilings(CPU, HostClock(1), quick=True)
    assert found["gemm_bfloat16"] == "not measured: cuBLAS is not itself"
    assert isinstance(found["copy"], float) and found["copy"] > 0.0
    assert "nvidia-smi" in gpu_machine.state() or "driver_version" in gpu_machine.state()


def test_every_demand_is_about_a_measured_row() -> None:
    rows = {row.id: row for row in gpu_suites.rows()}
    assert len(rows) == len(gpu_suites.rows())
    for asked in ASKED_GPU:
        row = rows[asked.row]
        others = asked.against.split(" | ") if asked.against else []
        assert set(others) <= {*row.baselines, *row.beside}
        assert set(row.baselines) <= set(row.case.names)
        if asked.measure == "memory":
            assert "ours" in row.memory
        if asked.measure == "copy":
            assert row.case.traffic > 0.0
    for row in rows.values():
        for case in (row.case, *row.beside.values()):
            assert suites.from_message(json.loads(json.dumps(case.message()))) == case


def measured() -> dict[str, Any]:
    """results.json of one row: what two modes and three candidates took."""

    def candidate(**modes: float) -> dict[str, Any]:
        samples = {mode: [seconds] * 3 for mode, seconds in modes.items()}
        first = samples.get("graph") or samples["calls"]
        return {"seconds": first, "modes": samples, "missing": {}, "work": 1e9, "traffic": 1e6,
                "peak_bytes": 5_000_000}  # fmt: skip

    info = {
        "row": "row", "title": "a row", "device": "cuda", "isa": None, "beside": [],
        "case": InfoNceCase(32, 64, 128).message(), "host_waits": "",
        "absent": {"cuDNN attention": "no kernel"},
        "candidates": {
            "ours": candidate(graph=1e-4, cold=3e-4, calls=2e-4),
            "fast": candidate(graph=3e-4, calls=3e-4),
            "slow": candidate(graph=4e-4, calls=4e-4),
            "loop": candidate(calls=8e-4),
        },
    }  # fmt: skip
    machine = {
        "processor": "some CPU", "cores": 2, "torch": "2", "python_version": "3",
        "densecl_ext": "0", "device": {"name": "some GPU", "kind": "cuda", "l2_mb": 50.0},
        "state_before": {"clocks.sm": "1 MHz"}, "state_after": {}, "ceilings": {"copy": 2e10},
    }  # fmt: skip
    return {"suite": "gpu", "machine_info": machine, "datetime": "2030-01-02T03:04:05",
            "quick": False, "benchmarks": [{"extra_info": info}],
            "skipped": {"other": "failed: no answer within 90 s"}}  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "ours", "ratio", "met"),
    [
        (Asked("row", "seconds", "", at_most=1e-4), "100 us", "", True),
        (Asked("row", "seconds", "", at_most=0.9e-4), "100 us", "", False),
        (Asked("row", "speed-up", "slow | fast", at_least=2.9), "100 us", "3.00x", True),
        (Asked("row", "speed-up", "cuDNN attention | slow", at_least=4.1), "100 us", "4.00x",
         False),
        (Asked("row", "speed-up", "loop", at_least=3.9), "200 us, called from Python", "4.00x",
         True),
        (Asked("row", "speed-up", "cuDNN attention", at_least=1.0), "", "no kernel", None),
        (Asked("row", "copy", "", at_least=0.4), "10 GB/s", "50 %", True),
        (Asked("row", "copy", "", at_least=0.6), "10 GB/s", "50 %", False),
        (Asked("row", "syncs", "", at_most=0), "the host never waits", "", True),
        (Asked("row", "memory", "", at_most=4e6), "5 MB extra", "5 MB", False),
        (Asked("row", "rate", "slow", at_least=3.9), "10 TFLOP/s", "4.00x", True),
        (Asked("other", "seconds", "", at_most=1.0), "", "failed: no answer within 90 s", None),
        (Asked("third", "seconds", "", at_most=1.0), "", report.NOT_RUN, None),
    ],
)  # fmt: skip
def test_verdicts(
    asked: Asked, ours: str, ratio: str, met: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_report, "ASKED_GPU", (asked,))
    (verdict,) = gpu_report.verdicts(measured())
    assert (verdict.ours, verdict.ratio, verdict.met) == (ours, ratio, met)


def test_a_row_without_ours_still_shows_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    results = measured()
    info = results["benchmarks"][0]["extra_info"]
    del info["candidates"]["ours"]
    info["absent"]["ours"] = "wrong: gradient is off"
    monkeypatch.setattr(gpu_report, "ASKED_GPU", (Asked("row", "seconds", "", at_most=1.0),))
    (verdict,) = gpu_report.verdicts(results)
    assert (verdict.ours, verdict.met) == ("wrong: gradient is off", None)
    assert "| fast" in gpu_report.markdown(results)
    assert gpu_rows.failures(results) == [
        "other: failed: no answer within 90 s",
        "row: ours: wrong: gradient is off",
    ]


def test_a_child_that_hangs_or_dies_is_lost_and_the_next_one_answers() -> None:
    child = Child("python_tests.benchmark_child")
    try:
        first = child.ask({"do": "work"}, 60.0)
        assert child.ask({"do": "more"}, 60.0)["pid"] == first["pid"]
        with pytest.raises(Lost, match="ended with status 3"):
            child.ask({"do": "die"}, 60.0)
        with pytest.raises(Lost, match="no answer within 1 s"):
            child.ask({"do": "hang"}, 1.0)
        assert child.ask({"do": "work"}, 60.0)["pid"] != first["pid"]
    finally:
        child.kill()


def test_quick_run_writes_everything_and_a_failed_row_is_named(tmp_path: Path) -> None:
    worker = Child("benchmarks.gpu_worker", "cpu", "--quick")
    try:
        found = gpu_rows.ask(worker, "no such row")
        assert found == {"error": "failed: KeyError: 'no such row'", "broken": False}
    finally:
        worker.kill()
    results = gpu_rows.measure(tmp_path, "cpu", quick=True, words="enqueue")
    assert results["skipped"] == {}
    written = report.load(tmp_path / "results.json")
    (entry,) = report.entries(written)
    assert set(entry.modes["ours"]) == {"graph", "cold", "calls"}
    assert set(entry.modes["clone + slice assignment"]) == {"calls"}
    assert written["machine_info"]["ceilings"]["copy"] > 0.0
    assert "A quick run" in (tmp_path / "table.md").read_text()
    command = [sys.executable, "-m", "benchmarks", "--report-only", "--out", str(tmp_path)]
    pytest.importorskip("matplotlib")
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert (tmp_path / "cuda_speedup.png").stat().st_size > 1000


def test_rows_are_left_out_when_the_time_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_rows, "ask", lambda worker, row: {"error": "failed", "broken": True})
    results = gpu_rows.measure(tmp_path, "cpu", quick=True, seconds=-1.0)
    reasons = {why for row, why in results["skipped"].items() if row != "machine"}
    assert reasons == {"not run: the -1 s were over"}
    assert len(results["skipped"]) == 1 + len(gpu_suites.rows())
    assert "The machine is not known" in (tmp_path / "table.md").read_text()


def test_a_kernel_that_hangs_gives_way_to_the_portable_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(gpu_rows.KERNEL, raising=False)
    asked = []

    def ask(worker: Child, row: str, waits: Any = None, limit: float = 0.0) -> dict[str, Any]:
        kernel = os.environ.get(gpu_rows.KERNEL)
        asked.append((row, kernel))
        if row != "machine" and kernel is None:
            return {"error": "failed: no answer within 60 s", "broken": True}
        return {"error": "failed: whatever", "broken": True}

    monkeypatch.setattr(gpu_rows, "ask", ask)
    results = gpu_rows.measure(tmp_path, "cpu", quick=True, words="nce-m256")
    assert asked == [("machine", None), ("nce-m256", None), ("nce-m256", "portable")]
    assert results["kernel"] == "portable, since nce-m256 failed: no answer within 60 s"
    assert "no answer within 60 s" in (tmp_path / "table.md").read_text()
    assert gpu_rows.KERNEL not in os.environ
    asked.clear()
    gpu_rows.measure(tmp_path, "cpu", quick=True, words="ema")  # not a matter of the loss's kernel
    assert asked == [("machine", None), ("ema", None)]


def test_parts_of_make_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu.call([sys.executable, "-c", "import time; time.sleep(60)"], 1.0) == 124
    run = gpu.Run(tmp_path, "cpu", True, 100.0)
    assert gpu.run_part("test", run) == "left out: needs a GPU"
    assert gpu.run_part("bench", gpu.Run(tmp_path, "cpu", True, 3.0)).startswith("left out")
    commands = []
    monkeypatch.setattr(gpu, "call", lambda command, limit: commands.append(command) or 1)
    assert gpu.run_part("step", run) == "failed, exit status 1"
    assert commands[0][2:] == ["benchmarks.step", "--out", str(tmp_path), "--device", "cpu",
                               "--seconds", "75", "--quick"]  # fmt: skip


def test_a_chart_keeps_the_point_that_knows_its_memory() -> None:
    charts = pytest.importorskip("benchmarks.charts")
    (row,) = report.entries(measured())
    known, unknown = row, replace(row, peaks=dict.fromkeys(row.peaks))
    for order in ((known, unknown), (unknown, known)):
        line: dict[int, tuple[float, float | None]] = {}
        for entry in order:
            charts.add_point(line, 32, entry, "ours")
        assert line == {32: (1e-4, 5_000_000)}
    assert charts.baselines(row) == ["fast", "slow", "loop"]
