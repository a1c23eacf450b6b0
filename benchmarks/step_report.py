"""From step.json to what people read. Imports neither torch nor matplotlib."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.report import NOT_RUN, Verdict, size, table, times, verdict_lines

HEADER = ["what", "ours", "baseline", "value", "asked on an H200", ""]
OURS_PARTS = ("momentum", "matching", "losses", "enqueue")
ORDER = ("momentum", "query_forward", "key_forward", "matching", "losses", "enqueue", "backward",
         "optimizer")  # fmt: skip
Results = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """A demand on the step: what it compares, and the bound."""

    what: str
    bound: str
    value: Callable[[Results], tuple[str, str, float]]  # ours, baseline in words; the value
    met: Callable[[float], bool]
    written: Callable[[float], str]


class Missing(Exception):
    """A number that a demand needs is not there; the message says why."""


def config(results: Results, name: str) -> dict[str, Any]:
    """A configuration that ran."""
    found = results["configs"].get(name)
    if found is None:
        raise Missing(NOT_RUN)
    if found.get("reason") or "images_per_second" not in found:
        raise Missing(f"{name}: {found.get('reason') or NOT_RUN}")
    return found


def rate(results: Results, name: str) -> float:
    """Images/s, the median of the rounds."""
    return statistics.median(config(results, name)["images_per_second"])


def faster(ours: str, other: str) -> Callable[[Results], tuple[str, str, float]]:
    """Ratio of images/s."""

    def value(results: Results) -> tuple[str, str, float]:
        mine, its = rate(results, ours), rate(results, other)
        return f"{ours}: {mine:.0f} images/s", f"{other}: {its:.0f} images/s", mine / its

    return value


def saved_memory(results: Results) -> tuple[str, str, float]:
    """Bytes of peak memory that ours needs less."""
    names = "ours, batch 256", "reference, batch 256"
    peaks = [config(results, name)["peak_bytes"] for name in names]
    if None in peaks:
        raise Missing("not measured")
    return size(peaks[0]), size(peaks[1]), float(peaks[1] - peaks[0])


def share(results: Results) -> tuple[str, str, float]:
    """Of matching, losses, momentum update and enqueues in the step."""
    phases = config(results, "ours, batch 256").get("phases")
    if not phases:
        raise Missing("not measured")
    ours = sum(phases.get(name, 0.0) for name in OURS_PARTS)
    return f"{1e3 * ours:.2f} ms", f"step: {1e3 * phases['step']:.1f} ms", ours / phases["step"]


def largest(results: Results) -> tuple[str, str, float]:
    """Ratio of the largest batches."""
    found = [results["largest"].get(model, {}) for model in ("ours", "reference")]
    for one in found:
        if one.get("reason") or not one.get("batch"):
            raise Missing(one.get("reason") or str(one.get("tries") or NOT_RUN))
    ours, other = (one["batch"] for one in found)
    return str(ours), f"reference: {other}", ours / other


def percent(value: float) -> str:
    """A share."""
    return f"{100 * value:.1f} %"


ASKED = (
    Asked("batch 32, eager", "at least 1.3x images/s",
          faster("ours, batch 32", "reference, batch 32"), lambda v: v >= 1.3, times),
    Asked("batch 32, CUDA graph", "at least 1.6x images/s",
          faster("ours, CUDA graph, batch 32", "reference, batch 32"), lambda v: v >= 1.6, times),
    Asked("batch 256, eager", "at least 1.1x images/s",
          faster("ours, batch 256", "reference, batch 256"), lambda v: v >= 1.1, times),
    Asked("batch 256, peak memory", "lower by at least 10 GB", saved_memory,
          lambda v: v >= 10e9, lambda v: f"{v / 1e9:+.1f} GB"),
    Asked("DenseCL against lambda = 0 (MoCo v2), batch 256", "at most 1 % slower",
          faster("ours, batch 256", "ours, lambda 0, batch 256"), lambda v: 1.0 / v - 1.0 <= 0.01,
          lambda v: f"{percent(1.0 / v - 1.0)} slower"),
    Asked("matching, losses, momentum update, enqueues in the step, batch 256", "under 2 %", share,
          lambda v: v < 0.02, percent),
    Asked("largest batch that fits", "at least 1.3x", largest, lambda v: v >= 1.3, times),
)  # fmt: skip


def verdicts(results: Results) -> list[Verdict]:
    """Every demand."""
    found = []
    for asked in ASKED:
        try:
            ours, other, value = asked.value(results)
        except Missing as reason:
            found.append(Verdict(asked.what, "", "", str(reason), asked.bound, None))
        else:
            written, met = asked.written(value), asked.met(value)
            found.append(Verdict(asked.what, ours, other, written, asked.bound, met))
    return found


def asked_table(results: Results) -> str:
    """The table of demands."""
    return table(HEADER, verdict_lines(verdicts(results)))


def markdown(results: Results) -> str:
    """step.md."""
    parts = ["# The training step", machine_line(results)]
    if results["quick"]:
        parts.append("**A quick run: a tiny network; the numbers mean nothing.**")
    parts += [
        "Whole pre-training steps of a ResNet-50 at 224 px (where nothing else is said) in "
        "bfloat16 autocast, channels-last, fused SGD, queues of 65,536. The views lie on the "
        "device already: no loader takes part. *Reference*: the same trainer with reference.py's "
        "ops, the matrix of logits in memory, the published update loop and the published queues. "
        "Medians of interleaved rounds; memory is the peak of everything, by torch's allocator.",
        "## What is asked",
        asked_table(results),
        "## Every configuration",
        config_table(results),
    ]
    timed = {n: c["phases"] for n, c in results["configs"].items() if c.get("phases")}
    if timed:
        parts += ["## Parts of a step", phase_table(timed)]
    tries = {model: found["tries"] for model, found in results["largest"].items()}
    if tries:
        lines = [f"- {model}: {found}" for model, found in tries.items()]
        parts += ["## Batches that were tried", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def machine_line(results: Results) -> str:
    """The GPU and the versions."""
    info = results["machine_info"]
    if info is None:
        return "The machine is not known."
    described = [f"{key} {value}" for key, value in info["device"].items() if key != "name"]
    return (
        f"{info['device']['name']} ({', '.join(described)}); {info['processor']}, {info['cores']} "
        f"cores; torch {info['torch']}, densecl_ext {info['densecl_ext']}; "
        f"{results['datetime'][:16]}."
    )


def config_table(results: Results) -> str:
    """Images/s, step time and memory."""
    cells = []
    for name, found in results["configs"].items():
        rates = found.get("images_per_second")
        if not rates:
            cells.append([name, str(found.get("reason") or NOT_RUN), "", "", ""])
            continue
        middle = statistics.median(rates)
        step = f"{1e3 * found['batch'] / middle:.1f} ms"
        spread = f"{min(rates):.0f} to {max(rates):.0f}"
        cells.append([name, f"{middle:.0f} images/s", spread, step, size(found["peak_bytes"])])
    return table(["", "rate", "rounds", "step", "peak memory"], cells)


def phase_table(timed: dict[str, dict[str, float]]) -> str:
    """Milliseconds and share of every part; what is left is the host's."""
    names = [name for name in ORDER if any(name in phases for phases in timed.values())]
    cells = []
    for config_name, phases in timed.items():
        whole = phases["step"]
        cells.append(
            [config_name, f"{1e3 * whole:.2f} ms"]
            + [f"{1e3 * phases[n]:.2f} ms, {percent(phases[n] / whole)}" if n in phases else ""
               for n in names]
        )  # fmt: skip
    return table(["", "step", *names], cells)


def line(found: dict[str, Any]) -> str:
    """A configuration in a line of the terminal."""
    rates = found.get("images_per_second")
    if not rates:
        return str(found.get("reason") or NOT_RUN)
    return f"{statistics.median(rates):.0f} images/s, peak {size(found['peak_bytes']) or 'unknown'}"
