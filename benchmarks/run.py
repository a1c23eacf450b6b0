"""A measurement: its rows one by one, each by a worker that it may take along."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
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
from benchmarks.rows import Row, rows
from benchmarks.timing import CAPTURE_FAILED, first_line
from benchmarks.verdicts import Entry

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
                except NotAvailable as reason:
                    told = self.results["skipped"][name] = str(reason)
                write(self._out, self.results)
                print(f"{name}: {told}", flush=True)
        finally:
            self._worker.close()
            self._memory.close()

    def ask(self, limit: float, function: Callable[..., Any], *given: Any) -> Any:
        """What the worker's function returns. A worker that hangs or fails is ended.

        Raises:
            NotAvailable: why there is no answer.
        """
        left, over = self._end - time.monotonic(), f"the {self._options.seconds:.0f} s were over"
        if left <= 0:
            raise NotAvailable(f"not run: {over}")
        try:
            return self._worker.call(min(limit, max(left, 15.0)), function, *given, self._settings)
        except NotAvailable:
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
            if "compile" not in name and "[" not in name:
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
