"""Several weights by one protocol: a table with paired intervals, and a picture."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from densecl_ext.evaluate.report import Report

RESAMPLES = 2000
# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom (any table of t).
T_QUANTILES = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Difference:
    """An arm's headline less the first arm's.

    Attributes:
        mean: of the pairs.
        low: lower end of the 95 % interval; NaN where there is no way to tell.
        high: upper end.
        by: what was drawn: "seeds", "images" or "".
    """

    mean: float
    low: float
    high: float
    by: str


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Arms measured by one protocol.

    Attributes:
        reports: arm -> its reports, one a seed.
        differences: arm -> its difference to the first arm; the first has none.
    """

    reports: dict[str, list[Report]]
    differences: dict[str, Difference]

    @property
    def line(self) -> str:
        """The protocol line, and how the intervals come about."""
        first = next(iter(self.reports.values()))[0]
        ways = {difference.by for difference in self.differences.values()}
        told = {
            "seeds": "95 % intervals: Student's t over paired seeds",
            "images": f"95 % intervals: bootstrap over images, {RESAMPLES} resamples, paired",
            "": "no intervals: one seed, and the protocol has no terms for each image",
        }
        return "; ".join([first.line, *(told[way] for way in sorted(ways))])

    def table(self) -> str:
        """A line an arm: the mean of every number, and the headline's difference, in percent."""
        numbers = list(next(iter(self.reports.values()))[0].numbers)
        base = next(iter(self.reports))
        head = ["%", "seeds", *numbers, f"{numbers[0]} - {base}", "95 % interval"]
        rows = [head]
        for arm, reports in self.reports.items():
            means = [mean([report.numbers[name] for report in reports]) for name in numbers]
            row = [arm, str(len(reports)), *(f"{100 * value:.2f}" for value in means)]
            if arm in self.differences:
                d = self.differences[arm]
                row += [f"{100 * d.mean:+.2f}", f"[{100 * d.low:+.2f}, {100 * d.high:+.2f}]"]
            rows.append(row + [""] * (len(head) - len(row)))
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        return "\n".join(
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "line": self.line,
            "arms": {arm: [one.to_dict() for one in some] for arm, some in self.reports.items()},
            "differences": {
                arm: {
                    "mean": d.mean,
                    "low": d.low if math.isfinite(d.low) else None,
                    "high": d.high if math.isfinite(d.high) else None,
                    "by": d.by,
                }
                for arm, d in self.differences.items()
            },
        }

    def draw(self, png: Path) -> None:
        """Draw a bar an arm, a dot a seed, and the interval of the difference; matplotlib."""
        from matplotlib.figure import Figure

        from densecl_ext.visualize.losses import save

        arms = list(self.reports)
        name = next(iter(self.reports[arms[0]][0].numbers))
        figure = Figure(figsize=(7.2, 0.55 * len(arms) + 1.5), dpi=120, layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for row, arm in enumerate(arms):
            values = [100 * report.value for report in self.reports[arm]]
            left.barh(row, mean(values), color="#1a73e8", alpha=0.75, height=0.6)
            left.scatter(values, [row] * len(values), s=14, color="#202124", zorder=3)
            if arm in self.differences:
                d = self.differences[arm]
                colour = "#188038" if d.low > 0 else "#d93025" if d.high < 0 else "#5f6368"
                if math.isfinite(d.low):
                    right.plot([100 * d.low, 100 * d.high], [row, row], color=colour, linewidth=2.5)
                right.scatter([100 * d.mean], [row], color=colour, s=34, zorder=3)
        left.set_yticks(range(len(arms)), arms)
        left.set_ylim(len(arms) - 0.5, -0.5)
        left.set_xlabel(f"{name}, %")
        right.axvline(0.0, color="#202124", linewidth=0.8)
        right.set_xlabel(f"difference to {arms[0]}, 95 % interval")
        for axes in (left, right):
            axes.grid(alpha=0.25, axis="x")
            axes.spines[["top", "right"]].set_visible(False)
        protocol = self.reports[arms[0]][0].protocol
        figure.suptitle(protocol, fontweight="bold", fontsize=11)
        save(figure, png)


def compare_reports(reports: Mapping[str, Sequence[Report]]) -> Comparison:
    """Compare arms with the first one, in pairs.

    With two seeds or more the interval is Student's t over the differences of the same places in
    both lists (seed by seed); with one it is a bootstrap over images, the same images drawn for
    both.

    Args:
        reports: arm -> reports, one a seed; all of one protocol on the same data.

    Raises:
        ValueError: fewer than two arms, different protocols, or different numbers of seeds.
    """
    arms = {arm: list(some) for arm, some in reports.items()}
    if len(arms) < 2:
        raise ValueError(f"compare: needs two arms or more, got {len(arms)}")
    if len({len(some) for some in arms.values()}) != 1 or not all(arms.values()):
        counts = {arm: len(some) for arm, some in arms.items()}
        raise ValueError(f"compare: every arm must have as many seeds, got {counts}")
    if len({report.protocol for some in arms.values() for report in some}) != 1:
        raise ValueError("compare: all reports must be of one protocol")
    base, *others = arms
    return Comparison(arms, {arm: difference(arms[arm], arms[base]) for arm in others})


def difference(ours: Sequence[Report], base: Sequence[Report]) -> Difference:
    """The paired difference of two arms' headlines, with a 95 % interval."""
    values = [a.value - b.value for a, b in zip(ours, base, strict=True)]
    if len(values) > 1:
        center = mean(values)
        spread = math.sqrt(sum((v - center) ** 2 for v in values) / (len(values) - 1))
        freedom = len(values) - 1
        t = T_QUANTILES[freedom - 1] if freedom <= len(T_QUANTILES) else 1.96 + 2.5 / freedom
        half = t * spread / math.sqrt(len(values))
        return Difference(center, center - half, center + half, "seeds")
    one, other = ours[0], base[0]
    if one.terms is None or other.terms is None or one.headline is None:
        return Difference(values[0], math.nan, math.nan, "")
    if one.terms.shape != other.terms.shape:
        raise ValueError("compare: both arms must be measured on the same images")
    generator = torch.Generator().manual_seed(0)
    n = len(one.terms)
    drawn = torch.randint(n, (RESAMPLES, n), generator=generator)
    weight = torch.zeros(RESAMPLES, n, dtype=torch.float64)
    weight.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    both = [
        one.headline((weight @ r.terms.double().flatten(1)).view(RESAMPLES, *r.terms.shape[1:]))
        for r in (one, other)
        if r.terms is not None
    ]
    low, high = (both[0] - both[1]).nanquantile(
        torch.tensor([0.025, 0.975], dtype=torch.float64)
    ).tolist()  # fmt: skip
    return Difference(values[0], low, high, "images")


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)
