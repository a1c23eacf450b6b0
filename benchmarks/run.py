"""`python -m benchmarks --out DIR`: measure, then write the results, a table and the charts.

Rows run in a process of their own, one after the other. A row that fails, hangs or takes the
process along leaves its reason in the results; the next one gets a new process. The files are
rewritten after every row, so that a run may end at any time. Where there is a GPU, `--suite cpu`
measures its rows too, into DIR/gpu.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import loaders, machine, worker
from benchmarks.cases import NotAvailable
from benchmarks.processes import Lost, Worker
from benchmarks.report import write
from benchmarks.rows import SUITES, Row, rows
from benchmarks.timing import CAPTURE_FAILED, first_line
from benchmarks.verdicts import Entry, failures
from densecl_ext import _native

# Seconds without an answer.
LIMITS = {"cpu": 900.0, "gpu": 60.0, "step": 110.0}
COMPILE_LIMIT, MEMORY_LIMIT = 240.0, 120.0
SWITCHES = ("DENSECL_CUDA_KERNEL", "DENSECL_CUDA_SWEEP", "DENSECL_CUDA_PDL")


class Run:
    """A measurement and what is known so far."""

    def __init__(self, out: Path, options: argparse.Namespace) -> None:
        self._out, self._options = out, options
        self._end = time.monotonic() + options.seconds
        # Tiny sizes, on a machine that does other things.
        threads = int(options.quick and options.device == "cpu")
        device = torch.device(options.device)
        self._settings = worker.Settings(device, options.suite, options.quick, threads)
        self._worker, self._memory = Worker(), Worker()
        self.results: dict[str, Any] = {
            "suite": options.suite, "machine_info": {},
            "datetime": datetime.datetime.now(datetime.timezone.utc).isoformat(),
            "quick": options.quick, "rows": [], "skipped": {},
        }  # fmt: skip
        if told := [f"{name}={os.environ[name]}" for name in SWITCHES if os.environ.get(name)]:
            self.results["kernel"] = "; ".join(told)

    def everything(self) -> None:
        """The machine, the rows, the loaders; every answer is kept and said in a line."""
        steps: list[tuple[str, Callable[..., str], Any]] = [("machine", self._machine, None)]
        steps += [(row.id, self._row, row) for row in rows(self._options.suite)]
        if self._options.suite == "cpu":
            steps += [(f"views-{name}", self._views, name) for name in loaders.RATES]
        try:
            for name, step, what in steps:
                if what and not all(word in name for word in self._options.k.split()):
                    continue
                try:
                    told = step(what)
                except (NotAvailable, ImportError) as reason:
                    told = self.results["skipped"][name] = str(reason)
                write(self._out, self.results)
                print(f"{name}: {told}", flush=True)
        finally:
            self._worker.close()
            self._memory.close()

    def ask(self, limit: float, function: Callable[..., Any], *given: Any) -> Any:
        """What the worker's function returns. A worker that hangs or fails is ended.

        Raises:
            NotAvailable, ImportError: why there is no answer.
        """
        left, over = self._end - time.monotonic(), f"the {self._options.seconds:.0f} s were over"
        if left <= 0:
            raise NotAvailable(f"not run: {over}")
        try:
            return self._worker.call(min(limit, max(left, 15.0)), function, *given, self._settings)
        except (NotAvailable, ImportError):
            raise
        except Lost as error:
            late = time.monotonic() > self._end
            raise NotAvailable(f"cut off: {over}" if late else f"failed: {error}") from None
        except Exception as error:
            self._worker.close()
            raise NotAvailable(f"failed: {type(error).__name__}: {first_line(error)}") from None

    def _machine(self, _: None) -> str:
        limit = 60.0 + LIMITS[self._options.suite]
        self.results["machine_info"] = self.ask(limit, machine.describe)
        return "measured"

    def _row(self, row: Row) -> str:
        if self._options.suite == "gpu" and row.id.startswith("nce"):
            variants = (f"ours [{variant}]" for variant in self._options.variant)
            row = replace(row, baselines=(*row.baselines, *variants))
        compiles = any("compile" in name for name in row.baselines)
        limit = max(LIMITS[self._options.suite], COMPILE_LIMIT * compiles)
        info = self.ask(limit, worker.run_row, row)
        made = info["candidates"]
        reasons = [one["missing"].get("graph", "") for one in made.values()]
        reasons += info["absent"].values()
        if any(reason.startswith(("failed", CAPTURE_FAILED)) for reason in reasons):
            self._worker.close()  # the device may take, and capture, nothing more
        for name in made if self._settings.device.type == "cpu" else ():
            if "compile" not in name:  # the compiler's own memory would be counted
                build, who = (row.beside[name], "ours") if name in row.beside else (row.case, name)
                given = worker.peak_of, build, who, self._settings
                with contextlib.suppress(Exception):
                    made[name]["peak_bytes"] = self._memory.call(MEMORY_LIMIT, *given)
        self.results["rows"].append(info)
        times = (f"{name} {1e6 * Entry(info).seconds(name):,.1f} us" for name in made)
        return ", ".join(("measured", *times))

    def _views(self, name: str) -> str:
        photos = os.environ.get("DENSECL_BENCH_PHOTOS", "")
        if not photos:
            raise NotAvailable("DENSECL_BENCH_PHOTOS names no folder of photographs")
        self._worker.close()  # loaders start processes and threads: in a fresh one
        self.results["rows"].append(self.ask(600.0, loaders.rate, name, photos))
        return "measured"


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 where no row failed and no result was wrong; a missed demand is no failure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--suite", choices=list(SUITES), default="cpu")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: the suite's")
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="folder to write")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument("-k", metavar="WORDS", default="", help="only rows whose id has them all")
    parser.add_argument("--seconds", type=float, default=1e5, help="nothing starts after these")
    parser.add_argument("--variant", nargs="+", default=[], metavar="NAME=VALUE",
                        help="also measure ours under these settings, side by side")  # fmt: skip
    parser.add_argument("--report-only", action="store_true", help="rewrite from results.json")
    options = parser.parse_args(arguments)
    on_gpu = options.suite != "cpu"
    options.device = options.device or ("cuda" if on_gpu else "cpu")
    if on_gpu and options.device == "cpu" and not options.quick:
        parser.error("--device cpu measures nothing: only with --quick")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends the workers on its way
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if options.report_only:
        for name in ("results.json", "step.json"):
            if (out / name).is_file():
                write(out, json.loads((out / name).read_text(encoding="utf-8")), last=True)
        return 0
    run = Run(out, options)
    run.everything()
    write(out, run.results, last=True)
    failed = failures(run.results)
    print("\n".join(failed))
    status = int(bool(failed))
    if not on_gpu and not options.k and torch.cuda.is_available() and not _native.missing_cuda:
        again = ["--suite", "gpu", "--out", str(out / "gpu"), "--seconds", str(options.seconds)]
        status |= main([*again, *(["--quick"] if options.quick else [])])
    return status
