"""What the measuring process does: __main__.py has its functions called in a process of its own."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.cases import Candidate, Case, NotAvailable, candidate_of
from benchmarks.rows import Row
from benchmarks.timing import MODES, Clock, CudaClock, first_line, measure
from densecl_ext import _host

OUT_OF_MEMORY = "out of memory"
RESET = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Settings:
    """Of a process."""

    device: torch.device
    suite: str = "cpu"
    quick: bool = False
    threads: int = 0  # 0: torch's choice

    def clock(self) -> Clock:
        """A GPU's, or a CPU's that stands in for one in a GPU's suite."""
        if self.device.type == "cuda":
            return CudaClock(self.device)
        return Clock(MODES if self.suite == "gpu" else ("calls",))


def answer(settings: Settings, function: Callable[..., Any], *given: Any) -> dict[str, Any]:
    """What a function returns, as "info", or why it could not: "skipped" or "error".

    "works" says whether the process can go on.
    """
    torch.backends.cudnn.benchmark = True  # as the trainer has it
    if settings.threads:
        torch.set_num_threads(settings.threads)
    try:
        found = {"info": function(*given, settings)}
    except NotAvailable as reason:
        found = {"skipped": str(reason)}
    except torch.OutOfMemoryError:
        found = {"error": OUT_OF_MEMORY}
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {first_line(error)}"}
    return found | {"works": still_works(settings.device)}


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


def describe(settings: Settings) -> dict[str, Any]:
    """What the machine is and what it reaches."""
    info = machine.describe(settings.device)
    info["ceilings"] = machine.ceilings(settings.clock(), settings.device, quick=settings.quick)
    return info | {"state_after": machine.state()}


def run_row(row: Row, settings: Settings) -> dict[str, Any]:
    """A row of results.json, without its memory: agreement first, then interleaved rounds."""
    if row.isa is not None and row.isa not in _host.available_isas():
        raise NotAvailable(f"this machine lacks {row.isa}")
    device, quick, clock = settings.device, settings.quick, settings.clock()
    cases = {"ours": row.case, **row.beside}
    if quick:
        cases = {name: case.shrunk() for name, case in cases.items()}
    case = cases["ours"]
    info: dict[str, Any] = {
        "row": row.id, "title": row.title, "device": device.type, "isa": row.isa,
        "case": case.message(), "absent": {}, "errors": {}, "beside": list(cases)[1:],
        "host_waits": None, "parts": {},
    }  # fmt: skip
    peaks: dict[str, int] = {}
    candidates = prepare(("ours", *row.baselines), cases, device, info, peaks)
    if "ours" in candidates:
        info["host_waits"] = host_waits(candidates["ours"], device)
    least, most = (3, 3) if quick else (5, 51) if settings.suite != "cpu" else (3, 41)
    sample = 0.4 if row.case.images and not quick else None
    timed, failed = measure(
        candidates, clock, seconds=row.seconds, least=least, most=most, sample=sample
    )
    info["absent"] |= failed
    info["candidates"] = {
        name: {
            "modes": {m: made.samples[m] for m in MODES if m in made.samples},
            "missing": made.missing,
            "work": cases.get(name, case).work, "traffic": cases.get(name, case).traffic,
            "images": case.images, "peak_bytes": peaks.get(name),
        }
        for name, made in timed.items()
    }  # fmt: skip
    for name in timed if case.images else ():
        with contextlib.suppress(RuntimeError):  # the times are there already
            info["parts"][name] = case.parts(name, candidates[name].run, device)
    return info


def prepare(
    names: tuple[str, ...],
    cases: dict[str, Case],
    device: torch.device,
    info: dict[str, Any],
    peaks: dict[str, int],
) -> dict[str, Candidate]:
    """Candidates that run and agree; into `info` why the others do not, and how well they agree."""
    case, *others = cases.values()
    inputs = case.inputs(device)
    expected = case.expected(inputs)
    candidates: dict[str, Candidate] = {}
    beside = dict(zip(info["beside"], others, strict=True))
    for name in (*names, *beside):
        try:
            if other := beside.get(name):
                candidates[name] = other.candidate("ours", other.inputs(device))
                continue
            if name.startswith("eager"):
                require_memory(case, device)
            before = start_peak(device)
            forced = f"ours [DENSECL_CPU_ISA={info['isa']}]" if info["isa"] else "ours"
            candidate = candidate_of(case, forced if name == "ours" else name, inputs)
            results = candidate.results()
            if case.whole_memory and device.type == "cuda":
                peaks[name] = torch.cuda.max_memory_allocated(device) - before
            info["errors"][name] = case.check(name, results, expected)
            candidates[name] = candidate
        except NotAvailable as reason:
            info["absent"][name] = str(reason)
        except AssertionError as error:
            info["absent"][name] = f"wrong: {first_line(error)}"
        except Exception as error:
            info["absent"][name] = f"failed: {first_line(error)}"
    return candidates


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


def memory_supported() -> bool:
    """Whether this system tells a process's peak."""
    return os.access(RESET, os.W_OK)


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
    getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)(0)
    RESET.write_text("5", encoding="ascii")  # 5: reset the peak
    return machine.bytes_of("/proc/self/status", "VmRSS")


def peak_of(case: Case, name: str, settings: Settings) -> dict[str, Any]:
    """Bytes that one call needs beyond what was there before it, and what it returned."""
    device = settings.device
    small = case.shrunk()
    candidate_of(small, name, small.inputs(device)).run()  # thread pools, lazy imports
    run = candidate_of(case, name, case.inputs(device)).run
    if device.type == "cuda" or case.whole_memory:
        run()  # what is made once, as an optimizer's momenta
    before = start_peak(device)
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = machine.bytes_of("/proc/self/status", "VmHWM")
    value = float(result) if isinstance(result, torch.Tensor) and result.numel() == 1 else None
    return {"bytes": max(0, peak - before), "value": value}
