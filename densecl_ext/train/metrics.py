"""Means over the steps between two log rows, and the CSV file they go to."""

from __future__ import annotations

import csv
import math
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.loggers.logger import Logger
from torch import Tensor

from densecl_ext.checkpoints.storage import atomic_file

FIRST_COLUMNS = ("step", "epoch", "loss", "loss_global", "loss_dense", "lr", "images_per_second")


class Window:
    """Sums of the metrics since the last log row.

    Sums stay on the device, so that adding never waits for the GPU. They are part of a run's
    state: a resumed run logs the same means as an uninterrupted one.
    """

    def __init__(self, device: torch.device) -> None:
        """Starts empty; sums of a loaded state go to `device`."""
        self._device = device
        self._reset()

    def _reset(self) -> None:
        self.count = 0
        self._sums: dict[str, Tensor] = {}
        self._images = 0
        self._started = time.perf_counter()

    def add(self, values: Mapping[str, Tensor], images: int) -> None:
        """Adds one step.

        Args:
            values: name -> 0-d tensor.
            images: images in the step's batch.
        """
        for name, value in values.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self.count += 1
        self._images += images

    def finite(self) -> bool:
        """Whether no loss since the last row was NaN or infinite. Waits for the device."""
        return all(math.isfinite(v.item()) for k, v in self._sums.items() if k.startswith("loss"))

    def take(self) -> dict[str, float]:
        """Returns the means and `images_per_second`, and starts anew."""
        means = {name: total.item() / self.count for name, total in self._sums.items()}
        now = time.perf_counter()
        means["images_per_second"] = self._images / max(now - self._started, 1e-9)
        self._reset()
        return means

    def state_dict(self) -> dict[str, Any]:
        """Sums and count; not the clock."""
        return {"count": self.count, "sums": {k: v.cpu() for k, v in self._sums.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a saved window."""
        self.count = state["count"]
        self._sums = {name: value.to(self._device) for name, value in state["sums"].items()}


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
