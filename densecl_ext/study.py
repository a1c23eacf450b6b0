"""`densecl ablate`: one option at a time, over seeds, on your own images; resumable.

Every arm of a study is the same configuration but for a few options. All arms of a seed start from
the same weights and see the same images and views, so that their differences are paired.
"""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from torch import nn

from densecl_ext.checkpoints import load_backbone
from densecl_ext.checkpoints.storage import atomic_file
from densecl_ext.train import PretrainConfig, pretrain
from densecl_ext.train.progress import Progress

Arms = Mapping[str, Mapping[str, Any]]
Measure = Callable[[nn.Module], Mapping[str, float]]

# study -> arm -> the options that make it; the first arm is what the others are compared with.
STUDIES: dict[str, Arms] = {
    "lambda": {
        "lambda 0 (MoCo v2)": {"loss_lambda": 0.0},
        "lambda 0.1": {"loss_lambda": 0.1},
        "lambda 0.3": {"loss_lambda": 0.3},
        "lambda 0.5": {"loss_lambda": 0.5},
        "lambda 0.7": {"loss_lambda": 0.7},
        "lambda 0.85": {"loss_lambda": 0.85},
        "lambda 1": {"loss_lambda": 1.0},
        "lambda 1, warm-up": {"loss_lambda": 1.0, "lambda_warmup": "2ep"},
    },
    "grid": {
        "own grid": {"grid_size": "none"},
        "1 x 1": {"grid_size": 1},
        "3 x 3": {"grid_size": 3},
        "5 x 5": {"grid_size": 5},
        "7 x 7": {"grid_size": 7},
    },
    "matching": {
        "geometric": {"matching": "geometric"},
        "backbone": {"matching": "backbone"},
        "backbone, mutual": {"matching": "backbone", "mutual_matching": True},
        "dense": {"matching": "dense"},
        "geometric, then backbone": {"matching": "backbone", "geometric_share": 0.5},
        "random": {"matching": "random"},
    },
    "negatives": {
        "MoCo v2": {"loss_lambda": 0.0},
        "DenseCL as published": {"matching": "backbone", "dense_negatives": "pooled"},
        "geometric, pooled": {"matching": "geometric", "dense_negatives": "pooled"},
        "backbone, position": {"matching": "backbone", "dense_negatives": "position"},
        "geometric, position": {"matching": "geometric", "dense_negatives": "position"},
        "geometric, 4 positions": {
            "matching": "geometric",
            "dense_negatives": "position",
            "positions_per_image": 4,
        },
    },
    "schedule": {
        "as given": {},
        "half the epochs": {"epochs": 0.5},
        "twice the epochs": {"epochs": 2.0},
        "four times the epochs": {"epochs": 4.0},
    },
    "queue": {
        "auto": {"queue_length": "auto"},
        "256": {"queue_length": 256},
        "1,024": {"queue_length": 1024},
        "4,096": {"queue_length": 4096},
        "16,384": {"queue_length": 16384},
    },
}


@dataclasses.dataclass(frozen=True)
class Line:
    """One run of a study.

    Attributes:
        arm: its name.
        seed: its seed.
        numbers: what was measured, the headline first.
    """

    arm: str
    seed: int
    numbers: dict[str, float]


