"""The queue of past keys: the negatives of queue-based contrastive learning.

MoCo (He et al., CVPR 2020, section 3.2) keeps the last ``K`` keys as a dictionary; DenseCL keeps
two such queues, one of global keys and one of dense keys (section 3.2).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densecl_ext import ops

QUEUE_INITS = ("empty", "random")


class KeyQueue(nn.Module):
    """A ring buffer of unit-length keys that counts how many it holds.

    The queue starts empty and a loss that is given the queue ignores the rows that hold no key yet,
    so no key that never was is used as a negative. ``init="random"`` restores the paper's start:
    the queue is full of random directions, which real keys then replace.

    Everything is a buffer on the queue's device, moved by ``.to()`` and saved in ``state_dict``:
    ``keys`` (K, D), ``pointer`` (1,) int64 (the row that is written next) and ``filled`` () int64
    (rows that hold a key). Nothing here waits for the device.

    Args:
        length: K, the number of keys that fit.
        dim: D, the size of a key.
        dtype: dtype of the stored keys, float32, bfloat16 or float16. It also chooses the
            arithmetic of the loss: see :func:`densecl_ext.ops.info_nce`.
        init: ``"empty"`` or ``"random"`` (unit rows of Gaussian noise from torch's global
            generator, all of them counted as keys).

    Raises:
        ValueError: a size below 1 or an unknown ``init``.
        TypeError: ``dtype`` is not one of the three.

    Example:
        >>> import torch
        >>> from densecl_ext import KeyQueue
        >>> queue = KeyQueue(length=4096, dim=128)
        >>> queue.enqueue_(torch.randn(48, 128))
        >>> int(queue.filled)
        48
    """

    keys: Tensor
    pointer: Tensor
    filled: Tensor

    def __init__(
        self, length: int, dim: int, dtype: torch.dtype = torch.float32, *, init: str = "empty"
    ) -> None:
        super().__init__()
        if length < 1 or dim < 1:
            raise ValueError(
                f"KeyQueue: length and dim must be at least 1, got length={length}, dim={dim}"
            )
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"KeyQueue: dtype must be float32, bfloat16 or float16, got {dtype}")
        if init not in QUEUE_INITS:
            raise ValueError(f"KeyQueue: init must be one of {QUEUE_INITS}, got {init!r}")
        if init == "random":
            keys = F.normalize(torch.randn(length, dim), dim=1).to(dtype)  # (K, D)
        else:
            keys = torch.zeros(length, dim, dtype=dtype)
        held = length if init == "random" else 0
        self.register_buffer("keys", keys)
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("filled", torch.tensor(held, dtype=torch.int64))

    @torch.no_grad()
    def enqueue_(self, keys: Tensor) -> None:
        """Replace the oldest keys by ``keys`` (B, D), scaled to unit length; any B.

        Of a batch larger than the queue the last K keys stay. The keys are detached.

        Raises:
            ValueError: ``keys`` is not (B, D).
        """
        ops.enqueue_(self.keys, self.pointer, keys, filled=self.filled)

    def __len__(self) -> int:
        """K, the number of keys that fit; ``filled`` says how many there are."""
        return self.keys.shape[0]

    def extra_repr(self) -> str:
        """Sizes and dtype for ``print(queue)``."""
        length, dim = self.keys.shape
        return f"length={length}, dim={dim}, dtype={self.keys.dtype}"
