"""The charts: speed-up against each baseline; time and peak memory against M and against K."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.report import ISA_NAMES, Entry, duration, size, suite_of, times

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
OURS = {"float32": "#0072b2", "bfloat16": "#d55e00"}
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
INK, FAINT = "#22262b", "#d9dde2"
STYLE: Any = {
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9aa0a8",
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "savefig.dpi": 160,
}
BARS = (
    "nce-f32",
    "nce-bf16",
    "nce-avx2-f32",
    "nce-m256-f32",
    "nce-m32-f32",
    "match",
    "ema",
    "enqueue",
)
GPU_BARS = (
    "nce",
    "nce-compile",
    "nce-m256",
    "nce-f32",
    "match-f32-cl",
    "match-bf16-cl",
    "ema",
    "enqueue",
    "step-loss",
)


def draw(rows: Sequence[Entry], results: dict[str, Any], out: Path) -> list[str]:
    """Write what the rows suffice for; returns the files' names."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    info = results["machine_info"]
    if info is None or suite_of(results) == "step":
        return []
    on_gpu = suite_of(results) == "gpu"
    if on_gpu:
        machine, prefix, bars, rows_kept = info["device"]["name"], "cuda_", GPU_BARS, 12544
    else:
        isa = ISA_NAMES.get(info["selected"], info["selected"])
        threads = f"{info['threads']} thread{'' if info['threads'] == 1 else 's'}"
        machine = f"{info['processor']}, {threads}, {isa}"
        prefix, bars, rows_kept = "", BARS, 1568
    own = [row for row in rows if "ours" in row.modes]
    written = []
    with pyplot.rc_context(STYLE):
        written += speedups(own, bars, str(machine), out / f"{prefix}speedup.png")
        for axis, fixed in (("M", ("queue_length", 65536)), ("K", ("rows", rows_kept))):
            path = out / f"{prefix}scaling_{axis.lower()}.png"
            written += scaling(own, axis, fixed, str(machine), path)
    return written


