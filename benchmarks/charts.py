"""The charts: speed-up against each baseline; time and peak memory against M and against K."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.verdicts import Entry, duration, machine_words, size, suite_of, times

# Okabe and Ito's palette, which colour-blind readers tell apart.
COLOURS = {
    "eager": "#8a8f98",
    "eager autocast": "#b7bcc4",
    "eager TF32": "#6d737c",
    "torch.compile": "#e69f00",
    "torch.compile autocast": "#f0c45c",
    "flash attention": "#009e73",
    "cuDNN attention": "#56b4e9",
    "lightly": "#cc79a7",
}
OTHERS = ("#8a8f98", "#e69f00", "#009e73", "#cc79a7")
LINES = {
    "eager PyTorch, float32": ("#6d737c", "s"),
    "ours, float32 queue": ("#0072b2", "o"),
    "ours, bfloat16 queue": ("#d55e00", "D"),
}
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
INK, FAINT = "#22262b", "#d9dde2"
STYLE: Any = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    "font.size": 10,
    "axes.edgecolor": "#9aa0a8",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "savefig.dpi": 160,
}
BARS = {
    "cpu": ("nce-f32", "nce-bf16", "nce-avx2-f32", "nce-m256-f32", "nce-m32-f32", "match", "ema",
            "enqueue"),
    "gpu": ("nce", "nce-compile", "nce-m256", "nce-f32", "match-f32-cl", "match-bf16-cl", "ema",
            "enqueue", "step-loss"),
}  # fmt: skip
Line = dict[int, tuple[float, float | None]]


def draw(rows: Sequence[Entry], results: dict[str, Any], out: Path) -> list[str]:
    """Write what the rows suffice for; returns the files' names."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    suite, info = suite_of(results), results["machine_info"]
    if info is None or suite not in BARS:
        return []
    machine = info["device"]["name"] if suite == "gpu" else machine_words(info)
    prefix, rows_kept = ("cuda_", 12544) if suite == "gpu" else ("", 1568)
    own = [row for row in rows if "ours" in row.found]
    with pyplot.rc_context(STYLE):
        made = {"speedup": speedups(own, BARS[suite])}
        for axis, fixed in (("M", ("queue_length", 65536)), ("K", ("rows", rows_kept))):
            made[f"scaling_{axis.lower()}"] = scaling(own, axis, fixed)
        written = []
        for name, (figure, title) in made.items():
            if figure is not None:
                figure.suptitle(f"{title}: {machine}", x=0.01, ha="left", weight="bold")
                figure.savefig(out / f"{prefix}{name}.png")
                pyplot.close(figure)
                written.append(f"{prefix}{name}.png")
    return written


