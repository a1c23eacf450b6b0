"""From results to what people read: what is asked and what came of it, every row, the machine.

One report for the ops on a CPU and on a GPU and for the training step.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import charts
from benchmarks.verdicts import (
    NOT_RUN,
    Entry,
    bandwidth,
    duration,
    entries,
    percent,
    rate,
    size,
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
CEILINGS = {
    "gemm_float32": ("torch's matrix product, float32", rate),
    "gemm_tf32": ("the same, TF32", rate),
    "gemm_bfloat16": ("torch's matrix product, bfloat16", rate),
    "copy": ("copy, read + written", bandwidth),
    "launch": ("smallest kernel, one of fifty in a graph", duration),
    "launch_alone": ("smallest kernel, alone in a graph", duration),
    "launch_from_python": ("smallest kernel, called from Python", duration),
}
LOADING = "Images per second of processor time: what one core does alone, without worker processes."
ISA_NAMES = {"serial": "plain C++", "neon": "NEON", "avx2": "AVX2", "avx512": "AVX-512",
             "avx512bf16": "AVX-512 BF16"}  # fmt: skip
PARTS = ("momentum", "query_forward", "key_forward", "matching", "losses", "enqueue", "backward",
         "optimizer")  # fmt: skip


def write(out: Path, results: dict[str, Any], *, last: bool = False) -> None:
    """Results and table, each whole at any time; at the end the charts too.

    Only the results matter on a machine that is lent: whatever goes wrong with the rest is said.
    """
    name, table_name = ("step", "step") if results["suite"] == "step" else ("results", "table")

    def replace(name: str, text: str) -> None:
        (out / f".{name}").write_text(text, encoding="utf-8")
        (out / f".{name}").replace(out / name)

    replace(f"{name}.json", json.dumps(results, indent=1) + "\n")
    try:
        replace(f"{table_name}.md", markdown(results))
        if last:
            print(asked_table(results, measured_alone=True))
            if info := results["machine_info"]:
                machine = info["device"]["name"] if results["suite"] == "gpu" else processor(info)
                charts.draw(entries(results), results["suite"], machine, out)
    except Exception as error:
        if last:
            print(f"tables or charts are missing: {type(error).__name__}: {error}")
    if last:
        print(f"written: {out / name}.json, table and charts beside it")


def asked_table(results: dict[str, Any], *, measured_alone: bool = False) -> str:
    """The table of demands."""
    marks = {True: "met", False: "**missed**", None: "not measured"}
    found = [v for v in verdicts(results) if not measured_alone or v.ratio != NOT_RUN]
    return table([{**v._asdict(), "met": marks[v.met]} for v in found])


def markdown(results: dict[str, Any]) -> str:
    """table.md, step.md."""
    suite, ran = results["suite"], entries(results)
    limits = results["machine_info"].get("ceilings", {})
    met = [verdict.met for verdict in verdicts(results)]
    parts = [f"# {TITLES[suite]}", *machine_lines(results)]
    if "kernel" in results:
        parts.append(f"**Kernels: {results['kernel']}.**")
    if results.get("quick"):
        parts.append("**A quick run: tiny sizes, so that the ratios mean nothing.**")
    parts += [
        HOW[suite],
        "## What is asked",
        f"{met.count(True)} of {len(met) - met.count(None)} measured demands are met; "
        f"{met.count(None)} were not measured.",
        asked_table(results),
        "## Every row" if suite != "cpu" else "## Against each baseline",
    ]
    prefix = "cuda_" if suite == "gpu" else ""
    if suite != "step" and any(row.id.startswith("nce") for row in ran):
        parts.append(f"![speed-up against each baseline]({prefix}speedup.png)")
    for row in ran:
        others = len(row.found) + len(row.absent) - 1 - len(row.info["beside"])
        if suite != "cpu" or (others > 0 and not row.id.startswith("scale")):
            parts += [f"### {row.title}", candidate_table(row, limits), *notes(row)]
    if losses := charts.losses(ran):
        drawn = [axis for axis in charts.AXES if charts.curves(losses, suite, axis)[0]]
        parts += ["## Growth"]
        parts += [f"![time and memory against {a.upper()}]({prefix}scaling_{a}.png)" for a in drawn]
        parts += ["Loss and gradient:", growth_table(losses)]
    if suite == "cpu":
        rates = [
            {"loader": info["title"], "rate": f"{info['images_per_second']:.0f} images/s"}
            for info in results["rows"] if "images_per_second" in info
        ]  # fmt: skip
        parts += ["## Data loading", LOADING if rates else "Not measured: see below.", table(rates)]
    if results.get("skipped"):
        parts += ["## Skipped", skipped_lines(results["skipped"])]
    return "\n\n".join(filter(None, parts)) + "\n"


def processor(info: dict[str, Any]) -> str:
    """As in `AMD EPYC, 2 threads, AVX-512`."""
    threads = f"{info['threads']} thread{'' if info['threads'] == 1 else 's'}"
    return f"{info['processor']}, {threads}, {ISA_NAMES.get(info['selected'], info['selected'])}"


def machine_lines(results: dict[str, Any]) -> list[str]:
    """The machine, its state, its ceilings."""
    info = results["machine_info"]
    if not info:
        return [f"The machine is not known: {results['skipped'].get('machine', NOT_RUN)}."]
    described = [
        processor(info), f"{info['cores']} cores, {info['memory_gb']:g} GB",
        f"torch {info['torch']}, Python {info['python_version']}, densecl_ext "
        f"{info['densecl_ext']}", f"GPU: {info['gpu'] or 'none'}", results["datetime"][:16],
    ]  # fmt: skip
    lines = []
    if results["suite"] != "cpu":
        told = [f"{k} {v}" for k, v in info["device"].items() if k not in ("name", "kind")]
        described.insert(0, f"{info['device']['name']} ({', '.join(told)})")
        for when in ("state", "state_after"):
            told = [f"{key} {value}" for key, value in info.get(when, {}).items()]
            lines.append(f"nvidia-smi, {when.replace('_', ' ')}: {', '.join(told)}.")
    limits = info.get("ceilings", {})
    fma = limits.get("fma", {})
    fma = {"": fma} if isinstance(fma, str) else fma
    found = [(f"multiply-add units, {ISA_NAMES.get(k, k)}", v, rate) for k, v in fma.items()]
    found += [(name, limits[key], of) for key, (name, of) in CEILINGS.items() if key in limits]
    cells = [
        {"ceiling": name, "best of several tries": value if isinstance(value, str) else of(value)}
        for name, value, of in found
    ]
    lines.insert(0, "; ".join(described) + ".")
    return [*lines, "Ceilings, measured in the same run:", table(cells)] if cells else lines


def candidate_table(row: Entry, limits: dict[str, Any]) -> str:
    """Every candidate's times, and what they mean; on a GPU in every mode."""
    modes = {"calls": "time"}
    if row.on_gpu:
        modes = {mode: mode for mode in ("graph", "cold", "calls")}
    cells = []
    for name, found in row.found.items():
        line = {"": name}
        for mode, header in modes.items():
            line[header] = interval(row.modes(name).get(mode), spread=row.on_gpu)
        line |= {"time / ours": "", "rate": ""}
        if name != "ours" and "ours" in row.found:
            ours, theirs, _ = row.pair("ours", name)
            line["time / ours"] = times(theirs / ours)
        if row.images:
            speed = row.images / row.seconds(name)
            line["rate"] = f"{speed:,.0f} images/s" if speed >= 10 else f"{speed:.2f} images/s"
        elif found["work"]:
            line["rate"] = rate(found["work"] / row.seconds(name))
        if row.on_gpu:
            line["of the limit"] = share_of_limit(row, name, limits)
        cells.append(line | {"extra memory": size(row.peak(name))})
    first = next(iter(modes.values()))
    return table(cells + [{"": name, first: reason} for name, reason in row.absent.items()])


