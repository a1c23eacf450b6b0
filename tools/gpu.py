"""`make gpu`: everything that needs a GPU, on a machine that has one and reaches no package index.

    python -m tools.gpu [--part all|build|smoke|test|sanitize|bench|step] [--out DIR]

It uses the Python it runs under, and that Python's torch. What is missing there (pytest,
compute-sanitizer, ...) is named and its part left out; a part that fails or hangs does not stop the
others. `smoke` runs every kernel in a process of its own; what fails there is replaced by the
portable kernel in `bench` and `step`, and named. All that DIR holds is packed into one archive
beside it after every part and every 20 seconds, whatever failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import commit
from tools import gpu_checks
from tools.commands import ROOT, call, end_on_termination

SANITIZERS = ("memcheck", "racecheck", "synccheck")
CHECK_LIMIT, FILE_LIMIT = 20.0, 60.0  # seconds of a check, of a file of tests
AT_ONCE = max(1, min(6, (os.cpu_count() or 1) // 2))
KERNEL, DEPENDENT = "DENSECL_CUDA_KERNEL", "DENSECL_CUDA_PDL"


class LeftOut(Exception):
    """A part that this machine cannot run, and why."""


def need(*modules: str) -> None:
    """Raise LeftOut unless all can be imported."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise LeftOut(f"no {', no '.join(missing)} in {sys.executable}")


def check_command(name: str, device: str) -> list[str]:
    """What runs one check."""
    return [sys.executable, "-m", "tools.gpu_checks", name, "--device", device]


