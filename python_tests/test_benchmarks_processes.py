"""Workers and commands that hang, fault or leave children: the next one runs, none stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks import processes
from benchmarks.processes import Lost, Worker
from python_tests import faulty_worker
from tools import commands
from tools.commands import TIMED_OUT, call

ROOT = Path(__file__).resolve().parent.parent


def gone(pid: int) -> bool:
    """Whether no such process runs; one that waits to be reaped does not."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker()
    yield made
    made.close()


@pytest.mark.parametrize(
    ("function", "limit", "words"),
    [
        (faulty_worker.hang, 1.0, "no answer within 1 s"),
        (faulty_worker.half, 1.0, "no answer within 1 s"),
        (faulty_worker.leave, 30.0, "the process ended: exit status 3"),
        (faulty_worker.fault, 30.0, "the process ended: SIGSEGV"),
        (faulty_worker.garbage, 30.0, "answered nonsense: UnpicklingError"),
        (faulty_worker.orphan, 30.0, "the process ended: exit status 3"),
    ],
)
def test_a_lost_worker_is_named_and_the_next_one_answers(
    worker: Worker,
    function: Callable[[], None],
    limit: float,
    words: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    first = worker.call(60.0, faulty_worker.work)
    assert worker.call(60.0, faulty_worker.work) == first
    with pytest.raises(Lost, match=words):
        worker.call(limit, function)
    assert gone(first)
    assert worker.call(60.0, faulty_worker.work) != first
    for line in capfd.readouterr().err.splitlines():
        if line.startswith("child "):
            assert gone(int(line.split()[1]))


def test_what_the_function_raises_is_raised_here(worker: Worker) -> None:
    first = worker.call(60.0, faulty_worker.work)
    with pytest.raises(RuntimeError, match="of a kind of its own"):
        worker.call(30.0, faulty_worker.unforeseen)
    assert worker.call(60.0, faulty_worker.work) == first


def test_a_worker_that_is_not_there_yet_is_ended_too(worker: Worker) -> None:
    """Its limit is over before it leads a group of its own."""
    with pytest.raises(Lost, match="no answer within 0 s"):
        worker.call(1e-4, faulty_worker.hang)
    assert worker.call(60.0, os.getpid) != os.getpid()


def test_a_grandchild_ends_with_the_worker(worker: Worker) -> None:
    child = worker.call(60.0, faulty_worker.grandchild)
    assert Path(f"/proc/{child}").exists()
    with pytest.raises(Lost):
        worker.call(0.5, faulty_worker.hang)
    assert gone(child)


def test_a_worker_that_would_not_go_is_left_behind(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = worker.call(60.0, os.getpid)
    with monkeypatch.context() as patch:
        patch.setattr(processes, "kill", lambda _: None)
        patch.setattr(processes, "PATIENCE", 0.2)
        with pytest.raises(Lost, match="no answer within 0 s"):
            worker.call(0.3, faulty_worker.hang)
    assert worker.call(60.0, os.getpid) != pid
    os.killpg(pid, signal.SIGKILL)


LEAVES_A_CHILD = (
    "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; "
    "time.sleep(60)']); print(p.pid, flush=True); "
)


@pytest.mark.parametrize(("then", "status"), [("time.sleep(60)", TIMED_OUT), ("sys.exit(5)", 5)])
def test_a_commands_whole_group_ends(then: str, status: int, tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        assert call([sys.executable, "-c", LEAVES_A_CHILD + then], 3.0, log=log) == status
    assert gone(int((tmp_path / "log").read_text()))


def test_termination_ends_what_runs(tmp_path: Path) -> None:
    code = (
        "import sys; from tools.commands import call, end_on_termination; "
        "end_on_termination(); "
        f"call([sys.executable, '-c', {LEAVES_A_CHILD + 'time.sleep(60)'!r}], 60.0)"
    )
    driver = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    assert driver.stdout is not None
    child = int(driver.stdout.readline())
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(20.0) == 143
    driver.stdout.close()
    assert gone(child)


def test_a_group_that_would_not_go_is_waited_for_only_so_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(commands, "PATIENCE", 0.2)
    process = subprocess.Popen(faulty_worker.SLEEP, start_new_session=True)
    with monkeypatch.context() as patch:
        patch.setattr(os, "killpg", lambda *_: None)
        assert commands.end(process) is None
    assert commands.end(process) == -signal.SIGKILL
