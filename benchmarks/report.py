"""From results.json to what people read: the table of demands, all baselines, the machine.

Reads pytest-benchmark's JSON alone; imports neither torch nor matplotlib.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.thresholds import ASKED, Asked

ISA_NAMES = {
    "serial": "plain C++",
    "neon": "NEON",
    "avx2": "AVX2",
    "avx512": "AVX-512",
    "avx512bf16": "AVX-512 BF16",
}


NOT_RUN = "not run"


@dataclass(frozen=True)
class Entry:
    """One measured row: medians, peaks, and why a candidate is missing."""

    id: str
    title: str
    device: str
    case: dict[str, Any]
    isa: str | None
    seconds: dict[str, float]  # median of one call, by candidate, ours first
    peaks: dict[str, int | None]  # bytes
    work: dict[str, float]  # FLOP of one call
    absent: dict[str, str]
    beside: tuple[str, ...] = ()  # candidates that are ours at another size
    # Of a GPU's row alone, see gpu_timing.py:
    modes: dict[str, dict[str, list[float]]] = field(default_factory=dict)  # samples
    traffic: dict[str, float] = field(default_factory=dict)  # bytes of one call
    missing: dict[str, str] = field(default_factory=dict)  # why a candidate is not in a graph
    host_waits: str | None = None  # what makes the host wait in ours; "" for nothing


def load(path: Path) -> dict[str, Any]:
    """The whole JSON."""
    return json.loads(path.read_text(encoding="utf-8"))


def entries(results: dict[str, Any]) -> list[Entry]:
    """The measured rows of the ops, in the order they ran."""
    found = []
    for benchmark in results["benchmarks"]:
        info = benchmark["extra_info"]
        if "candidates" not in info:
            continue
        candidates = info["candidates"]
        found.append(
            Entry(
                id=info["row"],
                title=info["title"],
                device=info["device"],
                case=info["case"],
                isa=info["isa"],
                seconds={n: statistics.median(c["seconds"]) for n, c in candidates.items()},
                peaks={n: c["peak_bytes"] for n, c in candidates.items()},
                work={n: c["work"] for n, c in candidates.items()},
                absent=info["absent"],
                beside=tuple(info["beside"]),
                modes={n: c.get("modes", {}) for n, c in candidates.items()},
                traffic={n: c.get("traffic", 0.0) for n, c in candidates.items()},
                missing={n: c.get("missing", {}).get("graph", "") for n, c in candidates.items()},
                host_waits=info.get("host_waits"),
            )
        )
    return found


@dataclass(frozen=True)
class Verdict:
    """A demand and what came of it; texts ready for the table."""

    what: str
    ours: str
    baseline: str
    ratio: str
    asked: str
    met: bool | None  # None: not measured


def verdicts(rows: Sequence[Entry], skipped: dict[str, str]) -> list[Verdict]:
    """Every demand, in the order of thresholds.py."""
    by_id = {row.id: row for row in rows if row.device == "cpu"}
    return [judge(asked, by_id.get(asked.row), skipped) for asked in ASKED]


def judge(asked: Asked, row: Entry | None, skipped: dict[str, str]) -> Verdict:
    """One demand against the row it is about."""
    limit = bound(asked)
    if row is None:
        reason = next(
            (why for node, why in skipped.items() if f"cpu-{asked.row}]" in node), NOT_RUN
        )
        return Verdict(asked.row, "", asked.against, reason, limit, None)
    if asked.measure == "memory":
        return judge_memory(asked, row, limit)
    other = asked.against
    if other not in row.seconds:
        return Verdict(row.title, "", other, row.absent.get(other, NOT_RUN), limit, None)
    ours, theirs = row.seconds["ours"], row.seconds[other]
    if asked.measure == "rate":
        mine, its = row.work["ours"] / ours, row.work[other] / theirs
        value, left, right = mine / its, rate(mine), f"{other}: {rate(its)}"
    else:
        value = theirs / ours if asked.measure == "speed-up" else ours / theirs
        left, right = duration(ours), f"{other}: {duration(theirs)}"
    return Verdict(row.title, left, right, times(value), limit, asked.met(value))


def judge_memory(asked: Asked, row: Entry, limit: str) -> Verdict:
    """A demand on peak memory: in bytes, or beside another candidate's."""
    other = asked.against
    ours, theirs = row.peaks.get("ours"), row.peaks.get(other)
    if ours is None or (other and theirs is None):
        return Verdict(row.title, "", other, "not measured", limit, None)
    left = f"{size(ours)} extra"
    if theirs is None:
        return Verdict(row.title, left, "", size(ours), limit, asked.met(float(ours)))
    ratio = ours / max(theirs, 1)
    return Verdict(
        row.title, left, f"{other}: {size(theirs)} extra", times(ratio), limit, asked.met(ratio)
    )


