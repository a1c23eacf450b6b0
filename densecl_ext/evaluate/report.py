"""What a protocol returns: numbers, and the settings that decide them."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

_TITLES = {"miou": "mIoU", "frequency_weighted_iou": "frequency-weighted IoU"}


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of one protocol on one network.

    Attributes:
        protocol: the protocol's name.
        numbers: name -> value; the first is the headline. Shares lie in [0, 1]; NaN where a number
            does not exist.
        settings: everything that decides the numbers, in the order of the protocol line.
        tables: further numbers by name, such as the intersection over union of every class.
        terms: (N, ...) one row an image, whose sum over images decides the headline; None where
            it is no function of such a sum.
        headline: sums (B, ...) -> (B,) values of the headline, for resampling ``terms``.
        draw: writes a picture to the path it is given; None where there is none.
        seconds: how long the protocol took.
    """

    protocol: str
    numbers: dict[str, float]
    settings: dict[str, Any]
    tables: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    terms: Tensor | None = None
    headline: Callable[[Tensor], Tensor] | None = None
    draw: Callable[[Path], None] | None = None
    seconds: float = 0.0

    @property
    def value(self) -> float:
        """The headline."""
        return next(iter(self.numbers.values()))

    @property
    def line(self) -> str:
        """The protocol line: the name and every setting that decides the numbers."""
        return f"{self.protocol}: " + ", ".join(
            f"{name}={_words(value)}" for name, value in self.settings.items()
        )

    def to_dict(self) -> dict[str, Any]:
        """The result for JSON: NaN, which JSON does not have, becomes None."""
        return {
            "protocol": self.protocol,
            "line": self.line,
            **_finite(self.numbers),
            **{name: _finite(table) for name, table in self.tables.items()},
            "settings": self.settings,
            "seconds": round(self.seconds, 3),
        }

    def table(self) -> str:
        """The result in lines for a person."""
        return reports_table({self.protocol: self})


def reports_table(reports: Mapping[str, Report]) -> str:
    """Several networks' results of one protocol side by side, shares in percent.

    Args:
        reports: column title -> report, all of one protocol.

    Returns:
        One column a network, one line a number, indented where it comes from a table.

    Raises:
        ValueError: no report, or different protocols.
    """
    if not reports or len({report.protocol for report in reports.values()}) != 1:
        raise ValueError("reports_table: needs reports of one protocol")
    rows: dict[str, dict[str, float]] = {}
    for title, report in reports.items():
        for name, value in report.numbers.items():
            rows.setdefault(_TITLES.get(name, name.replace("_", " ")), {})[title] = value
        for table in report.tables.values():
            for name, value in table.items():
                rows.setdefault(f"  {name}", {})[title] = value
    left = max(len(name) for name in rows)
    widths = {title: max(len(title), 6) for title in reports}
    lines = ["%".ljust(left) + "".join(f"  {title:>{w}}" for title, w in widths.items())]
    for name, values in rows.items():
        cells = (f"  {100 * values.get(title, math.nan):>{w}.2f}" for title, w in widths.items())
        lines.append(name.ljust(left) + "".join(cells))
    return "\n".join(lines)


def write_json(path: str | os.PathLike[str], content: Any) -> Path:
    """Write JSON atomically and return its path; the folder is made."""
    from densecl_ext.checkpoints.storage import atomic_file

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write((json.dumps(content, indent=2, default=str) + "\n").encode())
    return path


def _finite(numbers: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}


def _words(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (tuple, list)):
        return "x".join(str(item) for item in value) if value else "-"
    return str(value)
