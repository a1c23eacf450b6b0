"""`densecl ablate`: studies of one option over seeds, on the user's own images."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from densecl_ext.cli.command import Option, Word, command, given, options_of
from densecl_ext.train.config import PretrainConfig
from densecl_ext.train.recipes import load_recipe, recipe_names

STUDIES = ("lambda", "grid", "matching", "negatives", "schedule", "queue")  # of densecl_ext.study


@command(
    "ablate",
    "Compare values of one option on your own images: every arm with every seed, each measured by "
    "correspondence (no labels) and, with --labels, by linear and in-context segmentation.\n\nAn "
    "interrupted study goes on with the same command.",
    "densecl ablate --study negatives --data photos --recipe small_data --epochs 20 "
    "--output runs/negatives",
    Option(
        ["--study"],
        type=click.Choice(STUDIES),
        required=True,
        help="what differs between the arms",
    ),
    Option(["--seeds"], type=int, default=3, metavar="N", help="seeds 0 to N - 1 (default: 3)"),
    Option(
        ["--labels"],
        metavar="DIR",
        type=Word("DIR"),
        help="folder of labelled images, as `densecl evaluate segmentation` takes it",
    ),
    Option(
        ["--recipe"],
        metavar="NAME|FILE",
        type=Word("FILE", recipe_names()),
        help="what all arms share, before the options below",
    ),
    *[option for option in options_of(PretrainConfig) if option.name != "seed"],
)
def ablate(study: str, seeds: int, labels: str | None, recipe: str | None, **options: Any) -> int:
    """Runs a study and prints its table."""
    from densecl_ext.study import STUDIES, compared, run_study
    from densecl_ext.train.progress import ConsoleProgress

    values = (load_recipe(recipe) if recipe else {}) | given(options)
    config = PretrainConfig(**values)
    if not config.data:
        raise ValueError("ablate: data must name a folder of images, got nothing (--data DIR)")
    if seeds < 1:
        raise ValueError(f"ablate: seeds must be at least 1, got {seeds}")
    values.pop("output", None)
    lines = run_study(
        STUDIES[study],
        values,
        range(seeds),
        Measurement(config, labels),
        Path(config.output),
        progress=ConsoleProgress(),
    )
    print(compared(lines, next(iter(STUDIES[study]))))
    print(f"lines: {Path(config.output) / 'results.csv'}", file=sys.stderr)
    return 0


class Measurement:
    """Backbone -> numbers: correspondence on the images, segmentation where there are labels."""

    def __init__(self, config: PretrainConfig, labels: str | None) -> None:
        from densecl_ext.evaluate.correspondence import CorrespondenceOptions, Views

        self.pairs = CorrespondenceOptions(
            data=_one_folder(config.data), view_size=config.image_size
        )
        self.views = Views.load(self.pairs)
        self.labelled = None
        self.protocols: list[Any] = []
        if labels is not None:
            from densecl_ext.evaluate.dense import DenseData
            from densecl_ext.evaluate.incontext import InContext, InContextOptions
            from densecl_ext.evaluate.segmentation import Linear, SegmentationOptions

            shared: dict[str, Any] = {"data": labels, "recalibrate": 256}
            linear = SegmentationOptions(**shared, solver="lbfgs")
            self.labelled = DenseData.load(linear)
            self.protocols = [Linear(linear), InContext(InContextOptions(**shared))]

    def __call__(self, backbone: Any) -> dict[str, float]:
        """The numbers of one backbone."""
        from densecl_ext.evaluate.correspondence import correspondence
        from densecl_ext.evaluate.dense import evaluate_dense

        numbers: dict[str, float] = {}
        if self.labelled is not None:
            reports = evaluate_dense(backbone, self.labelled, self.protocols)
            numbers |= {f"{name} mIoU": 100 * report.value for name, report in reports.items()}
        found = correspondence(backbone, self.pairs, views=self.views).numbers
        numbers["correspondence"] = found["exact"]
        numbers["position share"] = found["position_share"]
        return numbers


def _one_folder(data: str | list[str]) -> str:
    if isinstance(data, str):
        return data
    if len(data) > 1:
        raise ValueError(f"ablate: data must be one folder, got {len(data)}; link them into one")
    return data[0]
