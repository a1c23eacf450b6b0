"""The GPU: what it is, how it was clocked, and what its units and its memory reach at most."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu_timing import Clock, first_line, spread
from benchmarks.loss_cases import tf32_products

QUERIED = (
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "power.draw",
    "power.limit",
    "temperature.gpu",
    "clocks_event_reasons.active",
)


def describe(device: torch.device) -> dict[str, Any]:
    """Name, size and versions, for a GPU; for a CPU only that it is one."""
    if device.type != "cuda":
        return {"name": "no GPU: the CPU in its place", "kind": device.type}
    found = torch.cuda.get_device_properties(device)
    return {
        "name": found.name,
        "kind": device.type,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_gb": round(found.total_memory / 1e9, 1),
        "l2_mb": round(found.L2_cache_size / 1e6, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "tf32_products": torch.backends.cuda.matmul.allow_tf32,
    }


def state() -> dict[str, str]:
    """Driver, clocks and power as nvidia-smi tells them now; or why it does not."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {"nvidia-smi": "not there"}
    command = [program, f"--query-gpu={','.join(QUERIED)}", "--format=csv,noheader", "--id=0"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return {"nvidia-smi": first_line(error)}
    values = [value.strip() for value in run.stdout.strip().split(",")]
    return dict(zip(QUERIED, values, strict=False))


def ceilings(device: torch.device, clock: Clock, *, quick: bool) -> dict[str, float | str]:
    """Limits that the rows can be held against: the best of several tries, in this very run.

    Returns:
        "gemm_bfloat16", "gemm_tf32", "gemm_float32": FLOP/s of a large cuBLAS product of random
        numbers. "copy": bytes/s, read and written, between two buffers far larger than the L2.
        "launch": seconds of the smallest kernel in a graph of fifty. "launch_alone": of a graph
        with nothing else. "launch_from_python": of one plain call. Text: why it is not known.
    """
    size, megabytes, tries = (128, 8, 2) if quick else (8192, 2048, 9)
    one = torch.zeros(1, device=device)
    probes: dict[str, Callable[[], float]] = {
        "gemm_bfloat16": lambda: gemm(size, torch.bfloat16, False, device, clock, tries),
        "gemm_tf32": lambda: gemm(size, torch.float32, True, device, clock, tries),
        "gemm_float32": lambda: gemm(size, torch.float32, False, device, clock, tries),
        "copy": lambda: copy(megabytes, device, clock, tries),
        "launch": lambda: launch(one, 50, clock),
        "launch_alone": lambda: launch(one, 1, clock),
        "launch_from_python": lambda: (
            spread(clock.seconds(one.zero_, 200) for _ in range(9))[0] / 200
        ),
    }
    found: dict[str, float | str] = {}
    for name, probe in probes.items():
        try:
            found[name] = probe()
        except Exception as error:
            found[name] = f"not measured: {first_line(error)}"
    return found


def gemm(
    size: int, dtype: torch.dtype, tf32: bool, device: torch.device, clock: Clock, tries: int
) -> float:
    """FLOP/s of a square matrix product."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    with tf32_products(tf32):
        return 2.0 * size**3 / best(lambda: torch.mm(a, b, out=out), clock, tries)


def copy(megabytes: int, device: torch.device, clock: Clock, tries: int) -> float:
    """Bytes/s of a copy, read and written."""
    source = torch.ones(megabytes << 18, device=device)
    target = torch.empty_like(source)
    seconds = best(lambda: target.copy_(source), clock, tries)
    return 2.0 * source.numel() * source.element_size() / seconds


def launch(one: torch.Tensor, calls: int, clock: Clock) -> float:
    """Seconds of a kernel that does nothing, in a graph of so many."""
    replay = clock.capture(one.zero_, calls)
    samples = []
    for _ in range(9):
        clock.flush()  # the host gets ahead of the device
        samples.append(clock.seconds(replay, 1) / calls)
    return spread(samples)[0]


def best(run: Any, clock: Clock, tries: int) -> float:
    """Seconds of the fastest call, after two that do not count."""
    for _ in range(2):
        run()
    return min(clock.seconds(run, 1) for _ in range(tries))
