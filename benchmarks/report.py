"""From results.json to what people read: what is asked and what came of it, every row, the machine.

One report for the ops on a CPU and on a GPU and for the training step.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.rows import Asked, rows

NOT_RUN = "not run"
ISA_NAMES = {
    "serial": "plain C++",
    "neon": "NEON",
    "avx2": "AVX2",
    "avx512": "AVX-512",
    "avx512bf16": "AVX-512 BF16",
}
TITLES = {
    "cpu": "Benchmarks",
    "gpu": "Benchmarks on a GPU",
    "step": "The training step",
}
HOW = {
    "cpu": "Medians of interleaved rounds: every candidate takes its turn in each round, on the "
    "same threads. Before that, all results were compared. Memory is the peak beyond the inputs.",
    "gpu": "Medians of interleaved rounds, 10th and 90th percentile behind; all results were "
    "compared first. *graph*: several calls in one CUDA graph, everything that fits in the L2 "
    "cached. *cold*: one call in a graph after the L2 was overwritten; holds one graph's launch. "
    "*calls*: called from Python, in a row. Ratios compare *graph* where both have it, else "
    "*calls*. Memory is the peak beyond the inputs, by torch's allocator. Demands were set for an "
    "H200.",
    "step": "Whole pre-training steps at 224 px in bfloat16 autocast, channels-last, fused SGD, "
    "queues of 65,536. The views lie on the device already: no loader takes part. *Reference*: the "
    "same trainer with reference.py's ops, the matrix of logits in memory, the published update "
    "loop and an enqueue whose pointer the host reads. Medians of interleaved rounds; memory is "
    "the peak of everything, by torch's allocator. Demands were set for an H200.",
}
CEILINGS = (
    ("gemm_float32", "torch's matrix product, float32"),
    ("gemm_tf32", "the same, TF32"),
    ("gemm_bfloat16", "torch's matrix product, bfloat16"),
    ("copy", "copy, read + written"),
    ("launch", "smallest kernel, one of fifty in a graph"),
    ("launch_alone", "smallest kernel, alone in a graph"),
    ("launch_from_python", "smallest kernel, called from Python"),
)
HEADER = ["what", "ours", "baseline", "ratio", "asked", ""]
PARTS = ("momentum", "query_forward", "key_forward", "matching", "losses", "enqueue", "backward",
         "optimizer")  # fmt: skip
OUR_PARTS = ("momentum", "matching", "losses", "enqueue")


@dataclass
class Entry:
    """One measured row: what results.json says of it, and its times."""

    info: dict[str, Any]

    def __post_init__(self) -> None:
        info = self.info
        self.id, self.title, self.case = info["row"], info["title"], info["case"]
        self.absent: dict[str, str] = info["absent"]
        self.found: dict[str, dict[str, Any]] = info["candidates"]
        self.images = max((c.get("images", 0) for c in self.found.values()), default=0)
        self.on_gpu = "graph" in {mode for name in self.found for mode in self.modes(name)}
        self.on_gpu |= info["device"] == "cuda"

    def modes(self, name: str) -> dict[str, list[float]]:
        """Seconds of one call, a sample a round, by mode; none where the candidate did not run."""
        found = self.found.get(name)
        return (found.get("modes") or {"calls": found["seconds"]}) if found else {}

    def seconds(self, name: str) -> float:
        """The median of one call, in a graph where it can."""
        modes = self.modes(name)
        return statistics.median(modes.get("graph") or modes["calls"])

    def pair(self, one: str, other: str) -> tuple[float, float, str]:
        """Seconds of two, timed in the same way: in a graph where both can, and how if not."""
        mine, its = self.modes(one), self.modes(other)
        mode = "graph" if "graph" in mine and "graph" in its else "calls"
        how = ", called from Python" if mode == "calls" and "graph" in {**mine, **its} else ""
        return statistics.median(mine[mode]), statistics.median(its[mode]), how

    def peak(self, name: str) -> int | None:
        """Bytes, None where it is not known."""
        return self.found.get(name, {}).get("peak_bytes")

    def work(self, name: str) -> float:
        """FLOP of one call."""
        return self.found[name]["work"]


def load(path: Path) -> dict[str, Any]:
    """The whole JSON."""
    return json.loads(path.read_text(encoding="utf-8"))


def suite_of(results: dict[str, Any]) -> str:
    """Which of rows.py's tables was measured; a CPU's where the file says nothing."""
    return results.get("suite", "cpu")


def entries(results: dict[str, Any]) -> list[Entry]:
    """The measured rows, in the order they ran."""
    infos = [benchmark["extra_info"] for benchmark in results["benchmarks"]]
    return [Entry(info) for info in infos if "candidates" in info]


@dataclass(frozen=True)
class Verdict:
    """A demand and what came of it; texts ready for the table."""

    what: str
    ours: str
    baseline: str
    ratio: str
    asked: str
    met: bool | None  # None: not measured


def verdicts(results: dict[str, Any]) -> list[Verdict]:
    """Every demand, in the order of rows.py."""
    by_id = {row.id: row for row in entries(results)}
    return [
        judge(asked, by_id.get(row.id), row.id, results)
        for row in rows(suite_of(results))
        for asked in row.asked
    ]


class Missing(Exception):
    """A number that a demand needs is not there; the message says why."""


def judge(asked: Asked, row: Entry | None, row_id: str, results: dict[str, Any]) -> Verdict:
    """One demand against the row it is about."""
    title = row.title if row else row_id
    try:
        if asked.measure == "largest":
            ours, other, value = largest(results)
        elif row is None:
            raise Missing(results.get("skipped", {}).get(row_id, NOT_RUN))
        else:
            ours, other, value = value_of(asked, row, ceilings(results))
    except Missing as reason:
        return Verdict(title, "", asked.against, str(reason), bound(asked), None)
    text = times(value)
    if asked.measure in ("copy", "parts"):
        text = percent(value)
    elif asked.measure in ("seconds", "syncs"):
        text = ""
    elif asked.measure == "saved" or not asked.against:
        text = size(value)
    return Verdict(title, ours, other, text, bound(asked), asked.met(value))


def value_of(asked: Asked, row: Entry, limits: dict[str, Any]) -> tuple[str, str, float]:
    """Ours and the other in words, and the value that is asked about; raises Missing."""
    who, measure, against = asked.who, asked.measure, asked.against
    if who not in row.found:
        raise Missing(row.absent.get(who, NOT_RUN))
    if measure == "syncs":
        waits = known(row.info.get("host_waits"))
        return waits or "the host never waits", "", float(bool(waits))
    if measure in ("memory", "saved"):
        ours, theirs = known(row.peak(who)), known(row.peak(against)) if against else 0
        value = ours / max(theirs, 1) if against else float(ours)
        other = f"{against}: {size(theirs)} extra" if against else ""
        return f"{size(ours)} extra", other, float(theirs - ours) if measure == "saved" else value
    if measure == "parts":
        parts = known(row.info.get("parts", {}).get(who) or None)
        ours = sum(parts.get(name, 0.0) for name in OUR_PARTS)
        return duration(ours), f"step: {duration(parts['step'])}", ours / parts["step"]
    if measure == "seconds":
        return duration(row.seconds(who)), "", row.seconds(who)
    if measure == "copy":
        rate_of_ours, copied = row.found[who]["traffic"] / row.seconds(who), limits.get("copy")
        if not isinstance(copied, float):
            raise Missing(copied or NOT_RUN)
        return bandwidth(rate_of_ours), f"copy: {bandwidth(copied)}", rate_of_ours / copied
    names = against.split(" | ")
    others = [name for name in names if name in row.found]
    if not others:
        reasons = [row.absent[name] for name in names if name in row.absent]
        raise Missing("; ".join(reasons) or NOT_RUN)
    other = min(others, key=lambda name: row.pair(who, name)[1])
    ours, theirs, how = row.pair(who, other)
    if measure == "rate":
        mine, its = row.work(who) / ours, row.work(other) / theirs
        return rate(mine), f"{other}: {rate(its)}", mine / its
    value = theirs / ours if measure == "speed-up" else ours / theirs
    left = duration(ours) + how if who == "ours" else f"{who}: {duration(ours)}{how}"
    return left, f"{other}: {duration(theirs)}", value


def known(value: Any) -> Any:
    """The value, or Missing where there is none."""
    if value is None:
        raise Missing("not measured")
    return value


def largest(results: dict[str, Any]) -> tuple[str, str, float]:
    """Ratio of the largest batches."""
    found = [results.get("largest", {}).get(name, {}) for name in ("ours", "reference")]
    for one in found:
        if one.get("reason") or not one.get("batch"):
            raise Missing(one.get("reason") or str(one.get("tries") or NOT_RUN))
    ours, other = (one["batch"] for one in found)
    return str(ours), f"reference: {other}", ours / other


def bound(asked: Asked) -> str:
    """The demand in words."""
    value, against = asked.bound, asked.against
    text = {
        "speed-up": f"{value:g}x faster",
        "time": f"{value:g}x the time",
        "rate": f"{value:g}x the FLOP/s",
        "memory": f"{value:g}x the memory" if against else f"{size(value)} extra",
        "saved": f"{size(value)} less",
        "seconds": duration(value),
        "copy": f"{percent(value)} of a copy's bandwidth",
        "parts": f"{percent(value)} of the step",
        "largest": f"{value:g}x the batch",
        "syncs": "no wait",
    }[asked.measure]
    if asked.measure == "syncs":
        return text
    return f"at {'least' if asked.least else 'most'} {text}"


def asked_table(results: dict[str, Any], *, measured_alone: bool = False) -> str:
    """The table of demands."""
    marks = {True: "met", False: "**missed**", None: "not measured"}
    found = [v for v in verdicts(results) if not measured_alone or v.ratio != NOT_RUN]
    cells = [[v.what, v.ours, v.baseline, v.ratio, v.asked, marks[v.met]] for v in found]
    return table(HEADER, cells)


def markdown(results: dict[str, Any]) -> str:
    """table.md, step.md."""
    found, suite, ran = verdicts(results), suite_of(results), entries(results)
    met = sum(v.met is True for v in found)
    measured = sum(v.met is not None for v in found)
    parts = [f"# {TITLES[suite]}", *machine_lines(results)]
    if "kernel" in results:
        parts.append(f"**Kernels: {results['kernel']}.**")
    if results.get("quick"):
        parts.append("**A quick run: tiny sizes, so that the ratios mean nothing.**")
    parts += [
        HOW[suite],
        "## What is asked",
        f"{met} of {measured} measured demands are met; {len(found) - measured} were not measured.",
        asked_table(results),
        "## Every row" if suite != "cpu" else "## Against each baseline",
    ]
    prefix = {"cpu": "", "gpu": "cuda_"}.get(suite)
    if prefix is not None and any(row.id.startswith("nce") for row in ran):
        parts.append(f"![speed-up against each baseline]({prefix}speedup.png)")
    limits = ceilings(results)
    for row in ran:
        others = len(row.found) + len(row.absent) - 1 - len(row.info["beside"])
        if suite != "cpu" or (others > 0 and not row.id.startswith("scale")):
            of = f" ({row.info['device']})" if suite == "cpu" else ""
            parts += [f"### {row.title}{of}", candidate_table(row, limits), *notes(row)]
    if results.get("largest"):
        lines = [f"- {name}: {one}" for name, one in results["largest"].items()]
        parts += ["## Batches that were tried", "\n".join(lines)]
    losses = [row for row in ran if row.case["kind"] == "InfoNceCase" and "ours" in row.found]
    losses = [row for row in losses if row.info["isa"] is None]
    if losses:
        parts += [
            "## Growth",
            f"![time and memory against M]({prefix}scaling_m.png)",
            f"![time and memory against K]({prefix}scaling_k.png)",
            "Loss and gradient:",
            scaling_table(losses),
        ]
        if features := [row for row in losses if row.case["features"] != 128]:
            parts += ["## Feature sizes", feature_table(features)]
    if suite == "cpu":
        parts += ["## Data loading", data_table(results)]
    if results.get("skipped"):
        parts += ["## Skipped", "\n".join(skipped_lines(results["skipped"]))]
    return "\n\n".join(parts) + "\n"


def ceilings(results: dict[str, Any]) -> dict[str, Any]:
    """What the machine reached at most, where it is known."""
    return (results["machine_info"] or {}).get("ceilings") or {}


def machine_words(info: dict[str, Any]) -> str:
    """As in `AMD EPYC, 2 threads, AVX-512`."""
    threads = f"{info['threads']} thread{'' if info['threads'] == 1 else 's'}"
    return f"{info['processor']}, {threads}, {ISA_NAMES.get(info['selected'], info['selected'])}"


def machine_lines(results: dict[str, Any]) -> list[str]:
    """The machine, its state, its ceilings."""
    info = results["machine_info"]
    if info is None:
        return [f"The machine is not known: {results['skipped'].get('machine', NOT_RUN)}."]
    described, lines = [], []
    if suite_of(results) != "cpu":
        gpu = info["device"]
        told = ", ".join(f"{k} {v}" for k, v in gpu.items() if k not in ("name", "kind"))
        described.append(f"{gpu['name']} ({told})")
        for when in ("state", "state_after"):
            told = ", ".join(f"{key} {value}" for key, value in info.get(when, {}).items())
            lines.append(f"nvidia-smi, {when.replace('_', ' ')}: {told}.")
    processor, threads, isa = machine_words(info).rsplit(", ", 2)
    described += [
        f"{processor}, {info['cores']} cores, {threads}, {info['memory_gb']:g} GB",
        f"kernels: {isa}",
        f"torch {info['torch']}, Python {info['python_version']}, densecl_ext "
        f"{info['densecl_ext']}",
        f"GPU: {info['gpu'] or 'none'}",
        results["datetime"][:16],
    ]
    limits, cells = ceilings(results), []
    fma = limits.get("fma", {})
    if isinstance(fma, str):
        cells.append(["multiply-add units", fma])
    else:
        cells += [[f"multiply-add units, {ISA_NAMES[isa]}", rate(v)] for isa, v in fma.items()]
    for key, name in CEILINGS:
        if (value := limits.get(key)) is not None:
            words = {"g": rate, "c": bandwidth, "l": duration}[key[0]]
            cells.append([name, value if isinstance(value, str) else words(value)])
    if not cells:
        return ["; ".join(described) + ".", *lines]
    what = "Ceilings, measured in the same run, best of several tries:"
    return ["; ".join(described) + ".", *lines, what, table(["", ""], cells)]


def candidate_table(row: Entry, limits: dict[str, Any]) -> str:
    """All candidates of a row, ours first."""
    gpu = row.on_gpu
    modes = ("graph", "cold", "calls") if gpu else ("calls",)
    cells = []
    for name, found in row.found.items():
        seconds, against, speed = row.seconds(name), "", ""
        if name != "ours" and "ours" in row.found:
            ours, theirs, _ = row.pair("ours", name)
            against = times(theirs / ours)
        if row.images:
            speed = f"{row.images / seconds:,.0f} images/s"
        elif found["work"]:
            speed = rate(found["work"] / seconds)
        line = [name, *(interval(row.modes(name).get(mode), spread=gpu) for mode in modes), against]
        line += [speed, *([share_of_limit(row, name, limits)] if gpu else []), size(row.peak(name))]
        cells.append(line)
    header = ["", *(modes if gpu else ["time"]), "time / ours", "rate"]
    header += [*(["of the limit"] if gpu else []), "extra memory"]
    cells += [[name, reason, *[""] * (len(header) - 2)] for name, reason in row.absent.items()]
    return table(header, cells)


def share_of_limit(row: Entry, name: str, limits: dict[str, Any]) -> str:
    """The time that operations or bytes need at the ceilings' rates, over the time taken.

    The ceiling of 16-bit products for 16-bit inputs, that of float32 for others: not said for
    baselines, which choose for themselves.
    """
    dtype = "float32" if row.case.get("dtype", "float32") == "float32" else "bfloat16"
    gemm, copy = limits.get(f"gemm_{dtype}"), limits.get("copy")
    if not (isinstance(gemm, float) and isinstance(copy, float)):
        return ""
    if not (name.startswith("ours") or name in row.info["beside"]):
        return ""
    least = max(row.work(name) / gemm, row.found[name].get("traffic", 0.0) / copy)
    return f"{100 * least / row.seconds(name):.0f} %" if least else ""


def notes(row: Entry) -> list[str]:
    """What a table's reader must know besides."""
    found = []
    if waits := row.info.get("host_waits"):
        found.append(f"**Ours makes the host wait**: {waits}.")
    missing = {name: c.get("missing", {}).get("graph") for name, c in row.found.items()}
    told = [f"{name}: {why}" for name, why in missing.items() if why and not row.images]
    if told:
        found.append("Not in a graph: " + "; ".join(told) + ".")
    timed = {who: parts for who, parts in row.info.get("parts", {}).items() if parts}
    if timed:
        names = [name for name in PARTS if any(name in parts for parts in timed.values())]
        cells = []
        for who, parts in timed.items():
            shares = [parts.get(name, 0.0) / parts["step"] for name in names]
            words = [f"{duration(s * parts['step'])}, {percent(s)}" if s else "" for s in shares]
            cells.append([who, duration(parts["step"]), *words])
        found.append(table(["", "step", *names], cells))
    return found


