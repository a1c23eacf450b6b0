"""`python -m benchmarks --out DIR`: measure, then write results.json, table.md and the charts.

Where there is a GPU, its rows go to DIR/gpu. Of a folder that gpu_rows.py wrote, --report-only
rewrites table and charts.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import gpu_report, report

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Exit status: pytest's. A wrong result or a crash fails the run, a missed demand does not."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="folder to write")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument("-k", metavar="WORDS", help="only rows whose name has them, as in pytest")
    parser.add_argument("--report-only", action="store_true", help="rewrite from results.json")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    status = 0 if options.report_only else measure(out, options.quick, options.k)
    if not (out / "results.json").is_file():
        print(f"no results in {out}", file=sys.stderr)
        return status or 1
    write_report(out)
    if not options.report_only and not options.k and torch.cuda.is_available():
        command = [sys.executable, "-m", "benchmarks.gpu_rows", "--out", str(out / "gpu")]
        command += ["--quick"] if options.quick else []
        status = status or subprocess.run(command, cwd=ROOT).returncode
    return status


def measure(out: Path, quick: bool, words: str | None) -> int:
    """Run pytest-benchmark in a process of its own; returns its exit status."""
    (out / "results.json").unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", str(ROOT / "benchmarks"), "-p", "no:cacheprovider"]
    command += ["-q", f"--benchmark-json={out / 'results.json'}", "--benchmark-disable-gc"]
    command += ["--benchmark-quiet"]
    command += ["--quick"] if quick else []
    command += ["-k", words] if words else []
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONUNBUFFERED": "1"}).returncode


def write_report(out: Path) -> None:
    """table.md and the charts beside results.json, and the demands on the terminal."""
    results = report.load(out / "results.json")
    if results.get("suite") == "gpu":
        text, asked = gpu_report.markdown(results), gpu_report.asked_table(results)
    else:
        text = report.markdown(results)
        found = report.verdicts(report.entries(results), results["skipped"])
        ran = [verdict for verdict in found if verdict.ratio != report.NOT_RUN]
        asked = report.table(report.HEADER, report.verdict_lines(ran))
    (out / "table.md").write_text(text, encoding="utf-8")
    from benchmarks import charts

    written = charts.draw(report.entries(results), results, out)
    print(asked)
    print(f"wrote {', '.join(['results.json', 'table.md', *written])} in {out}")


if __name__ == "__main__":
    sys.exit(main())