def bound(asked: Asked) -> str:
    """The demand in words."""
    low = asked.at_least is not None
    value = asked.at_least if asked.at_least is not None else asked.at_most
    assert value is not None
    absolute = asked.measure == "memory" and not asked.against
    text = size(value) if absolute else f"{value:g}x"
    what = {"speed-up": "faster", "time": "the time", "rate": "the FLOP/s", "memory": "the memory"}
    tail = "extra" if absolute else what[asked.measure]
    return f"at {'least' if low else 'most'} {text} {tail}"


def verdict_lines(found: Iterable[Verdict]) -> list[list[str]]:
    """Cells of the table of demands."""
    marks = {True: "met", False: "**missed**", None: "not measured"}
    return [[v.what, v.ours, v.baseline, v.ratio, v.asked, marks[v.met]] for v in found]


HEADER = ["what", "ours", "baseline", "ratio", "asked", ""]


def markdown(results: dict[str, Any]) -> str:
    """table.md."""
    rows = entries(results)
    found = verdicts(rows, results.get("skipped", {}))
    met = sum(v.met is True for v in found)
    measured = sum(v.met is not None for v in found)
    parts = ["# Benchmarks", *machine_lines(results)]
    if results.get("quick"):
        parts.append("**A quick run: tiny sizes, so that the ratios mean nothing.**")
    parts += [
        "Medians of interleaved rounds: every candidate takes its turn in each round, on the same "
        "threads. Before that, all results were compared. Memory is the peak beyond the inputs.",
        "## What is asked",
        f"{met} of {measured} measured demands are met; {len(found) - measured} were not measured.",
        table(HEADER, verdict_lines(found)),
        "## Against each baseline",
    ]
    if any(row.id.startswith("nce") for row in rows):
        parts.append("![speed-up against each baseline](speedup.png)")
    for row in rows:
        others = len(row.seconds) + len(row.absent) - 1 - len(row.beside)
        if others > 0 and not row.id.startswith("scale"):
            parts += [f"### {row.title} ({row.device})", candidate_table(row)]
    losses = [row for row in rows if row.case["kind"] == "InfoNceCase"]
    scaling = [row for row in losses if row.isa is None]
    if scaling:
        parts += [
            "## Growth",
            "![time and memory against M](scaling_m.png)",
            "![time and memory against K](scaling_k.png)",
            "Loss and gradient:",
            scaling_table(scaling),
        ]
    features = [row for row in losses if row.case["features"] != 128]
    if features:
        parts += ["## Feature sizes", feature_table(features)]
    parts += ["## Data loading", data_table(results)]
    if results.get("skipped"):
        parts += ["## Skipped", "\n".join(skipped_lines(results["skipped"]))]
    return "\n\n".join(parts) + "\n"


def machine_lines(results: dict[str, Any]) -> list[str]:
    """The machine and its ceilings."""
    info = results["machine_info"]
    lines = [
        f"{info['processor']}, {info['cores']} cores, {threads(info['threads'])}, "
        f"{info['memory_gb']:g} GB; kernels: {ISA_NAMES.get(info['selected'], info['selected'])}; "
        f"torch {info['torch']}, Python {info['python_version']}, densecl_ext "
        f"{info['densecl_ext']}; GPU: {info['gpu'] or 'none'}; {results['datetime'][:16]}."
    ]
    limits = info.get("ceilings") or {}
    cells = []
    fma = limits.get("fma", {})
    if isinstance(fma, str):
        cells.append(["multiply-add units", fma])
    else:
        cells += [[f"multiply-add units, {ISA_NAMES[isa]}", rate(v)] for isa, v in fma.items()]
    for key, name in (
        ("gemm_float32", "torch's matrix product, float32"),
        ("gemm_bfloat16", "torch's matrix product, bfloat16"),
    ):
        if key in limits:
            cells.append([name, rate(limits[key])])
    if "copy" in limits:
        cells.append(["copy, read + written", f"{limits['copy'] / 1e9:.1f} GB/s"])
    return [
        *lines,
        "Ceilings, measured in the same run, best of several tries:",
        table(["", ""], cells),
    ]


