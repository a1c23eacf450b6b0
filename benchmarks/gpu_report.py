"""From the GPU's results.json to what people read. Imports neither torch nor matplotlib."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.gpu_thresholds import ASKED_GPU
from benchmarks.report import (
    NOT_RUN,
    Entry,
    Verdict,
    duration,
    entries,
    judge_memory,
    size,
    skipped_lines,
    table,
    times,
    verdict_lines,
)
from benchmarks.thresholds import Asked

HEADER = ["what", "ours", "baseline", "ratio", "asked on an H200", ""]
CEILINGS = (
    ("gemm_bfloat16", "cuBLAS product, 8,192 cubed, bfloat16"),
    ("gemm_tf32", "the same, TF32"),
    ("gemm_float32", "the same, float32"),
    ("copy", "copy of 2 GiB, read + written"),
    ("launch", "smallest kernel, one of fifty in a graph"),
    ("launch_alone", "smallest kernel, alone in a graph"),
    ("launch_from_python", "smallest kernel, called from Python"),
)


def median(row: Entry, name: str, mode: str) -> float | None:
    """Seconds of one call, None where the candidate did not run in this mode."""
    samples = row.modes.get(name, {}).get(mode)
    return statistics.median(samples) if samples else None


def pair(row: Entry, other: str) -> tuple[float, float, str]:
    """Seconds of ours and of another, timed in the same way, and which: graph where both can."""
    for mode in ("graph", "calls"):
        ours, theirs = median(row, "ours", mode), median(row, other, mode)
        if ours is not None and theirs is not None:
            return ours, theirs, "" if mode == "graph" else ", called from Python"
    raise KeyError(other)


def verdicts(results: dict[str, Any]) -> list[Verdict]:
    """Every demand, in the order of gpu_thresholds.py."""
    by_id = {row.id: row for row in entries(results)}
    copy = ((results["machine_info"] or {}).get("ceilings") or {}).get("copy")
    return [judge(asked, by_id.get(asked.row), results["skipped"], copy) for asked in ASKED_GPU]


def judge(
    asked: Asked, row: Entry | None, skipped: dict[str, str], copy: float | str | None
) -> Verdict:
    """One demand against the row it is about."""
    limit = bound(asked)
    if row is None:
        return Verdict(asked.row, "", asked.against, skipped.get(asked.row, NOT_RUN), limit, None)
    if "ours" not in row.seconds:
        reason = row.absent.get("ours", NOT_RUN)
        return Verdict(row.title, reason, asked.against, "", limit, None)
    if asked.measure == "memory":
        return judge_memory(asked, row, limit)
    if asked.measure == "syncs":
        return judge_syncs(asked, row, limit)
    if asked.measure in ("seconds", "copy"):
        return judge_alone(asked, row, limit, copy)
    others = [name for name in asked.against.split(" | ") if name in row.seconds]
    if not others:
        reasons = [row.absent[name] for name in asked.against.split(" | ") if name in row.absent]
        return Verdict(row.title, "", asked.against, "; ".join(reasons) or NOT_RUN, limit, None)
    other = min(others, key=lambda name: pair(row, name)[1])
    ours, theirs, how = pair(row, other)
    if asked.measure == "rate":
        mine, its = row.work["ours"] / ours, row.work[other] / theirs
        value, left, right = mine / its, flops(mine), f"{other}: {flops(its)}"
    else:
        value = theirs / ours if asked.measure == "speed-up" else ours / theirs
        left, right = duration(ours) + how, f"{other}: {duration(theirs)}"
    return Verdict(row.title, left, right, times(value), limit, asked.met(value))


def judge_alone(asked: Asked, row: Entry, limit: str, copy: float | str | None) -> Verdict:
    """A demand on our time, or on our share of a copy's bandwidth."""
    seconds, how = median(row, "ours", "graph"), ""
    if seconds is None:
        seconds, how = median(row, "ours", "calls"), ", called from Python"
    assert seconds is not None
    if asked.measure == "seconds":
        return Verdict(row.title, duration(seconds) + how, "", "", limit, asked.met(seconds))
    rate = row.traffic["ours"] / seconds
    if not isinstance(copy, float):
        return Verdict(row.title, bandwidth(rate), "copy", copy or NOT_RUN, limit, None)
    share = rate / copy
    left, right = bandwidth(rate) + how, f"copy: {bandwidth(copy)}"
    return Verdict(row.title, left, right, f"{100 * share:.0f} %", limit, asked.met(share))


