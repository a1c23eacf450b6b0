"""What was asked and what came of it: results.json as rows, verdicts and numbers in words."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.rows import Asked, rows

NOT_RUN = "not run"
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


def ceilings(results: dict[str, Any]) -> dict[str, Any]:
    """What the machine reached at most, where it is known."""
    return (results["machine_info"] or {}).get("ceilings") or {}


def failures(results: dict[str, Any]) -> list[str]:
    """Rows that failed, and candidates that computed something else or failed where ours did."""
    found = [f"{name}: {why}" for name, why in results["skipped"].items() if "failed" in why]
    for benchmark in results["benchmarks"]:
        info = benchmark["extra_info"]
        for name, why in info.get("absent", {}).items():
            if why.startswith("wrong") or (name == "ours" and why.startswith("failed")):
                found.append(f"{info['row']}: {name}: {why}")
    return found


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
