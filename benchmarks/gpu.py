"""`make gpu`: everything that needs a GPU, on a machine that has one and reaches no package index.

    python -m benchmarks.gpu [--part all|build|test|bench|step|sanitize] [--out DIR]

It uses the Python it runs under, and that Python's torch. What is missing there (pytest,
compute-sanitizer, ...) is named and its part left out; a part that fails or hangs does not stop the
others. All parts together take less than nine minutes, however the first ones go.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
SANITIZERS = ("memcheck", "racecheck", "synccheck")


class LeftOut(Exception):
    """A part that this machine cannot run, and why."""


def need(*modules: str) -> None:
    """Raise LeftOut unless all can be imported."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise LeftOut(f"no {', no '.join(missing)} in {sys.executable}")


def call(command: list[str], limit: float, **environment: str) -> int:
    """Exit status of a command in the repository's root, its output passed on.

    After so many seconds it is killed, with status 124 as of the program `timeout`: a kernel may
    hang.
    """
    print("$", " ".join(command), flush=True)
    settings = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | environment
    try:
        run = subprocess.run(command, cwd=ROOT, env=settings, check=False, timeout=max(limit, 1.0))
    except subprocess.TimeoutExpired:
        return 124
    return run.returncode


def architecture() -> str:
    """This GPU's, as DENSECL_CUDA_ARCHS has it."""
    major, minor = torch.cuda.get_device_capability()
    return "9.0a" if (major, minor) == (9, 0) else f"{major}.{minor}"


def build(run: Run) -> int:
    """The extension modules, in place, for this GPU alone."""
    need("setuptools")
    jobs = str(min(16, os.cpu_count() or 1))
    return call(
        [sys.executable, "setup.py", "build_ext", "--inplace"], run.limit,
        DENSECL_CUDA="1", DENSECL_CUDA_ARCHS=architecture(), MAX_JOBS=jobs,
    )  # fmt: skip


def test(run: Run) -> int:
    """The tests that are marked gpu."""
    need("pytest", "hypothesis", "numpy")
    report = f"--junitxml={run.out / 'gpu_tests.xml'}"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", report]
    return call(command, run.limit)


def sanitize(run: Run) -> int:
    """Every op on small shapes under compute-sanitizer's tools."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        raise LeftOut("no compute-sanitizer on the PATH")
    status = 0
    for tool in SANITIZERS:
        log = run.out / f"sanitizer_{tool}.txt"
        status |= call(
            [sanitizer, "--tool", tool, "--error-exitcode", "1", "--log-file", str(log),
             sys.executable, "-m", "benchmarks.gpu_small"],
            run.limit / len(SANITIZERS), PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )  # fmt: skip
        print(log.read_text(errors="replace")[-2000:] if log.is_file() else f"{tool}: no log")
    return status


def bench(run: Run) -> int:
    """The ops' rows: results.json, table.md, charts where matplotlib is there."""
    return measure("benchmarks.gpu_rows", run)


def step(run: Run) -> int:
    """The whole training step: step.json, step.md."""
    return measure("benchmarks.step", run)


def measure(module: str, run: Run) -> int:
    """A benchmark that starts nothing when little of its time is left."""
    seconds = max(run.limit - 25.0, 5.0)
    command = [sys.executable, "-m", module, "--out", str(run.out), "--device", run.device]
    command += ["--seconds", f"{seconds:.0f}", *(["--quick"] if run.quick else [])]
    return call(command, run.limit + 30.0)


# In this order; the seconds that a part may take when all of them run.
PARTS: dict[str, tuple[Callable[[Run], int], float]] = {
    "build": (build, 240.0),
    "test": (test, 120.0),
    "bench": (bench, 180.0),
    "step": (step, 200.0),
    "sanitize": (sanitize, 150.0),
}
ON_CPU = ("bench", "step")


@dataclass(frozen=True)
class Run:
    """Where a part writes, on what it runs, and how long."""

    out: Path
    device: str
    quick: bool
    limit: float  # seconds


def run_part(name: str, run: Run) -> str:
    """What came of a part, in words."""
    try:
        if run.limit < 15.0:
            raise LeftOut("the time was over")
        if run.device == "cpu" and name not in ON_CPU:
            raise LeftOut("needs a GPU")
        status = PARTS[name][0](run)
    except LeftOut as reason:
        return f"left out: {reason}"
    except Exception as error:
        return f"failed: {type(error).__name__}: {error}"
    return "ok" if status == 0 else f"failed, exit status {status}"


def main() -> int:
    """Exit status: 0 where every part that could run went well."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--part", choices=["all", *PARTS], default="all")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu")
    parser.add_argument("--seconds", type=float, default=520.0, help="for all parts together")
    parser.add_argument("--quick", action="store_true", help="bench and step at tiny sizes")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"],
                        help="cpu: only with --quick, to see that bench and step run")  # fmt: skip
    options = parser.parse_args()
    if options.device == "cpu" and not options.quick:
        parser.error("--device cpu measures nothing: only with --quick")
    if options.device == "cuda" and not torch.cuda.is_available():
        print("make gpu: no GPU: torch finds none here", file=sys.stderr)
        return 1
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    end = time.monotonic() + options.seconds
    for name, (_, limit) in PARTS.items():
        if options.part not in ("all", name):
            continue
        started = time.monotonic()
        left = end - started
        run = Run(
            out, options.device, options.quick, min(limit, left) if options.part == "all" else left
        )
        result = run_part(name, run)
        found[name] = {"result": result, "seconds": round(time.monotonic() - started, 1)}
        print(f"== {name}: {result}", flush=True)
        write(out, found)
    return int(any("failed" in part["result"] for part in found.values()))


def write(out: Path, found: dict[str, Any]) -> None:
    """gpu.json: the machine and the parts so far."""
    machine: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda}
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
        machine["capability"] = torch.cuda.get_device_capability()
    text = json.dumps({"machine": machine, "parts": found}, indent=2) + "\n"
    (out / "gpu.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
