"""Stopping a run between two steps when the terminal or the scheduler asks for it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """Turns the first Ctrl-C (SIGINT) or SIGTERM into a flag; a second one interrupts at once.

    Use as a context manager around the run; it restores the handlers it found. Outside the main
    thread, where Python allows no handlers, it does nothing.

    A terminal's Ctrl-C, and many schedulers' SIGTERM, reach the loader's worker processes too.
    Workers forked under this handler ignore Ctrl-C, so the batch in flight still arrives; and once
    a stop is requested, a dying worker no longer raises in the middle of a step.

    Attributes:
        requested: whether to stop after the current step.
    """

    def __init__(self, notify: Callable[[], None] = lambda: None) -> None:
        """Args: notify: called when a stop is first requested."""
        self.requested = False
        self._notify = notify
        self._owner = os.getpid()
        self._previous: dict[int, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            return
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        # torch's handler for dead workers raises wherever the main thread happens to be.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._notify()

    def __enter__(self) -> StopRequest:
        """Installs the handlers."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
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
