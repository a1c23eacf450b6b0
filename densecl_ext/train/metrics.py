"""Where the log rows go: metrics.csv, and one of Lightning's loggers."""

from __future__ import annotations

import csv
import math
import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import Logger

from densecl_ext.checkpoints.run_folder import RunFolder
from densecl_ext.checkpoints.storage import atomic_file
from densecl_ext.train.config import PretrainConfig

FIRST_COLUMNS = ("step", "epoch", "loss", "loss_global", "loss_dense", "lr", "images_per_second")


class CsvLog(Logger):
    """metrics.csv: one row a log step, cut back when a run is resumed.

    Columns: step, epoch, loss, loss_global, loss_dense, lr, images_per_second, then the model's
    metrics.
    """

    def __init__(self, path: Path, *, resume_step: int | None = None) -> None:
        """Opens the log.

        Args:
            path: the file.
            resume_step: None starts a new file; a step keeps the rows up to it and drops later
                ones, which the resumed run writes again.
        """
        self.path = path
        self._columns: list[str] = list(FIRST_COLUMNS)
        rows: list[dict[str, str]] = []
        if resume_step is not None and path.is_file():
            rows = [row for row in self._read() if _step(row) <= resume_step]
        self._rewrite(rows)

    def _read(self) -> list[dict[str, str]]:
        with self.path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            self._columns = list(reader.fieldnames or FIRST_COLUMNS)
            return list(reader)

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        lines = [
            self._columns,
            *([row.get(column) or "" for column in self._columns] for row in rows),
        ]
        with atomic_file(self.path) as file:
            for line in lines:
                file.write((",".join(line) + "\n").encode())

    @property
    def name(self) -> str:
        """The logger's name."""
        return "csv"

    @property
    def version(self) -> str:
        """No versions: a run folder has one log."""
        return ""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Appends a row.

        Args:
            metrics: column -> value.
            step: the step, 1-based.
        """
        row = {"step": str(step), **{name: f"{value:.7g}" for name, value in metrics.items()}}
        new = [name for name in row if name not in self._columns]
        if new:
            rows = self._read()
            self._columns += new
            self._rewrite(rows)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(",".join(row.get(column, "") for column in self._columns) + "\n")

    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing to do: config.yaml has them."""


def _step(row: Mapping[str, str | None]) -> float:
    try:
        return float(row.get("step") or "inf")
    except ValueError:
        return math.inf  # a line cut short by a crash


def build_loggers(
    config: PretrainConfig, folder: RunFolder, resume_step: int | None
) -> list[Logger]:
    """metrics.csv and the logger that is wanted; a resumed run goes on after `resume_step`.

    Raises:
        ImportError: the logger's package is not installed.
        RuntimeError: it does not start.
    """
    loggers: list[Logger] = [CsvLog(folder.metrics, resume_step=resume_step)]
    kind = config.logger
    if kind == "auto":
        kind = "tensorboard" if config.tensorboard else "csv"
    try:
        if kind == "tensorboard":
            from lightning.fabric.loggers import TensorBoardLogger

            purge: dict[str, Any] = {} if resume_step is None else {"purge_step": resume_step + 1}
            name = folder.tensorboard.name
            loggers.append(TensorBoardLogger(folder.path, name=name, version="", **purge))
        elif kind == "wandb":
            from lightning.pytorch.loggers import WandbLogger

            # What resumes a run is another one there, beside it in the group of that folder.
            name = folder.path.name
            loggers.append(WandbLogger(name=name, group=name, save_dir=folder.path))
        elif kind == "mlflow":
            from lightning.pytorch.loggers import MLFlowLogger

            own = f"sqlite:///{folder.path.resolve()}/mlflow.db"
            store = os.environ.get("MLFLOW_TRACKING_URI", own)
            loggers.append(MLFlowLogger(run_name=folder.path.name, tracking_uri=store))
        if kind in ("wandb", "mlflow"):
            loggers[-1].log_hyperparams(config.to_mapping())
    except ModuleNotFoundError as error:
        raise ImportError(
            f"pretrain: logger {kind} needs {kind}, which is not installed: pip install {kind}"
        ) from error
    except Exception as error:  # each service has errors of its own
        raise RuntimeError(f"pretrain: logger {kind} does not start: {error}") from error
    return loggers
