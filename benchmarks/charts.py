"""The charts: speed-up against each baseline; time and peak memory against M and against K."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.verdicts import Entry, duration, size, times

# Okabe and Ito's palette, which colour-blind readers tell apart.
COLOURS = {
    "eager": "#8a8f98", "eager autocast": "#b7bcc4", "eager TF32": "#6d737c",
    "torch.compile": "#e69f00", "torch.compile autocast": "#f0c45c", "flash attention": "#009e73",
    "cuDNN attention": "#56b4e9", "lightly": "#cc79a7",
}  # fmt: skip
LINES = {
    "eager PyTorch, float32": ("#6d737c", "s"),
    "ours, float32 queue": ("#0072b2", "o"),
    "ours, bfloat16 queue": ("#d55e00", "D"),
}
STYLE: Any = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "grid.color": "#d9dde2", "legend.frameon": False, "savefig.dpi": 160,
}  # fmt: skip
BARS = {
    "cpu": ("nce-f32", "nce-bf16", "nce-m256-f32", "nce-m32-f32", "match", "ema", "enqueue"),
    "gpu": ("nce", "nce-compile", "nce-m256", "nce-f32", "match-f32-cl", "match-bf16-cl", "ema",
            "enqueue", "step-loss"),
}  # fmt: skip
# What grows, what is kept, and at which size, on a CPU and on a GPU.
AXES = {"m": ("rows", "queue_length", {"cpu": 65536, "gpu": 65536}),
        "k": ("queue_length", "rows", {"cpu": 1568, "gpu": 12544})}  # fmt: skip
NAMES = {"rows": "M, rows of the batch", "queue_length": "K, length of the queue"}
Point = tuple[float, int | None]  # seconds, bytes


def draw(rows: Sequence[Entry], suite: str, machine: str, out: Path) -> None:
    """Write the charts that the rows suffice for."""
    if suite not in BARS:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        made = {"speedup": speedups(rows, BARS[suite])}
        made |= {f"scaling_{axis}": scaling(losses(rows), suite, axis) for axis in AXES}
        for name, (figure, title) in made.items():
            if figure is not None:
                figure.suptitle(f"{title}: {machine}", x=0.01, ha="left", weight="bold")
                figure.savefig(out / f"{'cuda_' if suite == 'gpu' else ''}{name}.png")
                pyplot.close(figure)


def speedups(rows: Sequence[Entry], wanted: Sequence[str]) -> tuple[Any, str]:
    """Bars: how many times faster than each baseline, under each row's name and time."""
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator

    bars = {
        row: [name for name in row.found if not name.startswith("ours")]
        for name in wanted for row in rows if row.id == name and "ours" in row.found
    }  # fmt: skip
    bars = {row: names for row, names in bars.items() if names}
    if not bars:
        return None, ""
    height = 0.23 * sum(len(names) + 1.6 for names in bars.values()) + 1.2
    figure, axes = pyplot.subplots(figsize=(9.5, height), layout="constrained")
    y, ratios, labels = 0.0, [1.0], {}
    for row, names in bars.items():
        heading = f" {row.title}: {duration(row.seconds('ours'))}"
        axes.text(1.0, y - 0.15, heading, weight="bold", va="center", fontsize=9.5)
        for name in names:
            y += 1.0
            ours, theirs, _ = row.pair("ours", name)
            ratios.append(theirs / ours)
            axes.barh(
                y, ratios[-1] - 1.0, left=1.0, height=0.72, color=COLOURS.get(name, "#8a8f98")
            )
            axes.text(max(ratios[-1], 1.0), y, f" {times(ratios[-1])}", va="center", fontsize=9)
            labels[y] = f"{name}  {duration(theirs)}"
        y += 1.6
    axes.set_yticks(list(labels), labels.values(), fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.set(xscale="log", ylim=(y - 0.6, -0.8), xlim=(min(0.9, 0.8 * min(ratios)),
             1.5 * max(ratios)), xlabel="times faster than the baseline, logarithmic")  # fmt: skip
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.minorticks_off()
    axes.spines["left"].set_visible(False)
    axes.axvline(1.0, color="black", linewidth=1.0)
    axes.grid(axis="x")
    return figure, "densecl_ext against today's code"


def losses(rows: Sequence[Entry]) -> list[Entry]:
    """Loss and gradient at every size, sorted; of two rows of a size, that which has its memory."""
    found: dict[tuple[Any, ...], Entry] = {}
    for row in rows:
        if row.case["kind"] == "info_nce" and row.case["gradient"] and "ours" in row.found:
            key = tuple(row.case[n] for n in ("dtype", "features", "queue_length", "rows"))
            if key not in found or found[key].peak("ours") is None:
                found[key] = row
    return [found[key] for key in sorted(found)]


def curves(rows: Sequence[Entry], suite: str, axis: str) -> tuple[dict[str, dict[int, Point]], int]:
    """The points of a chart's lines, and the first size at which eager does not fit, or 0.

    No lines where none has two points: there is no such chart.
    """
    varied, kept, fixed = AXES[axis]
    lines: dict[str, dict[int, Point]] = {label: {} for label in LINES}
    too_large = 0
    for row in rows:
        x, dtype = row.case[varied], row.case["dtype"]
        label, of_size = f"ours, {dtype} queue", row.case[kept] == fixed.get(suite)
        if label not in lines or row.case["features"] != 128 or not of_size:
            continue
        lines[label][x] = row.seconds("ours"), row.peak("ours")
        if "eager" in row.found and (dtype == "float32" or row.on_gpu):
            # in float32 whatever the queue's dtype; on a CPU a float32 row tells as much
            eager = row.seconds("eager"), row.peak("eager")
            lines["eager PyTorch, float32"].setdefault(x, eager)
        elif "does not fit" in row.absent.get("eager", ""):
            too_large = too_large or x
    return (lines if max(map(len, lines.values())) > 1 else {}), too_large


def scaling(rows: Sequence[Entry], suite: str, axis: str) -> tuple[Any, str]:
    """Two panels, time and peak memory, over M or K; eager ends where it no longer fits."""
    from matplotlib import pyplot

    lines, too_large = curves(rows, suite, axis)
    if not lines:
        return None, ""
    varied, kept, fixed = AXES[axis]
    figure, panels = pyplot.subplots(1, 2, figsize=(10.5, 4.3), layout="constrained")
    ticks = sorted({x for line in lines.values() for x in line})
    crowded = {tick for tick, after in zip(ticks, ticks[1:], strict=False) if after < 3 * tick}
    for column, (panel, words) in enumerate(zip(panels, (duration, size), strict=True)):
        for label, (colour, marker) in LINES.items():
            points = [(x, y[column]) for x, y in sorted(lines[label].items()) if y[column]]
            panel.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=5,
                       label=label if points else None, lw=1.8)  # fmt: skip
            if points and "eager" in label and too_large > points[-1][0]:
                panel.annotate("no longer fits", points[-1], xytext=(8, 2), fontsize=9,
                               textcoords="offset points", color=colour, va="center")  # fmt: skip
        panel.loglog()
        panel.set_xticks(ticks, ["" if tick in crowded else f"{tick:,}" for tick in ticks])
        panel.minorticks_off()
        panel.yaxis.set_major_formatter(lambda value, _, words=words: words(value))
        panel.set_xlabel(NAMES[varied])
        panel.set_title("peak extra memory" if column else "time of loss and gradient")
        panel.grid()
    panels[0].legend(loc="upper left", fontsize=9)
    at = f"{NAMES[kept][0]} = {fixed[suite]:,}, D = 128"
    return figure, f"info_nce over {NAMES[varied][0]} ({at})"