def speedups(rows: Sequence[Entry], wanted: Sequence[str]) -> tuple[Any, str]:
    """Bars: how many times faster than each baseline."""
    from matplotlib import pyplot

    by_id = {row.id: row for row in rows}
    chosen = [by_id[name] for name in wanted if name in by_id and baselines(by_id[name])]
    if not chosen:
        return None, ""
    bars = sum(len(baselines(row)) for row in chosen)
    height = 0.23 * bars + 0.33 * len(chosen) + 1.2
    figure, axes = pyplot.subplots(figsize=(9.5, height), layout="constrained")
    y, ratios = 0.0, [1.0]
    for row in chosen:
        label = row.title.replace("info_nce, ", "info_nce  ")
        heading = f" {label}: {duration(row.seconds('ours'))}"
        axes.text(1.0, y - 0.15, heading, weight="bold", va="center", fontsize=9.5)
        y += 0.8
        for i, name in enumerate(baselines(row)):
            ours, theirs, _ = row.pair("ours", name)
            ratios.append(theirs / ours)
            colour = COLOURS.get(name, OTHERS[i % len(OTHERS)])
            axes.barh(y, ratios[-1] - 1.0, left=1.0, height=0.72, color=colour)
            axes.text(max(ratios[-1], 1.0), y, f" {times(ratios[-1])}", va="center", fontsize=9)
            axes.text(-0.01, y, f"{name}  {duration(theirs)}", va="center", ha="right", fontsize=9,
                      transform=axes.get_yaxis_transform())  # fmt: skip
            y += 1.0
        y += 0.75
    axes.set_ylim(y - 0.6, -0.8)
    axes.set_xscale("log")  # one bar is of another order than the rest
    low, high = min(0.9, 0.8 * min(ratios)), 1.5 * max(ratios)
    axes.set_xlim(low, high)
    ticks = [tick for tick in TICKS if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.axvline(1.0, color=INK, linewidth=1.0)
    axes.grid(axis="x")
    axes.set_xlabel("times faster than the baseline, logarithmic")
    return figure, "densecl_ext against today's code"


def baselines(row: Entry) -> list[str]:
    """The candidates that are not ours."""
    return [name for name in row.found if not name.startswith("ours")]


def scaling(rows: Sequence[Entry], axis: str, fixed: tuple[str, int]) -> tuple[Any, str]:
    """Two panels, time and peak memory, over M or K; eager ends where it no longer fits."""
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullFormatter

    varied = "rows" if axis == "M" else "queue_length"
    chosen = [row for row in rows if on_axis(row, fixed)]
    lines: dict[str, Line] = {}
    missing: list[int] = []
    for row in chosen:
        x, dtype = row.case[varied], row.case["dtype"]
        add_point(lines.setdefault(f"ours, {dtype} queue", {}), x, row, "ours")
        if "eager" in row.found and (dtype == "float32" or row.on_gpu):
            # in float32 whatever the queue's dtype; on a CPU a float32 row tells as much
            add_point(lines.setdefault("eager PyTorch, float32", {}), x, row, "eager")
        elif "does not fit" in row.absent.get("eager", ""):
            missing.append(x)
    if max((len(line) for line in lines.values()), default=0) < 2:
        return None, ""
    figure, panels = pyplot.subplots(1, 2, figsize=(10.5, 4.3), layout="constrained")
    ticks = sorted({row.case[varied] for row in chosen})
    crowded = {tick for tick, after in zip(ticks, ticks[1:], strict=False) if after < 3 * tick}
    for column, (name, words) in enumerate(
        (("time of loss and gradient", duration), ("peak extra memory", size))
    ):
        panel = panels[column]
        for label, (colour, marker) in LINES.items():
            points = sorted(lines.get(label, {}).items())
            pairs = [(x, p[column]) for x, p in points if p[column]]
            if not pairs:
                continue
            xs, ys = zip(*pairs, strict=True)
            panel.plot(xs, ys, color=colour, marker=marker, label=label, markersize=5, lw=1.8)
            if "eager" in label and missing and min(missing) > xs[-1]:
                panel.annotate("no longer fits", (xs[-1], ys[-1]), xytext=(8, 2), fontsize=9,
                               textcoords="offset points", color=colour, va="center")  # fmt: skip
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xticks(ticks, ["" if tick in crowded else f"{tick:,}" for tick in ticks])
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.minorticks_off()
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _, words=words: words(value)))
        panel.set_xlabel("M, rows of the batch" if axis == "M" else "K, length of the queue")
        panel.set_title(name)
        panel.grid()
    panels[0].legend(loc="upper left", fontsize=9)
    kept = f"{'K' if axis == 'M' else 'M'} = {fixed[1]:,}"
    return figure, f"info_nce over {axis} ({kept}, D = 128)"


def add_point(line: Line, x: int, row: Entry, name: str) -> None:
    """A row's time and memory; of two rows of one size, that which has both."""
    if x not in line or row.peak(name) is not None:
        line[x] = (row.seconds(name), row.peak(name))


def on_axis(row: Entry, fixed: tuple[str, int]) -> bool:
    """Whether the row is a point of the chart that keeps this size fixed."""
    case = row.case
    if case["kind"] != "InfoNceCase" or row.info["isa"] is not None:
        return False
    return case["features"] == 128 and case["gradient"] and case[fixed[0]] == fixed[1]
