"""The benchmarks' own code: every baseline computes what the op does, and rows survive faults."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import rows, run, verdicts, worker
from benchmarks.cases import (
    Case,
    NotAvailable,
    candidate_of,
    ema_update_,
    enqueue_,
    resnet50_shapes,
    shrunk,
    sizes,
)
from benchmarks.losses import (
    AttentionLoss,
    attention_formulation,
    cudnn_attention,
    flash_attention,
    in_chunks,
    info_nce,
)
from benchmarks.rows import Row
from benchmarks.step import step
from densecl_ext import reference
from python_tests import faulty_rows

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
ALL = [row for suite in ("cpu", "gpu") for row in rows.rows(suite)]
BUILDS = {
    "-".join(str(sizes(build).get(n, "")) for n in ("kind", "dtype", "gradient")): build
    for build in (row.case for row in ALL if row.case.func.__name__ != "step")
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_baselines_agree(build: partial[Case]) -> None:
    case = shrunk(build)(CPU)
    expected = case.expected()
    agreed = []
    for name in case.names:
        if name.startswith("torch.compile"):  # a quarter of a minute; checked when measured
            continue
        try:
            candidate = candidate_of(case, name)
        except (NotAvailable, ImportError):  # lightly's loss, where it is not installed
            continue
        case.check(name, candidate.results(), expected)
        agreed.append(candidate)
    assert len(agreed) > 1
    for candidate in agreed:
        candidate.run()  # may write to the inputs, hence after all checks


def test_a_wrong_result_is_noticed() -> None:
    case = info_nce(CPU, rows=16, queue_length=64, features=8)
    loss, gradient = case.expected()
    case.check("right", (loss, gradient), (loss, gradient))
    with pytest.raises(AssertionError, match="wrong: gradient is off"):
        case.check("wrong", (loss, 1.001 * gradient), (loss, gradient))
    with pytest.raises(AssertionError, match="wrong: loss is off"):
        case.check("wrong", (loss + 0.001, gradient), (loss, gradient))


def test_ours_under_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variant's variables hold while it runs, and no longer."""
    seen = []
    monkeypatch.setattr(
        "densecl_ext.ops.ema_update_", lambda *_, **__: seen.append(os.environ.get("A"))
    )
    case = ema_update_(CPU, count=2)
    candidate_of(case, "ours [A=1 B=2]").run()
    candidate_of(case, "ours").run()
    assert seen == ["1", None] and "B" not in os.environ
    with pytest.raises(NotAvailable, match="on a GPU only"):
        candidate_of(case, "ours [DENSECL_CUDA_SWEEP=base]")
    isa = "neon" if "x86" in os.uname().machine else "avx2"
    with pytest.raises(NotAvailable, match=f"this machine lacks {isa}"):
        candidate_of(case, f"ours [DENSECL_CPU_ISA={isa}]")


def test_a_library_that_is_missing_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network of timm's, lightly's loss: their columns say so."""
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "lightly.loss", None)
    vit = partial(step, batch=1, backbone="timm/vit_tiny_patch16_224", size=32, precision="fp32")
    exact = partial(info_nce, rows=8, queue_length=16)
    found = []
    for row in (Row("vit", vit), Row("nce", exact, ("lightly",))):
        settings = worker.Settings(CPU, threads=1)
        found.append(worker.run_row(replace(row, seconds=0.0), settings))
    assert "timm" in found[0]["absent"]["ours"] and "lightly" in found[1]["absent"]["lightly"]
    assert list(found[1]["candidates"]) == ["ours"]
    assert not verdicts.failures({"skipped": {}, "rows": found})


def test_rows_are_complete_and_survive_the_pipe() -> None:
    for suite in ("cpu", "gpu", "step"):
        found = rows.rows(suite)
        assert len({row.id for row in found}) == len(found)
        for row in found:
            names = {name.partition(" [")[0] for name in row.baselines}
            case = shrunk(row.case)(CPU)
            assert names <= set(case.names)
            for build in (row.case, *row.beside.values()):
                copied = pickle.loads(pickle.dumps(build))
                assert sizes(copied) == sizes(build) == json.loads(json.dumps(sizes(build)))
            for asked in row.asked:
                others = set(asked.against.split(" | ")) if asked.against else set()
                assert others <= {*row.baselines, *row.beside}
                assert asked.who in ("ours", *row.baselines)
                assert asked.measure != "copy" or case.traffic > 0.0


def test_resnet50_shapes() -> None:
    shapes = resnet50_shapes()
    assert len(shapes) == sizes(partial(ema_update_))["count"] == 161
    assert sum(torch.Size(shape).numel() for shape in shapes) == 25_557_032


def test_reference_of_the_large_sizes_is_the_formula_in_chunks() -> None:
    rows = [torch.randn(50, 16, requires_grad=True), torch.randn(50, 16), torch.randn(64, 16)]
    rows[2] = torch.nn.functional.normalize(rows[2], dim=1)
    expected = reference.info_nce(*rows)
    loss, gradient = in_chunks(*rows, logits=640)  # ten rows at a time
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, rows[0])[0])


def test_attention_takes_the_log_sum_exp_as_either_kernel_gives_it() -> None:
    """Flash attention's is (1, 1, M), cuDNN's (1, 1, M, 1)."""
    inputs = [torch.randn(20, 16, requires_grad=True), torch.randn(20, 16), torch.randn(64, 16)]

    def like_cudnn(rows: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output, lse = flash_attention(rows, keys)
        return output, lse.unsqueeze(-1)

    losses = []
    for kernel in (flash_attention, like_cudnn):
        loss = attention_formulation(kernel)(*inputs)
        (gradient,) = torch.autograd.grad(loss, inputs[0])
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


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def options(suite: str = "gpu", **changed: Any) -> argparse.Namespace:
    chosen = {"suite": suite, "device": "cpu", "quick": True, "k": "", "seconds": 300.0,
              "variant": []}  # fmt: skip
    return argparse.Namespace(**chosen | changed)


def test_rows_survive_the_faults_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One hangs, one faults, one prints garbage."""
    faults = {"ema": "hang", "enqueue": "fault", "match-f32": "garbage"}
    monkeypatch.setenv("FAULTS", json.dumps(faults))
    monkeypatch.setenv("DENSECL_CUDA_KERNEL", "portable")
    monkeypatch.setattr(worker, "run_row", faulty_rows.run_row)
    monkeypatch.setattr(run, "LIMITS", {"gpu": 120.0})
    names = ["ema", "enqueue", "match-f32", "nce-loss", "match-bf16-cl"]
    table = {row.id: row for row in rows.rows("gpu")}
    monkeypatch.setattr(run, "rows", lambda suite: [table[name] for name in names])
    measured_run = run.Run(tmp_path, options(seconds=600.0))
    ask = measured_run.ask

    def impatient(limit: float, function: Any, *given: Any) -> Any:
        # Its process runs already; the others start one, which takes a while on a busy machine.
        hangs = isinstance(given[0], Row) and given[0].id == "ema" if given else False
        return ask(5.0 if hangs else limit, function, *given)

    measured_run.ask = impatient  # type: ignore[method-assign]
    measured_run.everything()
    results = load(tmp_path / "results.json")
    assert set(results["skipped"]) == {"ema", "enqueue", "match-f32"}
    assert results["skipped"]["ema"] == "failed: no answer within 5 s"
    assert results["skipped"]["enqueue"] == "failed: the process ended: SIGSEGV"
    assert results["skipped"]["match-f32"].startswith("failed: answered nonsense")
    measured = {entry.id: entry for entry in verdicts.entries(results)}
    assert set(measured) == {"nce-loss", "match-bf16-cl"}
    assert list(measured["match-bf16-cl"].found) == ["ours", rows.FORMULA]
    assert results["kernel"] == "DENSECL_CUDA_KERNEL=portable"
    assert results["kernel"] in (tmp_path / "table.md").read_text()
    assert len(verdicts.failures(results)) == 3
    assert set(measured["nce-loss"].modes("ours")) == {"graph", "cold", "calls"}
    assert measured["match-bf16-cl"].seconds("ours") > 0.0


