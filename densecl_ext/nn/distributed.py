"""What the model needs of torch.distributed: the keys of all processes, means over them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


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


def world_size() -> int:
    """Number of processes; 1 without an initialised process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
