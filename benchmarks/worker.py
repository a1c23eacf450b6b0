"""The process that measures: `python -m benchmarks.worker cpu|cuda [--suite NAME] [--quick]`.

It answers requests of __main__.py, one at a time:

    {"do": "machine"}                         what it is and what it reaches
    {"do": "row", "row", ...}                 a row of results.json, without its memory
    {"do": "memory", "case", "name"}          peak bytes of one call beyond what was there before
    {"do": "fits", "case", "name"}            whether a training step's batch fits
    {"do": "views", "backend", "photos"}      images/s of a loader

"settings" of any are environment variables that hold while it is answered.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.cases import (
    Candidate,
    Case,
    NotAvailable,
    candidate_of,
    environment,
)
from benchmarks.processes import requests
from benchmarks.rows import Row, from_message, rows
from benchmarks.timing import MODES, Clock, CudaClock, HostClock, first_line, measure
from densecl_ext import _host

OUT_OF_MEMORY = "out of memory"
PROC = Path("/proc/self")
BATCH, SIZE = 32, 224  # of the loaders' views
Settings = argparse.Namespace  # device, suite, quick


def run_row(row: Row, clock: Clock, request: dict[str, Any], options: Settings) -> dict[str, Any]:
    """Agreement first, then interleaved rounds.

    In the request "only" names one candidate, without the others; "waits" says why some must not
    be captured, where that is known from before.
    """
    if row.isa is not None and row.isa not in _host.available_isas():
        raise NotAvailable(f"this machine lacks {row.isa}")
    cases = {"ours": row.case, **row.beside}
    if options.quick:
        cases = {name: case.shrunk() for name, case in cases.items()}
    info: dict[str, Any] = {
        "row": row.id, "title": row.title, "device": options.device.type, "isa": row.isa,
        "case": cases["ours"].message(), "absent": {}, "errors": {}, "beside": list(row.beside),
        "host_waits": None, "parts": {},
    }  # fmt: skip
    peaks: dict[str, int | None] = {}
    first = () if request.get("only", "") not in ("", "ours") else ("ours",)
    candidates = prepare((*first, *row.baselines), cases, options, info, peaks)
    for name, reason in request.get("waits", {}).items():
        if name in candidates:
            candidates[name].waits = reason
    if "ours" in candidates:
        info["host_waits"] = host_waits(candidates["ours"], options.device)
    least, most = (3, 3) if options.quick else (5, 51) if options.suite != "cpu" else (3, 41)
    sample = 0.4 if cases["ours"].images and not options.quick else None
    timed, failed = measure(
        candidates, clock, seconds=row.seconds, least=least, most=most, sample=sample
    )
    info["absent"] |= failed
    info["candidates"] = {
        name: {
            "seconds": made.samples.get("graph") or made.samples["calls"],
            "modes": {m: made.samples[m] for m in MODES if m in made.samples},
            "missing": made.missing,
            "work": cases.get(name, cases["ours"]).work,
            "traffic": cases.get(name, cases["ours"]).traffic,
            "images": cases["ours"].images,
            "peak_bytes": peaks.get(name),
        }
        for name, made in timed.items()
    }
    if parts := getattr(cases["ours"], "parts", None):
        for name in timed:
            with contextlib.suppress(RuntimeError):  # the times are there already
                info["parts"][name] = parts(name, candidates[name].run, options.device)
    return info


def prepare(
    names: tuple[str, ...],
    cases: dict[str, Case],
    options: Settings,
    info: dict[str, Any],
    peaks: dict[str, int | None],
) -> dict[str, Candidate]:
    """Candidates that run and agree; into `info` why the others do not, and how well they agree."""
    case = cases["ours"]
    inputs = case.inputs(options.device)
    expected = case.expected(inputs)
    candidates: dict[str, Candidate] = {}
    for name in names:
        try:
            if name.startswith("eager"):
                require_memory(case, options.device)
            before = start_peak(options.device)
            candidate = candidate_of(case, name, inputs)
            results = candidate.results()
            if case.whole_memory and options.device.type == "cuda":
                peaks[name] = torch.cuda.max_memory_allocated(options.device) - before
            info["errors"][name] = case.check(name, results, expected)
        except NotAvailable as reason:
            info["absent"][name] = str(reason)
        except AssertionError as error:
            info["absent"][name] = f"wrong: {first_line(error)}"
        except Exception as error:
            info["absent"][name] = f"failed: {first_line(error)}"
        else:
            candidates[name] = candidate
    for label, other in list(cases.items())[1:]:
        try:
            candidates[label] = other.candidate("ours", other.inputs(options.device))
        except Exception as error:
            info["absent"][label] = f"failed: {first_line(error)}"
    return candidates


def require_memory(case: Case, device: torch.device) -> None:
    """NotAvailable where the published formula would take more than half of the free memory."""
    if device.type == "cuda":
        free = float(torch.cuda.mem_get_info(device)[0])
    else:
        free = 1024 * machine.kilobytes("/proc/meminfo", "MemAvailable") or 8e9
    if case.eager_bytes > free / 2:
        raise NotAvailable(
            f"does not fit: about {case.eager_bytes / 1e9:.0f} GB, half of {free / 1e9:.0f} GB free"
        )


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


def memory_supported() -> bool:
    """Whether this system tells a process's peak."""
    return os.access(PROC / "clear_refs", os.W_OK)


