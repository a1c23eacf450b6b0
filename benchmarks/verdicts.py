"""What was asked and what came of it: results.json as rows, verdicts and numbers in words."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.rows import Asked, rows

NOT_RUN = "not run"
OUR_PARTS = ("momentum", "matching", "losses", "enqueue")
ISA_NAMES = {"serial": "plain C++", "neon": "NEON", "avx2": "AVX2", "avx512": "AVX-512",
             "avx512bf16": "AVX-512 BF16"}  # fmt: skip


class Missing(Exception):
    """A number that a demand needs is not there; the message says why."""


class Entry:
    """One measured row: what results.json says of it, and its times."""

    def __init__(self, info: dict[str, Any]) -> None:
        self.info = info
        self.id, self.title, self.case = info["row"], info["title"], info["case"]
        self.absent: dict[str, str] = info["absent"]
        self.found: dict[str, dict[str, Any]] = info["candidates"]
        self.images = max((made["images"] for made in self.found.values()), default=0)
        in_graphs = any("graph" in made["modes"] for made in self.found.values())
        self.on_gpu = in_graphs or info["device"] == "cuda"

    def modes(self, name: str) -> dict[str, list[float]]:
        """Seconds of one call, a sample a round, by mode."""
        return self.found[name]["modes"]

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


def entries(results: dict[str, Any]) -> list[Entry]:
    """The measured rows, in the order they ran."""
    return [Entry(info) for info in results["rows"] if "candidates" in info]


def ceilings(results: dict[str, Any]) -> dict[str, Any]:
    """What the machine reached at most, where it is known."""
    return (results["machine_info"] or {}).get("ceilings") or {}


def failures(results: dict[str, Any]) -> list[str]:
    """Rows that failed, and candidates that computed something else or failed where ours did."""
    found = [f"{name}: {why}" for name, why in results["skipped"].items() if "failed" in why]
    for info in results["rows"]:
        for name, why in info.get("absent", {}).items():
            if why.startswith("wrong") or (name == "ours" and why.startswith("failed")):
                found.append(f"{info['row']}: {name}: {why}")
    return found


class Verdict(NamedTuple):
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
        for row in rows(results["suite"])
        for asked in row.asked
    ]


def judge(asked: Asked, row: Entry | None, row_id: str, results: dict[str, Any]) -> Verdict:
    """One demand against the row it is about."""
    title = row.title if row else row_id
    words, demand = DEMANDS[asked.measure]
    bound = demand.format(f"{asked.bound:g}x" if words is times else words(asked.bound))
    try:
        ours, other, value = value_of(asked, row, row_id, results)
    except Missing as reason:
        return Verdict(title, "", asked.against, str(reason), bound, None)
    text = "" if asked.measure in ("seconds", "syncs") else words(value)
    met = value >= asked.bound if bound.startswith("at least") else value <= asked.bound
    return Verdict(title, ours, other, text, bound, met)


def value_of(
    asked: Asked, row: Entry | None, row_id: str, results: dict[str, Any]
) -> tuple[str, str, float]:
    """Ours and the other in words, and the value that is asked about; raises Missing."""
    measure, against, _, who = asked
    if row is None:
        raise Missing(results.get("skipped", {}).get(row_id, NOT_RUN))
    if who not in row.found:
        raise Missing(row.absent.get(who, NOT_RUN))
    if measure == "syncs":
        waits = known(row.info.get("host_waits"))
        return waits or "the host never waits", "", float(bool(waits))
    if measure in ("extra", "memory", "saved"):
        ours = known(row.peak(who))
        if measure == "extra":
            return f"{size(ours)} extra", "", float(ours)
        theirs = known(row.peak(against))
        value = float(theirs - ours) if measure == "saved" else ours / max(theirs, 1)
        return f"{size(ours)} extra", f"{against}: {size(theirs)} extra", value
    if measure == "parts":
        parts = known(row.info.get("parts", {}).get(who) or None)
        ours = sum(parts.get(name, 0.0) for name in OUR_PARTS)
        return duration(ours), f"step: {duration(parts['step'])}", ours / parts["step"]
    if measure == "seconds":
        return duration(row.seconds(who)), "", row.seconds(who)
    if measure == "copy":
        moved, copied = row.found[who]["traffic"] / row.seconds(who), ceilings(results).get("copy")
        if not isinstance(copied, float):
            raise Missing(copied or NOT_RUN)
        return bandwidth(moved), f"copy: {bandwidth(copied)}", moved / copied
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


# Numbers in words.


def scaled(value: float, *units: tuple[float, str]) -> str:
    """In the first of the units that is not too large, or else in the last."""
    scale, unit = next((unit for unit in units if abs(value) >= unit[0]), units[-1])
    return f"{value / scale:.3g} {unit}"


def times(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.1f}x" if ratio < 100 else f"{ratio:.0f}x"


def duration(seconds: float) -> str:
    return scaled(seconds, (1.0, "s"), (1e-3, "ms"), (1e-6, "us"))


def size(count: float | None) -> str:
    """Bytes; nothing where they are not known."""
    if count is None:
        return ""
    small = f"{count / 1e3:.0f} kB"
    return small if abs(count) < 1e6 else scaled(count, (1e9, "GB"), (1e6, "MB"))


def rate(flops: float) -> str:
    if flops >= 5e12:
        return f"{flops / 1e12:.3g} TFLOP/s"
    return f"{flops / 1e9:,.0f} GFLOP/s" if flops >= 1e10 else f"{flops / 1e9:.2g} GFLOP/s"


def bandwidth(bytes_per_second: float) -> str:
    gigabytes = bytes_per_second / 1e9
    return f"{gigabytes:.3g} GB/s" if gigabytes < 100 else f"{gigabytes:,.0f} GB/s"


def percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def machine_words(info: dict[str, Any]) -> str:
    """As in `AMD EPYC, 2 threads, AVX-512`."""
    threads = f"{info['threads']} thread{'' if info['threads'] == 1 else 's'}"
    return f"{info['processor']}, {threads}, {ISA_NAMES.get(info['selected'], info['selected'])}"


# By measure: the value in words, and how the demand reads.
DEMANDS: dict[str, tuple[Callable[[float], str], str]] = {
    "speed-up": (times, "at least {} faster"),
    "time": (times, "at most {} the time"),
    "rate": (times, "at least {} the FLOP/s"),
    "memory": (times, "at most {} the memory"),
    "extra": (size, "at most {} extra"),
    "saved": (size, "at least {} less"),
    "seconds": (duration, "at most {}"),
    "copy": (percent, "at least {} of a copy's bandwidth"),
    "parts": (percent, "at most {} of the step"),
    "syncs": (str, "no wait"),
}
