"""`python -m benchmarks.gpu_rows --out DIR`: measure the GPU's rows, and write what is known.

Rows run in a process of their own, one after the other. A row that fails, hangs or takes the
process along leaves its reason in results.json; the next one gets a new process. results.json and
table.md are rewritten after every row, so that a run may end at any time.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_report, gpu_suites, report
from benchmarks.child import Child, Lost
from benchmarks.gpu_timing import CAPTURE_FAILED
from benchmarks.loss_cases import InfoNceCase, StepLossCase
from benchmarks.memory import MemoryProcess
from benchmarks.suites import Row, from_message

ROW_LIMIT, COMPILE_LIMIT, MEMORY_LIMIT = 60.0, 150.0, 40.0  # seconds without an answer
BROKEN = "left the device unable to work"
KERNEL = "DENSECL_CUDA_KERNEL"


def measure(
    out: Path, device: str, *, quick: bool, words: str = "", seconds: float = 170.0
) -> dict[str, Any]:
    """Measure the rows whose id has `words`, in so many seconds; returns results.json."""
    started = time.monotonic()
    results: dict[str, Any] = {
        "suite": "gpu",
        "machine_info": None,
        "datetime": datetime.datetime.now(datetime.timezone.utc).isoformat(),
        "quick": quick,
        "benchmarks": [],
        "skipped": {},
    }
    before = os.environ.get(KERNEL)
    worker = Child("benchmarks.gpu_worker", device, *(["--quick"] if quick else []))
    memories = MemoryProcess(torch.get_num_threads())
    try:
        found = ask(worker, "machine")
        results["machine_info"] = found.get("info")
        if "error" in found:
            results["skipped"]["machine"] = found["error"]
        for row in gpu_suites.rows():
            if words not in row.id:
                continue
            if time.monotonic() - started > seconds:
                results["skipped"][row.id] = f"not run: the {seconds:.0f} s were over"
                continue
            found = ask_row(worker, row)
            if found.pop("broken") and can_fall_back(row):
                # Hopper's kernel may hang or fault: the rest of the run shall not.
                os.environ[KERNEL] = "portable"
                memories.close()
                results["kernel"] = f"portable, since {row.id} {found.get('error', BROKEN)}"
                found = ask_row(worker, row)
                found.pop("broken")
            if "error" in found:
                results["skipped"][row.id] = found["error"]
            else:
                info = found["info"]
                add_memory(row, info, device, memories)
                results["benchmarks"].append({"extra_info": info})
            write(out, results)
            print(f"{row.id}: {gpu_report.line(results, row.id)}", flush=True)
    finally:
        worker.kill()
        memories.close()
        if "kernel" in results and before is None:
            os.environ.pop(KERNEL, None)
        results["seconds"] = round(time.monotonic() - started, 1)
        write(out, results)
    return results


def can_fall_back(row: Row) -> bool:
    """Whether the row runs the loss's kernel, and not yet the portable one."""
    return isinstance(row.case, InfoNceCase | StepLossCase) and KERNEL not in os.environ


def ask_row(worker: Child, row: Row) -> dict[str, Any]:
    """The worker's answer about a row.

    A capture that fails keeps the candidates behind it from theirs: the row is then measured once
    more by a new process that does not try it.
    """
    slow = any(name.startswith("torch.compile") for name in row.baselines)
    waits: dict[str, str] = {}
    while True:
        found = ask(worker, row.id, waits, COMPILE_LIMIT if slow else ROW_LIMIT)
        candidates = found.get("info", {}).get("candidates", {})
        failed = {
            name: candidate["missing"]["graph"]
            for name, candidate in candidates.items()
            if candidate["missing"].get("graph", "").startswith(CAPTURE_FAILED)
        }
        if not failed:
            return found
        worker.kill()
        found["broken"] = False
        waits |= {name: why.removeprefix(CAPTURE_FAILED) for name, why in failed.items()}
        if list(candidates)[-1] in failed:  # nobody stands behind it
            return found


def ask(
    worker: Child, row: str, waits: dict[str, str] | None = None, limit: float = ROW_LIMIT
) -> dict[str, Any]:
    """The worker's answer, or {"error": why there is none}, with "broken": whether it was ended.

    It is ended where it hangs, and where the device takes no more work from it.
    """
    try:
        found = worker.ask({"row": row, "waits": waits or {}}, limit)
    except Lost as error:
        return {"error": f"failed: {error}", "broken": True}
    found["broken"] = not found.pop("works")
    if found["broken"]:
        worker.kill()
    if "error" in found:
        found["error"] = f"failed: {found['error']}"
    return found


def add_memory(row: Row, info: dict[str, Any], device: str, memories: MemoryProcess) -> None:
    """Peak extra bytes of the candidates that ran and are asked for."""
    case = from_message(info["case"])
    for name in row.memory:
        if name in info["candidates"]:
            peak = memories.peak(case.message(), name, device, MEMORY_LIMIT)
            info["candidates"][name]["peak_bytes"] = peak


def write(out: Path, results: dict[str, Any]) -> None:
    """results.json and table.md, each whole at any time."""
    for name, text in (
        ("results.json", json.dumps(results, indent=1) + "\n"),
        ("table.md", gpu_report.markdown(results)),
    ):
        partial = out / f".{name}"
        partial.write_text(text, encoding="utf-8")
        partial.replace(out / name)


def failures(results: dict[str, Any]) -> list[str]:
    """Rows that failed, and candidates that computed something else or failed where ours did."""
    found = [f"{name}: {why}" for name, why in results["skipped"].items() if "failed" in why]
    for benchmark in results["benchmarks"]:
        info = benchmark["extra_info"]
        for name, why in info["absent"].items():
            if why.startswith("wrong") or (name == "ours" and why.startswith("failed")):
                found.append(f"{info['row']}: {name}: {why}")
    return found


def main() -> int:
    """Exit status: 0 where no row failed and no result was wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_rows", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder to write")
    parser.add_argument("--device", default="cuda", help="cpu only with --quick")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument("-k", default="", metavar="WORD", help="only rows whose id has it")
    parser.add_argument("--seconds", type=float, default=170.0, help="no row starts after these")
    options = parser.parse_args()
    if options.device == "cpu" and not options.quick:
        parser.error("--device cpu measures nothing: only with --quick")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    results = measure(
        out, options.device, quick=options.quick, words=options.k, seconds=options.seconds
    )
    print(gpu_report.asked_table(results))
    try:
        from benchmarks import charts

        charts.draw(report.entries(results), results, out)
    except ImportError as error:
        print(f"no charts: {error}")
    failed = failures(results)
    print("\n".join(failed) or f"wrote results.json and table.md in {out}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
