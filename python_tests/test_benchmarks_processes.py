"""Workers and commands that hang, fault or leave children: the next one runs, none stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import processes
from benchmarks.processes import TIMED_OUT, Lost, Worker, call

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
    made = Worker("python_tests.faulty_worker")
    yield made
    made.close()
    assert not processes.alive


@pytest.mark.parametrize(
    ("fault", "limit", "words"),
    [
        ("hang", 1.0, "no answer within 1 s"),
        ("half a line", 1.0, "no answer within 1 s"),
        ("exit", 30.0, "the process ended: exit status 3"),
        ("fault", 30.0, "the process ended: SIGSEGV"),
        ("garbage", 30.0, "answered b'Xid 31"),
        ("orphan", 30.0, "the process ended: exit status 3"),
    ],
)
def test_a_lost_worker_is_named_and_the_next_one_answers(
    worker: Worker, fault: str, limit: float, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    first = worker.ask({"do": "work"}, 60.0)
    assert worker.ask({"do": "more"}, 60.0)["pid"] == first["pid"]
    with pytest.raises(Lost, match=words):
        worker.ask({"do": fault}, limit)
    assert gone(first["pid"])
    assert worker.ask({"do": "work"}, 60.0)["pid"] != first["pid"]
    for line in capfd.readouterr().err.splitlines():
        if line.startswith("child "):
            assert gone(int(line.split()[1]))


def test_a_grandchild_ends_with_the_worker(worker: Worker) -> None:
    child = worker.ask({"do": "grandchild"}, 60.0)["child"]
    assert Path(f"/proc/{child}").exists()
    with pytest.raises(Lost):
        worker.ask({"do": "hang"}, 0.5)
    assert gone(child)


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
        "import sys; from benchmarks.processes import call, end_on_termination; "
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
    monkeypatch.setattr(processes, "PATIENCE", 0.2)
    process = processes.start([sys.executable, "-c", "import time; time.sleep(60)"], {})
    with monkeypatch.context() as patch:
        patch.setattr(os, "killpg", lambda *_: None)
        assert processes.end(process) is None
    assert processes.end(process) == -signal.SIGKILL