def start_peak(device: torch.device) -> int:
    """Bytes in use now; from here on the peak is looked for.

    On a GPU torch's allocator counts, on a CPU the resident set's high-water mark.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if not memory_supported():
        return 0
    # Free heap goes back to the system, or the next call would find it already resident.
    trim: Callable[[int], int] = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)
    trim(0)
    (PROC / "clear_refs").write_text("5", encoding="ascii")  # 5: reset the peak
    return 1024 * int(machine.kilobytes(str(PROC / "status"), "VmRSS"))


def peak_of(
    request: dict[str, Any], known: dict[Case, Any], device: torch.device
) -> dict[str, Any]:
    """Bytes that one call needs beyond what was there before it, and what it returned."""
    case, name = from_message(request["case"]), request["name"]
    small = case.shrunk()
    candidate_of(small, name, small.inputs(device)).run()  # thread pools, lazy imports
    if case not in known:
        known.clear()
        known[case] = case.inputs(device)
    run = candidate_of(case, name, known[case]).run
    if device.type == "cuda" or case.whole_memory:
        run()  # what is made once, as an optimizer's momenta
    before = start_peak(device)
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = 1024 * int(machine.kilobytes(str(PROC / "status"), "VmHWM"))
    value = float(result) if isinstance(result, torch.Tensor) and result.numel() == 1 else None
    return {"bytes": max(0, peak - before), "value": value}


def rate_of_views(backend: str, photos: str, options: Settings) -> dict[str, Any]:
    """Two augmented 224 px views of every photograph of a folder: images per second."""
    package = {"dali": "nvidia", "torchvision": "torchvision"}[backend]
    if importlib.util.find_spec(package) is None:
        raise NotAvailable(f"{backend} is not installed")
    from densecl_ext.data import build_loader

    loader = build_loader(
        photos, batch_size=BATCH, size=SIZE, backend=backend, device=options.device
    )
    batches = min(len(loader) - 3, 4 if options.quick else 16)
    if batches < 1:
        raise NotAvailable(f"{photos} holds too few photographs for {BATCH} a batch")
    samples = []
    try:
        for epoch in range(1 if options.quick else 3):
            loader.set_epoch(epoch)
            stream = iter(loader)
            for _ in range(3):  # worker processes start, queues of finished batches empty
                next(stream)
            samples.append(rate_of(stream, batches, seconds=6.0))
            del stream
    finally:
        loader.close()
    return {
        "row": f"views-{backend}", "title": f"two {SIZE} px views, {backend}, batches of {BATCH}",
        "device": options.device.type, "images_per_second": statistics.median(samples),
        "samples": samples,
    }  # fmt: skip


def rate_of(stream: Iterator[Any], batches: int, seconds: float) -> float:
    """Images per second over a number of batches, or as many as start within a time limit."""
    start, taken = time.perf_counter(), 0
    while taken < batches and time.perf_counter() < start + seconds:
        batch = next(stream)
        if batch.view_q.device.type == "cuda":
            torch.cuda.synchronize(batch.view_q.device)
        taken += 1
    return taken * BATCH / (time.perf_counter() - start)


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


def respond(request: dict[str, Any], options: Settings, known: dict[Case, Any]) -> dict[str, Any]:
    """The answer to one request."""
    device = options.device
    if request["do"] == "memory":
        return peak_of(request, known, device)
    if request["do"] == "fits":
        case, name = from_message(request["case"]), request["name"]
        candidate_of(case, name, case.inputs(device)).results()
        return {}
    if request["do"] == "views":
        return {"info": rate_of_views(request["backend"], request["photos"], options)}
    modes = MODES if options.suite == "gpu" else ("calls",)
    clock: Clock = CudaClock(device) if device.type == "cuda" else HostClock(modes)
    if request["do"] == "machine":
        info = machine.describe(device)
        info["ceilings"] = machine.ceilings(clock, device, quick=options.quick)
        info["state_after"] = machine.state()
        return {"info": info}
    (row,) = (row for row in rows(options.suite) if row.id == request["row"])
    names, only = ("ours", *row.baselines, *request.get("variants", ())), request.get("only")
    row = replace(
        row,
        baselines=tuple(name for name in names[1:] if only in (None, "", name)),
        beside=row.beside if only in (None, "", "ours") else {},
    )
    return {"info": run_row(row, clock, request, options)}


def main() -> None:
    """Answer until there are no more requests."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.worker")
    parser.add_argument("device", type=torch.device)
    parser.add_argument("--suite", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.backends.cudnn.benchmark = True  # as the trainer has it
    if options.threads:
        torch.set_num_threads(options.threads)
    known: dict[Case, Any] = {}
    for request, answer in requests():
        try:
            with environment(request.get("settings", {})):
                found = respond(request, options, known)
        except NotAvailable as reason:
            found = {"skipped": str(reason)}
        except torch.OutOfMemoryError:
            found = {"error": OUT_OF_MEMORY}
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {first_line(error)}"}
        answer(found | {"works": still_works(options.device)})


if __name__ == "__main__":
    main()