def run_study(
    arms: Arms,
    base: Mapping[str, Any],
    seeds: Sequence[int],
    measure: Measure,
    output: Path,
    *,
    progress: Progress | None = None,
) -> list[Line]:
    """Pre-train every arm with every seed and measure it.

    Writes OUTPUT/ARM/seed_N/ (the runs) and OUTPUT/results.csv, a line as soon as a run is
    measured. What is there is not done again, and a run that was interrupted goes on.

    Args:
        arms: name -> options on top of ``base``; a factor of ``epochs`` below 1 or with a fraction
            multiplies the base's.
        base: options that all arms share.
        seeds: of weights, order and views.
        measure: backbone -> numbers.
        output: folder of the study.
        progress: told about every step of every run.

    Raises:
        ValueError: an option that does not fit, or results of another study in ``output``.
        KeyboardInterrupt: a run was stopped; the next call goes on with it.
    """
    table = output / "results.csv"
    lines = read_lines(table)
    strange = {line.arm for line in lines} - set(arms)
    if strange:
        raise ValueError(
            f"ablate: {table} holds other arms ({', '.join(sorted(strange))}); use another output"
        )
    done = {(line.arm, line.seed) for line in lines}
    for seed in seeds:
        for arm, own in arms.items():
            if (arm, seed) in done:
                continue
            folder = output / "".join(c if c.isalnum() else "_" for c in arm) / f"seed_{seed}"
            config = arm_config({**base, "seed": seed, "output": str(folder)}, own)
            resume = (folder / "checkpoints" / "last.pt").is_file()
            result = pretrain(config, resume=resume, progress=progress)
            if result.interrupted:
                raise KeyboardInterrupt
            numbers = dict(measure(load_backbone(result.checkpoint)))
            lines.append(Line(arm, seed, numbers))
            write_lines(table, lines)
    return lines


def arm_config(base: Mapping[str, Any], own: Mapping[str, Any]) -> PretrainConfig:
    """The configuration of an arm."""
    values = {**base, **own}
    if isinstance(own.get("epochs"), float):
        usual = PretrainConfig(**base).epochs
        values["epochs"] = max(1, round(usual * own["epochs"]))
    return PretrainConfig(**values)


def read_lines(table: Path) -> list[Line]:
    """The lines of results.csv; none where there is no file."""
    if not table.is_file():
        return []
    with table.open(newline="", encoding="utf-8") as file:
        return [
            Line(row.pop("arm"), int(row.pop("seed")), {k: float(v) for k, v in row.items() if v})
            for row in csv.DictReader(file)
        ]


def write_lines(table: Path, lines: Sequence[Line]) -> None:
    """Replace results.csv in one go."""
    names = list(dict.fromkeys(name for line in lines for name in line.numbers))
    with atomic_file(table) as file:
        rows = [["arm", "seed", *names]]
        rows += [
            [line.arm, str(line.seed), *(f"{line.numbers.get(n, math.nan):.7g}" for n in names)]
            for line in lines
        ]
        for row in rows:
            quoted = ('"' + cell.replace('"', '""') + '"' if "," in cell else cell for cell in row)
            file.write((",".join(quoted) + "\n").encode())


# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Mean of paired differences, and half of its 95 % interval by Student's t.

    Infinite for a single difference; above 13, the quantile of 13 is used, which is a little wide.
    """
    if len(differences) < 2:
        return fmean(differences), math.inf
    quantile = _T[min(len(differences) - 2, len(_T) - 1)]
    return fmean(differences), quantile * stdev(differences) / math.sqrt(len(differences))


def compared(lines: Sequence[Line], baseline: str, metrics: Sequence[str] = ()) -> str:
    """A table: mean over the seeds, and the paired difference to the baseline with its interval."""
    by_arm: dict[str, dict[int, Line]] = {}
    for line in lines:
        by_arm.setdefault(line.arm, {})[line.seed] = line
    metrics = metrics or list(dict.fromkeys(name for line in lines for name in line.numbers))
    rows = [["arm", "seeds", *metrics]]
    for arm, runs in by_arm.items():
        row = [arm, str(len(runs))]
        for metric in metrics:
            cell = f"{fmean(line.numbers[metric] for line in runs.values()):.4g}"
            common = sorted(runs.keys() & by_arm.get(baseline, {}).keys())
            if arm != baseline and common:
                mean, half = interval(
                    [
                        runs[seed].numbers[metric] - by_arm[baseline][seed].numbers[metric]
                        for seed in common
                    ]
                )
                cell += f" ({mean:+.3g}"
                cell += f" [{mean - half:+.3g}, {mean + half:+.3g}])" if half < math.inf else ")"
            row.append(cell)
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
