"""What the measuring process does: run.py has these functions called in a process of its own."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.cases import Candidate, Case, NotAvailable, candidate_of, shrunk, sizes
from benchmarks.rows import Row
from benchmarks.timing import Settings, first_line, measure

RESET = Path("/proc/self/clear_refs")


def run_row(row: Row, settings: Settings) -> dict[str, Any]:
    """A row of results.json, without a CPU's memory: agreement first, then interleaved rounds."""
    device, quick, clock = settings.device, settings.quick, settings.clock()
    gpu = device.type == "cuda"
    builds = {"ours": row.case, **row.beside}
    if quick:
        builds = {name: shrunk(build) for name, build in builds.items()}
    case = builds["ours"](device)
    expected = case.expected()
    info: dict[str, Any] = {
        "row": row.id, "title": case.title + row.note, "device": device.type,
        "case": sizes(row.case), "absent": {}, "errors": {}, "beside": list(row.beside),
        "host_waits": None, "parts": {}, "candidates": {},
    }  # fmt: skip
    ready: dict[str, Candidate] = {}
    for name in ("ours", *row.baselines, *row.beside):
        try:
            if name.startswith("eager"):
                require_memory(case, device)
            before = start_peak(device) if gpu and case.parts else 0
            of = case
            if name in row.beside:
                of = builds[name](device)
                candidate = of.candidate("ours")
            else:
                candidate = candidate_of(case, name)
                info["errors"][name] = case.check(name, candidate.results(), expected)
            if gpu and not case.parts:
                before = start_peak(device)
                candidate.run()
            ready[name] = candidate
            info["candidates"][name] = {
                "work": of.work, "traffic": of.traffic, "images": of.images,
                "peak_bytes": peak(device, before) if gpu else None,
            }  # fmt: skip
        except (NotAvailable, ImportError) as reason:
            info["absent"][name] = first_line(reason)
        except AssertionError as error:
            info["absent"][name] = f"wrong: {first_line(error)}"
        except Exception as error:
            info["absent"][name] = f"failed: {first_line(error)}"
    if "ours" in ready:
        info["host_waits"] = host_waits(ready["ours"], device)
    least, most = (3, 3) if quick else (5, 51) if settings.suite != "cpu" else (3, 41)
    timed, failed = measure(
        ready, clock, seconds=row.seconds, least=least, most=most,
        sample=0.4 if case.images and not quick else 0.0,
    )  # fmt: skip
    info["absent"] |= failed
    info["candidates"] = {name: made | info["candidates"][name] for name, made in timed.items()}
    if parts := case.parts:
        for name in timed:
            with contextlib.suppress(RuntimeError):  # the times are there already
                info["parts"][name] = parts(name, ready[name].run)
    return info


def require_memory(case: Case, device: torch.device) -> None:
    """NotAvailable where the published formula would take more than half of the free memory."""
    if device.type == "cuda":
        free = float(torch.cuda.mem_get_info(device)[0])
    else:
        free = machine.bytes_of("/proc/meminfo", "MemAvailable") or 8e9
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


def start_peak(device: torch.device) -> int:
    """Bytes in use now; from here on the peak is looked for.

    On a GPU torch's allocator counts, on a CPU the resident set's high-water mark.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if not os.access(RESET, os.W_OK):
        return 0
    # Free heap goes back to the system, or the next call would find it already resident.
    getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)(0)
    RESET.write_text("5", encoding="ascii")  # 5: reset the peak
    return machine.bytes_of("/proc/self/status", "VmRSS")


def peak(device: torch.device, before: int) -> int:
    """The most bytes that were in use since, beyond those before."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) - before
    return max(0, machine.bytes_of("/proc/self/status", "VmHWM") - before)


def peak_of(build: partial[Case], name: str, settings: Settings) -> int:
    """On a CPU: bytes that one call needs beyond what was there before it."""
    settings.clock()
    candidate_of(shrunk(build)(settings.device), name).run()  # thread pools, lazy imports
    case = (shrunk(build) if settings.quick else build)(settings.device)
    run = candidate_of(case, name).run
    if case.parts:
        run()  # what is made once, as an optimizer's momenta
    before = start_peak(settings.device)
    run()
    return peak(settings.device, before)
