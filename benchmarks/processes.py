"""Processes that may hang, fault or leave children behind, and take nobody along.

Every process starts a group of its own, and a group ends as a whole: a compiler's or a sanitizer's
children would keep the GPU. Pools (concurrent.futures, pebble) end their own workers alone, know
nothing of other commands, and pebble is not on a machine without a package index.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
TIMED_OUT = 124  # as of the program `timeout`
PATIENCE = 5.0  # seconds that a killed process may take to go: a driver may hold it
alive: set[subprocess.Popen[bytes]] = set()


def start(command: list[str], settings: dict[str, str], **streams: Any) -> subprocess.Popen[bytes]:
    """A command in the repository's root, leader of its own process group."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | settings
    made = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **streams)
    alive.add(made)
    return made


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


def call(
    command: list[str],
    limit: float,
    *,
    log: IO[bytes] | None = None,
    tick: Callable[[], None] = lambda: None,
    **settings: str,
) -> int:
    """Exit status of a command, 124 where it was ended at its time limit.

    `tick` is called every few seconds meanwhile. Nothing of the command's group runs afterwards.
    """
    streams = {"stdout": log, "stderr": subprocess.STDOUT} if log else {}
    process = start(command, settings, stdin=subprocess.DEVNULL, **streams)
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


def end_on_termination() -> None:
    """SIGTERM ends every group, then this process."""

    def leave(*_: object) -> None:
        for process in list(alive):
            end(process)
        sys.exit(143)

    signal.signal(signal.SIGTERM, leave)


class Lost(RuntimeError):
    """The worker ended, kept silent or answered nonsense; the message says which."""


class Worker:
    """A Python module run apart that answers requests: one JSON object in, one out.

    Started when it is first asked, and again after it was lost.

    Args:
        module: run with `python -m`; its loop is :func:`requests`.
        arguments: of its command line.
    """

    def __init__(self, module: str, *arguments: str) -> None:
        self._command = [sys.executable, "-m", module, *arguments]
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: dict[str, Any], limit: float) -> dict[str, Any]:
        """The answer; the process and its children are ended where there is none.

        Raises:
            Lost: no answer, or no sensible one, within the time limit.
        """
        if self._process is None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
            self._process = start(self._command, {}, **pipes)
        try:
            line = self._exchange(self._process, json.dumps(request).encode() + b"\n", limit)
        except TimeoutError:
            self.close()
            raise Lost(f"no answer within {limit:.0f} s") from None
        try:
            answer = json.loads(line)
            if line.endswith(b"\n") and isinstance(answer, dict):
                return answer
        except ValueError:
            pass
        gone, status = ended(self._process), self.close()
        raise Lost(
            f"the process ended: {status_text(status)}" if gone else f"answered {line!r:.99}"
        )

    def _exchange(self, process: subprocess.Popen[bytes], line: bytes, limit: float) -> bytes:
        assert process.stdin is not None and process.stdout is not None
        limit_at, answer = time.monotonic() + limit, b""
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(line)
        while not answer.endswith(b"\n"):
            ready = select.select([process.stdout], [], [], 0.1)[0]
            got = os.read(process.stdout.fileno(), 1 << 16) if ready else b""
            answer += got
            if not got and ended(process):  # a grandchild may still hold the pipe
                break
            if time.monotonic() > limit_at:
                raise TimeoutError
            if ready and not got:
                time.sleep(0.02)
        return answer

    def close(self) -> int | None:
        """End the process and its children; its exit status."""
        if self._process is None:
            return None
        process, self._process = self._process, None
        status = end(process)
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]
        return status


def status_text(status: int | None) -> str:
    """An exit status in words."""
    if status is not None and status < 0:
        return signal.Signals(-status).name
    return f"exit status {status}"


def requests() -> Iterator[tuple[dict[str, Any], Callable[[dict[str, Any]], None]]]:
    """The worker's side: each request with the function that answers it.

    Whatever else is printed from here on goes to stderr, so that it cannot look like an answer.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=answers, flush=True)

    for line in sys.stdin:
        yield json.loads(line), answer
