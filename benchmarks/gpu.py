"""`make gpu`: everything that needs a GPU, on a machine that has one and reaches no package index.

    python -m benchmarks.gpu [--part all|build|test|sanitize|bench|step] [--out DIR]

It uses the Python it runs under, and that Python's torch. What is missing there (pytest,
compute-sanitizer, ...) is named and its part left out; a part that fails does not stop the others.
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
from pathlib import Path

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


def call(command: list[str], **environment: str) -> int:
    """Exit status of a command in the repository's root, its output passed on."""
    print("$", " ".join(command), flush=True)
    settings = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | environment
    return subprocess.run(command, cwd=ROOT, env=settings, check=False).returncode


def architecture() -> str:
    """This GPU's, as DENSECL_CUDA_ARCHS has it."""
    major, minor = torch.cuda.get_device_capability()
    return "9.0a" if (major, minor) == (9, 0) else f"{major}.{minor}"


def build(out: Path) -> int:
    """The extension modules, in place, for this GPU alone."""
    need("setuptools")
    jobs = str(min(16, os.cpu_count() or 1))
    return call(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        DENSECL_CUDA="1", DENSECL_CUDA_ARCHS=architecture(), MAX_JOBS=jobs,
    )  # fmt: skip


def test(out: Path) -> int:
    """The tests that are marked gpu."""
    need("pytest", "hypothesis", "numpy")
    report = f"--junitxml={out / 'gpu_tests.xml'}"
    return call(
        [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", report]
    )


def sanitize(out: Path) -> int:
    """Every op on small shapes under compute-sanitizer's tools."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        raise LeftOut("no compute-sanitizer on the PATH")
    status = 0
    for tool in SANITIZERS:
        log = out / f"sanitizer_{tool}.txt"
        status |= call(
            [sanitizer, "--tool", tool, "--error-exitcode", "1", "--log-file", str(log),
             sys.executable, "-m", "benchmarks.gpu_small"],
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )  # fmt: skip
        print(log.read_text(errors="replace")[-2000:] if log.is_file() else f"{tool}: no log")
    return status


def bench(out: Path) -> int:
    """The ops' rows: results.json, table.md, charts where matplotlib is there."""
    need("numpy")
    return call([sys.executable, "-m", "benchmarks.gpu_rows", "--out", str(out)])


PARTS: dict[str, Callable[[Path], int]] = {
    "build": build,
    "test": test,
    "sanitize": sanitize,
    "bench": bench,
}


def main() -> int:
    """Exit status: 0 where every part that could run went well."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--part", choices=["all", *PARTS], default="all")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("make gpu: no GPU: torch finds none here", file=sys.stderr)
        return 1
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, part in PARTS.items():
        if options.part not in ("all", name):
            continue
        started = time.perf_counter()
        try:
            status = part(out)
            result = "ok" if status == 0 else f"failed, exit status {status}"
        except LeftOut as reason:
            result = f"left out: {reason}"
        found[name] = {"result": result, "seconds": round(time.perf_counter() - started, 1)}
        print(f"== {name}: {result}", flush=True)
    machine = {
        "gpu": torch.cuda.get_device_name(), "capability": torch.cuda.get_device_capability(),
        "torch": torch.__version__, "cuda": torch.version.cuda,
    }  # fmt: skip
    (out / "gpu.json").write_text(json.dumps({"machine": machine, "parts": found}, indent=2) + "\n")
    return int(any("failed" in part["result"] for part in found.values()))


if __name__ == "__main__":
    sys.exit(main())
