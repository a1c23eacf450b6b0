"""What was asked and what came of it: results.json as rows, verdicts and numbers in words."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from benchmarks.rows import Asked, rows

NOT_RUN = "not run"
OUR_PARTS = ("momentum", "matching", "losses", "enqueue")


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


def entries(results: dict[str, Any]) -> list[Entry]:
    """The measured rows, in the order they ran."""
    return [Entry(info) for info in results["rows"] if "candidates" in info]


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
    found = []
    for row in rows(results["suite"]):
        for asked in row.asked:
            words, demand = DEMANDS[asked.measure]
            bound = demand.format(f"{asked.bound:g}x" if words is times else words(asked.bound))
            entry, lost = by_id.get(row.id), results["skipped"].get(row.id, NOT_RUN)
            try:
                ours, other, value = value_of(asked, known(entry, lost), results)
            except Missing as reason:
                title = entry.title if entry else row.id
                found.append(Verdict(title, "", asked.against, str(reason), bound, None))
                continue
            met = value >= asked.bound if bound.startswith("at least") else value <= asked.bound
            text = "" if asked.measure in ("seconds", "syncs") else words(value)
            found.append(Verdict(by_id[row.id].title, ours, other, text, bound, met))
    return found


def value_of(asked: Asked, row: Entry, results: dict[str, Any]) -> tuple[str, str, float]:
    """Ours and the other in words, and the value that is asked about; raises Missing."""
    measure, against, _, who = asked
    if who not in row.found:
        raise Missing(row.absent.get(who, NOT_RUN))
    if measure == "syncs":
        waits = known(row.info.get("host_waits"))
        return waits or "the host never waits", "", float(bool(waits))
    if measure == "seconds":
        return duration(row.seconds(who)), "", row.seconds(who)
    if measure == "parts":
        parts = known(row.info.get("parts", {}).get(who) or None)
        ours, step = sum(parts.get(name, 0.0) for name in OUR_PARTS), parts["step"]
        return duration(ours), f"step: {duration(step)}", ours / step
    if measure == "copy":
        copied = results["machine_info"].get("ceilings", {}).get("copy")
        known(copied if isinstance(copied, float) else None, copied or NOT_RUN)
        moved = row.found[who]["traffic"] / row.seconds(who)
        return bandwidth(moved), f"copy: {bandwidth(copied)}", moved / copied
    if measure in ("extra", "memory", "saved"):
        ours = known(row.peak(who))
        if measure == "extra":
            return f"{size(ours)} extra", "", float(ours)
        theirs = known(row.peak(against))
        value = float(theirs - ours) if measure == "saved" else ours / max(theirs, 1)
        return f"{size(ours)} extra", f"{against}: {size(theirs)} extra", value
    others = [name for name in against.split(" | ") if name in row.found]
    reasons = [row.absent[name] for name in against.split(" | ") if name in row.absent]
    known(others or None, "; ".join(reasons) or NOT_RUN)
    other = min(others, key=lambda name: row.pair(who, name)[1])
    ours, theirs, how = row.pair(who, other)
    if measure == "rate":
        mine, its = row.work(who) / ours, row.work(other) / theirs
        return rate(mine), f"{other}: {rate(its)}", mine / its
    label = "" if who == "ours" else f"{who}: "
    value = theirs / ours if measure == "speed-up" else ours / theirs
    return f"{label}{duration(ours)}{how}", f"{other}: {duration(theirs)}", value


def known(value: Any, reason: str = "not measured") -> Any:
    """The value; Missing with the reason where there is none."""
    if value is None:
        raise Missing(reason)
    return value


def scaled(unit: str, value: float | None) -> str:
    """Three digits and a prefix, as in 243 ms; nothing where the value is not known."""
    if value is None:
        return ""
    value = float(f"{value:.3g}")
    power = math.floor(math.log10(abs(value)) / 3) if value else 0
    power = max(-3, min(power, 4 if unit != "s" else 0))
    return f"{value / 1000.0**power:.4g} {'num kMGT'[power + 3].strip()}{unit}"


duration, size = partial(scaled, "s"), partial(scaled, "B")
rate, bandwidth = partial(scaled, "FLOP/s"), partial(scaled, "B/s")


def times(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.1f}x" if ratio < 100 else f"{ratio:.0f}x"


def percent(share: float) -> str:
    return f"{100 * share:.3g} %"


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