def judge_syncs(asked: Asked, row: Entry, limit: str) -> Verdict:
    """A demand that the host never waits."""
    if row.host_waits is None:
        return Verdict(row.title, "", "", "not measured", limit, None)
    left = row.host_waits or "the host never waits"
    return Verdict(row.title, left, "", "", limit, not row.host_waits)


def bound(asked: Asked) -> str:
    """The demand in words."""
    low = asked.at_least is not None
    value = asked.at_least if asked.at_least is not None else asked.at_most
    assert value is not None
    text = {
        "seconds": duration(value),
        "copy": f"{100 * value:.0f} % of a copy's bandwidth",
        "memory": f"{size(value)} extra",
        "speed-up": f"{value:g}x faster",
        "time": f"{value:g}x the time",
        "rate": f"{100 * value:.0f} % of its FLOP/s",
        "syncs": "no wait",
    }[asked.measure]
    if asked.measure == "syncs":
        return text
    return f"at {'least' if low else 'most'} {text}"


def asked_table(results: dict[str, Any]) -> str:
    """The table of demands."""
    return table(HEADER, verdict_lines(verdicts(results)))


def markdown(results: dict[str, Any]) -> str:
    """table.md."""
    rows = entries(results)
    found = verdicts(results)
    met = sum(v.met is True for v in found)
    measured = sum(v.met is not None for v in found)
    parts = ["# Benchmarks on a GPU", *machine_lines(results)]
    if "kernel" in results:
        parts.append(f"**Kernel of the loss: {results['kernel']}.**")
    if results["quick"]:
        parts.append("**A quick run: tiny sizes, so that the ratios mean nothing.**")
    parts += [
        "Medians of interleaved rounds, 10th and 90th percentile behind; all results were compared "
        "first. *graph*: several calls in one CUDA graph, everything that fits in the L2 cached. "
        "*cold*: one call in a graph after the L2 was overwritten; holds one graph's launch. "
        "*calls*: called from Python, in a row. Ratios compare *graph* where both have it, else "
        "*calls*. Memory is the peak beyond the inputs, by torch's allocator.",
        "## What is asked",
        f"{met} of {measured} measured demands are met; {len(found) - measured} were not measured. "
        "They were set for an H200.",
        table(HEADER, verdict_lines(found)),
        "![speed-up against each baseline](cuda_speedup.png)",
        "![time and memory against M](cuda_scaling_m.png)",
        "![time and memory against K](cuda_scaling_k.png)",
        "## Every row",
    ]
    limits = (results["machine_info"] or {}).get("ceilings") or {}
    for row in rows:
        parts += [f"### {row.title}", candidate_table(row, limits)]
        parts += notes(row)
    if results["skipped"]:
        parts += ["## Not measured", "\n".join(skipped_lines(results["skipped"]))]
    return "\n\n".join(parts) + "\n"


