"""Commands that may hang, fault or leave children behind, and take nobody along.

Every command leads a group of its own, and a group ends as a whole: a compiler's or a sanitizer's
children would keep the GPU.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
TIMED_OUT = 124  # as of the program `timeout`
PATIENCE = 5.0  # seconds that a killed process may take to go: a driver may hold it
alive: set[subprocess.Popen[bytes]] = set()


def call(
    command: list[str],
    limit: float,
    *,
    log: IO[bytes] | None = None,
    tick: Callable[[], None] = lambda: None,
    settings: Mapping[str, str] | None = None,
) -> int:
    """Exit status of a command in the repository's root, 124 where it was ended at its limit.

    `tick` is called every 20 seconds meanwhile. Nothing of the command's group runs afterwards.
    """
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"PYTHONUNBUFFERED": "1"} | dict(settings or {}),
        start_new_session=True, stdin=subprocess.DEVNULL, stdout=log,
        stderr=subprocess.STDOUT if log else None,
    )  # fmt: skip
    alive.add(process)
    limit_at = time.monotonic() + limit
    next_tick = time.monotonic() + 20.0
    try:
        while not ended(process) and time.monotonic() < limit_at:
            time.sleep(0.02)
            if time.monotonic() > next_tick:
                tick()
                next_tick = time.monotonic() + 20.0
        in_time = ended(process)
    finally:
        status = end(process)
    return status if in_time and status is not None else TIMED_OUT


def ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether it ended by itself; it stays a zombie, so that its group's number stays its own."""
    options = os.WEXITED | os.WNOWAIT | os.WNOHANG
    return process.returncode is not None or os.waitid(os.P_PID, process.pid, options) is not None


def end(process: subprocess.Popen[bytes]) -> int | None:
    """Kill the whole group; the exit status of its leader, None where it would not go."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    alive.discard(process)
    try:
        return process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        return None


def end_on_termination() -> None:
    """SIGTERM ends every group, then this process."""

    def leave(*_: object) -> None:
        for process in list(alive):
            end(process)
        sys.exit(143)

    signal.signal(signal.SIGTERM, leave)
