"""The forward of :class:`densecl_ext.nn.batchnorm.SplitBatchNorm` on a GPU, in two launches."""

from __future__ import annotations

import torch
from torch import Tensor

from densecl_ext import _native  # noqa: F401  registers the operator

_native_op = torch.ops.densecl_ext._split_batch_norm


_LAYOUTS = {
    2: torch.contiguous_format,
    4: torch.channels_last,
    5: torch.channels_last_3d,
}


def takes(x: Tensor, *vectors: Tensor | None) -> bool:
    """Whether the kernels can normalise x: on a GPU, channels side by side, float32 vectors."""
    if not x.is_cuda or _native.missing_cuda is not None:
        return False
    layout = _LAYOUTS.get(x.dim())
    return (
        layout is not None
        and x.is_contiguous(memory_format=layout)
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and x.shape[1] % 4 == 0
        and x.storage_offset() * x.element_size() % 16 == 0
        and all(v is None or (v.dtype == torch.float32 and v.is_contiguous()) for v in vectors)
    )


def split_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    groups: int,
    factor: float,
    eps: float,
) -> Tensor:
    """Normalise every group by itself; see :class:`SplitBatchNorm`. Records no gradient.

    Args:
        x: (N, C, ...), which :func:`takes`.
        weight: (C,) float32 or None.
        bias: (C,) float32 or None.
        running_mean: (C,) float32, moved in place, or None.
        running_var: (C,) float32, moved in place, or None.
        groups: blocks of samples, at most N // 2.
        factor: weight of the groups' mean statistics in the running ones.
        eps: added to the variance.

    Returns:
        As x.
    """
    out = torch.empty_like(x, memory_format=_LAYOUTS[x.dim()])
    rows, result = (t.flatten(2).transpose(1, 2) if t.dim() > 2 else t[:, None] for t in (x, out))
    _native_op(rows, result, weight, bias, running_mean, running_var, groups, factor, eps)
    return out
