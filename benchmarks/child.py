"""A process apart that answers requests: one JSON line in, one out.

What hangs, crashes or runs out of memory there takes nobody along.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class Lost(RuntimeError):
    """The child ended or kept silent; the message says which."""


class Child:
    """A Python module run as a child; started when it is first asked, and again after it is lost.

    Args:
        module: run with `python -m`; its loop is :func:`requests`.
        arguments: of its command line.
    """

    def __init__(self, module: str, *arguments: str) -> None:
        self._command = [sys.executable, "-m", module, *arguments]
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: dict[str, Any], timeout: float | None = None) -> dict[str, Any]:
        """The child's answer; waits for it so many seconds, or for ever.

        Raises:
            Lost: it ended, or gave no answer in time and was killed.
        """
        if self._process is None:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, cwd=ROOT
            )
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        line = b""
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(request).encode() + b"\n")
            line = self._line(process.stdout.fileno(), timeout)
        if not line.endswith(b"\n"):
            status = self.close()
            raise Lost(f"the process that measures ended with status {status}")
        return json.loads(line)

    def _line(self, stream: int, timeout: float | None) -> bytes:
        end = None if timeout is None else time.monotonic() + timeout
        line = b""
        while not line.endswith(b"\n"):
            left = None if end is None else max(0.0, end - time.monotonic())
            if not select.select([stream], [], [], left)[0]:
                self.kill()
                raise Lost(f"no answer within {timeout:.0f} s")
            got = os.read(stream, 1 << 16)
            if not got:
                break
            line += got
        return line

    def kill(self) -> None:
        """End the child at once."""
        if self._process is not None:
            self._process.kill()
            self.close()

    def close(self) -> int | None:
        """Let the child end; returns its exit status."""
        if self._process is None:
            return None
        process, self._process = self._process, None
        assert process.stdin is not None and process.stdout is not None
        process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        return process.wait()


def requests() -> Iterator[tuple[dict[str, Any], Callable[[dict[str, Any]], None]]]:
    """The child's side: each request with the function that answers it.

    Whatever else is printed from here on goes to stderr, so that it cannot look like an answer.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=answers, flush=True)

    for line in sys.stdin:
        yield json.loads(line), answer
