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
from rank_processes import run_ranks, started_ranks

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


STOPS = [(1, 2, "SIGTERM"), (0, 1, "SIGINT"), (1, 1, "SIGUSR1")]  # rank, after its n-th step


def stopped(data: str, folder: str) -> tuple[list[PretrainResult], PretrainResult]:
    """A run that signals end three times and that goes on each time, and one without."""
    whole = run(data, f"{folder}/whole", {}, {})
    output, resume = f"{folder}/part", {"resume": "auto"}
    parts = [run(data, output, {}, resume, stop) for stop in STOPS]
    return [*parts, run(data, output, {}, resume)], whole


def test_a_signal_to_one_rank_stops_all_and_the_same_ranks_go_on_with_the_same_bits(
    data: str, tmp_path: Path
) -> None:
    """A signal after a step's keys have gone out is told with the next one's."""
    (parts, whole), (others, _) = good(run_ranks(2, tmp_path, stopped, data, str(tmp_path)))
    ends = [(3, True), (5, True), (7, True), (9, False)]
    for every, first in ((parts, True), (others, False)):
        assert [(part.step, part.interrupted) for part in every] == ends
        assert {part.first for part in every} == {first}
    expected, got = (load_checkpoint(r.checkpoint) for r in (whole, parts[-1]))
    runs.assert_same({key: got[key] for key in KEEP}, {key: expected[key] for key in KEEP})
    assert len(runs.rows(parts[-1])) == len(runs.rows(whole)) == 5
    assert not list(tmp_path.glob("*/checkpoints/.unfinished*"))


def test_a_run_of_two_ranks_goes_on_alone_and_on_four(data: str, tmp_path: Path) -> None:
    """With the same batches: of a network without chance, with the same weights up to rounding."""
    options = {"key_bn": "sync", "base_lr": 1.0, "queue_init": "random", "log_every": 1}
    whole = run(data, str(tmp_path / "w"), options, {})
    for step, world in ((3, 2), (5, 1), (9, 4)):
        how = (data, str(tmp_path / "p"), {**options, "max_steps": step}, {"resume": "auto"})
        if world == 1:
            part = run(*how)
        else:
            (part, *_) = good(run_ranks(world, tmp_path / f"to{step}", run, *how))
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


def disagreeing(data: str, output: str, weights: str) -> list[str]:
    """What each of three runs says that cannot begin."""
    from densecl_ext.train import pretrain

    told = []
    for options in (
        {"batch_size": 9},
        {"devices": 4},
        {"backbone": "resnet18", "weights": weights},
    ):
        try:
            pretrain(runs.tiny_config(data, output, timeout=60, **options))
        except Exception as error:
            told.append(f"{type(error).__name__}: {error}")
        told.append(str(os.path.exists(output)))
    return told


def test_disagreement_is_told_before_anything_is_written(data: str, tmp_path: Path) -> None:
    words = (data, str(tmp_path / "run"), str(tmp_path / "none.pth"))
    first, second = run_ranks(2, tmp_path, disagreeing, *words)
    for told in (first, second):
        assert "batch_size 9 cannot be shared equally by 2 processes; the nearest that can are " \
            "8 and 10" in told[0]  # fmt: skip
        assert "started 2 processes on each of 1 machines, but devices is 4" in told[2]
        assert told[1] == told[3] == "False"
    assert "RankFailed: rank 0 failed" in second[4] and "RankFailed" not in first[4]


# --- whole processes, as a person starts them

# The small recipe, on smaller images and without the last three stages of its network.
SMALLER = """
    --output-stride 8 --truncate --image-size 32 --batch-size 8 --queue-length 20
    --loader memory --log-every 2 --checkpoint-every 5
"""
COMMON = """
    --recipe small_data --device cpu --devices 2 --threads 1 --workers 1 --no-tensorboard
    --timeout 60
"""
TINY = [*COMMON.split(), *SMALLER.split()]


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


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_same_line_stops_goes_on_and_is_killed(data: str, tmp_path: Path, start: Any) -> None:
    output, log, step = tmp_path / "run", tmp_path / "log", 0
    words = ["--data", data, "--output", str(output), *TINY, "--epochs", "3000", "--resume", "auto"]
    for number in (signal.SIGTERM, signal.SIGINT, None):
        before = logged(output)
        process = start(words, log)
        until(lambda: logged(output) > before + 3, log)  # noqa: B023
        assert not step or f"resuming at step {step} of" in log.read_text()
        if number is None:
            break
        process.send_signal(number)
        assert process.wait(60) == 130
        assert "go on with:" in log.read_text()
        reached = load_checkpoint(output / "checkpoints" / "last.pt")["step"]
        assert reached > step
        step = reached
    ranks = children(process.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    assert process.wait(60) == 2
    told = [line for line in log.read_text().splitlines() if "SIGKILL" in line or "error" in line]
    assert len(told) == 1 and f"rank 1 (process {ranks[1]}) was ended by SIGKILL" in told[0]
    assert all(map(gone, ranks))
    assert load_checkpoint(output / "checkpoints" / "last.pt")["step"] >= step


def command(words: list[str]) -> None:
    from densecl_ext import cli

    sys.exit(cli.main(words))


def exit_codes(ranks: list[Any]) -> list[int | None]:
    for rank in ranks:
        rank.join(600)
    return [rank.exitcode for rank in ranks]


@pytest.mark.slow
def test_ten_kills_change_nothing(data: str, tmp_path: Path) -> None:
    """Random ranks at random moments; the end has the bits of an undisturbed run.

    DENSECL_TEST_PHOTOS names a folder of photographs, which the small recipe then takes as it is.
    """
    photos = os.environ.get("DENSECL_TEST_PHOTOS")
    sizes = ["--log-every", "1", "--checkpoint-every", "3", "--max-steps", "30"]
    if not photos:
        sizes = [*SMALLER.split(), "--max-steps", "80"]
    words = ["pretrain", *COMMON.split(), *sizes, "--data", photos or data, "--resume", "auto"]
    words += ["--loader", "torchvision", "--workers", "0", "--output"]  # reads what it needs
    whole, output = tmp_path / "whole", tmp_path / "run"
    with started_ranks(2, tmp_path, command, [*words, str(whole)]) as ranks:
        assert exit_codes(ranks) == [0, 0]
    draw, kills, codes = random.Random(0), 0, [0]
    while codes != [0, 0]:
        with started_ranks(2, tmp_path, command, [*words, str(output)]) as ranks:
            if kills < 10:
                reached = logged(output) + draw.randrange(1, 3)
                end = time.monotonic() + 120
                while logged(output) < reached and ranks[0].is_alive():
                    assert time.monotonic() < end
                    time.sleep(0.01)
                time.sleep(draw.uniform(0, 0.1))
                if all(rank.is_alive() for rank in ranks):
                    draw.choice(ranks).kill()
                    kills += 1
            codes = exit_codes(ranks)
            assert sorted(codes) in ([0, 0], [-signal.SIGKILL, 2])
        print(f"{kills} kills, exit codes {codes}, {logged(output)} rows")
    assert kills == 10
    expected, got = (load_checkpoint(p / "checkpoints" / "last.pt") for p in (whole, output))
    runs.assert_same({key: got[key] for key in KEEP}, {key: expected[key] for key in KEEP})
