"""From results to what people read: what is asked and what came of it, every row, the machine.

One report for the ops on a CPU and on a GPU and for the training step.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.verdicts import (
    ISA_NAMES,
    NOT_RUN,
    Entry,
    bandwidth,
    ceilings,
    duration,
    entries,
    machine_words,
    percent,
    rate,
    size,
    suite_of,
    times,
    verdicts,
)

TITLES = {"cpu": "Benchmarks", "gpu": "Benchmarks on a GPU", "step": "The training step"}
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
PARTS = ("momentum", "query_forward", "key_forward", "matching", "losses", "enqueue", "backward",
         "optimizer")  # fmt: skip


def write(out: Path, results: dict[str, Any], *, last: bool = False) -> None:
    """Results and table, each whole at any time; at the end the charts too.

    Only the results matter on a machine that is lent: whatever goes wrong with the rest is said.
    """
    name, written = "step" if suite_of(results) == "step" else "results", []

    def replace(name: str, text: str) -> None:
        (out / f".{name}").write_text(text, encoding="utf-8")
        (out / f".{name}").replace(out / name)
        written.append(name)

    replace(f"{name}.json", json.dumps(results, indent=1) + "\n")
    try:
        from benchmarks import charts

        replace("step.md" if name == "step" else "table.md", markdown(results))
        if last:
            print(asked_table(results, measured_alone=True))
            written += charts.draw(entries(results), results, out)
    except Exception as error:
        if last:
            print(f"tables or charts are missing: {type(error).__name__}: {error}")
    if last:
        print(f"wrote {', '.join(written)} in {out}")


def asked_table(results: dict[str, Any], *, measured_alone: bool = False) -> str:
    """The table of demands."""
    marks = {True: "met", False: "**missed**", None: "not measured"}
    found = [v for v in verdicts(results) if not measured_alone or v.ratio != NOT_RUN]
    header = ["what", "ours", "baseline", "ratio", "asked", ""]
    return table(header, [[*v[:-1], marks[v.met]] for v in found])


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
    prefix = "cuda_" if suite == "gpu" else ""
    if suite != "step" and any(row.id.startswith("nce") for row in ran):
        parts.append(f"![speed-up against each baseline]({prefix}speedup.png)")
    for row in ran:
        others = len(row.found) + len(row.absent) - 1 - len(row.info["beside"])
        if suite != "cpu" or (others > 0 and not row.id.startswith("scale")):
            of = f" ({row.info['device']})" if suite == "cpu" else ""
            limits = ceilings(results)
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