class Run:
    """The parts, what came of them, and what they leave behind."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.out: Path = options.out.resolve()
        self.device, self.quick = options.device, options.quick
        self.archive: Path = (options.archive or self.out.with_suffix(".tar.gz")).resolve()
        self.end = time.monotonic() + options.seconds
        self.limit = 0.0  # seconds of the part that runs
        self.found: dict[str, Any] = {"machine": machine(), "parts": {}, "off": {}}
        self.out.mkdir(parents=True, exist_ok=True)
        before = self.out / "gpu.json"
        if before.is_file():  # a part that runs alone keeps what an earlier smoke has found
            self.found |= json.loads(before.read_text(encoding="utf-8"))

    def pack(self) -> None:
        """gpu.json and the archive, each whole at any time."""
        text = json.dumps(self.found, indent=2) + "\n"
        (self.out / "gpu.json").write_text(text, encoding="utf-8")
        partial = self.archive.with_name(f".{self.archive.name}")
        with tarfile.open(partial, "w:gz") as archive:
            archive.add(self.out, self.out.name)
        partial.replace(self.archive)

    def call(self, command: list[str], limit: float, log: str = "", **settings: str) -> int:
        """Exit status of a command; its output goes to a file of the folder, or is passed on."""
        print("$", " ".join(command), flush=True)
        settings = {"PYTHONPATH": str(ROOT)} | settings
        if not log:
            return call(command, limit, tick=self.pack, settings=settings)
        path = self.out / log
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            return call(command, limit, log=file, settings=settings)

    def build(self) -> int:
        """The extension modules, in place, for this GPU alone."""
        need("setuptools")
        major, minor = torch.cuda.get_device_capability()
        arch = "9.0a" if (major, minor) == (9, 0) else f"{major}.{minor}"
        return self.call(
            [sys.executable, "setup.py", "build_ext", "--inplace"], self.limit, DENSECL_CUDA="1",
            DENSECL_CUDA_ARCHS=arch, DENSECL_CUDA_WARNINGS="allow",
            MAX_JOBS=str(min(16, os.cpu_count() or 1)),
        )  # fmt: skip

    def smoke(self) -> int:
        """Every check in a process of its own: the portable kernels, then Hopper's.

        A Hopper check that fails is tried without dependent launches, which are then off; if it
        still fails, all kernels are portable from here on.
        """
        on_hopper = self.device == "cpu" or torch.cuda.get_device_capability()[0] == 9
        failed = self._checks(list(gpu_checks.PORTABLE))
        self.found["off"] = {}
        hopper = self._checks(list(gpu_checks.HOPPER)) if on_hopper else {}
        if hopper and not (left := self._checks(list(hopper), **{DEPENDENT: "0"})):
            self.found["off"] = {DEPENDENT: f"0, since {', '.join(hopper)} failed with it"}
        elif hopper:
            self.found["off"] = {KERNEL: f"portable, since {', '.join(left)} failed"}
        self.found["checks"] = failed | hopper
        for name, reason in (failed | hopper).items():
            print(f"{name}: {reason}")
        return int(bool(failed | hopper))

    def _checks(self, names: Sequence[str], **settings: str) -> dict[str, str]:
        """Why checks failed, by name."""
        commands = {name: check_command(name, self.device) for name in names}
        limit = CHECK_LIMIT if self.device == "cuda" else 6 * CHECK_LIMIT
        return self._all(commands, "smoke", limit, **settings)

    def test(self) -> int:
        """The tests that are marked gpu, a process for each file."""
        need("pytest", "hypothesis", "numpy")
        options = ["-m", "gpu", "-v", "-p", "no:cacheprovider", "--tb=short"]
        if importlib.util.find_spec("pytest_timeout"):
            options += ["--timeout=30", "--timeout-method=thread"]
        marked = ("pytest.mark.gpu", "BACKENDS", "on_each_device")
        commands = {
            path.stem: [sys.executable, "-m", "pytest", *options, str(path)]
            for path in sorted((ROOT / "python_tests").glob("test_*.py"))
            if any(word in path.read_text(encoding="utf-8") for word in marked)
        }
        failed = self._all(commands, "tests", min(FILE_LIMIT, self.limit))
        self.found["tests"] = {"files": len(commands), "failed": failed}
        print("\n".join(f"{name}: {reason}" for name, reason in failed.items()))
        return int(bool(failed))

    def _all(
        self, commands: dict[str, list[str]], folder: str, limit: float, **settings: str
    ) -> dict[str, str]:
        """Runs commands, several at once, each with a log in the folder; why they failed."""

        def one(name: str) -> str:
            left = self.end - time.monotonic()
            if left < 1.0:
                return "left out: the time was over"
            log = f"{folder}/{name.replace(' ', '_').replace(',', '')}{'-' if settings else ''}.txt"
            status = self.call(commands[name], min(limit, left), log, **settings)
            last = (self.out / log).read_text(errors="replace").strip().splitlines()[-1:]
            # 5: all tests of a file were deselected
            return "" if status in (0, 5) else f"status {status}, {' '.join(last)[:300]}"

        with ThreadPoolExecutor(AT_ONCE) as pool:
            reasons = dict(zip(commands, pool.map(one, commands), strict=True))
        self.pack()
        return {name: reason for name, reason in reasons.items() if reason}

    def sanitize(self) -> int:
        """Every kernel under compute-sanitizer's tools; memcheck has half of the time."""
        sanitizer = shutil.which("compute-sanitizer")
        if sanitizer is None:
            raise LeftOut("no compute-sanitizer on the PATH")
        status = 0
        for share, tool in zip((0.5, 0.6, 1.0), SANITIZERS, strict=True):
            log, started = self.out / f"sanitizer_{tool}.txt", time.monotonic()
            command = [sanitizer, "--tool", tool, "--error-exitcode", "1", "--log-file", str(log)]
            command += [sys.executable, "-m", "tools.gpu_checks", *gpu_checks.SANITIZED]
            told, settings = f"sanitizer_{tool}_checks.txt", {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            status |= self.call(command, share * self.limit, told, **settings)
            self.limit -= time.monotonic() - started
            print(log.read_text(errors="replace")[-2000:] if log.is_file() else f"{tool}: no log")
            self.pack()
        return status

    def bench(self) -> int:
        """The ops' rows: results.json, table.md, charts."""
        return self._measure("gpu")

    def step(self) -> int:
        """The whole training step: step.json, step.md."""
        return self._measure("step")

    def _measure(self, suite: str) -> int:
        """A benchmark that starts nothing when little of its time is left."""
        command = [sys.executable, "-m", "benchmarks", "--suite", suite, "--out", str(self.out)]
        command += ["--device", self.device, "--seconds", f"{max(self.limit - 25.0, 5.0):.0f}"]
        command += ["--quick"] if self.quick else []
        off = {name: text.partition(",")[0] for name, text in self.found["off"].items()}
        return self.call(command, self.limit + 10.0, **off)

    def part(self, name: str, limit: float) -> str:
        """What came of a part, in words."""
        self.limit = limit
        try:
            if limit < 15.0:
                raise LeftOut("the time was over")
            if self.device == "cpu" and name not in ("smoke", "bench", "step"):
                raise LeftOut("needs a GPU")
            status = PARTS[name][0](self)
        except LeftOut as reason:
            return f"left out: {reason}"
        except Exception as error:
            return f"failed: {type(error).__name__}: {error}"
        return "ok" if status == 0 else f"failed, exit status {status}"


# In this order; the seconds that a part may take when all of them run.
PARTS: dict[str, tuple[Callable[[Run], int], float]] = {
    "build": (Run.build, 180.0),
    "smoke": (Run.smoke, 90.0),
    "test": (Run.test, 100.0),
    "sanitize": (Run.sanitize, 90.0),
    "bench": (Run.bench, 150.0),
    "step": (Run.step, 150.0),
}


def machine() -> dict[str, Any]:
    """What the report says of the GPU and the commit."""
    found: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda}
    found["commit"] = commit()
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["capability"] = torch.cuda.get_device_capability()
    return found


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 where every part that could run went well."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu", description=__doc__)
    parser.add_argument("--part", nargs="+", choices=["all", *PARTS], default=["all"])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu")
    parser.add_argument("--archive", type=Path, help="default: the folder's name, .tar.gz")
    parser.add_argument("--seconds", type=float, default=540.0, help="for all parts together")
    parser.add_argument("--quick", action="store_true", help="bench and step at tiny sizes")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"],
                        help="cpu: only with --quick, to see that everything runs")  # fmt: skip
    options = parser.parse_args(arguments)
    if options.device == "cpu" and not options.quick:
        parser.error("--device cpu measures nothing: only with --quick")
    if options.device == "cuda" and not torch.cuda.is_available():
        print("make gpu: no GPU: torch finds none here", file=sys.stderr)
        return 1
    end_on_termination()
    run = Run(options)
    wanted = list(PARTS) if "all" in options.part else [p for p in PARTS if p in options.part]
    results = []
    try:
        for name in wanted:
            started = time.monotonic()
            left = run.end - started
            limit = min(PARTS[name][1], left) if len(wanted) > 1 else left
            results.append(run.part(name, limit))
            seconds = round(time.monotonic() - started, 1)
            run.found["parts"][name] = {"result": results[-1], "seconds": seconds}
            print(f"== {name}: {results[-1]} ({seconds:.0f} s)", flush=True)
            run.pack()
    finally:
        run.pack()
    print(f"wrote {run.archive}")
    return int(any("failed" in result for result in results))


if __name__ == "__main__":
    sys.exit(main())
