"""Runs of several ranks: stopped, resumed on other numbers of ranks, failing, killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("lightning")
pytest.importorskip("torchvision")
if not dist.is_available():
    pytest.skip("torch was built without distributed", allow_module_level=True)

import train_runs as runs
from rank_processes import run_ranks

from densecl_ext.checkpoints import load_checkpoint
from densecl_ext.data import build_loader
from densecl_ext.train import PretrainResult
from densecl_ext.train.step import TrainingStep

ROOT = Path(__file__).resolve().parent.parent
KEEP = ("model", "optimizer", "loader", "rng", "window", "epoch", "step")


def run(
    data: str, output: str, options: dict[str, Any], how: dict[str, Any], act: Any = None
) -> PretrainResult:
    """A tiny run; `act` is (rank, step, what) and happens on that rank right after that step."""
    options = {"timeout": 60, **options}
    config = runs.tiny_config(data, output, **options)
    if act is None:
        return runs.tiny_run(config, **how)
    rank, at, what = act
    right, done = TrainingStep.__call__, 0

    def step(self: TrainingStep, *views: Any) -> Any:
        nonlocal done
        found = right(self, *views)
        done += 1
        if done == at and dist.get_rank() == rank:
            if what == "queue":
                self.model.global_queue.keys[3, 3] += 1e-3
            else:
                os.kill(os.getpid(), getattr(signal, what))
        return found

    TrainingStep.__call__ = step  # type: ignore[method-assign]
    try:
        return runs.tiny_run(config, **how)
    finally:
        TrainingStep.__call__ = right  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(runs.image_folder(tmp_path_factory.mktemp("photos") / "images"))


def good(results: list[Any]) -> list[PretrainResult]:
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


@pytest.fixture(scope="module")
def whole(data: str, tmp_path_factory: pytest.TempPathFactory) -> list[PretrainResult]:
    """An uninterrupted run of two ranks."""
    folder = tmp_path_factory.mktemp("whole")
    return good(run_ranks(2, folder / "meeting", run, data, str(folder / "run"), {}, {}))


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_to_one_rank_stops_all_and_the_same_ranks_go_on_with_the_same_bits(
    number: str, whole: list[PretrainResult], data: str, tmp_path: Path
) -> None:
    """A signal after a step's keys have gone out is told with the next one's."""
    output, resume = str(tmp_path / "part"), {"resume": "auto"}
    part = good(run_ranks(2, tmp_path / "b", run, data, output, {}, resume, (1, 3, number)))
    assert [(r.step, r.interrupted, r.first) for r in part] == [(4, True, True), (4, True, False)]
    assert load_checkpoint(part[0].checkpoint)["step"] == 4
    again = good(run_ranks(2, tmp_path / "c", run, data, output, {}, resume))
    expected, got = (load_checkpoint(r[0].checkpoint) for r in (whole, again))
    runs.assert_same({key: got[key] for key in KEEP}, {key: expected[key] for key in KEEP})
    assert len(runs.rows(again[0])) == len(runs.rows(whole[0])) == 5
    assert not list(tmp_path.glob("*/checkpoints/.unfinished*"))


def test_a_run_of_two_ranks_goes_on_alone_and_on_four(data: str, tmp_path: Path) -> None:
    """With the same batches: of a network without chance, with the same weights up to rounding."""
    options = {"key_bn": "sync", "base_lr": 1.0, "queue_init": "random", "log_every": 1}
    (whole,) = good(run_ranks(1, tmp_path / "a", run, data, str(tmp_path / "w"), options, {}))
    for step, world in ((3, 2), (4, 1), (7, 4), (9, 2)):
        (part, *_) = good(
            run_ranks(
                world,
                tmp_path / f"to{step}",
                run,
                data,
                str(tmp_path / "p"),
                {**options, "max_steps": step},
                {"resume": "auto"},
            )
        )
        assert part.step == step
    expected, got = load_checkpoint(whole.checkpoint), load_checkpoint(part.checkpoint)
    assert got["loader"] == expected["loader"]
    assert torch.equal(got["rng"]["torch"], expected["rng"]["torch"])
    for name, value in expected["model"].items():
        torch.testing.assert_close(got["model"][name], value, atol=2e-3, rtol=2e-3, msg=name)
    for row, one in zip(runs.rows(part), runs.rows(whole), strict=True):
        assert float(row["loss"]) == pytest.approx(float(one["loss"]), rel=1e-3)


def fails(data: str, output: str) -> None:
    """The loader of rank 1 fails in the middle of the second epoch."""
    from densecl_ext.train.launch import launch

    ranks = launch("cpu", timeout=60)
    with build_loader(
        data, batch_size=8, size=32, backend="torchvision", workers=0, rank=ranks.rank, ranks=2
    ) as loader:
        right = loader._own

        def own(batch: Any) -> Any:
            if ranks.rank == 1 and loader.epoch == 1:
                raise OSError("the disk of rank 1 is gone")
            return right(batch)

        loader._own = own
        runs.tiny_run(runs.tiny_config("", output, loader="auto"), loader=loader)


def test_a_rank_that_fails_ends_all_and_says_why_alone(data: str, tmp_path: Path) -> None:
    first, second = run_ranks(2, tmp_path, fails, data, str(tmp_path / "run"))
    assert "rank 1: OSError: the disk of rank 1 is gone" in str(second)
    assert "rank 0: RankFailed: rank 1 failed" in str(first)
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["step"] == 3


def test_queues_that_differ_are_found(data: str, tmp_path: Path) -> None:
    options = {"log_every": 3, "max_steps": 8, "queue_length": 200}
    output = str(tmp_path / "run")
    for result in run_ranks(2, tmp_path, run, data, output, options, {}, (1, 2, "queue")):
        assert "the queues of rank 1 differ from rank 0's at step 4" in str(result)


def test_disagreement_is_told_before_anything_is_written(data: str, tmp_path: Path) -> None:
    output = str(tmp_path / "run")
    for result in run_ranks(2, tmp_path, run, data, output, {"batch_size": 9}, {}):
        assert "batch_size 9 cannot be shared equally by 2 processes; the nearest that can are " \
            "8 and 10" in str(result)  # fmt: skip
    for result in run_ranks(2, tmp_path, run, data, output, {"devices": 4}, {}):
        assert "started 2 processes on each of 1 machines, but devices is 4" in str(result)
    assert not (tmp_path / "run").exists()
    weights = {"backbone": "resnet18", "weights": str(tmp_path / "none.pth")}
    first, second = run_ranks(2, tmp_path, pretrain_named, data, output, weights)
    assert "RankFailed: rank 0 failed" in str(second) and "RankFailed" not in str(first)


def pretrain_named(data: str, output: str, options: dict[str, Any]) -> PretrainResult:
    from densecl_ext.train import pretrain

    return pretrain(runs.tiny_config(data, output, timeout=60, **options))


# --- whole processes, as a person starts them

OPTIONS = """
    --backbone resnet18 --image-size 32 --batch-size 8 --dim 8 --hidden-dim 16 --queue-length 20
    --precision fp32 --device cpu --loader memory --no-tensorboard --log-every 2 --workers 1
    --checkpoint-every 5 --timeout 60
