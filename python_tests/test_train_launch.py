"""How a run's processes are found, compared with what is asked for, and joined."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("lightning")

from rank_processes import run_ranks

from densecl_ext.train.supervise import Start, found_launcher, share_batch, started, supervise

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
SLURM = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2", "SLURM_LOCALID": "3"}
POD = {"WORLD_SIZE": "3", "RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "1"}
OURS = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Start("", 1, 1, 0, 1)),
        ({"SLURM_NTASKS": "8"}, Start("", 1, 1, 0, 1)),  # a batch script, not a task of srun
        ({**TORCHRUN, "LOCAL_RANK": "2"}, Start("torchrun", 8, 4, 2, 2)),
        ({**SLURM, **TORCHRUN}, Start("torchrun", 8, 4, 0, 2)),  # torchrun inside a job
        (SLURM, Start("slurm", 8, 4, 3, 2)),
        (POD, Start("kubernetes", 3, 1, 0, 3)),
        (OURS, Start("densecl", 2, 2, 1, 1)),
    ],
)
def test_what_launchers_tell(variables: dict[str, str], expected: Start) -> None:
    assert found_launcher(variables) == expected


def test_launchers_that_do_not_tell_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="one of 4 processes by mpirun; start it with torchrun"):
        found_launcher({"OMPI_COMM_WORLD_SIZE": "4"})
    with pytest.raises(RuntimeError, match="RANK and MASTER_ADDR do not say which"):
        found_launcher({"WORLD_SIZE": "4"})
    with pytest.raises(RuntimeError, match="are for the command: densecl pretrain --devices N"):
        started(2)
    for name, value in OURS.items():
        monkeypatch.setenv(name, value)
    assert started("auto") == started(2) == Start("densecl", 2, 2, 1, 1)
    with pytest.raises(RuntimeError, match="started 2 processes on each of 1 machines, but devic"):
        started(2, 3)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(RuntimeError, match="num_nodes 2 needs MASTER_ADDR.* NODE_RANK set on eve"):
        supervise(["true"], 2, 2)


@pytest.mark.parametrize(
    ("batch", "world", "parts", "near"),
    [
        (30, 4, 1, "4 processes; the nearest that can are 28 and 32"),
        (3, 4, 1, "4 processes; the nearest that can is 4"),
        (64, 3, 2, r"3 processes in 2 parts \(accumulate\); the nearest that can are 60 and 66"),
    ],
)
def test_a_batch_that_cannot_be_shared(batch: int, world: int, parts: int, near: str) -> None:
    with pytest.raises(ValueError, match=f"batch_size {batch} cannot be shared equally by {near}"):
        share_batch(batch, world, parts)
    assert share_batch(64, 4, 2) == 8


PROGRAM = """
import os, signal, sys, time
rank = os.environ["LOCAL_RANK"]
if len(sys.argv) > 1 and rank == "1":
    os.kill(os.getpid(), int(sys.argv[1])) if sys.argv[1] != "0" else sys.exit(7)
if len(sys.argv) > 1:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)
"""


@pytest.mark.parametrize(("how", "code"), [([], 0), (["9"], 2), (["0"], 2)])
def test_none_outlives_one_that_ends_badly(
    how: list[str],
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from densecl_ext.train import supervise as module

    monkeypatch.setattr(module, "_GRACE", 0.2)
    assert supervise([sys.executable, "-c", PROGRAM, *how], 3, 1) == code
    told = capsys.readouterr().err
    assert told.count("\n") == (how == ["9"]) and ("rank 1" in told) == (how == ["9"])
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    if children.exists():
        alive = {int(word) for word in children.read_text().split()}
        for pid in alive:
            assert "LOCAL_RANK=" not in Path(f"/proc/{pid}/environ").read_text()


OBEDIENT = """
import os, signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(130))
open(sys.argv[1] + os.environ["LOCAL_RANK"], "w").close()
time.sleep(60)
"""


def test_a_signal_is_passed_on_and_the_code_says_resume(tmp_path: Path) -> None:
    """To a supervisor of three in a process of its own, as signals need its main thread."""
    program = "import sys; from densecl_ext.train.supervise import supervise; "
    program += f"sys.exit(supervise([sys.executable, '-c', {OBEDIENT!r}, sys.argv[1]], 3, 1))"
    process = subprocess.Popen([sys.executable, "-c", program, f"{tmp_path}/"], cwd=ROOT)
    end = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 3 and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 130


def test_a_cuda_graph_is_for_one_gpu(tmp_path: Path) -> None:
    """Said before anything is opened: no GPU is needed for it."""
    import torch
    import train_runs as runs

    from densecl_ext.train.launch import Ranks
    from densecl_ext.train.run import build_run

    config = runs.tiny_config("none", tmp_path / "run", cuda_graph=True, device="cuda")
    gpu = torch.device("cuda", 0)
    with pytest.raises(ValueError, match="cuda_graph is for one GPU, the run has 2; leave it out"):
        build_run(config, gpu, ranks=Ranks(gpu, rank=0, world=2))


def under_slurm() -> tuple[str, int, int]:
    """Joins as a task of srun, with the variables that it sets."""
    rank = os.environ["LOCAL_RANK"]
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "NODE_RANK"):
        del os.environ[name]
    os.environ |= {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_PROCID": rank,
        "SLURM_LOCALID": rank,
        "SLURM_NODEID": "0",
    }
    from densecl_ext.train.launch import launch

    ranks = launch("cpu", timeout=60)
    ranks.gather(0)  # neither ends while the other is still on its way
    return type(ranks.fabric._connector.cluster_environment).__name__, ranks.rank, ranks.world


def test_tasks_of_slurm_meet(tmp_path: Path) -> None:
    assert run_ranks(2, tmp_path, under_slurm) == [
        ("SLURMEnvironment", 0, 2),
        ("SLURMEnvironment", 1, 2),
    ]


def first_fails() -> list[str]:
    from densecl_ext.train.launch import launch

    ranks, told = launch("cpu", timeout=60), []

    def fail() -> None:
        raise RuntimeError("connection refused by a logger")

    for work in (ranks.first_does, ranks.all_do):
        try:
            with ranks.together():
                work(fail)
        except RuntimeError as error:
            told.append(f"{type(error).__name__}: {error}")
    return told


def test_an_error_of_one_is_told_once(tmp_path: Path) -> None:
    own, others = run_ranks(2, tmp_path, first_fails)
    assert own == ["RuntimeError: connection refused by a logger"] * 2
    assert others == ["RankFailed: rank 0 failed: connection refused by a logger"] * 2