def test_rows_are_left_out_when_the_time_is_over(tmp_path: Path) -> None:
    late = run.Run(tmp_path, options(seconds=-1.0))
    late.everything()
    assert set(late.results["skipped"].values()) == {"not run: the -1 s were over"}
    assert len(late.results["skipped"]) == 1 + len(rows.rows("gpu"))
    assert "The machine is not known" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    ("graph", "absent", "closed"),
    [("capture failed: syncs", "", 1), ("", "failed: a fault", 1), ("reads", "does not fit", 0)],
)
def test_after_a_failure_the_next_row_gets_a_new_process(
    graph: str, absent: str, closed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured_run = run.Run(tmp_path, options())
    made = {"missing": {"graph": graph}, "images": 0, "modes": {"calls": [1.0]}}
    names = ("ours", "ours [A=1]", "torch.compile")
    candidates: dict[str, dict[str, Any]] = {name: dict(made) for name in names}
    answer = {"row": "", "title": "", "case": {}, "device": "cpu", "absent": {"eager": absent},
              "candidates": candidates}  # fmt: skip
    measured_run.ask = lambda *_, **__: answer  # type: ignore[method-assign]
    closings: list[int] = []
    monkeypatch.setattr(measured_run._worker, "close", lambda: closings.append(1))
    monkeypatch.setattr(measured_run, "_memory", SimpleNamespace(call=lambda *_: 3))
    told = measured_run._row(rows.rows("gpu")[0])
    assert told.startswith("measured, ours 1,000,000.0 us, ours [A=1] 1,000,000.0 us")
    assert len(closings) == closed
    assert [candidates[name].get("peak_bytes") for name in names] == [3, 3, None]


@pytest.mark.parametrize(("suite", "words"), [("cpu", "enqueue"), ("step", "step-32")])
def test_quick_run_writes_everything(suite: str, words: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    arguments = ["-m", "benchmarks", "--quick", "--out", str(tmp_path), "-k", words]
    arguments += ["--suite", suite, "--device", "cpu"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    ran = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    # The CUDA graph's reason is in the table; it fails no row.
    assert ran.returncode == 0, ran.stdout + ran.stderr
    results, table = {"cpu": ("results.json", "table.md"), "step": ("step.json", "step.md")}[suite]
    (entry,) = verdicts.entries(load(tmp_path / results))
    assert entry.seconds("ours") > 0.0 and "A quick run" in (tmp_path / table).read_text()
    if suite == "step":
        assert "CUDA graph" in entry.absent and "images/s" in (tmp_path / table).read_text()
        assert {"momentum", "losses", "backward", "optimizer"} <= entry.info["parts"]["ours"].keys()
        return
    assert (entry.peak("ours") or 0) < 10_000_000
    assert tuple(entry.found) == shrunk(partial(enqueue_))(CPU).names
    chart = (tmp_path / "speedup.png").stat()
    subprocess.run(
        [sys.executable, "-m", "benchmarks", "--report-only", "--out", str(tmp_path)],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    assert (tmp_path / "speedup.png").stat().st_mtime > chart.st_mtime
