"""What a worker of the tests of benchmarks/processes.py is asked to do: answers, or goes wrong."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


def work() -> int:
    """This process's number."""
    print("this is not an answer")
    os.write(1, b"nor is this\n")
    return os.getpid()


def hang() -> None:
    """As a call that waits for a device does."""
    time.sleep(60.0)


def leave() -> None:
    """End without an answer."""
    os._exit(3)


def fault() -> None:
    """As a call through a wrong pointer does."""
    os.kill(os.getpid(), signal.SIGSEGV)


def unforeseen() -> None:
    """An exception that nobody catches."""
    raise RuntimeError("of a kind of its own")


def pipe() -> int:
    """Where the answers go."""
    (found,) = (x for x in gc.get_objects() if isinstance(x, Connection))
    return found.fileno()


def garbage() -> None:
    """A whole message that is none, where the answers go."""
    os.write(pipe(), (8).to_bytes(4, "big") + b"Xid 31: ")
    time.sleep(60.0)


def half() -> None:
    """The beginning of an answer."""
    os.write(pipe(), (800).to_bytes(4, "big") + b"Xid 31: ")
    time.sleep(60.0)


def grandchild() -> int:
    """A process that outlives this one."""
    return subprocess.Popen(SLEEP).pid


def orphan() -> None:
    """The same, and the end of this one; the child holds all that this one has open."""
    child = os.fork()
    if child == 0:
        os.execv(SLEEP[0], SLEEP)
    os.write(2, f"child {child}\n".encode())
    os._exit(3)
