"""The process that measures rows on a device: `python -m benchmarks.gpu_worker DEVICE [--quick]`.

It answers requests of gpu_rows.py. Alone, so that a kernel that hangs or faults ends this process
and not the run.
"""

from __future__ import annotations

import gc
import sys
from typing import Any

import torch

from benchmarks import gpu_machine, gpu_suites, machine
from benchmarks.cases import Candidate, Case, NotAvailable
from benchmarks.compare import require_memory
from benchmarks.gpu_timing import MODES, Clock, clock_for, first_line, measure
from benchmarks.suites import Row


def run_row(
    row: Row, device: torch.device, clock: Clock, waits: dict[str, str], *, quick: bool
) -> dict[str, Any]:
    """Agreement first, then interleaved rounds; the row of results.json without its memory.

    `waits`: why a candidate must not be captured, where that is known from before.
    """
    cases = {"ours": row.case, **row.beside}
    if quick:
        cases = {name: case.shrunk() for name, case in cases.items()}
    candidates, absent, errors = prepare(row, cases, device)
    for name, reason in waits.items():
        if name in candidates:
            candidates[name].waits = reason
    host = host_waits(candidates["ours"], device) if "ours" in candidates else None
    least, most = (2, 3) if quick else (5, 51)
    timed, failed = measure(candidates, clock, seconds=row.seconds, least=least, most=most)
    absent |= failed
    return {
        "row": row.id,
        "title": row.title,
        "device": device.type,
        "isa": None,
        "case": cases["ours"].message(),
        "absent": absent,
        "errors": errors,
        "beside": list(row.beside),
        "host_waits": host,
        "candidates": {
            name: {
                "seconds": timings.samples.get("graph") or timings.samples["calls"],
                "modes": {m: timings.samples[m] for m in MODES if m in timings.samples},
                "missing": timings.missing,
                "work": cases.get(name, cases["ours"]).work,
                "traffic": cases.get(name, cases["ours"]).traffic,
                "peak_bytes": None,
            }
            for name, timings in timed.items()
        },
    }


def prepare(
    row: Row, cases: dict[str, Case], device: torch.device
) -> tuple[dict[str, Candidate], dict[str, str], dict[str, dict[str, float]]]:
    """Candidates that run and agree, why the others do not, and how well they agree."""
    case = cases["ours"]
    inputs = case.inputs(device)
    expected = case.expected(inputs)
    candidates: dict[str, Candidate] = {}
    absent: dict[str, str] = {}
    errors: dict[str, dict[str, float]] = {}
    for name in ("ours", *row.baselines):
        try:
            if name.startswith("eager"):
                require_memory(case, device)
            candidate = case.candidate(name, inputs)
            errors[name] = case.check(name, candidate.results(), expected)
        except NotAvailable as reason:
            absent[name] = str(reason)
        except AssertionError as error:
            absent[name] = f"wrong: {first_line(error)}"
        except Exception as error:
            absent[name] = f"failed: {first_line(error)}"
        else:
            candidates[name] = candidate
    for label in row.beside:
        try:
            other = cases[label]
            candidates[label] = other.candidate("ours", other.inputs(device))
        except Exception as error:
            absent[label] = f"failed: {first_line(error)}"
    return candidates, absent, errors


def host_waits(candidate: Candidate, device: torch.device) -> str | None:
    """Where a call makes the host wait for the device: "" for nowhere, None where unknown."""
    if device.type != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("error")
    try:
        candidate.run()
    except RuntimeError as error:
        return first_line(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def still_works(device: torch.device) -> bool:
    """Whether the device takes more work: after a fault no call of this process succeeds."""
    try:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
        torch.zeros(1, device=device).add_(1).item()
    except RuntimeError:
        return False
    return True


def main() -> None:
    """Answer until there are no more requests."""
    from benchmarks.child import requests

    device, quick = torch.device(sys.argv[1]), "--quick" in sys.argv
    rows = {row.id: row for row in gpu_suites.rows()}
    if device.type == "cpu":
        torch.set_num_threads(1)  # tiny sizes on a machine that does other things
    for request, answer in requests():
        clock: Clock | None = None
        try:
            clock = clock_for(device)
            if request["row"] == "machine":
                info = machine.describe() | {"device": gpu_machine.describe(device)}
                info["state_before"] = gpu_machine.state()
                info["ceilings"] = gpu_machine.ceilings(device, clock, quick=quick)
                info["state_after"] = gpu_machine.state()
                found = {"info": info}
            else:
                row, waits = rows[request["row"]], request.get("waits", {})
                found = {"info": run_row(row, device, clock, waits, quick=quick)}
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {first_line(error)}"}
        clock = None  # and with it the graphs' memory
        found["works"] = still_works(device)
        answer(found)


if __name__ == "__main__":
    main()
