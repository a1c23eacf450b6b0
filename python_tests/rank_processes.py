"""Runs a function in several processes that meet as `densecl pretrain --devices` lets them."""

from __future__ import annotations

import contextlib
import multiprocessing as mp
import os
import pickle
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from densecl_ext.train.supervise import free_port

HERE = Path(__file__).resolve().parent
# Imported once, by a process without threads that all others are forked from.
PRELOAD = ["densecl_ext.train.loop", "densecl_ext.data.torchvision_loader", "rank_processes"]


def _process(rank: int, world: int, port: int, folder: str, call: bytes) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank),
        NODE_RANK="0",
    )
    import torch

    torch.set_num_threads(1)
    function, arguments = pickle.loads(call)
    try:
        result = function(*arguments)
    except SystemExit:  # a command, whose exit code the process takes
        raise
    except BaseException as error:
        result = RuntimeError(f"rank {rank}: {type(error).__name__}: {error}")
        traceback.print_exc()
    with open(f"{folder}/rank{rank}.pickle", "wb") as file:
        pickle.dump(result, file)


@contextlib.contextmanager
def started_ranks(
    world: int, folder: Path, function: Callable[..., Any], *arguments: Any
) -> Iterator[list[Any]]:
    """The processes that call the function, started; none outlives the block."""
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = path
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    folder.mkdir(parents=True, exist_ok=True)
    call, port = pickle.dumps((function, arguments)), free_port()
    processes = [
        context.Process(target=_process, args=(rank, world, port, str(folder), call))
        for rank in range(world)
    ]
    try:
        for process in processes:
            process.start()
        yield processes
    finally:
        for process in processes:
            process.kill()
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def run_ranks(world: int, folder: Path, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What the function returned on every rank; an exception there comes as a RuntimeError."""
    with started_ranks(world, folder, function, *arguments) as processes:
        for process in processes:
            process.join(300)
    results = []
    for rank in range(world):
        with open(folder / f"rank{rank}.pickle", "rb") as file:
            results.append(pickle.load(file))
    return results