def share_of_limit(row: Entry, name: str, limits: dict[str, Any]) -> str:
    """The time that operations or bytes need at the ceilings' rates, over the time taken.

    The ceiling of 16-bit products for 16-bit inputs, that of float32 for others: not said for
    baselines, which choose for themselves.
    """
    dtype = "float32" if row.case.get("dtype", "float32") == "float32" else "bfloat16"
    gemm, copy = limits.get(f"gemm_{dtype}"), limits.get("copy")
    ours = name.startswith("ours") or name in row.info["beside"]
    if not (ours and isinstance(gemm, float) and isinstance(copy, float)):
        return ""
    least = max(row.work(name) / gemm, row.found[name]["traffic"] / copy)
    return percent(least / row.seconds(name)) if least else ""


def notes(row: Entry) -> list[str]:
    """What a table's reader must know besides."""
    found = []
    if waits := row.info.get("host_waits"):
        found.append(f"**Ours makes the host wait**: {waits}.")
    missing = {name: made["missing"].get("graph") for name, made in row.found.items()}
    told = [f"{name}: {why}" for name, why in missing.items() if why and not row.images]
    if told:
        found.append("Not in a graph: " + "; ".join(told) + ".")
    cells = []
    for who, parts in row.info.get("parts", {}).items():
        if parts:
            line = {"": who, "step": duration(parts["step"])} | dict.fromkeys(PARTS, "")
            for name in parts.keys() & line.keys() - {"step"}:
                line[name] = f"{duration(parts[name])}, {percent(parts[name] / parts['step'])}"
            cells.append(line)
    return [*found, table(cells)]


def growth_table(losses: Sequence[Entry]) -> str:
    """Ours and eager at every size of the loss."""
    cells = []
    for row in losses:
        ours, case = row.seconds("ours"), row.case
        speed = rate(row.work("ours") / ours)
        eager = duration(row.seconds("eager")) if "eager" in row.found else row.absent.get("eager")
        cells.append({
            "queue": case["dtype"], "M": f"{case['rows']:,}", "K": f"{case['queue_length']:,}",
            "D": str(case["features"]), "ours": duration(ours), "rate": speed,
            "extra memory": size(row.peak("ours")), "eager": eager or "",
            "its extra memory": size(row.peak("eager")),
        })  # fmt: skip
    return table(cells)


def skipped_lines(skipped: dict[str, str]) -> str:
    """Reasons, each with the rows that it kept from running, or how many."""
    reasons: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        reasons.setdefault(reason, []).append(name)
    few = {why: ", ".join(n) if len(n) < 5 else f"{len(n)} rows" for why, n in reasons.items()}
    return "\n".join(f"- {reason}: {names}" for reason, names in few.items())


def table(cells: Sequence[dict[str, str]]) -> str:
    """A Markdown table of lines whose keys are the columns; without lines, nothing."""
    from tabulate import tabulate  # a machine without it still gets results.json

    return tabulate(cells, "keys", tablefmt="github", disable_numparse=True) if cells else ""


def interval(samples: Sequence[float] | None, *, spread: bool) -> str:
    """Median, and where wanted the 10th and 90th percentile."""
    if not samples:
        return ""
    ordered, last = sorted(samples), len(samples) - 1
    low, high = ordered[round(0.1 * last)], ordered[round(0.9 * last)]
    text = duration(statistics.median(samples))
    return f"{text} ({duration(low)} to {duration(high)})" if spread else text
