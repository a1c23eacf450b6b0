"""Functions called in a process of its own, which may hang, fault or leave children behind.

The process leads a group, and the group ends as a whole: a compiler's children would keep the GPU.
Pools (concurrent.futures, pebble) end their own workers alone.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

PATIENCE = 5.0  # seconds that a killed process may take to go: a driver may hold it


class Lost(RuntimeError):
    """The process ended, kept silent or answered nonsense; the message says which."""


class Worker:
    """Calls functions in a process that starts when it is first needed, and again when lost."""

    _process: BaseProcess | None = None
    _pipe: Connection

    def call(self, limit: float, function: Callable[..., Any], *given: Any) -> Any:
        """What the function returns, or raises.

        Raises:
            Lost: no answer, or no sensible one, within the limit; the process and its children are
                ended.
        """
        process, late = self._started(), threading.Event()

        def give_up() -> None:
            late.set()
            kill(process)

        timer = threading.Timer(limit, give_up)
        timer.start()
        try:
            self._pipe.send((function, given))
            while not self._pipe.poll(0.1):
                # A grandchild may hold the pipe, and a driver a process that was killed.
                if ended(process) or late.is_set():
                    raise EOFError
            value, raised = self._pipe.recv()
        except Exception as error:  # it ends, or somebody ended it, or this is no answer
            status, words = self.close(), f"answered nonsense: {type(error).__name__}: {error}"
            if isinstance(error, (OSError, EOFError)):
                words = f"the process ended: exit status {status}"
                if status is not None and status < 0:
                    words = f"the process ended: {signal.Signals(-status).name}"
            raise Lost(f"no answer within {limit:.0f} s" if late.is_set() else words) from error
        finally:
            timer.cancel()
        if raised is not None:
            raise raised
        return value

    def _started(self) -> BaseProcess:
        if self._process is None:
            spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
            self._pipe, theirs = spawn.Pipe()
            self._process = spawn.Process(target=serve, args=(theirs,))
            self._process.start()
            theirs.close()
        return self._process

    def close(self) -> int | None:
        """End the process and its children; its exit status."""
        process, self._process = self._process, None
        if process is None:
            return None
        self._pipe.close()
        process.join(1.0)  # where it waits for work, it ends by itself
        kill(process)
        process.join(PATIENCE)
        return process.exitcode


def kill(process: BaseProcess) -> None:
    """End a whole group at once, or the process alone where it does not lead one yet."""
    assert process.pid is not None
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()


def ended(process: BaseProcess) -> bool:
    """Whether it ended by itself; it stays a zombie, so that its group's number stays its own."""
    assert process.pid is not None
    options = os.WEXITED | os.WNOWAIT | os.WNOHANG
    return os.waitid(os.P_PID, process.pid, options) is not None


def serve(pipe: Connection) -> None:
    """The worker's side, until the other one is gone."""
    os.setsid()
    with contextlib.suppress(EOFError):
        while True:
            function, given = pipe.recv()
            value, raised = None, None
            try:
                value = function(*given)
            except Exception as error:
                raised = error
            pipe.send((value, raised))
