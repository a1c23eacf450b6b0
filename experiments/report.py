"""Tables and the figure of docs/evidence.md, from experiments/results/.

    python -m experiments.report                # prints the tables
    python -m experiments.report --write        # and puts them between docs/evidence.md's marks

A table has one row an arm: mean over the seeds, and the paired difference to the baseline, seed by
seed, with its 95 % interval by Student's t.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

from densecl_ext.study import interval
from experiments.run import RESULTS

ROOT = Path(__file__).resolve().parent.parent
PAGE, FIGURE = ROOT / "docs" / "evidence.md", ROOT / "docs" / "images" / "evidence.png"
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
Rows = dict[str, dict[int, dict[str, Any]]]  # arm -> seed -> line


def lines(study: str) -> list[dict[str, Any]]:
    """The results of a study."""
    path = RESULTS / f"{study}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def groups(found: Iterable[dict[str, Any]]) -> dict[tuple[str, str, int], Rows]:
    """Lines by split, set and steps; an arm with options of its own is a row of its own."""
    grouped: dict[tuple[str, str, int], Rows] = defaultdict(lambda: defaultdict(dict))
    without: dict[tuple[str, str], dict[int, dict[str, Any]]] = defaultdict(dict)
    for line in found:
        run = line["run"]
        arm = run["arm"]
        if run["options"] != "{}":
            arm += " " + ", ".join(f"{k}={v}" for k, v in json.loads(run["options"]).items())
        if arm == "random":
            without[run["split"], run["set"]][run["seed"]] = line
            continue
        usual = default_rate(run["arm"])
        if run["lr"] != usual:
            arm += f" lr={run['lr']:g}"
        grouped[run["split"], run["set"], run["steps"]][arm][run["seed"]] = line
    for (split, name, _), rows in grouped.items():
        if without[split, name]:
            rows["random"] = without[split, name]
    return dict(sorted(grouped.items()))


def default_rate(arm: str) -> float:
    """The arm's own learning rate."""
    from experiments.methods import ARMS

    return ARMS[arm][2]


def table(rows: Rows, baseline: str = BASELINE) -> str:
    """One group as Markdown."""
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


def draw(found: dict[tuple[str, str, int], Rows], png: Path) -> None:
    """Linear mIoU and correspondence of the arms: a dot a seed, a line at their mean."""
    from matplotlib.figure import Figure

    shown = [arm for arm in ("random", "densecl_paper", "mocov2", "vicregl", "dino", "ours")]
    sets = [key for key in found if len(found[key].get("ours", {})) > 1]
    if not sets:
        return  # one seed shows nothing
    figure = Figure(figsize=(4.6 * len(sets), 5.6), dpi=110, layout="constrained")
    axes = figure.subplots(2, len(sets), squeeze=False)
    for column, key in enumerate(sets):
        rows = found[key]
        arms = [arm for arm in shown if arm in rows]
        for row, metric in enumerate(("segmentation", "exact")):
            ax = axes[row][column]
            for place, arm in enumerate(arms):
                seen = [value(line, metric) for line in rows[arm].values()]
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
        axes[0][column].set_title(f"pre-trained on {source}, {key[2]:,} steps", fontsize=10)
    png.parent.mkdir(exist_ok=True)
    figure.savefig(png)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.report", description=__doc__)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
    for path in sorted(RESULTS.glob("*.jsonl")):
        study = path.stem
        found = groups(lines(study))
        text = []
        for (split, name, steps), rows in found.items():
            text += [f"**{name}, {steps:,} steps, CamVid {split}**", "", table(rows), ""]
        body = "\n".join(text)
        print(f"== {study}\n\n{body}")
        mark = rf"(<!-- {study} -->\n).*?(<!-- /{study} -->)"
        page = re.sub(mark, lambda m, body=body: f"{m[1]}\n{body}\n{m[2]}", page, flags=re.DOTALL)
        if study == "final" and given.write:
            draw(found, FIGURE)
    if given.write:
        PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