def candidate_table(row: Entry) -> str:
    """All candidates of a row, ours first."""
    cells = []
    for name, seconds in row.seconds.items():
        against = "" if name == "ours" else times(seconds / row.seconds["ours"])
        speed = rate(row.work[name] / seconds) if row.work[name] else ""
        cells.append([name, duration(seconds), against, speed, size(row.peaks[name])])
    cells += [[name, reason, "", "", ""] for name, reason in row.absent.items()]
    return table(["", "time", "time / ours", "rate", "extra memory"], cells)


def scaling_table(rows: Sequence[Entry]) -> str:
    """Ours and eager at every M and K with D = 128."""
    cells = []
    for row in sorted(
        rows, key=lambda r: (r.case["dtype"], r.case["queue_length"], r.case["rows"])
    ):
        if row.case["features"] != 128 or not row.case["gradient"] or row.device != "cpu":
            continue
        m, k, ours = row.case["rows"], row.case["queue_length"], row.seconds["ours"]
        line = [
            row.case["dtype"],
            f"{m:,}",
            f"{k:,}",
            duration(ours),
            rate(row.work["ours"] / ours),
        ]
        line.append(size(row.peaks["ours"]))
        if "eager" in row.seconds:
            line += [duration(row.seconds["eager"]), size(row.peaks["eager"])]
        else:
            line += [row.absent.get("eager", ""), ""]
        cells.append(line)
    header = ["queue", "M", "K", "ours", "rate", "extra memory", "eager", "extra memory"]
    return table(header, cells)


def feature_table(rows: Sequence[Entry]) -> str:
    """Ours at feature sizes other than 128."""
    header = ["queue", "D", "time", "rate"]
    cells = []
    for row in rows:
        ours = row.seconds["ours"]
        speed = rate(row.work["ours"] / ours)
        cells.append([row.case["dtype"], str(row.case["features"]), duration(ours), speed])
    return table(header, cells)


def data_table(results: dict[str, Any]) -> str:
    """Images per second of the loaders."""
    cells = [
        [info["title"], info["device"], f"{info['images_per_second']:.0f} images/s"]
        for info in (benchmark["extra_info"] for benchmark in results["benchmarks"])
        if "images_per_second" in info
    ]
    if not cells:
        return "Not measured: see below."
    return table(["loader", "device", "rate"], cells)


def skipped_lines(skipped: dict[str, str]) -> list[str]:
    """Reasons, each with how many rows it kept from running."""
    reasons: dict[str, list[str]] = {}
    for node, reason in skipped.items():
        reasons.setdefault(reason, []).append(node)
    return [
        f"- {reason}: {', '.join(nodes) if len(nodes) < 5 else f'{len(nodes)} rows'}"
        for reason, nodes in reasons.items()
    ]


def table(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that it reads well as text too."""
    lines = [list(header), *[list(line) for line in cells]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    padded = [" | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines]
    padded.insert(1, " | ".join("-" * max(width, 3) for width in widths))
    return "\n".join(f"| {line} |" for line in padded)


def duration(seconds: float) -> str:
    """With a unit that fits."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def rate(flops: float) -> str:
    """FLOP/s."""
    return f"{flops / 1e9:,.0f} GFLOP/s" if flops >= 1e10 else f"{flops / 1e9:.2g} GFLOP/s"


def size(count: float | None) -> str:
    """Bytes with a unit that fits."""
    if count is None:
        return ""
    for scale, unit in ((1e9, "GB"), (1e6, "MB")):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count / 1e3:.0f} kB"


def times(ratio: float) -> str:
    """A factor."""
    return f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.1f}x" if ratio < 100 else f"{ratio:.0f}x"


def threads(count: int) -> str:
    """In words."""
    return f"{count} thread{'' if count == 1 else 's'}"
