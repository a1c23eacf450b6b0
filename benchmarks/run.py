"""A measurement: its rows one by one, each by a worker that it may take along."""

from __future__ import annotations

import argparse
import datetime
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import loaders, worker
from benchmarks.processes import Lost, Worker
from benchmarks.report import write
from benchmarks.rows import Row, rows
from benchmarks.timing import CAPTURE_FAILED
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
            "suite": options.suite, "machine_info": None,
            "datetime": datetime.datetime.now(datetime.timezone.utc).isoformat(),
            "quick": options.quick, "rows": [], "skipped": {},
        }  # fmt: skip
        if told := [f"{name}={os.environ[name]}" for name in SWITCHES if os.environ.get(name)]:
            self.results["kernel"] = "; ".join(told)

    def everything(self) -> None:
        """The machine, the rows, the loaders."""
        suite, words = self._options.suite, self._options.k.split()
        try:
            found = self.ask(60.0 + LIMITS[suite], worker.describe)
            self.results["machine_info"] = found.get("info")
            self._tell("machine", found)
            for row in rows(suite):
                if all(word in row.id for word in words):
                    self._tell(row.id, self.row(row))
            for name in loaders.RATES if suite == "cpu" else ():
                if all(word in f"views-{name}" for word in words):
                    self._tell(f"views-{name}", self._views(name))
        finally:
            self._worker.close()
            self._memory.close()
            write(self._out, self.results)

    def ask(self, limit: float, function: Callable[..., Any], *given: Any) -> Any:
        """The worker's answer: {"info": what the function returns}, or why there is none.

        It is ended where it hangs and where the device takes no more work from it.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            return {"skipped": f"not run: the {self._options.seconds:.0f} s were over"}
        request = worker.answer, self._settings, function, *given
        try:
            found = self._worker.call(min(limit, max(left, 15.0)), *request)
        except Lost as error:
            if time.monotonic() > self._end:
                return {"skipped": f"cut off: the {self._options.seconds:.0f} s were over"}
            return {"error": f"failed: {error}"}
        if "error" in found:
            found["error"] = f"failed: {found['error']}"
        if not found.pop("works"):
            self._worker.close()
        return found

    def row(self, row: Row) -> dict[str, Any]:
        """A row's answer, with the memory of its candidates."""
        if self._options.suite == "gpu" and row.id.startswith("nce"):
            variants = (f"ours [{variant}]" for variant in self._options.variant)
            row = replace(row, baselines=(*row.baselines, *variants))
        limit = LIMITS[self._options.suite]
        if any("compile" in name for name in row.baselines):
            limit = max(limit, COMPILE_LIMIT)
        found = self.ask(limit, worker.run_row, row)
        if "info" in found:
            made = found["info"]["candidates"].values()
            if any(one["missing"].get("graph", "").startswith(CAPTURE_FAILED) for one in made):
                self._worker.close()  # which can capture nothing more
            self._add_memory(row, found["info"])
        return found

    def _add_memory(self, row: Row, info: dict[str, Any]) -> None:
        """Peak extra bytes of the candidates that ran and are asked for."""
        for name in filter(info["candidates"].__contains__, row.memory):
            case, who = row.case, name
            if name in row.beside:
                case, who = row.beside[name], "ours"
            case = case.shrunk() if self._options.quick else case
            given = self._settings, worker.peak_of, case, who
            try:
                found = self._memory.call(MEMORY_LIMIT, worker.answer, *given)
            except Lost:
                found = {}
            info["candidates"][name]["peak_bytes"] = found.get("info", {}).get("bytes")

    def _views(self, name: str) -> dict[str, Any]:
        photos = os.environ.get("DENSECL_BENCH_PHOTOS", "")
        if not photos:
            return {"skipped": "DENSECL_BENCH_PHOTOS names no folder of photographs"}
        self._worker.close()  # loaders start processes and threads: in a fresh one
        return self.ask(600.0, loaders.rate, name, photos)

    def _tell(self, name: str, found: dict[str, Any]) -> None:
        """Keep an answer, and say it in a line."""
        told = found.get("error") or found.get("skipped")
        if told:
            self.results["skipped"][name] = told
        if "row" in (info := found.get("info", {})):
            self.results["rows"].append(info)
        write(self._out, self.results)
        for who in info.get("candidates", {}):
            told = f"{told or 'measured'}, {who} {1e6 * Entry(info).seconds(who):,.1f} us"
        print(f"{name}: {told or 'measured'}", flush=True)
