"""Writes a run's checkpoints behind its steps, so that no step waits for a disk."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from densecl_ext.checkpoints.run_folder import RunFolder

RETRY_SECONDS = 1.0


class CheckpointWriter:
    """Copies a run's state into host memory at once, and writes the copy from a thread.

    At most one checkpoint is in flight: the next one waits for it. A write that fails is tried once
    more; what fails again is raised by the next call, and the older checkpoint is intact.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, state: Mapping[str, Any], *, keep: str | None = None) -> None:
        """Begins to write checkpoints/last.pt; returns when the state is copied.

        Args:
            state: of the run; may change as soon as this returns.
            keep: another name for the checkpoint, under which it stays.

        Raises:
            OSError: the one before could not be written.
        """
        self.wait()
        copied = host_copy(state)
        self._thread = threading.Thread(
            target=self._write, args=(copied, keep), name="densecl-checkpoint"
        )
        self._thread.start()

    def wait(self) -> None:
        """Returns when the newest checkpoint is on the disk; raises OSError if it could not be."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raises OSError if a write has failed; waits for nothing."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """Waits for what is in flight, whatever becomes of it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, state: dict[str, Any], keep: str | None) -> None:
        try:
            try:
                self._folder.save(state)
            except OSError:
                time.sleep(RETRY_SECONDS)  # a network disk may be back by then
                self._folder.save(state)
            if keep is not None:
                self._folder.keep(keep)
        except BaseException as error:
            self._error = error


def host_copy(value: Any) -> Any:
    """Dicts, lists and tuples with every tensor copied into host memory; tied ones stay tied."""
    copies: dict[int, Tensor] = {}

    def copy(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in copies:
                copies[id(value)] = value.detach().to("cpu", copy=True)
            return copies[id(value)]
        if isinstance(value, Mapping):
            return type(value)((key, copy(item)) for key, item in value.items())  # type: ignore
        if isinstance(value, (list, tuple)):
            return type(value)(copy(item) for item in value)
        return value

    with torch.no_grad():
        return copy(value)
