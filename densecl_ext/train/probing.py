"""Measures the features in the middle of a run, and keeps the checkpoint that they are best in.

The loss says little about them: dense features can get worse while it falls (arXiv 2510.17299).
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.fabric.loggers.logger import Logger

from densecl_ext.checkpoints.run_folder import RunFolder
from densecl_ext.train.config import PretrainConfig
from densecl_ext.train.progress import Progress
from densecl_ext.train.run import Run
from densecl_ext.train.schedule import duration_in_steps

BEST = "best.pt"


class Probing:
    """Runs the cheap protocols every so often.

    Labelled images (masks/ beside images/) are measured by linear and in-context segmentation and
    by correspondence, other folders by correspondence alone. The first number decides which
    checkpoint is kept as checkpoints/best.pt.

    Args:
        config: resolved; ``probe``.
        folder: of the run; an earlier best is read from its metrics.csv.

    Raises:
        ValueError: the probe's folder does not fit.
    """

    def __init__(self, config: PretrainConfig, folder: RunFolder) -> None:
        from densecl_ext.evaluate.probe import Probe, ProbeOptions

        data = Path(config.probe)
        if not data.is_dir():
            raise ValueError(f"pretrain: probe must be a folder, got {config.probe!r}")
        if (data / "masks").is_dir():
            options = ProbeOptions(data=str(data), view_size=config.image_size)
            self.headline = "segmentation/miou"
        else:
            options = ProbeOptions(
                photos=str(data), probes=("correspondence",), view_size=config.image_size
            )
            self.headline = "correspondence/exact"
        self.probe = Probe(options)
        self.best = best_of(folder.metrics, self.headline)

    def __call__(
        self, run: Run, folder: RunFolder, loggers: Sequence[Logger], progress: Progress
    ) -> None:
        """Measure, log, and keep the newest checkpoint if it is the best so far."""
        head = run.model.neck.dense_head if run.model.with_dense else None
        # What it draws must not show in the run, whose ranks all have equal generators.
        with torch.random.fork_rng(devices=[run.device] if run.device.type == "cuda" else []):
            found = self.probe.run(run.model.backbone, head)
        for logger in loggers:
            logger.log_metrics(found, run.step)
        value = found[self.headline]
        better = self.best is None or value > self.best
        if better:
            self.best = value
            folder.keep(BEST)
        told = ", ".join(f"{name} {number:.3f}" for name, number in found.items() if "/" in name)
        progress.message(f"probe at step {run.step}: {told}{' (best so far)' if better else ''}")


def probe_due(config: PretrainConfig, steps_per_epoch: int, step: int, last: int) -> bool:
    """Whether to measure after this step."""
    every = duration_in_steps(config.probe_every, steps_per_epoch)
    due = step == last or (every > 0 and step % every == 0)
    return due and config.probe != "none"


def best_of(metrics: Path, headline: str) -> float | None:
    """The highest value of a column of metrics.csv; None where there is none."""
    if not metrics.is_file():
        return None
    with metrics.open(newline="", encoding="utf-8") as file:
        values = [row.get(headline) for row in csv.DictReader(file)]
    return max((float(value) for value in values if value), default=None)
