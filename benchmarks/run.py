"""A measurement: its rows one by one, and what is done where one takes its process along."""

from __future__ import annotations

import argparse
import bisect
import datetime
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import worker
from benchmarks.processes import Lost, Worker
from benchmarks.report import write
from benchmarks.rows import Row, rows
from benchmarks.step import COMPARED, StepCase
from benchmarks.timing import CAPTURE_FAILED

# Seconds without an answer.
LIMITS = {"cpu": 900.0, "gpu": 60.0, "step": 110.0}
COMPILE_LIMIT, MEMORY_LIMIT, TRY_LIMIT = 240.0, 120.0, 45.0
KERNEL = "DENSECL_CUDA_KERNEL"
SWITCHES = (KERNEL, "DENSECL_CUDA_SWEEP", "DENSECL_CUDA_PDL")
BATCHES = range(64, 4097, 64)  # of which the largest that fits is looked for


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
            "quick": options.quick, "benchmarks": [], "skipped": {},
        }  # fmt: skip
        # Ops that run by their portable kernels, and why.
        self._portable = dict.fromkeys(options.portable, "since their check failed")
        self._note_kernels()

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
            for backend in ("dali", "torchvision") if suite == "cpu" else ():
                if all(word in f"views-{backend}" for word in words):
                    self._tell(f"views-{backend}", self._views(backend))
        finally:
            self._worker.close()
            self._memory.close()
            write(self._out, self.results)

    def ask(self, limit: float, function: Callable[..., Any], *given: Any, **variables: str) -> Any:
        """The worker's answer: {"info": what the function returns}, or why there is none.

        It is ended where it hangs and where the device takes no more work from it: then "broken".
        """
        left = self._end - time.monotonic()
        if left <= 0:
            return {"skipped": f"not run: the {self._options.seconds:.0f} s were over"}
        request = worker.answer, self._settings, variables, function, *given
        try:
            found = self._worker.call(min(limit, max(left, 15.0)), *request)
        except Lost as error:
            if time.monotonic() > self._end:
                return {"skipped": f"cut off: the {self._options.seconds:.0f} s were over"}
            return {"error": f"failed: {error}", "broken": True}
        if "error" in found:
            found["error"] = f"failed: {found['error']}"
        if not found.pop("works"):
            self._worker.close()
            found |= {"broken": True}
        return found

    def _note_kernels(self) -> None:
        told = [f"{op} portable, {why}" for op, why in self._portable.items()]
        told += [f"{name}={os.environ[name]}" for name in SWITCHES if os.environ.get(name)]
        if told:
            self.results["kernel"] = "; ".join(told)

    def _variables(self, row: Row) -> dict[str, str]:
        """What holds while a row is measured: its instruction set, or the portable kernels."""
        portable = {KERNEL: "portable"} if set(row.case.kernels) & set(self._portable) else {}
        return portable | ({"DENSECL_CPU_ISA": row.isa} if row.isa else {})

    def row(self, row: Row) -> dict[str, Any]:
        """A row's answer; where that takes the process along, its candidates apart."""
        if row.id == "step-largest":
            return self._largest()
        if self._options.suite == "gpu" and row.id.startswith("nce"):
            variants = (f"ours [{variant}]" for variant in self._options.variant)
            row = replace(row, baselines=(*row.baselines, *variants))
        found = self._row(row, "ours", *row.baselines)
        if found.get("broken"):
            found = self._apart(row)
        if "info" in found:
            self._add_memory(row, found["info"])
        return found

    def _apart(self, row: Row) -> dict[str, Any]:
        """Ours alone, then the others one by one: who faults costs nobody else.

        Where ours takes its process along again, its ops run by their portable kernels, from there
        on for the rest of the run: Hopper's may hang or fault.
        """
        found = self._row(row, "ours")
        ops = row.case.kernels if self._options.suite != "cpu" else ()
        switched = os.environ.get(KERNEL) or set(ops) & set(self._portable)
        if found.get("broken") and ops and not switched:
            why = found.get("error", "left the device unable to work")
            self._portable |= dict.fromkeys(ops, f"since {row.id} {why}")
            self._note_kernels()
            found = self._row(row, "ours")
        if "info" not in found and self._options.suite != "step":
            return found
        answers = {"ours": found} | {name: self._row(row, name) for name in row.baselines}
        infos = [one["info"] for one in answers.values() if "info" in one]
        for info in infos[1:]:
            for part in ("candidates", "absent", "errors", "parts"):
                infos[0][part] |= info[part]
        if infos:
            reasons = {n: a.get("error") or a.get("skipped") for n, a in answers.items()}
            infos[0]["absent"] |= {name: reason for name, reason in reasons.items() if reason}
        return {"info": infos[0]} if infos else found

    def _row(self, row: Row, *names: str) -> dict[str, Any]:
        """The worker's answer about some of a row's candidates.

        A capture that fails keeps the candidates behind it from theirs: the row is then measured
        once more by a new process that does not try it.
        """
        limit = LIMITS[self._options.suite]
        if any("compile" in name for name in row.baselines):
            limit = max(limit, COMPILE_LIMIT)
        waits: dict[str, str] = {}
        while True:
            found = self.ask(limit, worker.run_row, row, names, waits, **self._variables(row))
            candidates = found.get("info", {}).get("candidates", {})
            graphs = {name: made["missing"].get("graph", "") for name, made in candidates.items()}
            failed = [name for name, why in graphs.items() if why.startswith(CAPTURE_FAILED)]
            if not failed:
                return found
            self._worker.close()
            found.pop("broken", None)
            waits |= {name: graphs[name].removeprefix(CAPTURE_FAILED) for name in failed}
            if list(candidates)[-1] in failed:  # nobody stands behind it
                return found

    def _add_memory(self, row: Row, info: dict[str, Any]) -> None:
        """Peak extra bytes of the candidates that ran and are asked for."""
        for name in filter(info["candidates"].__contains__, row.memory):
            case, who = row.case, name
            if name in row.beside:
                case, who = row.beside[name], "ours"
            case = case.shrunk() if self._options.quick else case
            given = self._settings, self._variables(row), worker.peak_of, case, who
            try:
                found = self._memory.call(MEMORY_LIMIT, worker.answer, *given)
            except Lost:
                found = {}
            info["candidates"][name]["peak_bytes"] = found.get("info", {}).get("bytes")

    def _views(self, backend: str) -> dict[str, Any]:
        photos = os.environ.get("DENSECL_BENCH_PHOTOS", "")
        if not photos:
            return {"skipped": "DENSECL_BENCH_PHOTOS names no folder of photographs"}
        self._worker.close()  # loaders start processes and threads: in a fresh one
        return self.ask(300.0, worker.rate_of_views, backend, photos)

    def _largest(self) -> dict[str, Any]:
        """Bisect the largest batch of ours and of the reference."""
        batches, size = (BATCHES[:1], StepCase.small) if self._options.quick else (BATCHES, {})
        self.results["largest"] = {}
        for name in COMPARED:
            tries: dict[int, str] = {}
            result: dict[str, Any] = {"tries": tries}

            def too_large(batch: int, name: str = name, tries: dict[int, str] = tries) -> bool:
                case = StepCase(**{**size, "batch": batch})
                found = self.ask(TRY_LIMIT, worker.fits, case, name)
                tries[batch] = found.get("error") or found.get("skipped") or "fits"
                if tries[batch] == "fits":
                    return False
                self._worker.close()
                if worker.OUT_OF_MEMORY not in tries[batch]:
                    raise RuntimeError(tries[batch])
                return True

            try:
                count = bisect.bisect(batches, False, key=too_large)
                result["batch"] = batches[count - 1] if count else None
            except RuntimeError as error:
                result["reason"] = str(error)
            if self._options.quick:
                result.setdefault("reason", "a quick run tries one batch")
            self.results["largest"][name] = result
        return {}

    def _tell(self, name: str, found: dict[str, Any]) -> None:
        """Keep an answer, and say it in a line."""
        told = found.get("error") or found.get("skipped")
        if told:
            self.results["skipped"][name] = told
        if "row" in (info := found.get("info", {})):
            self.results["benchmarks"].append({"extra_info": info})
        write(self._out, self.results)
        for who, made in info.get("candidates", {}).items():
            told = f"{told or 'measured'}, {who} {1e6 * statistics.median(made['seconds']):,.1f} us"
        print(f"{name}: {told or 'measured'}", flush=True)
