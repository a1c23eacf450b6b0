"""The machine: what it is, and what its arithmetic units and its memory reach at most."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

import densecl_ext.info
from benchmarks.losses import tf32_products
from benchmarks.timing import Clock, Settings, first_line

HERE = Path(__file__).resolve().parent
QUERIED = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw",
           "power.limit", "temperature.gpu", "clocks_event_reasons.active")  # fmt: skip


def describe(settings: Settings) -> dict[str, Any]:
    """What the machine is and what it reaches; nothing that names owner or host."""
    known = densecl_ext.info.collect()
    cpu, gpu, before = known["cpu"], settings.device.type == "cuda", state()
    device: dict[str, Any] = {"name": "no GPU: the CPU in its place", "kind": "cpu"}
    if gpu:
        found = torch.cuda.get_device_properties(settings.device)
        device = {
            "name": found.name, "kind": "cuda", "capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "memory_gb": round(found.total_memory / 1e9, 1),
            "l2_mb": round(found.L2_cache_size / 1e6, 1),
            "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
            "tf32_products": torch.backends.cuda.matmul.allow_tf32,
        }  # fmt: skip
    return {
        "processor": cpu["model"], "cores": cpu.get("cores_usable", cpu["cores"]),
        "instruction_sets": cpu["kernels_that_run_here"], "selected": cpu["selected"],
        "threads": cpu["torch_threads"],
        "memory_gb": round(bytes_of("/proc/meminfo", "MemTotal") / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python_version": platform.python_version(), "torch": torch.__version__,
        "numpy": known["libraries"]["numpy"], "densecl_ext": densecl_ext.__version__,
        "compiler": known["build"]["compiler"], "commit": commit(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "device": device, "state": before,
        "ceilings": ceilings(settings.clock(), settings.device, quick=settings.quick),
        "state_after": state(),
    }  # fmt: skip


def commit() -> str:
    """Which commit this is, with "+" where files differ from it; "" outside of git."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty=+"]
    ran = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    return ran.stdout.strip()


def bytes_of(path: str, key: str) -> int:
    """A size in a file of the system's, 0 where it is not told."""
    with contextlib.suppress(OSError):
        if found := re.search(rf"^{key}:\s+(\d+) kB", Path(path).read_text("utf-8"), re.MULTILINE):
            return 1024 * int(found[1])
    return 0


def state() -> dict[str, str]:
    """Driver, clocks and power as nvidia-smi tells them now; or why it does not."""
    query = f"--query-gpu={','.join(QUERIED)}"
    command = ["nvidia-smi", query, "--format=csv,noheader", "--id=0"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return {"nvidia-smi": first_line(error)}
    return dict(zip(QUERIED, map(str.strip, run.stdout.split(",")), strict=False))


def ceilings(clock: Clock, device: torch.device, *, quick: bool) -> dict[str, Any]:
    """Limits that the rows can be held against: the best of several tries, in this very run.

    Returns:
        "gemm_...": FLOP/s of a large product of random numbers. "copy": bytes/s, read and written,
        between two buffers far larger than the cache. Of a CPU "fma": FLOP/s of multiply-add
        chains in registers (ceiling.cpp), by instruction set. Of a GPU "launch": seconds of the
        smallest kernel in a graph of fifty; "launch_alone": of a graph with nothing else;
        "launch_from_python": of one plain call. Text: why it is not known.
    """
    gpu = len(clock.modes) > 1
    size, megabytes, tries = (8192, 2048, 9) if gpu else (2048, 256, 7)
    if quick:
        size, megabytes, tries = 128, 8, 2
    one = torch.zeros(1, device=device)

    def gemm(dtype: torch.dtype, tf32: bool = False) -> float:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        with tf32_products(tf32):
            return 2.0 * size**3 / best(clock, lambda: torch.mm(a, b, out=out), tries)

    def copy() -> float:
        source = torch.ones(megabytes << 18, device=device)
        target = torch.empty_like(source).fill_(0.0)
        return 2.0 * source.nbytes / best(clock, lambda: target.copy_(source), tries)

    def launch(calls: int) -> float:
        replay, samples = clock.capture(one.zero_, calls), []
        for _ in range(9):
            clock.flush()  # the host gets ahead of the device
            samples.append(clock.seconds(replay, 1) / calls)
        return sorted(samples)[4]

    probes: dict[str, Callable[[], Any]] = {
        "gemm_bfloat16": partial(gemm, torch.bfloat16),
        "gemm_float32": partial(gemm, torch.float32), "copy": copy,
    }  # fmt: skip
    if gpu:
        probes |= {
            "gemm_tf32": partial(gemm, torch.float32, True), "launch": partial(launch, 50),
            "launch_alone": partial(launch, 1),
            "launch_from_python": partial(best, clock, one.zero_, 9, 200),
        }  # fmt: skip
    else:
        probes["fma"] = partial(fma_ceilings, torch.get_num_threads(), quick=quick)
    found: dict[str, Any] = {}
    for name, probe in probes.items():
        try:
            found[name] = probe()
        except Exception as error:
            found[name] = f"not measured: {first_line(error)}"
    return found


def best(clock: Clock, run: Callable[[], Any], tries: int, calls: int = 1) -> float:
    """Seconds of one call in the fastest try, after two that do not count."""
    for _ in range(2):
        run()
    return min(clock.seconds(run, calls) for _ in range(tries)) / calls


def fma_ceilings(threads: int, *, quick: bool) -> dict[str, float]:
    """FLOP/s of multiply-add chains on a number of threads."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or "c++"
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/ceiling.so"
        command = [*compiler.split(), "-std=c++17", "-O2", "-shared", "-fPIC"]
        command += [str(HERE / "ceiling.cpp"), "-o", library]
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            raise RuntimeError("the C++ compiler refuses ceiling.cpp")
        loaded = ctypes.CDLL(library)
    # Some 10 ms a try: short enough that one of many is not interrupted.
    steps, tries = (20_000, 2) if quick else (3_000_000, 25)
    found = {}
    with ThreadPoolExecutor(threads) as pool:  # ctypes lets go of the interpreter's lock
        for name in ("serial", "avx2", "avx512", "avx512bf16"):
            probe = getattr(loaded, f"densecl_fma_{name}")
            probe.argtypes, probe.restype = [ctypes.c_int64], ctypes.c_double
            if operations := threads * probe(1) * steps:

                def all_threads(probe: Any = probe) -> None:
                    list(pool.map(probe, [steps] * threads))

                found[name] = operations / best(Clock(), all_threads, tries)
    return found
