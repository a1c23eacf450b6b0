"""`densecl pretrain --devices N`: starts the processes, passes signals on, leaves none behind.

Imports nothing heavy. torchrun and srun do the same for the processes they start, and what they
tell those is read here too.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import NamedTuple

SUPERVISED = "DENSECL_SUPERVISED"  # set for the processes that `supervise` started
INTERRUPTED = 130
_GRACE = 10.0  # seconds that the others have to end by themselves once one is gone
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Start(NamedTuple):
    """How this process was started.

    Attributes:
        launcher: "torchrun", "slurm", "kubernetes", "densecl", or "" for alone.
        world: processes of the run.
        on_machine: of them on this machine.
        local_rank: which of those this is.
        machines: machines of the run.
    """

    launcher: str
    world: int
    on_machine: int
    local_rank: int
    machines: int


def found_launcher(environment: Mapping[str, str] = os.environ) -> Start:
    """What launchers have told this process; raises RuntimeError for mpirun, which is not one."""

    def number(name: str, default: int) -> int:
        return int(environment.get(name) or default)

    if "TORCHELASTIC_RUN_ID" in environment:
        world = number("WORLD_SIZE", 1)
        on_machine = number("LOCAL_WORLD_SIZE", world)
        return Start("torchrun", world, on_machine, number("LOCAL_RANK", 0), world // on_machine)
    if number("SLURM_STEP_NUM_TASKS", 1) > 1:
        world, machines = number("SLURM_STEP_NUM_TASKS", 1), number("SLURM_STEP_NUM_NODES", 1)
        local_rank = number("SLURM_LOCALID", 0)
        return Start("slurm", world, world // machines, local_rank, machines)
    if number("OMPI_COMM_WORLD_SIZE", 1) > 1:
        raise RuntimeError(
            f"pretrain: started as one of {environment['OMPI_COMM_WORLD_SIZE']} processes by "
            "mpirun; start it with torchrun, srun or --devices N"
        )
    if "LOCAL_RANK" in environment and number("WORLD_SIZE", 1) > 1:
        world = number("WORLD_SIZE", 1)
        on_machine = number("LOCAL_WORLD_SIZE", world)
        return Start("densecl", world, on_machine, number("LOCAL_RANK", 0), world // on_machine)
    if number("WORLD_SIZE", 1) > 1:
        world = number("WORLD_SIZE", 1)
        if "RANK" not in environment or "MASTER_ADDR" not in environment:
            raise RuntimeError(
                f"pretrain: started as one of {world} processes (WORLD_SIZE), but RANK and "
                "MASTER_ADDR do not say which; start it with torchrun, srun or --devices N"
            )
        return Start("kubernetes", world, 1, 0, world)
    return Start("", 1, 1, 0, 1)


def started(devices: int | str = "auto", num_nodes: int = 1) -> Start:
    """How this process was started, compared with what is asked for.

    Raises:
        RuntimeError: another number of processes was started.
    """
    start = found_launcher()
    wanted = start.on_machine if devices == "auto" else int(devices)
    if not start.launcher:
        if wanted * num_nodes > 1:
            raise RuntimeError(
                f"pretrain: devices {wanted} and num_nodes {num_nodes} are for the command: "
                "densecl pretrain --devices N; a script of your own is started with "
                "torchrun --nproc-per-node N"
            )
        return start
    machines = start.machines if num_nodes == 1 else num_nodes
    if (wanted, machines) != (start.on_machine, start.machines):
        raise RuntimeError(
            f"pretrain: {start.launcher} started {start.on_machine} processes on each of "
            f"{start.machines} machines, but devices is {wanted} and num_nodes {machines}; "
            "leave both out"
        )
    return start


def share_batch(batch_size: int, world: int, accumulate: int) -> int:
    """Images of one part of the batch on one process.

    Raises:
        ValueError: they cannot share it equally; the message names the nearest that they can.
    """
    shares = world * accumulate
    if batch_size % shares == 0:
        return batch_size // shares
    below = batch_size // shares * shares
    near = [str(size) for size in (below, below + shares) if size]
    parts = f" in {accumulate} parts (accumulate)" if accumulate > 1 else ""
    raise ValueError(
        f"pretrain: batch_size {batch_size} cannot be shared equally by {world} processes{parts}; "
        f"the nearest that can {'is' if len(near) == 1 else 'are'} {' and '.join(near)}"
    )


def supervise(command: Sequence[str], devices: int, num_nodes: int) -> int:
    """Runs a command once for every process of this machine, and waits for all of them.

    A signal to this process is passed on to each. When one ends badly the others get some seconds
    to end by themselves, and are then killed. If this process is killed, they are asked to stop.

    Args:
        command: what to run.
        devices: how many times.
        num_nodes: machines that do the same; with more than one MASTER_ADDR, MASTER_PORT and
            NODE_RANK must be set on each.

    Returns:
        The exit code: 0, 130 after an interruption, 2 after an error.

    Raises:
        RuntimeError: a variable is missing.
    """
    environment = dict(os.environ)
    if num_nodes > 1:
        missing = [n for n in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if n not in environment]
        if missing:
            raise RuntimeError(
                f"pretrain: num_nodes {num_nodes} needs {', '.join(missing)} set on every machine; "
                "or start it with torchrun or srun"
            )
    else:
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment |= {
        SUPERVISED: "1",
        "NODE_RANK": environment.get("NODE_RANK", "0"),
        "WORLD_SIZE": str(devices * num_nodes),
        "LOCAL_WORLD_SIZE": str(devices),
    }
    processes: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in _SIGNALS}
    try:
        for local_rank in range(devices):
            # A session of its own: Ctrl-C reaches it once, through this process.
            processes.append(
                subprocess.Popen(
                    command,
                    env=environment | {"LOCAL_RANK": str(local_rank)},
                    start_new_session=True,
                    preexec_fn=_end_with_parent,
                )
            )
        return _watch(processes, int(environment["NODE_RANK"]) * devices)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(processes: Sequence[subprocess.Popen[bytes]], first_rank: int) -> int:
    """Waits; says which process was killed, and ends those that outlive it."""
    deadline = None
    while any(process.poll() is None for process in processes):
        for rank, process in enumerate(processes, first_rank):
            code = process.poll()
            if deadline is None and code not in (None, 0, INTERRUPTED):
                deadline = time.monotonic() + _GRACE
                if code is not None and code < 0:
                    _say(
                        f"pretrain: rank {rank} (process {process.pid}) was ended by "
                        f"{_signal_name(-code)}; ending the others. Go on from the last "
                        "checkpoint with --resume"
                    )
        if deadline is not None and time.monotonic() > deadline:
            for process in processes:
                if process.poll() is None:
                    process.kill()
        time.sleep(0.05)
    codes = [process.wait() for process in processes]
    if any(code not in (0, INTERRUPTED) for code in codes):
        return 2
    return INTERRUPTED if INTERRUPTED in codes else 0


def this_command() -> list[str]:
    """What started this process."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is None:
        return [sys.executable, os.path.abspath(sys.argv[0]), *sys.argv[1:]]
    return [sys.executable, "-m", spec.name.removesuffix(".__main__"), *sys.argv[1:]]


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def _end_with_parent() -> None:
    """On Linux, asks the system for SIGTERM when the parent is gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
