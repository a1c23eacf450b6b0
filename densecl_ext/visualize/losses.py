"""The loss curves of a run."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from densecl_ext.checkpoints.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVES = (
    ("loss", "total", "#202124", 2.4),
    ("loss_global", "global", "#1a73e8", 1.6),
    ("loss_dense", "dense", "#e8710a", 1.6),
)


def read_metrics(path: str | os.PathLike[str]) -> dict[str, list[float]]:
    """Columns of a run's metrics.csv.

    Args:
        path: the file.

    Returns:
        Column name -> values in the order of the steps; NaN where a cell is empty.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no row, or no column ``step``.
    """
    path = Path(path)
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or "step" not in rows[0]:
        raise ValueError(f"read_metrics: {path} must have a column 'step' and at least one row")
    columns: dict[str, list[float]] = {}
    for name in rows[0]:
        if name is None:
            continue
        columns[name] = [float(row[name]) if row[name] else math.nan for row in rows]
    return columns


def plot_losses(
    metrics: str | os.PathLike[str],
    png: str | os.PathLike[str],
    *,
    title: str = "DenseCL pre-training",
) -> Path:
    """Draw total, global and dense loss over the steps.

    Args:
        metrics: metrics.csv of a run, or the run's folder.
        png: the picture to write; its folder is made.
        title: above the picture.

    Returns:
        The picture's path.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has no row or none of the loss columns.
        ImportError: matplotlib is not installed.
    """
    source = Path(metrics)
    if source.is_dir():
        source = RunFolder(source).metrics
    columns = read_metrics(source)
    present = [curve for curve in CURVES if curve[0] in columns]
    if not present:
        raise ValueError(f"plot_losses: {source} has none of the columns loss, loss_global, ...")

    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.2), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    steps = columns["step"]
    for name, label, colour, width in present:
        values = columns[name]
        last = next((v for v in reversed(values) if not math.isnan(v)), math.nan)
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1.0)
        axes.plot(
            steps,
            smooth(values),
            color=colour,
            linewidth=width,
            label=f"{label}, {last:.2f} at end",
        )
    axes.set_xlabel("step")
    axes.set_ylabel("InfoNCE loss (nats)")
    axes.set_title(title, loc="left", fontweight="bold")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="best")
    return save(figure, png)


def smooth(values: Sequence[float], share: float = 0.03) -> list[float]:
    """Centred moving average over ``share`` of the values, shorter at the ends, without NaN."""
    half = int(len(values) * share / 2.0)
    out = []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)
        near = [v for v in values[i - reach : i + reach + 1] if not math.isnan(v)]
        out.append(sum(near) / len(near) if near else math.nan)
    return out


def save(figure: Figure, png: str | os.PathLike[str]) -> Path:
    """Write a figure as PNG of at most 128 colours and return its path; the folder is made.

    A palette keeps pictures of photographs small enough to be shown in a README.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.frombytes(
        "RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba())
    ).convert("RGB")
    path = Path(png)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.quantize(128, dither=Image.Dither.NONE).save(path, format="PNG", optimize=True)
    return path
