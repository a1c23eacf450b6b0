"""`python -m benchmarks --out DIR`: measure, then write the results, a table and the charts.

Rows run in a process of their own, one after the other. A row that fails, hangs or takes the
process along leaves its reason in the results; the next one gets a new process. The files are
rewritten after every row, so that a run may end at any time. Where there is a GPU, `--suite cpu`
measures its rows too, into DIR/gpu.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.processes import Lost, Worker, end_on_termination
from benchmarks.rows import Row, rows
from benchmarks.step import COMPARED, StepCase, largest_batch
from benchmarks.timing import CAPTURE_FAILED
from benchmarks.verdicts import NOT_RUN, entries, failures, suite_of
from benchmarks.worker import OUT_OF_MEMORY
from densecl_ext import _native

# Seconds without an answer.
LIMITS = {"cpu": 900.0, "gpu": 60.0, "step": 110.0}
COMPILE_LIMIT, MEMORY_LIMIT, TRY_LIMIT = 240.0, 120.0, 45.0
NAMES = {"cpu": ("results.json", "table.md"), "gpu": ("results.json", "table.md"),
         "step": ("step.json", "step.md")}  # fmt: skip
SWITCHES = ("DENSECL_CUDA_KERNEL", "DENSECL_CUDA_SWEEP", "DENSECL_CUDA_PDL")
# The ops that have kernels of Hopper's own, by the cases that run them.
OPS = {
    "InfoNceCase": ("info_nce",),
    "MatchCase": ("dense_match",),
    "StepLossCase": ("info_nce", "dense_match"),
    "StepCase": ("info_nce", "dense_match"),
}
WORKER = "benchmarks.worker"
BROKEN = "left the device unable to work"
LARGEST = 4096


class Run:
    """A measurement and what is known so far."""

    def __init__(self, out: Path, options: argparse.Namespace) -> None:
        self._out, self._options = out, options
        self._end = time.monotonic() + options.seconds
        arguments = [options.device, "--suite", options.suite]
        arguments += ["--quick"] if options.quick else []
        # Tiny sizes, on a machine that does other things.
        arguments += ["--threads", "1"] if options.quick and options.device == "cpu" else []
        self._worker = Worker(WORKER, *arguments)
        self._memory = Worker(WORKER, *arguments)
        self.results: dict[str, Any] = {
            "suite": options.suite,
            "machine_info": None,
            "datetime": datetime.datetime.now(datetime.timezone.utc).isoformat(),
            "quick": options.quick,
            "benchmarks": [],
            "skipped": {},
        }
        # Ops that run by their portable kernels, and why.
        self._portable = dict.fromkeys(options.portable, "since their check failed")
        self._note_kernels()

    def everything(self) -> None:
        """The machine, the rows, the loaders."""
        words = self._options.k.split()
        try:
            found = self.ask({"do": "machine"}, 60.0 + LIMITS[self._options.suite])
            self.results["machine_info"] = found.get("info")
            self._skip("machine", found)
            for row in rows(self._options.suite):
                if all(word in row.id for word in words):
                    self._tell(row.id, self.row(row))
            for backend in ("dali", "torchvision") if self._options.suite == "cpu" else ():
                if all(word in f"views-{backend}" for word in words):
                    self._tell(f"views-{backend}", self._views(backend))
        finally:
            self._worker.close()
            self._memory.close()
            self.write()

    def ask(self, request: dict[str, Any], limit: float) -> dict[str, Any]:
        """The worker's answer, or {"error": why there is none}; "broken" where it was ended.

        It is ended where it hangs, and where the device takes no more work from it.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            return {"skipped": f"not run: the {self._options.seconds:.0f} s were over"}
        try:
            found = self._worker.ask(request, min(limit, max(left, 15.0)))
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

    def _settings(self, row: Row) -> dict[str, str]:
        """What holds while a row is measured: its instruction set, or the portable kernels."""
        ops = OPS.get(type(row.case).__name__, ())
        portable = {SWITCHES[0]: "portable"} if set(ops) & set(self._portable) else {}
        return portable | ({"DENSECL_CPU_ISA": row.isa} if row.isa else {})

    def row(self, row: Row) -> dict[str, Any]:
        """A row's answer; where that takes the process along, its candidates apart."""
        if row.id == "step-largest":
            return self._largest()
        found = self._row(row)
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
        ops = OPS.get(type(row.case).__name__, ()) if self._options.suite != "cpu" else ()
        switched = os.environ.get(SWITCHES[0]) or set(ops) & set(self._portable)
        if found.get("broken") and ops and not switched:
            self._portable |= dict.fromkeys(ops, f"since {row.id} {found.get('error', BROKEN)}")
            self._note_kernels()
            found = self._row(row, "ours")
        if "info" not in found and self._options.suite != "step":
            return found
        for name in row.baselines:
            one = self._row(row, name)
            if "info" not in found and "info" in one:
                one["info"]["absent"]["ours"] = found.get("error", NOT_RUN)
                found = one
            elif "info" in one:
                for part in ("candidates", "absent", "errors", "parts"):
                    found["info"][part] |= one["info"][part]
            elif "info" in found:
                found["info"]["absent"][name] = one.get("error") or one.get("skipped") or NOT_RUN
        return found

    def _row(self, row: Row, only: str = "") -> dict[str, Any]:
        """The worker's answer about a row, or about one of its candidates.

        A capture that fails keeps the candidates behind it from theirs: the row is then measured
        once more by a new process that does not try it.
        """
        compiles = any("compile" in name for name in row.baselines)
        waits: dict[str, str] = {}
        request: dict[str, Any] = {"do": "row", "row": row.id, "waits": waits, "only": only}
        request["settings"] = self._settings(row)
        if row.id.startswith("nce") and self._options.suite == "gpu":
            request["variants"] = [f"ours [{variant}]" for variant in self._options.variant]
        while True:
            limit = COMPILE_LIMIT if compiles else LIMITS[self._options.suite]
            found = self.ask(request, max(limit, LIMITS[self._options.suite]))
            candidates = found.get("info", {}).get("candidates", {})
            failed = {
                name: candidate["missing"]["graph"]
                for name, candidate in candidates.items()
                if candidate["missing"].get("graph", "").startswith(CAPTURE_FAILED)
            }
            if not failed:
                return found
            self._worker.close()
            found.pop("broken", None)
            waits |= {name: why.removeprefix(CAPTURE_FAILED) for name, why in failed.items()}
            if list(candidates)[-1] in failed:  # nobody stands behind it
                return found

    def _add_memory(self, row: Row, info: dict[str, Any]) -> None:
        """Peak extra bytes of the candidates that ran and are asked for."""
        for name in row.memory:
            if name not in info["candidates"]:
                continue
            case = row.beside.get(name, row.case)
            case = case.shrunk() if self._options.quick else case
            request = {"do": "memory", "case": case.message()}
            request["settings"] = self._settings(row)
            request["name"] = "ours" if name in row.beside else name
            try:
                found = self._memory.ask(request, MEMORY_LIMIT)
            except Lost:
                found = {}
            info["candidates"][name]["peak_bytes"] = found.get("bytes")

    def _views(self, backend: str) -> dict[str, Any]:
        photos = os.environ.get("DENSECL_BENCH_PHOTOS", "")
        if not photos:
            return {"skipped": "DENSECL_BENCH_PHOTOS names no folder of photographs"}
        self._worker.close()  # loaders start processes and threads: in a fresh one
        return self.ask({"do": "views", "backend": backend, "photos": photos}, 300.0)

    def _largest(self) -> dict[str, Any]:
        """Bisect the largest batch of ours and of the reference, each try in a new process."""
        total = (self.results["machine_info"] or {}).get("device", {}).get("memory_gb", 0.0) * 1e9
        self.results["largest"] = {}
        for name in COMPARED:
            tries: dict[int, str] = {}

            def fits(batch: int, name: str = name, tries: dict[int, str] = tries) -> bool:
                case = StepCase(batch)
                if self._options.quick:
                    case = StepCase(**{**StepCase.small, "batch": batch})
                found = self.ask({"do": "fits", "case": case.message(), "name": name}, TRY_LIMIT)
                self._worker.close()
                tries[batch] = found.get("error") or found.get("skipped") or "fits"
                if tries[batch] != "fits" and OUT_OF_MEMORY not in tries[batch]:
                    raise RuntimeError(tries[batch])
                return tries[batch] == "fits"

            result: dict[str, Any] = {"tries": tries}
            guess = 16 if self._options.quick else first_guess(self.results, name, total)
            try:
                result["batch"] = largest_batch(fits, guess, 16, 1 if self._options.quick else 5)
            except RuntimeError as error:
                result["reason"] = str(error)
            if self._options.quick:
                result.setdefault("reason", "a quick run tries one batch")
            self.results["largest"][name] = result
        return {}

    def _skip(self, name: str, found: dict[str, Any]) -> None:
        reason = found.get("error") or found.get("skipped")
        if reason:
            self.results["skipped"][name] = reason

    def _tell(self, name: str, found: dict[str, Any]) -> None:
        """Keep an answer, and say it in a line."""
        self._skip(name, found)
        if "info" in found:
            self.results["benchmarks"].append({"extra_info": found["info"]})
        self.write()
        told = self.results["skipped"].get(name, "measured")
        for who, made in found.get("info", {}).get("candidates", {}).items():
            told += f", {who} {1e6 * sorted(made['seconds'])[len(made['seconds']) // 2]:,.1f} us"
        print(f"{name}: {told}", flush=True)

    def write(self) -> None:
        """The files, each whole at any time."""
        write(self._out, self.results)


