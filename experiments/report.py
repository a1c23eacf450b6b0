"""Tables and the figure of docs/evidence.md, from experiments/results/.

    python -m experiments.report                # prints the tables
    python -m experiments.report --write        # and puts them between docs/evidence.md's marks

A mark names the studies whose lines its tables are made of, and may say "against" which arm.

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
FIGURE_OF = "tuned long rate_long peers"  # of the page's marks
METRICS = {  # name in the lines: title, digits
    "segmentation": ("linear mIoU", 1),
    "incontext": ("in-context mIoU", 1),
    "exact": ("correspondence", 3),
    "finetune46": ("fine-tuned mIoU, 46 labelled", 1),
    "finetune": ("fine-tuned mIoU, 367", 1),
    "ap": ("raccoons AP", 1),
    "knn": ("Caltech-101 k-NN", 1),
    "position_share": ("position share", 2),
}
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
    "pixpro": "PixPro",
    "slotcon": "SlotCon",
}
Rows = dict[str, dict[int, dict[str, Any]]]  # arm and its settings -> seed -> line
Group = tuple[str, str, int, str]  # split, set, steps, network where it is not the usual one


def groups(found: Iterable[dict[str, Any]]) -> dict[Group, Rows]:
    """Lines that may be compared; an arm with settings of its own is a row of its own."""
    grouped: dict[Group, list[tuple[Run, dict[str, Any]]]] = defaultdict(list)
    without: dict[tuple[str, str, str], dict[int, dict[str, Any]]] = defaultdict(dict)
    for line in found:
        run = Run(**line["run"])
        if run.arm == "random":
            without[run.split, run.set, network(run)][run.seed] = line
        else:
            grouped[run.split, run.set, run.steps, network(run)].append((run, line))
    out: dict[Group, Rows] = {}
    for (split, name, steps, of), members in sorted(grouped.items(), key=lambda item: item[0]):
        options = [json.loads(run.options) for run, _ in members]
        shared = {k: v for k, v in options[0].items() if all(o.get(k) == v for o in options)}
        rows: Rows = defaultdict(dict)
        for (run, line), own in zip(members, options, strict=True):
            settings = [f"{k}={v}" for k, v in own.items() if k not in shared]
            if run.lr != ARMS[run.arm][2]:
                settings.append(f"lr={run.lr:g}")
            rows[" ".join([run.arm, ", ".join(settings)]).strip()][run.seed] = line
        if without[split, name, of]:
            rows["random"] = without[split, name, of]
        told = [of] if of else []
        told += [f"{k}={v}" for k, v in shared.items()]
        out[split, name, steps, ", ".join(told)] = rows
    for (split, name, of), seeds in without.items():
        if seeds and not any((key[0], key[1]) == (split, name) for key in out):
            out[split, name, 0, of] = {"random": seeds}  # a study of random weights alone
    return out


def network(run: Run) -> str:
    """What differs from the usual network, views and start, as text."""
    words = {
        "backbone": run.backbone,
        "truncate": "all stages",
        "output_stride": f"stride {run.output_stride}",
        "size": f"{run.size} pixels",
        "batch": f"batch {run.batch}",
        "views": "views " + ", ".join(f"{k}={v}" for k, v in json.loads(run.views).items()),
        "start": f"from {run.start}",
    }
    usual = {field.name: field.default for field in dataclasses.fields(Run)}
    if not run.truncate:
        usual["output_stride"] = 0  # said beside "all stages" whatever it is
    return ", ".join(word for name, word in words.items() if getattr(run, name) != usual[name])


def row_of(rows: Rows, arm: str) -> str:
    """A row by its name, or an arm's: of several, that of most seeds, its own settings first."""
    if arm in rows:
        return arm
    own = [label for label in rows if label.partition(" ")[0] == arm]
    return max(own, key=lambda label: (len(rows[label]), label == arm), default="")


def table(rows: Rows, against: str = BASELINE) -> str:
    """One group as Markdown; differences are to `against`, an arm or one of its rows."""
    baseline = row_of(rows, against)
    every = [line["numbers"] for by_seed in rows.values() for line in by_seed.values()]
    metrics = [metric for metric in METRICS if any(metric in numbers for numbers in every)]
    head = ["arm", "seeds", *(METRICS[metric][0] for metric in metrics)]
    out = [" | ".join(head), " | ".join("---" for _ in head)]
    order = sorted(rows, key=lambda arm: (arm != "random", -mean_of(rows[arm], "segmentation")))
    for arm in order:
        name, _, rest = arm.partition(" ")
        cells = [NAMES.get(name, name) + (f" ({rest})" if rest else ""), str(len(rows[arm]))]
        for metric in metrics:
            digits = METRICS[metric][1]
            if math.isnan(mean_of(rows[arm], metric)):
                cells.append("")
                continue
            cell = f"{mean_of(rows[arm], metric):.{digits}f}"
            other = rows.get(baseline, {})
            paired = rows[arm].keys() & other.keys() and not math.isnan(mean_of(other, metric))
            if arm != baseline and metric != "position_share" and paired:
                cell += f" ({difference(rows[arm], other, metric, digits)})"
            cells.append(cell)
        out.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in out)


