"""Runs one row: agreement first, then interleaved rounds, then memory."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks import measure, memory
from benchmarks.cases import Candidate, Case, NotAvailable, forced
from benchmarks.loss_cases import InfoNceCase
from benchmarks.memory import MemoryProcess
from benchmarks.suites import Row


def run_row(
    row: Row, device: torch.device, benchmark: Any, memories: MemoryProcess, *, quick: bool
) -> None:
    """Measure a row and leave everything in the benchmark's extra_info.

    The benchmark times ours; its untimed set-up before each round is where the baselines take
    their turn, timed here.
    """
    cases = {"ours": row.case, **row.beside}
    if quick:
        cases = {name: case.shrunk() for name, case in cases.items()}
    with forced("DENSECL_CPU_ISA", row.isa):
        candidates, absent, errors = prepare(row, cases, device)
        timings = {name: measure.warm_up(c.run, device) for name, c in candidates.items()}
        seconds: dict[str, list[float]] = {name: [] for name in candidates}
        samples = {
            name: measure.repeated(candidate.run, timings[name][0], device)
            for name, candidate in candidates.items()
        }
        rounds = measure.rounds_within(
            0.0 if quick else row.seconds, {n: t for n, (_, t) in timings.items()}, 3, 41
        )
        ours = samples.pop("ours")

        def others() -> None:
            for name, sample in samples.items():
                seconds[name].append(measure.seconds_of(sample) / timings[name][0])

        benchmark.pedantic(ours, setup=others, rounds=rounds)
        if benchmark.stats is not None:
            seconds["ours"] = [s / timings["ours"][0] for s in benchmark.stats.stats.data]
        peaks = {}
        for name in row.memory:
            if name in candidates:
                own = cases.get(name)
                asked = (own, "ours") if own is not None else (cases["ours"], name)
                peaks[name] = memories.peak(asked[0].message(), asked[1], device.type)
    benchmark.extra_info.update(
        row=row.id,
        title=row.title,
        device=device.type,
        isa=row.isa,
        case=cases["ours"].message(),
        calls=timings["ours"][0],
        absent=absent,
        errors=errors,
        beside=list(row.beside),
        candidates={
            name: {
                "seconds": seconds[name],
                "work": cases.get(name, cases["ours"]).work,
                "peak_bytes": peaks.get(name),
            }
            for name in candidates
        },
    )


def prepare(
    row: Row, cases: dict[str, Case], device: torch.device
) -> tuple[dict[str, Candidate], dict[str, str], dict[str, dict[str, float]]]:
    """Candidates that can run and agree, why the others cannot, and how well they agree.

    Raises:
        AssertionError: A candidate computes something else.
    """
    case = cases["ours"]
    inputs = case.inputs(device)
    expected = case.expected(inputs)
    candidates: dict[str, Candidate] = {}
    absent: dict[str, str] = {}
    errors: dict[str, dict[str, float]] = {}
    for name in ("ours", *row.baselines):
        try:
            if name == "eager":
                require_memory(case, device)
            candidate = case.candidate(name, inputs)
        except NotAvailable as reason:
            absent[name] = str(reason)
            continue
        errors[name] = case.check(name, candidate.results(), expected)
        candidates[name] = candidate
    for label, other in row.beside.items():
        other = cases[label]
        candidates[label] = other.candidate("ours", other.inputs(device))
    return candidates, absent, errors


def require_memory(case: Case, device: torch.device) -> None:
    """NotAvailable where the published formula would take more than half of the free memory."""
    if not isinstance(case, InfoNceCase):
        return
    if device.type == "cuda":
        free = float(torch.cuda.mem_get_info(device)[0])
    else:
        free = memory.available_bytes() if memory.supported() else 8e9
    if case.eager_bytes > free / 2:
        raise NotAvailable(
            f"does not fit: about {case.eager_bytes / 1e9:.0f} GB, half of {free / 1e9:.0f} GB free"
        )