def scaling_table(found: Sequence[Entry]) -> str:
    """Ours and eager at every M and K with D = 128."""
    cells = []
    for row in sorted(
        found, key=lambda r: (r.case["dtype"], r.case["queue_length"], r.case["rows"])
    ):
        case, ours = row.case, row.seconds("ours")
        if case["features"] != 128 or not case["gradient"]:
            continue
        speed = rate(row.work("ours") / ours)
        line = [case["dtype"], f"{case['rows']:,}", f"{case['queue_length']:,}", duration(ours)]
        line += [speed, size(row.peak("ours"))]
        if "eager" in row.found:
            line += [duration(row.seconds("eager")), size(row.peak("eager"))]
        else:
            line += [row.absent.get("eager", ""), ""]
        cells.append(line)
    header = ["queue", "M", "K", "ours", "rate", "extra memory", "eager", "extra memory"]
    return table(header, cells)


def feature_table(found: Sequence[Entry]) -> str:
    """Ours at feature sizes other than 128."""
    cells = []
    for row in found:
        ours = row.seconds("ours")
        speed = rate(row.work("ours") / ours)
        cells.append([row.case["dtype"], str(row.case["features"]), duration(ours), speed])
    return table(["queue", "D", "time", "rate"], cells)


def data_table(results: dict[str, Any]) -> str:
    """Images per second of the loaders."""
    infos = [benchmark["extra_info"] for benchmark in results["benchmarks"]]
    cells = [
        [info["title"], info["device"], f"{info['images_per_second']:.0f} images/s"]
        for info in infos
        if "images_per_second" in info
    ]
    return table(["loader", "device", "rate"], cells) if cells else "Not measured: see below."


