"""The machine: what it is, and what its arithmetic units and its memory reach at most."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
measured_ceilings: dict[str, Any] = {}


def describe() -> dict[str, Any]:
    """Processor, instruction sets, threads and versions; nothing that names owner or host."""
    import numpy
    import torch

    import densecl_ext
    from densecl_ext import _host

    found: dict[str, Any] = {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "instruction_sets": list(_host.available_isas()),
        "selected": _host.selected_isa(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(entry("/proc/meminfo", "MemTotal", 0.0) / 1e6, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python_version": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "densecl_ext": densecl_ext.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    info = Path(densecl_ext.__file__).with_name("_build_info.json")
    if info.is_file():
        found["compiler"] = json.loads(info.read_text(encoding="utf-8"))["cxx"]
    return found


def processor() -> str:
    """Its name as the system knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def entry(path: str, key: str, default: float) -> float:
    """The first number of a line `key: number ...`."""
    try:
        lines = Path(path).read_text(encoding="ascii").splitlines()
    except OSError:
        return default
    for line in lines:
        if line.startswith(f"{key}:"):
            return float(line.split()[1])
    return default


def ceilings(*, quick: bool) -> dict[str, Any]:
    """Limits that the numbers can be held against, best of several tries, on torch's threads.

    FMA: register-only multiply-add chains (ceiling.cpp), FLOP/s by instruction set. GEMM: torch's
    matrix product. Copy: torch's copy of 256 MB, bytes read and written per second.
    """
    import torch

    size, megabytes, tries = (256, 16, 2) if quick else (2048, 256, 7)
    found: dict[str, Any] = {"fma": fma_ceilings(torch.get_num_threads(), quick=quick)}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(size, size).to(dtype)
        name = str(dtype).removeprefix("torch.")
        found[f"gemm_{name}"] = 2.0 * size**3 / best(lambda a=a: a @ a, tries)
    source = torch.ones(megabytes * 2**20 // 4)
    target = torch.empty_like(source).fill_(0.0)
    found["copy"] = 2.0 * source.numel() * 4 / best(lambda: target.copy_(source), tries)
    return found


def best(run: Callable[[], Any], tries: int) -> float:
    """Seconds of the fastest try, after one that does not count."""
    run()
    seconds = []
    for _ in range(tries):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def fma_ceilings(threads: int, *, quick: bool) -> dict[str, float] | str:
    """FLOP/s of multiply-add chains on so many threads, or why that is not known."""
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        return "not measured: no C++ compiler"
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "ceiling.so"
        command = [*compiler.split(), "-std=c++17", "-O2", "-shared", "-fPIC"]
        command += [str(HERE / "ceiling.cpp"), "-o", str(library)]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        if built.returncode != 0:
            return "not measured: the C++ compiler refuses ceiling.cpp"
        loaded = ctypes.CDLL(str(library))
    # Some 10 ms a try: short enough that one of many is not interrupted.
    steps, tries = (20_000, 2) if quick else (3_000_000, 25)
    found = {}
    with ThreadPoolExecutor(threads) as pool:  # ctypes lets go of the interpreter's lock
        for name in ("serial", "avx2", "avx512", "avx512bf16"):
            probe = getattr(loaded, f"densecl_fma_{name}")
            probe.argtypes, probe.restype = [ctypes.c_int64], ctypes.c_double
            if probe(1) == 0.0:
                continue
            operations = threads * probe(1) * steps
            seconds = best(lambda p=probe: list(pool.map(p, [steps] * threads)), tries)
            found[name] = operations / seconds
    return found
