"""What every op that writes in place owes to autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def record(*tensors: Tensor) -> None:
    """Count the write, so that autograd refuses a backward that saved an older value.

    torch does this by itself for its own ops; for an op of another library it must be said.
    While torch.compile traces, functionalization keeps the books. Inference tensors have no
    counter, and no backward may save them.
    """
    if torch.compiler.is_compiling():
        return
    try:
        torch.autograd.graph.increment_version(tensors)
    except RuntimeError:
        torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])