def difference(
    one: dict[int, dict[str, Any]], other: dict[int, dict[str, Any]], metric: str, digits: int
) -> str:
    """Mean of one - other over their common seeds, and its 95 % interval."""
    common = sorted(one.keys() & other.keys())
    mean, half = interval([value(one[s], metric) - value(other[s], metric) for s in common])
    if not math.isfinite(half):
        return f"{mean:+.{digits}f}"
    low, high = mean - half, mean + half
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def ahead(found: dict[Group, Rows], against: str) -> list[str]:
    """Ours after some steps beside the baseline after more, one line a pair of lengths."""
    out = []
    for (split, name, steps, of), rows in found.items():
        longer = [key for key in found if key[:2] == (split, name) and key[3] == of]
        for key in (key for key in longer if key[2] > steps):
            one, other = rows.get(row_of(rows, "ours")), found[key].get(row_of(found[key], against))
            if one and other:
                told = [
                    f"{difference(one, other, metric, 1)} {METRICS[metric][0]}"
                    for metric in ("segmentation", "incontext")
                ]
                name_of, _, settings = against.partition(" ")
                other_name = " ".join([NAMES[name_of], settings]).strip()
                who = f"ours after {steps:,} steps - {other_name} after {key[2]:,}"
                out.append(f"- {name}, {who}: {', '.join(told)}")
    return [*out, ""] if out else []


def value(line: dict[str, Any], metric: str) -> float:
    """A number of a line; NaN where it was not measured."""
    return float(line["numbers"].get(metric, math.nan))


def mean_of(lines_by_seed: dict[int, dict[str, Any]], metric: str) -> float:
    """Mean over the seeds."""
    return fmean(value(line, metric) for line in lines_by_seed.values())


def draw(found: dict[Group, Rows], png: Path) -> None:
    """Linear and in-context mIoU over the number of steps: a dot a seed, a line at the means."""
    from matplotlib.figure import Figure

    usual = [key for key in found if key[0] == "test" and not key[3]]
    sets = [name for name in ("camvid", "photos") if any(key[1] == name for key in usual)]
    titles = {
        "photos": "pre-trained on photographs",
        "camvid": "pre-trained on CamVid's own frames, no labels",
    }
    lines_of = {"ours": "#0072b2", "mocov2": "#8a8f98"}
    points = {"vicregl": "v", "slotcon": "D", "dino": "s", "densecl_paper": "x"}
    figure = Figure(figsize=(4.6 * len(sets), 6.4), dpi=110, layout="constrained")
    axes = figure.subplots(2, len(sets), squeeze=False, sharey="row", sharex=True)
    for column, name in enumerate(sets):
        groups_of = {key[2]: found[key] for key in usual if key[1] == name}
        for row, metric in enumerate(("segmentation", "incontext")):
            ax = axes[row][column]
            for arm, colour in lines_of.items():
                means = {}
                for steps, rows in sorted(groups_of.items()):
                    seen = [value(one, metric) for one in rows.get(row_of(rows, arm), {}).values()]
                    if seen:
                        means[steps] = fmean(seen)
                        ax.scatter([steps] * len(seen), seen, s=18, color=colour, alpha=0.6)
                ax.plot(means.keys(), means.values(), color=colour, linewidth=2, label=NAMES[arm])
            shortest = min(groups_of)
            rows = groups_of[shortest]
            for arm, marker in points.items():
                if label := row_of(rows, arm):
                    mean = mean_of(rows[label], metric)
                    ax.scatter(
                        shortest * 0.9, mean, marker=marker, color="#d55e00", label=NAMES[arm]
                    )
            if "random" in rows:
                mean = mean_of(rows["random"], metric)
                ax.axhline(mean, color="black", linewidth=1, linestyle=":", label=NAMES["random"])
            ax.set_xscale("log")
            ax.minorticks_off()
            ax.set_xticks(sorted(groups_of), [f"{steps:,}" for steps in sorted(groups_of)])
            ax.set_ylabel(f"CamVid test, {METRICS[metric][0]}" if column == 0 else "")
            ax.spines[["top", "right"]].set_visible(False)
            ax.grid(axis="y", color="#e5e7eb")
        axes[0][column].set_title(titles[name], fontsize=10)
        axes[1][column].set_xlabel("training steps of 64 images")
    axes[0][-1].legend(
        *axes[0][0].get_legend_handles_labels(),
        fontsize=8, frameon=False, ncol=2, loc="lower right", bbox_to_anchor=(1, 0.05),
    )  # fmt: skip
    png.parent.mkdir(exist_ok=True)
    figure.savefig(png)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.report", description=__doc__)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--against", help='differences to this instead, as "mocov2 lr=0.1"')
    given = parser.parse_args()
    if given.write and given.against:
        parser.error("the page's differences are to MoCo v2: leave out --write or --against")
    if given.against and given.against.partition(" ")[0] not in ARMS:
        parser.error(f"--against must begin with one of {', '.join(ARMS)}, got {given.against!r}")
    page = PAGE.read_text(encoding="utf-8")

    def filled(mark: re.Match[str]) -> str:
        studies, _, other = mark[1].partition(" against ")
        found = groups(
            one for study in studies.split() for one in lines(RESULTS / f"{study}.jsonl")
        )
        baseline = given.against or other or BASELINE
        text = [f"<!-- {mark[1]} -->", ""]
        for (split, name, steps, of), rows in found.items():
            length = f"{name}, {steps:,} steps" if steps else "no pre-training"
            title = f"{length}, {of + ', ' if of else ''}CamVid {split}"
            text += [f"**{title}**", "", table(rows, baseline), ""]
        text += ahead(found, baseline)
        print("\n".join(text))
        if mark[1] == FIGURE_OF and given.write:
            draw(found, FIGURE)
        return "\n".join([*text, f"<!-- /{mark[1]} -->"])

    page = re.sub(r"<!-- ([\w ]+) -->\n.*?<!-- /\1 -->", filled, page, flags=re.DOTALL)
    if given.write:
        PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
