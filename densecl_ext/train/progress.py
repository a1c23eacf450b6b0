"""What a person sees of a run while it goes."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO


class Progress:
    """Silence: the base class, and what `pretrain` uses when it is given nothing else.

    Subclass it to follow a run; every method is called in the main thread, between two steps.
    """

    def start(self, *, step: int, total: int, batch_size: int) -> None:
        """Called before the first step.

        Args:
            step: steps already done.
            total: steps of the whole run.
            batch_size: images a step.
        """

    def update(self, step: int) -> None:
        """Called after every step with the number of steps done."""

    def log(self, row: Mapping[str, float]) -> None:
        """Called with every row of metrics.csv."""

    def message(self, text: str) -> None:
        """Called with a sentence for a person."""

    def close(self) -> None:
        """Called once at the end, whatever it was."""


class ConsoleProgress(Progress):
    """A progress bar in a terminal; elsewhere a line every few seconds.

    Both show the loss, images per second and the time left.
    """

    def __init__(self, stream: TextIO | None = None, *, line_seconds: float = 10.0) -> None:
        """Prepares the display.

        Args:
            stream: where it goes; None is standard error.
            line_seconds: time between two lines where the stream is no terminal.
        """
        self._stream = stream or sys.stderr
        self._line_seconds = line_seconds
        self._bar: Any = None
        self._row: Mapping[str, float] = {}

    def start(self, *, step: int, total: int, batch_size: int) -> None:
        """Begins the bar or the clock."""
        self._first, self._total, self._batch_size = step, total, batch_size
        self._began = self._last_line = time.monotonic()
        if self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, initial=step, file=self._stream, unit="step", dynamic_ncols=True
            )

    def update(self, step: int) -> None:
        """Moves the bar, or prints a line when it is time."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        if now - self._last_line < self._line_seconds and step < self._total:
            return
        self._last_line = now
        rate = (step - self._first) / max(now - self._began, 1e-9)  # steps per second
        loss = f", loss {self._row['loss']:.4f}" if "loss" in self._row else ""
        left = format_seconds((self._total - step) / rate) if rate > 0 else "?"
        self.message(
            f"step {step}/{self._total}{loss}, {rate * self._batch_size:.0f} images/s, {left} left"
        )

    def log(self, row: Mapping[str, float]) -> None:
        """Shows the newest loss."""
        self._row = row
        if self._bar is not None:
            self._bar.set_postfix_str(
                f"loss {row['loss']:.4f}, {row['images_per_second']:.0f} images/s", refresh=False
            )

    def message(self, text: str) -> None:
        """Prints a line without breaking the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def format_seconds(seconds: float) -> str:
    """Writes a duration as 1:02:03 or 2:03."""
    whole = math.ceil(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