"""
TINY = OPTIONS.split()


def started_by(words: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "densecl_ext", "pretrain", *words],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )


def until(true: Any, log: Path, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def logged(output: Path) -> int:
    metrics = output / "metrics.csv"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


@pytest.fixture
def start() -> Iterator[Callable[[list[str], Path], subprocess.Popen[bytes]]]:
    """Starts a command that does not outlive the test."""
    started: list[subprocess.Popen[bytes]] = []

    def begin(words: list[str], log: Path) -> subprocess.Popen[bytes]:
        started.append(started_by(words, log))
        return started[-1]

    yield begin
    for process in started:
        if process.poll() is None:
            process.terminate()  # which it passes on
            process.wait(60)


def forever(data: str, output: Path) -> list[str]:
    words = ["--data", data, "--output", str(output), *TINY, "--devices", "2", "--epochs", "3000"]
    return [*words, "--resume", "auto"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_others_end_when_one_is_killed(data: str, tmp_path: Path, start: Any) -> None:
    output, log = tmp_path / "run", tmp_path / "log"
    process = start(forever(data, output), log)
    until(lambda: logged(output) > 3, log)
    ranks = children(process.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    assert process.wait(60) == 2
    told = [line for line in log.read_text().splitlines() if "SIGKILL" in line or "error" in line]
    assert len(told) == 1 and f"rank 1 (process {ranks[1]}) was ended by SIGKILL" in told[0]
    assert all(map(gone, ranks))
    assert load_checkpoint(output / "checkpoints" / "last.pt")["step"] % 5 == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_same_line_stops_and_goes_on(
    number: signal.Signals, data: str, tmp_path: Path, start: Any
) -> None:
    output, log, step = tmp_path / "run", tmp_path / "log", 0
    for _ in range(2):
        before = logged(output)
        process = start(forever(data, output), log)
        until(lambda: logged(output) > before + 2, log)  # noqa: B023
        assert not step or f"resuming at step {step} of" in log.read_text()
        process.send_signal(number)
        assert process.wait(60) == 130
        assert "go on with:" in log.read_text()
        reached = load_checkpoint(output / "checkpoints" / "last.pt")["step"]
        assert reached > step
        step = reached


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ten_kills_change_nothing(data: str, tmp_path: Path, start: Any) -> None:
    """Random ranks at random moments; the end has the bits of an undisturbed run."""
    photos = os.environ.get("DENSECL_TEST_PHOTOS", data)
    rest = [*TINY, "--devices", "2", "--data", photos, "--resume", "auto", "--max-steps", "60"]
    rest += ["--epochs", "100", "--loader", "torchvision", "--workers", "0"]  # reads what it needs
    whole = start(["--output", str(tmp_path / "whole"), *rest], tmp_path / "log")
    assert whole.wait(300) == 0
    draw, output, log = random.Random(0), tmp_path / "run", tmp_path / "log"
    words, kills = ["--output", str(output), *rest], 0
    while True:
        process = start(words, log)
        if kills < 10:
            at = draw.randrange(1, 4)
            before = logged(output)
            until(lambda: logged(output) > before + at or process.poll() is not None, log)  # noqa: B023
            time.sleep(draw.uniform(0, 0.2))
            ranks = children(process.pid)
            if process.poll() is None and len(ranks) == 2:
                os.kill(draw.choice(ranks), signal.SIGKILL)
                kills += 1
        if process.wait(120) == 0:
            break
    print(f"{kills} kills")
    expected, got = (
        load_checkpoint(p / "checkpoints" / "last.pt") for p in (tmp_path / "whole", output)
    )
    runs.assert_same({key: got[key] for key in KEEP}, {key: expected[key] for key in KEEP})
