"""The processes of a run: who started them, how they meet, and how an error of one reaches all."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from densecl_ext.train.machine import pick_device
from densecl_ext.train.supervise import SUPERVISED, Start, share_batch, started

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from densecl_ext.train.config import PretrainConfig

_Result = TypeVar("_Result")


_OWN = "of_this_rank"  # marks an error that is no lost connection to another


class RankFailed(RuntimeError):
    """Another process of the run failed.

    Attributes:
        told: whether that process, or who started it, says why, so that this one need not.
    """

    def __init__(self, message: str, *, told: bool = True) -> None:
        super().__init__(message)
        self.told = told


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The processes of a run, as one of them sees them.

    Attributes:
        device: this process's.
        rank: its number, from 0 on; rank 0 alone touches the disk and tells of the run.
        world: how many there are.
        on_machine: how many of them share this machine.
        fabric: Lightning's, which started or joined them.
    """

    device: torch.device
    rank: int = 0
    world: int = 1
    on_machine: int = 1
    fabric: Fabric | None = None

    @property
    def first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with averaged gradients; alone, as it is. All ranks call it together.

        Raises:
            RuntimeError: the ranks' models differ in names or shapes.
        """
        if self.world == 1:
            return model
        assert self.fabric is not None
        return self.fabric.strategy.setup_module(model)

    def first_does(self, work: Callable[[], _Result]) -> _Result:
        """What rank 0 gets from `work`, on all ranks; plain containers and tensors on the CPU.

        Raises:
            Exception: rank 0's own, there; RankFailed elsewhere.
        """
        if self.world == 1:
            return work()
        result, error = None, None
        if self.first:
            try:
                result = work()
            except Exception as caught:
                error = caught
        sent = [(result, None if error is None else str(error))]
        dist.broadcast_object_list(sent, src=0, device=_cpu_or(self.device))
        if error is not None:
            raise own(error)
        if sent[0][1] is not None:
            raise RankFailed(f"rank 0 failed: {sent[0][1]}")
        return sent[0][0]  # type: ignore[return-value]

    def all_do(self, work: Callable[[], _Result]) -> _Result:
        """Every rank does `work`; if it fails on one, it fails on all.

        Raises:
            Exception: the rank's own, on the first rank that failed; RankFailed elsewhere.
        """
        if self.world == 1:
            return work()
        result, error = None, None
        try:
            result = work()
        except Exception as caught:
            error = caught
        errors = self.gather(None if error is None else str(error))
        failed = [rank for rank, text in enumerate(errors) if text is not None]
        if not failed:
            return result  # type: ignore[return-value]
        if self.rank == failed[0] and error is not None:
            raise own(error)
        raise RankFailed(f"rank {failed[0]} failed: {errors[failed[0]]}")

    def gather(self, value: _Result) -> list[_Result]:
        """Every rank's value; plain containers and tensors on the CPU."""
        if self.world == 1:
            return [value]
        gathered: list[Any] = [None] * self.world
        dist.all_gather_object(gathered, value)
        return gathered

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Turns the error of a collective, when a rank has gone, into a RankFailed that says so."""
        try:
            yield
        except RankFailed:
            raise
        except RuntimeError as error:  # DistError is one
            if self.world == 1 or hasattr(error, _OWN) or not _is_lost(error):
                raise
            raise RankFailed(
                f"pretrain: rank {self.rank} of {self.world} has lost another process, which ended "
                "or no longer answers: go on from the last checkpoint with --resume",
                told=bool(os.environ.get(SUPERVISED)) or not self._speaks(),
            ) from error

    def _speaks(self) -> bool:
        """Of the ranks that are left, one is enough to say it: the first that asks the store."""
        try:
            store = dist.distributed_c10d._get_default_store()
            store.set_timeout(timedelta(seconds=2))
            return store.add("densecl/lost", 1) == 1
        except Exception:  # the store lived in the process that is gone
            return True


def own(error: Exception) -> Exception:
    """Marks an error of this rank's own doing, which the others know of."""
    setattr(error, _OWN, True)
    return error


def launch(
    device: str,
    *,
    devices: int | str = "auto",
    num_nodes: int = 1,
    timeout: int = 1800,
    batch_size: int | None = None,
    accumulate: int = 1,
) -> Ranks:
    """Joins the run's processes, before anything else of it exists.

    torchrun, SLURM's srun, Kubernetes' PyTorchJob and `densecl pretrain --devices` start them.
    Fabric knows launchers, ranks and devices, and makes the process group: NCCL between GPUs, gloo
    between CPUs. Precision, backward and saving are the project's own: crop boxes must stay float32
    under bf16, `TrainingStep` runs without Lightning too and as a CUDA graph, and a checkpoint is
    one atomic file that does not depend on how the run was started.

    Args:
        device: the option.
        devices: processes on this machine, or "auto" for as many as were started.
        num_nodes: machines.
        timeout: seconds until a process that does not answer counts as lost.
        batch_size: the batch that they are to share, where it is to be checked.
        accumulate: parts of it.

    Raises:
        ValueError: the batch cannot be shared equally, or the device is one of several.
        RuntimeError: fewer or more processes were started than asked for, or a device is missing.
    """
    from lightning.fabric import Fabric
    from lightning.fabric.plugins.environments import LightningEnvironment
    from lightning.fabric.strategies import DDPStrategy

    start = started(devices, num_nodes)
    if batch_size is not None:
        share_batch(batch_size, start.world, accumulate)
    picked = pick_device(device, local_rank=start.local_rank, on_machine=start.on_machine)
    if start.world == 1:
        fabric = Fabric(
            accelerator=picked.type,
            devices=1 if picked.type == "cpu" else [picked.index or 0],
            plugins=[LightningEnvironment()],
        )
        fabric.launch()
        return Ranks(picked, fabric=fabric)
    strategy = DDPStrategy(
        timeout=timedelta(seconds=timeout),
        # The queues are large, and equal already.
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
    )
    fabric = Fabric(
        accelerator=picked.type,
        devices=start.on_machine,
        num_nodes=start.machines,
        strategy=strategy,
        plugins=[_environment(start)],
    )
    with _quiet():
        fabric.launch()
    return Ranks(picked, fabric.global_rank, fabric.world_size, start.on_machine, fabric)


def join(config: PretrainConfig) -> Ranks:
    """`launch` with a run's options."""
    return launch(
        config.device,
        devices=config.devices,
        num_nodes=config.num_nodes,
        timeout=config.timeout,
        batch_size=config.batch_size,
        accumulate=config.accumulate,
    )


def _environment(start: Start) -> Any:
    from lightning.fabric.plugins import environments

    if start.launcher == "torchrun":
        return environments.TorchElasticEnvironment()
    if start.launcher == "slurm":
        return environments.SLURMEnvironment(auto_requeue=False)
    if start.launcher == "kubernetes":
        return environments.KubeflowEnvironment()
    return environments.LightningEnvironment()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's lines of every process that joins."""
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("fabric", "pytorch")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _cpu_or(device: torch.device) -> torch.device | None:
    return device if device.type == "cuda" else None


def _is_lost(error: BaseException) -> bool:
    """Whether a collective failed because a process is gone, not because of what it was given."""
    text = str(error).lower()
    signs = ("connection", "timed out", "timeout", "peer", "remote process", "socket", "nccl")
    return isinstance(error, dist.DistError) or any(sign in text for sign in signs)
