"""Peak extra memory of one call: what it needs beyond its inputs.

On the CPU the high-water mark of the resident set (Linux: /proc/self/clear_refs and VmHWM), read in
a process of its own, where nothing else lives and a candidate that runs out of memory takes nobody
along. On a GPU torch's own allocator counts.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks.child import Child, Lost, requests


def supported() -> bool:
    """Whether this system can tell."""
    return os.access("/proc/self/clear_refs", os.W_OK)


def available_bytes() -> float:
    """Memory that a new allocation may take without swapping."""
    text = Path("/proc/meminfo").read_text(encoding="ascii")
    found = re.search(r"MemAvailable:\s+(\d+) kB", text)
    return float(found[1]) * 1024 if found else 0.0


class MemoryProcess:
    """A child that builds cases and measures them, one request at a time; started when needed."""

    def __init__(self, threads: int) -> None:
        self._child = Child("benchmarks.memory", str(threads))

    def peak(
        self, case: dict[str, Any], candidate: str, device: str, timeout: float | None = None
    ) -> int | None:
        """Bytes of one call, or None where that cannot be told (the child died, or no Linux)."""
        if device == "cpu" and not supported():
            return None
        isa = os.environ.get("DENSECL_CPU_ISA")
        request = {"case": case, "candidate": candidate, "device": device, "isa": isa}
        try:
            return self._child.ask(request, timeout)["bytes"]
        except Lost:
            return None

    def close(self) -> None:
        """End the child."""
        self._child.close()


def serve(threads: int) -> None:
    """The child's loop: a case and a candidate in, bytes out."""
    import torch

    from benchmarks import suites
    from benchmarks.cases import Case

    torch.set_num_threads(threads)
    known: dict[Case, Any] = {}
    for request, answer in requests():
        if request["isa"]:
            os.environ["DENSECL_CPU_ISA"] = request["isa"]
        else:
            os.environ.pop("DENSECL_CPU_ISA", None)
        case, device = suites.from_message(request["case"]), torch.device(request["device"])
        name = request["candidate"]
        small = case.shrunk()
        small.candidate(name, small.inputs(device)).run()  # thread pools, lazy imports
        if case not in known:
            known = {case: case.inputs(device)}
        run = case.candidate(name, known[case]).run
        answer({"bytes": peak_of(run, device)})


def peak_of(run: Any, device: Any) -> int:
    """Bytes that one call needs beyond what was there before it."""
    import torch

    if device.type == "cuda":
        run()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()
    give_back()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # 5: reset the peak
    before = status_bytes("VmRSS")
    run()
    return max(0, status_bytes("VmHWM") - before)


def give_back() -> None:
    """Free heap goes back to the system, or the next call would find it already resident."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def status_bytes(key: str) -> int:
    """An entry of /proc/self/status."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    serve(int(sys.argv[1]))
