"""`python -m benchmarks --out DIR`: measure, then write the results, a table and the charts.

Rows run in a process of their own, one after the other. A row that fails, hangs or takes the
process along leaves its reason in the results; the next one gets a new process. The files are
rewritten after every row, so that a run may end at any time. Where there is a GPU, `--suite cpu`
measures its rows too, into DIR/gpu.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path

import torch

from benchmarks.report import write
from benchmarks.rows import SUITES
from benchmarks.run import Run
from benchmarks.verdicts import failures
from densecl_ext import _native


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


if __name__ == "__main__":
    sys.exit(main())