def speedups(
    rows: Sequence[Entry], bars_wanted: Sequence[str], machine: str, path: Path
) -> list[str]:
    """Bars: how many times faster than each baseline."""
    from matplotlib import pyplot

    by_id = {row.id: row for row in rows}
    chosen = [by_id[name] for name in bars_wanted if name in by_id]
    chosen = [row for row in chosen if baselines(row)]
    if not chosen:
        return []
    bars = sum(len(baselines(row)) for row in chosen)
    height = 0.23 * bars + 0.33 * len(chosen) + 1.2
    figure, axes = pyplot.subplots(figsize=(9.5, height), layout="constrained")
    y, ratios = 0.0, [1.0]
    for row in chosen:
        label = row.title.replace("info_nce, ", "info_nce  ")
        heading = f" {label}: {duration(row.seconds('ours'))}"
        axes.text(1.0, y - 0.15, heading, weight="bold", va="center", ha="left", fontsize=9.5)
        y += 0.8
        others = baselines(row)
        for i, name in enumerate(others):
            ours, theirs, _ = row.pair("ours", name)
            ratio = theirs / ours
            ratios.append(ratio)
            colour = COLOURS.get(name, OTHERS[i % len(OTHERS)])
            axes.barh(y, ratio - 1.0, left=1.0, height=0.72, color=colour)
            axes.text(max(ratio, 1.0), y, f" {times(ratio)}", va="center", ha="left", fontsize=9)
            axes.text(-0.01, y, f"{name}  {duration(theirs)}", transform=side(axes),
                      va="center", ha="right", fontsize=9)  # fmt: skip
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
    axes.grid(axis="x", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_xlabel("times faster than the baseline, logarithmic")
    figure.suptitle(
        f"densecl_ext against today's code: {machine}", x=0.01, ha="left", weight="bold"
    )
    figure.savefig(path)
    pyplot.close(figure)
    return [path.name]


def baselines(row: Entry) -> list[str]:
    """The candidates that are not ours."""
    return [name for name in row.modes if not name.startswith("ours")]


def side(axes: Axes) -> Any:
    """x in units of the axes' width, y in data."""
    return axes.get_yaxis_transform()


def scaling(
    rows: Sequence[Entry], axis: str, fixed: tuple[str, int], machine: str, path: Path
) -> list[str]:
    """Two panels, time and peak memory, over M or K; eager ends where it no longer fits."""
    from matplotlib import pyplot

    varied = "rows" if axis == "M" else "queue_length"
    chosen = [row for row in rows if on_axis(row, fixed)]
    lines: dict[str, dict[int, tuple[float, float | None]]] = {}
    missing: list[int] = []
    for row in chosen:
        x, dtype = row.case[varied], row.case["dtype"]
        line = lines.setdefault(f"ours, {dtype} queue", {})
        add_point(line, x, row, "ours")
        if "eager" in row.modes and (dtype == "float32" or "graph" in row.modes["eager"]):
            # in float32 whatever the queue's dtype; on a CPU a float32 row tells as much
            eager = lines.setdefault("eager PyTorch, float32", {})
            add_point(eager, x, row, "eager")
        elif "does not fit" in row.absent.get("eager", ""):
            missing.append(x)
    if max((len(line) for line in lines.values()), default=0) < 2:
        return []
    figure, panels = pyplot.subplots(1, 2, figsize=(10.5, 4.3), layout="constrained")
    styles = {
        "eager PyTorch, float32": ("#6d737c", "s"),
        "ours, float32 queue": (OURS["float32"], "o"),
        "ours, bfloat16 queue": (OURS["bfloat16"], "D"),
    }
    for column, (panel, name) in enumerate(
        zip(panels, ("time of loss and gradient", "peak extra memory"), strict=True)
    ):
        for label, (colour, marker) in styles.items():
            points = sorted(lines.get(label, {}).items())
            pairs = [(x, p[column]) for x, p in points if p[column]]
            if not pairs:
                continue
            xs, ys = zip(*pairs, strict=True)
            panel.plot(
                xs, ys, marker=marker, color=colour, label=label, markersize=5, linewidth=1.8
            )
            if "eager" in label and missing and min(missing) > xs[-1]:
                panel.annotate(
                    "no longer fits", (xs[-1], ys[-1]), xytext=(8, 2), textcoords="offset points",
                    color=colour, fontsize=9, va="center",
                )  # fmt: skip
        finish(panel, axis, name, column, sorted({row.case[varied] for row in chosen}))
    panels[0].legend(loc="upper left", fontsize=9)
    kept = f"{'K' if axis == 'M' else 'M'} = {fixed[1]:,}"
    figure.suptitle(f"info_nce over {axis} ({kept}, D = 128): {machine}", x=0.01, ha="left",
                    weight="bold")  # fmt: skip
    figure.savefig(path)
    pyplot.close(figure)
    return [path.name]


def add_point(line: dict[int, tuple[float, float | None]], x: int, row: Entry, name: str) -> None:
    """A row's time and memory; of two rows of one size, that which has both."""
    if x not in line or row.peaks[name] is not None:
        line[x] = (row.seconds(name), row.peaks[name])


def on_axis(row: Entry, fixed: tuple[str, int]) -> bool:
    """Whether the row is a point of the chart that keeps this size fixed."""
    case = row.case
    if case["kind"] != "InfoNceCase" or row.isa is not None:
        return False
    return case["features"] == 128 and case["gradient"] and case[fixed[0]] == fixed[1]


def finish(panel: Axes, axis: str, name: str, column: int, ticks: list[int]) -> None:
    """Scales, units and grid of one panel."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    panel.set_xscale("log")
    panel.set_yscale("log")
    crowded = [
        tick for i, tick in enumerate(ticks) if i + 1 < len(ticks) and ticks[i + 1] < 3 * tick
    ]
    panel.set_xticks(ticks, ["" if tick in crowded else f"{tick:,}" for tick in ticks])
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.minorticks_off()
    write = duration if column == 0 else size
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: write(value)))
    panel.set_xlabel("M, rows of the batch" if axis == "M" else "K, length of the queue")
    panel.set_title(name)
    panel.grid(color=FAINT, linewidth=0.7)
    panel.set_axisbelow(True)
