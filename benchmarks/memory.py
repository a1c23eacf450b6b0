"""Peak extra memory of one call: what it needs beyond its inputs.

On the CPU the high-water mark of the resident set (Linux: /proc/self/clear_refs and VmHWM), read in
a process of its own, where nothing else lives and a candidate that runs out of memory takes nobody
along. On a GPU torch's own allocator counts.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


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
        self._threads = threads
        self._child: subprocess.Popen[str] | None = None

    def peak(self, case: dict[str, Any], candidate: str, device: str) -> int | None:
        """Bytes of one call, or None where that cannot be told (the child died, or no Linux)."""
        if device == "cpu" and not supported():
            return None
        if self._child is None:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.memory", str(self._threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
            )
        child = self._child
        assert child.stdin is not None and child.stdout is not None
        isa = os.environ.get("DENSECL_CPU_ISA")
        request = {"case": case, "candidate": candidate, "device": device, "isa": isa}
        try:
            child.stdin.write(json.dumps(request) + "\n")
            child.stdin.flush()
            answer = child.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self.close()
            return None
        return json.loads(answer)["bytes"]

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            child, self._child = self._child, None
            assert child.stdin is not None and child.stdout is not None
            child.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                child.stdin.close()
            child.wait()


def serve(threads: int) -> None:
    """The child's loop: a request a line on stdin, an answer a line on stdout."""
    import torch

    from benchmarks import suites
    from benchmarks.cases import Case

    torch.set_num_threads(threads)
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever others print must not look like answers
    known: dict[Case, Any] = {}
    for line in sys.stdin:
        request = json.loads(line)
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
        print(json.dumps({"bytes": peak_of(run, device)}), file=answers, flush=True)


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
