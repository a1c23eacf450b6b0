"""Instruction sets: which there are, how one is forced, and that they agree."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch
from op_cases import ISAS, QUEUE_DTYPES, Result, Rows, case, randn, rms, row_errors, run, term_sizes

from densecl_ext import _host, ops


def _native_calls() -> dict[str, object]:
    rows = Rows(randn(3, 8), randn(3, 8, seed=1), randn(5, 8, seed=2))
    grid = randn(1, 8, 4)
    return {
        "info_nce": lambda: ops.info_nce(rows.query, rows.positive, rows.queue),
        "dense_info_nce": lambda: ops.dense_info_nce(
            grid, grid, torch.zeros(1, 4, dtype=torch.int64), rows.queue
        ),
        "dense_match": lambda: ops.dense_match(grid, grid),
        "ema_update_": lambda: ops.ema_update_([torch.ones(3)], [torch.ones(3)], 0.5),
    }


def test_the_sets_are_reported() -> None:
    known = _host.known_isas()
    assert ISAS[0] == known[0] == "serial"
    assert [isa for isa in known if isa in ISAS] == ISAS
    if platform.machine() == "x86_64":
        assert {"avx2", "avx512"} <= set(known)
        with open("/proc/cpuinfo") as file:
            flags = set(next(line for line in file if line.startswith("flags")).split())
        assert ("avx2" in ISAS) == ({"avx2", "fma"} <= flags)
        assert ("avx512" in ISAS) == (
            {"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags
        )


def test_the_best_set_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save that Intel's vdpbf16ps runs at half the rate of the float32 units."""
    best = ISAS[-1]
    cpuinfo = Path("/proc/cpuinfo")
    intel = cpuinfo.is_file() and "GenuineIntel" in cpuinfo.read_text(encoding="utf-8")
    if intel and best == "avx512bf16":
        best = "avx512"
    monkeypatch.delenv("DENSECL_CPU_ISA", raising=False)
    assert _host.selected_isa() == best
    monkeypatch.setenv("DENSECL_CPU_ISA", "")
    assert _host.selected_isa() == best


@pytest.mark.parametrize("isa", ISAS)
def test_the_variable_is_read_at_every_call(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DENSECL_CPU_ISA", isa)
    assert _host.selected_isa() == isa
    monkeypatch.setenv("DENSECL_CPU_ISA", "nonsense")
    with pytest.raises(RuntimeError):
        _host.selected_isa()
    monkeypatch.setenv("DENSECL_CPU_ISA", isa)
    assert _host.selected_isa() == isa


@pytest.mark.skipif(len(ISAS) < 2, reason="this machine has one instruction set")
def test_the_forced_set_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets add up in different orders, so at least one bit of a long sum differs."""
    rows = Rows(randn(40, 300), randn(40, 300, seed=1), randn(2000, 300, seed=2))
    rows.options["normalize"] = False
    results = []
    for isa in (ISAS[0], ISAS[-1]):
        monkeypatch.setenv("DENSECL_CPU_ISA", isa)
        results.append(run(ops.info_nce, rows))
    assert not torch.equal(results[0].grad_query, results[1].grad_query)


@pytest.mark.parametrize("op", ["info_nce", "dense_info_nce", "dense_match", "ema_update_"])
@pytest.mark.parametrize("name", ["nonsense", "AVX2", "avx", "serial "])
def test_an_unknown_set_is_an_error(op: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DENSECL_CPU_ISA", name)
    with pytest.raises(RuntimeError, match="DENSECL_CPU_ISA names no instruction set"):
        _native_calls()[op]()


@pytest.mark.skipif(set(_host.known_isas()) == set(ISAS), reason="this machine has every set")
def test_a_set_that_the_machine_lacks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DENSECL_CPU_ISA", next(i for i in _host.known_isas() if i not in ISAS))
    for call in _native_calls().values():
        with pytest.raises(RuntimeError, match="DENSECL_CPU_ISA"):
            call()


@pytest.mark.parametrize("queue_dtype", QUEUE_DTYPES, ids=str)
def test_info_nce_agrees(queue_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within float32 rounding: a 16-bit queue rounds the operands alike in every set.

    Weights may be rounded to bfloat16 by a set that multiplies in it; float32 queues never are.
    """
    results: list[Result] = []
    for regime in ("random", "clustered", "long_queue"):
        rows, _, _ = case(regime, 25, 700, 48, 0.2, queue_dtype)
        sizes = term_sizes(rows)
        for isa in ISAS:
            monkeypatch.setenv("DENSECL_CPU_ISA", isa)
            results.append(run(ops.info_nce, rows))
            first, last = results[-1 - ISAS.index(isa)], results[-1]
            loss_rounding = 1e-5 + 2.0**-22 * first.loss.abs()
            assert ((last.loss - first.loss).abs() <= loss_rounding).all()
            bound = 1e-5 if queue_dtype == torch.float32 else 1e-3
            assert rms(row_errors(last.grad_query, first.grad_query, sizes[0])) < bound
            assert rms(row_errors(last.grad_positive, first.grad_positive, sizes[1])) < bound


def test_ema_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    updated = []
    for isa in ISAS:
        monkeypatch.setenv("DENSECL_CPU_ISA", isa)
        targets = [randn(1000), randn(77).bfloat16(), randn(5).half()]
        ops.ema_update_(targets, [randn(1000, seed=1), randn(77, seed=2), randn(5, seed=3)], 0.9)
        updated.append(targets)
    for targets in updated[1:]:
        for target, first in zip(targets, updated[0], strict=True):
            unit = torch.finfo(target.dtype).eps
            torch.testing.assert_close(target, first, atol=unit, rtol=unit)


def test_dense_match_agrees_on_clear_winners(monkeypatch: pytest.MonkeyPatch) -> None:
    query = randn(3, 256, 49)
    key = query[:, :, torch.randperm(49, generator=torch.Generator().manual_seed(0))]
    key = key + 0.5 * randn(3, 256, 49, seed=1)
    matches = []
    for isa in ISAS:
        monkeypatch.setenv("DENSECL_CPU_ISA", isa)
        matches.append(ops.dense_match(query, key, mutual=True))
    assert (matches[0] >= 0).float().mean() > 0.9
    assert all(torch.equal(match, matches[0]) for match in matches[1:])


def test_the_plan_depends_on_shapes_alone() -> None:
    plan = _host.info_nce_plan(1568, 65536, 128)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert _host.info_nce_plan(1568, 65536, 128) == plan
    finally:
        torch.set_num_threads(threads)
    assert plan["queue_slices"] * plan["slice_rows"] >= 65536
    assert plan["row_groups"] * plan["group_rows"] >= 1568
    assert plan["workspace_bytes"] < 20e6
    with pytest.raises(ValueError, match="info_nce_plan"):
        _host.info_nce_plan(-1, 1, 1)