def machine_lines(results: dict[str, Any]) -> list[str]:
    """The GPU, its state, its ceilings."""
    info = results["machine_info"]
    if info is None:
        return ["The machine is not known: " + results["skipped"].get("machine", NOT_RUN)]
    gpu = info["device"]
    described = [f"{key} {value}" for key, value in gpu.items() if key not in ("name", "kind")]
    cells = []
    for key, name in CEILINGS:
        value = info["ceilings"].get(key, NOT_RUN)
        if not isinstance(value, str):
            value = {"g": flops, "c": bandwidth, "l": duration}[key[0]](value)
        cells.append([name, value])
    states = [
        f"nvidia-smi {when} the ceilings: "
        + ", ".join(f"{key} {value}" for key, value in info[f"state_{when}"].items())
        for when in ("before", "after")
    ]
    return [
        f"{gpu['name']} ({', '.join(described)}); {info['processor']}, {info['cores']} cores; "
        f"torch {info['torch']}, Python {info['python_version']}, densecl_ext "
        f"{info['densecl_ext']}; {results['datetime'][:16]}.",
        "; ".join(states) + ".",
        "Ceilings, measured in the same run:",
        table(["", ""], cells),
    ]


def candidate_table(row: Entry, limits: dict[str, Any]) -> str:
    """All candidates of a row, ours first."""
    cells = []
    for name in row.seconds:
        modes = [interval(row.modes[name].get(mode)) for mode in ("graph", "cold", "calls")]
        against = ""
        if name != "ours" and "ours" in row.seconds:
            ours, theirs, _ = pair(row, name)
            against = times(theirs / ours)
        best = median(row, name, "graph") or median(row, name, "calls") or 0.0
        rate = flops(row.work[name] / best) if row.work[name] else ""
        share = share_of_limit(row, name, best, limits)
        cells.append([name, *modes, against, rate, share, size(row.peaks[name])])
    cells += [[name, reason, "", "", "", "", "", ""] for name, reason in row.absent.items()]
    header = ["", "graph", "cold", "calls", "time / ours", "rate", "of the limit", "extra memory"]
    return table(header, cells)


def share_of_limit(row: Entry, name: str, seconds: float, limits: dict[str, Any]) -> str:
    """The time that operations or bytes need at the ceilings' rates, over the time taken.

    The ceiling of 16-bit products for 16-bit inputs, that of float32 for others: not said for
    baselines, which choose for themselves.
    """
    if name != "ours" and name not in row.beside:
        return ""
    exact = row.case.get("dtype", "float32") == "float32"
    gemm, copy = limits.get("gemm_float32" if exact else "gemm_bfloat16"), limits.get("copy")
    if isinstance(gemm, float) and isinstance(copy, float):
        least = max(row.work[name] / gemm, row.traffic[name] / copy)
        return f"{100 * least / seconds:.0f} %" if least else ""
    return ""


def notes(row: Entry) -> list[str]:
    """What a table's reader must know besides."""
    found = []
    if row.host_waits:
        found.append(f"**Ours makes the host wait**: {row.host_waits}.")
    missing = [f"{name}: {why}" for name, why in row.missing.items() if why]
    if missing:
        found.append("Not in a graph: " + "; ".join(missing) + ".")
    return found


def interval(samples: Sequence[float] | None) -> str:
    """Median and percentiles in words."""
    if not samples:
        return ""
    ordered = sorted(samples)
    low = ordered[round(0.1 * (len(ordered) - 1))]
    high = ordered[round(0.9 * (len(ordered) - 1))]
    return f"{duration(statistics.median(samples))} ({duration(low)} to {duration(high)})"


def line(results: dict[str, Any], row_id: str) -> str:
    """A row in a line of the terminal."""
    if row_id in results["skipped"]:
        return results["skipped"][row_id]
    (row,) = (row for row in entries(results) if row.id == row_id)
    told = [f"{name} {duration(seconds)}" for name, seconds in row.seconds.items()]
    told += [f"{name}: {reason}" for name, reason in row.absent.items()]
    return ", ".join(told)


def flops(rate: float) -> str:
    """TFLOP/s."""
    return f"{rate / 1e12:.3g} TFLOP/s"


def bandwidth(rate: float) -> str:
    """GB/s."""
    return f"{rate / 1e9:,.0f} GB/s"
