"""What the model needs of torch.distributed: the keys of all processes, means over them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

STOP, FAILED, CHECKED, CHECKSUM = range(4)  # the fields of a note


@torch.no_grad()
def gather_keys(keys: Tensor) -> Tensor:
    """Keys (N, D) of all processes, in the order of their ranks: (world size * N, D).

    Every rank gets the same result, so queues that are equal before stay equal. N must be equal on
    all ranks. Without an initialised process group, or alone in it, the keys come back as they are.
    """
    if world_size() == 1:
        return keys
    keys = keys.contiguous()
    gathered = [torch.empty_like(keys) for _ in range(world_size())]
    dist.all_gather(gathered, keys)
    return torch.cat(gathered)


class KeyExchange:
    """`gather_keys` that also carries a note of every process: one collective for both.

    Put it in the place of a model's ``gather``. What a process has to tell the others is written
    into `note` before a step, and after it `notes` holds what all of them have told in that step.

    Args:
        device: where the keys are.

    Attributes:
        note: int32 (4,), what this process tells: whether to stop, whether it failed, whether the
            checksum of its queues is there, and that.
        notes: int32 (world size, 4) of the last exchange; None before the first.
    """

    def __init__(self, device: torch.device) -> None:
        self.note = torch.zeros(4, dtype=torch.int32, device=device)
        self.notes: Tensor | None = None

    def tell(self, *, stop: bool, failed: bool, checksum: Tensor | None = None) -> None:
        """Write the note of the next exchange; nothing waits.

        Args:
            stop: ask all processes to stop after this step.
            failed: say that this process cannot go on.
            checksum: () int32 of `queue_checksum`, to be compared with the others'.
        """
        told = torch.tensor([stop, failed, checksum is not None, 0], dtype=torch.int32)
        if self.note.is_cuda:
            told = told.pin_memory()
        self.note.copy_(told, non_blocking=True)
        if checksum is not None:
            self.note[CHECKSUM] = checksum

    @torch.no_grad()
    def __call__(self, keys: Tensor) -> Tensor:
        """Keys float32 (N, ...) of all processes: (world size * N, ...)."""
        ranks = world_size()
        sent = torch.cat([keys.contiguous().view(torch.int32).flatten(), self.note])
        received = sent.new_empty(ranks * sent.numel())
        dist.all_gather_into_tensor(received, sent)
        rows = received.view(ranks, -1)
        self.notes = rows[:, keys.numel() :].clone()
        own = rows[:, : keys.numel()].contiguous().view(torch.float32)
        return own.reshape(ranks * keys.shape[0], *keys.shape[1:])


@torch.no_grad()
def queue_checksum(*queues: Tensor) -> Tensor:
    """() int32 over the bits of queues (K, D): other rows, or rows elsewhere, give another one.

    Reads every queue once and waits for nothing.
    """
    total = torch.zeros((), dtype=torch.int64, device=queues[0].device)
    for queue in queues:
        bits = queue.view(torch.int32 if queue.element_size() == 4 else torch.int16)
        rows = bits.sum(dim=1)  # int64 (K,)
        total = total * 31 + (rows * (2 * torch.arange(len(rows), device=rows.device) + 1)).sum()
    return (total % 2**31).int()


def mean_over_ranks(mean: Tensor, match: Tensor, row_weight: Tensor | None = None) -> Tensor:
    """A process's share of a mean over the matched positions of all processes.

    ``mean`` (0-d) is ``sum(w l) / sum(w)`` over this process's positions. Processes have different
    sums of weights, so that the plain average of their means (and of the gradients, which
    DistributedDataParallel takes) would count a position more where few are matched. The share is
    ``mean * R sum(w) / sum(w over all R processes)``: the average of all shares is the mean over
    all positions. One all-reduce of a number, in every process; alone, ``mean`` as it is.

    Args:
        mean: 0-d, this process's mean.
        match: (N, S) int64; positions with -1 have weight 0.
        row_weight: (N, S) weights, 1 where None.
    """
    ranks = world_size()
    if ranks == 1:
        return mean
    with torch.no_grad():
        weight = (match >= 0).float()
        own = (weight if row_weight is None else weight * row_weight).sum()
        total = own.clone()
        dist.all_reduce(total)
        share = ranks * own / torch.where(total == 0, torch.ones_like(total), total)
    return mean * share


def own_rows(draw: Callable[[int], Tensor], rows: int) -> Tensor:
    """This process's rows of random numbers that are drawn for the images of all processes.

    So an image's numbers do not depend on how many processes share the batch, and the generators
    of all processes stay equal.

    Args:
        draw: called with a number of rows, returns that many.
        rows: this process's, equal on all.
    """
    ranks = world_size()
    if ranks == 1:
        return draw(rows)
    first = dist.get_rank() * rows
    return draw(ranks * rows)[first : first + rows]


def world_size() -> int:
    """Number of processes; 1 without an initialised process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