def first_guess(results: dict[str, Any], name: str, total: float) -> int:
    """Where memory ends by a straight line through the peaks at batches 32 and 256."""
    infos = {b["extra_info"]["row"]: b["extra_info"] for b in results["benchmarks"]}
    peaks = [
        infos.get(f"step-{n}", {}).get("candidates", {}).get(name, {}).get("peak_bytes")
        for n in (32, 256)
    ]
    if not all(peaks):
        return 512
    slope = (peaks[1] - peaks[0]) / (256 - 32)
    return min(LARGEST, int((0.95 * total - peaks[0]) / max(slope, 1.0)) + 32)


def write(out: Path, results: dict[str, Any], *, last: bool = False) -> None:
    """Results and table, each whole at any time; at the end the charts too.

    Only the results matter on a machine that is lent: whatever goes wrong with the rest is said.
    """
    names, written = NAMES[suite_of(results)], []

    def replace(name: str, text: str) -> None:
        (out / f".{name}").write_text(text, encoding="utf-8")
        (out / f".{name}").replace(out / name)
        written.append(name)

    replace(names[0], json.dumps(results, indent=1) + "\n")
    try:
        from benchmarks import charts, report

        replace(names[1], report.markdown(results))
        if last:
            print(report.asked_table(results, measured_alone=True))
            written += charts.draw(entries(results), results, out)
    except Exception as error:
        if last:
            print(f"tables or charts are missing: {type(error).__name__}: {error}")
    if last:
        print(f"wrote {', '.join(written)} in {out}")


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 where no row failed and no result was wrong; a missed demand is no failure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--suite", choices=list(NAMES), default="cpu")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: the suite's")
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="folder to write")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument("-k", metavar="WORDS", default="", help="only rows whose id has them all")
    parser.add_argument("--seconds", type=float, default=1e5, help="nothing starts after these")
    parser.add_argument("--variant", nargs="+", default=[], metavar="NAME=VALUE",
                        help="also measure ours under these settings, side by side")  # fmt: skip
    parser.add_argument("--portable", nargs="+", default=[], choices=OPS["StepCase"],
                        help="ops that run by their portable kernels")  # fmt: skip
    parser.add_argument("--report-only", action="store_true", help="rewrite from results.json")
    options = parser.parse_args(arguments)
    on_gpu = options.suite != "cpu"
    options.device = options.device or ("cuda" if on_gpu else "cpu")
    if on_gpu and options.device == "cpu" and not options.quick:
        parser.error("--device cpu measures nothing: only with --quick")
    end_on_termination()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if options.report_only:
        for name in dict.fromkeys(names[0] for names in NAMES.values()):
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


if __name__ == "__main__":
    sys.exit(main())
