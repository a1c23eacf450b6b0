"""Stopping a run between two steps when the terminal or the scheduler asks for it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Turns Ctrl-C (SIGINT), SIGTERM and SIGUSR1 into a flag; Ctrl-C after one interrupts at once.

    SIGUSR1 is what SLURM is commonly told to send before a job's time is up.

    Use as a context manager around the run; it restores the handlers it found. Outside the main
    thread, where Python allows no handlers, it does nothing.

    A terminal's Ctrl-C, and many schedulers' SIGTERM, reach the loader's worker processes too.
    Workers forked under this handler ignore Ctrl-C, so the batch in flight still arrives; and once
    a stop is requested, a dying worker no longer raises in the middle of a step.

    Attributes:
        requested: whether to stop after the current step.
        agreed: whether all processes of the run are to; alone it is the same.
    """

    def __init__(self, notify: Callable[[], None] = lambda: None, *, alone: bool = True) -> None:
        """Makes the flag.

        Args:
            notify: called when a stop is first requested.
            alone: no other process has to agree.
        """
        self.requested = False
        self._alone, self._agreed = alone, False
        self._notify = notify
        self._owner = os.getpid()
        self._previous: dict[int, Any] = {}

    @property
    def agreed(self) -> bool:
        """Whether to stop now."""
        return self.requested if self._alone else self._agreed

    def agree(self) -> None:
        """Called when all processes know of the request."""
        self._agreed = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            return
        if self.requested:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.requested = True
        # torch's handler for dead workers raises wherever the main thread happens to be.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._notify()

    def __enter__(self) -> StopRequest:
        """Installs the handlers."""
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                self._previous[number] = signal.signal(number, self._handle)
            self._previous[signal.SIGCHLD] = signal.getsignal(signal.SIGCHLD)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Restores the handlers."""
        for number, handler in self._previous.items():
            if number != signal.SIGCHLD or self.requested:
                signal.signal(number, handler)
        self._previous.clear()
