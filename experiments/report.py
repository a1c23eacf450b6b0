"""Tables and the figure of docs/evidence.md, from experiments/results/.

    python -m experiments.report                # prints the tables
    python -m experiments.report --write        # and puts them between docs/evidence.md's marks

A table has one row an arm: mean over the seeds, and the paired difference to the baseline, seed by
seed, with its 95 % interval by Student's t.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

from densecl_ext.study import interval
from experiments.methods import ARMS
from experiments.run import RESULTS, lines
from experiments.training import Run

ROOT = Path(__file__).resolve().parent.parent
PAGE, FIGURE = ROOT / "docs" / "evidence.md", ROOT / "docs" / "images" / "evidence.png"
FIGURE_OF = "tuned"
METRICS = {
    "segmentation": "linear mIoU",
    "incontext": "in-context mIoU",
    "exact": "correspondence",
    "position_share": "position share",
}
DECIMALS = {"segmentation": 1, "incontext": 1, "exact": 3, "position_share": 2}
BASELINE = "mocov2"
NAMES = {
    "random": "random weights",
    "mocov2": "MoCo v2",
    "mocov2_reflect": "MoCo v2, reflect padding",
    "densecl_paper": "DenseCL as published",
    "densecl_paper_reflect": "DenseCL as published, reflect padding",
    "densecl_geometric": "geometric matching alone",
    "densecl_position": "single-position negatives alone",
    "ours": "ours",
    "simsiam": "SimSiam",
    "byol": "BYOL",
    "dino": "DINO",
    "vicregl": "VICRegL",
}
Rows = dict[str, dict[int, dict[str, Any]]]  # arm and its settings -> seed -> line
Group = tuple[str, str, int, str]  # split, set, steps, network where it is not the usual one


def groups(found: Iterable[dict[str, Any]]) -> dict[Group, Rows]:
    """Lines that may be compared; an arm with settings of its own is a row of its own."""
    grouped: dict[Group, Rows] = defaultdict(lambda: defaultdict(dict))
    without: dict[tuple[str, str, str], dict[int, dict[str, Any]]] = defaultdict(dict)
    for line in found:
        run = Run(**line["run"])
        settings = json.loads(run.options)
        label = run.arm
        if settings:
            label += " " + ", ".join(f"{k}={v}" for k, v in settings.items())
        if run.arm == "random":
            without[run.split, run.set, network(run)][run.seed] = line
            continue
        if run.lr != ARMS[run.arm][2]:
            label += f" lr={run.lr:g}"
        grouped[run.split, run.set, run.steps, network(run)][label][run.seed] = line
    for (split, name, _, of), rows in grouped.items():
        if without[split, name, of]:
            rows["random"] = without[split, name, of]
    return dict(sorted(grouped.items()))


def network(run: Run) -> str:
    """What differs from the usual network and views, as text."""
    usual = {field.name: field.default for field in dataclasses.fields(Run)}
    names = {"backbone": "", "output_stride": "stride ", "size": "pixels ", "batch": "batch "}
    values = {name: getattr(run, name) for name in names}
    return ", ".join(f"{names[n]}{v}" for n, v in values.items() if v != usual[n])


def baseline_of(rows: Rows) -> str:
    """The baseline's row: of several, that of most seeds, the arm's own settings before others."""
    own = [label for label in rows if label.partition(" ")[0] == BASELINE]
    return max(own, key=lambda label: (len(rows[label]), label == BASELINE), default="")


def table(rows: Rows) -> str:
    """One group as Markdown."""
    baseline = baseline_of(rows)
    head = ["arm", "seeds", *METRICS.values()]
    out = [" | ".join(head), " | ".join("---" for _ in head)]
    order = sorted(rows, key=lambda arm: (arm != "random", -mean_of(rows[arm], "segmentation")))
    for arm in order:
        name, _, rest = arm.partition(" ")
        cells = [NAMES.get(name, name) + (f" ({rest})" if rest else ""), str(len(rows[arm]))]
        for metric in METRICS:
            digits = DECIMALS[metric]
            cell = f"{mean_of(rows[arm], metric):.{digits}f}"
            common = sorted(rows[arm].keys() & rows.get(baseline, {}).keys())
            if arm != baseline and metric != "position_share" and common:
                differences = [
                    value(rows[arm][seed], metric) - value(rows[baseline][seed], metric)
                    for seed in common
                ]
                mean, half = interval(differences)
                if math.isfinite(half):
                    low, high = mean - half, mean + half
                    cell += f" ({mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}])"
                else:
                    cell += f" ({mean:+.{digits}f})"
            cells.append(cell)
        out.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in out)


def value(line: dict[str, Any], metric: str) -> float:
    """A number of a line."""
    return float(line["numbers"][metric])


def mean_of(lines_by_seed: dict[int, dict[str, Any]], metric: str) -> float:
    """Mean over the seeds."""
    return fmean(value(line, metric) for line in lines_by_seed.values())


def draw(found: dict[Group, Rows], png: Path) -> None:
    """Linear mIoU and correspondence of the arms: a dot a seed, a line at their mean."""
    from matplotlib.figure import Figure

    shown = [arm for arm in ("random", "densecl_paper", "mocov2", "vicregl", "dino", "ours")]
    # label by arm; of several settings, the one of most seeds
    labels = {
        key: {
            label.partition(" ")[0]: label
            for label in sorted(rows, key=lambda label: len(rows[label]))
        }
        for key, rows in found.items()
    }
    sets = [key for key in found if len(found[key].get(labels[key].get("ours", ""), {})) > 1]
    if not sets:
        return  # one seed shows nothing
    figure = Figure(figsize=(3.3 * len(sets), 5.6), dpi=110, layout="constrained")
    axes = figure.subplots(2, len(sets), squeeze=False, sharey="row")
    for column, key in enumerate(sets):
        rows = found[key]
        arms = [arm for arm in shown if arm in labels[key]]
        for row, metric in enumerate(("segmentation", "exact")):
            ax = axes[row][column]
            for place, arm in enumerate(arms):
                seen = [value(line, metric) for line in rows[labels[key][arm]].values()]
                colour = "#0072b2" if arm == "ours" else "#8a8f98"
                ax.scatter([place] * len(seen), seen, s=22, color=colour, zorder=3)
                ax.hlines(fmean(seen), place - 0.3, place + 0.3, color=colour, linewidth=2)
            ax.set_xticks(range(len(arms)), [NAMES[arm].replace(" as ", "\nas ") for arm in arms])
            ax.tick_params(axis="x", labelsize=8)
            ax.set_ylabel(
                {"segmentation": "CamVid, linear mIoU", "exact": "correspondence"}[metric]
            )
            ax.spines[["top", "right"]].set_visible(False)
            ax.grid(axis="y", color="#e5e7eb")
        source = {"photos": "photographs", "camvid": "CamVid's own frames"}[key[1]]
        axes[0][column].set_title(f"{source}\n{key[2]:,} steps", fontsize=10)
    png.parent.mkdir(exist_ok=True)
    figure.savefig(png)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.report", description=__doc__)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
    for path in sorted(RESULTS.glob("*.jsonl")):
        study = path.stem
        found = groups(lines(path))
        text = []
        for (split, name, steps, of), rows in found.items():
            title = f"{name}, {steps:,} steps, {of + ', ' if of else ''}CamVid {split}"
            text += [f"**{title}**", "", table(rows), ""]
        body = "\n".join(text)
        print(f"== {study}\n\n{body}")
        mark = rf"(<!-- {study} -->\n).*?(<!-- /{study} -->)"
        page = re.sub(mark, lambda m, body=body: f"{m[1]}\n{body}\n{m[2]}", page, flags=re.DOTALL)
        if study == FIGURE_OF and given.write:
            draw(found, FIGURE)
    if given.write:
        PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
