"""What the model needs of torch.distributed: the keys of all processes."""

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
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return keys
    keys = keys.contiguous()
    gathered = [torch.empty_like(keys) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, keys)
    return torch.cat(gathered)