def skipped_lines(skipped: dict[str, str]) -> list[str]:
    """Reasons, each with how many rows it kept from running."""
    reasons: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        reasons.setdefault(reason, []).append(name)
    return [
        f"- {reason}: {', '.join(names) if len(names) < 5 else f'{len(names)} rows'}"
        for reason, names in reasons.items()
    ]


def failures(results: dict[str, Any]) -> list[str]:
    """Rows that failed, and candidates that computed something else or failed where ours did."""
    found = [f"{name}: {why}" for name, why in results["skipped"].items() if "failed" in why]
    for benchmark in results["benchmarks"]:
        info = benchmark["extra_info"]
        for name, why in info.get("absent", {}).items():
            if why.startswith("wrong") or (name == "ours" and why.startswith("failed")):
                found.append(f"{info['row']}: {name}: {why}")
    return found


def table(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    from tabulate import tabulate  # a machine without it still gets results.json

    return tabulate(cells, header, tablefmt="github", disable_numparse=True)


def interval(samples: Sequence[float] | None, *, spread: bool) -> str:
    """Median and percentiles in words."""
    if not samples:
        return ""
    ordered, last = sorted(samples), len(samples) - 1
    low, high = ordered[round(0.1 * last)], ordered[round(0.9 * last)]
    text = duration(statistics.median(samples))
    return f"{text} ({duration(low)} to {duration(high)})" if spread else text


def duration(seconds: float) -> str:
    """With a unit that fits."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def rate(flops: float) -> str:
    """FLOP/s."""
    if flops >= 5e12:
        return f"{flops / 1e12:.3g} TFLOP/s"
    return f"{flops / 1e9:,.0f} GFLOP/s" if flops >= 1e10 else f"{flops / 1e9:.2g} GFLOP/s"


def bandwidth(bytes_per_second: float) -> str:
    """GB/s."""
    rate = bytes_per_second / 1e9
    return f"{rate:.3g} GB/s" if rate < 100 else f"{rate:,.0f} GB/s"


def size(count: float | None) -> str:
    """Bytes with a unit that fits."""
    if count is None:
        return ""
    for scale, unit in ((1e9, "GB"), (1e6, "MB")):
        if abs(count) >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count / 1e3:.0f} kB"


def percent(share: float) -> str:
    """A share."""
    return f"{100 * share:.3g} %"


def times(ratio: float) -> str:
    """A factor."""
    return f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.1f}x" if ratio < 100 else f"{ratio:.0f}x"
