"""The ops in plain PyTorch: the truth of the tests and the baseline of the benchmarks.

Written the way people write them today: ``matmul``, ``cat``, ``cross_entropy``, with the whole
(M, K + 1) matrix of logits in memory. Every function takes the arguments of its native twin in
:mod:`densecl_ext.ops`, and float64 tensors as well, so a test can ask for the same loss in double
precision. Argument checks live with the native ops; here PyTorch's own errors have to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-12  # rows shorter than this are divided by it and get no gradient


def unit_rows(rows: Tensor) -> Tensor:
    """Scale rows (M, D) to unit length; a (near-)zero row stays near zero and gets no gradient.

    ``F.normalize`` would hand such a row a gradient 1e12 times too large, since its direction is
    undefined.
    """
    unit = F.normalize(rows, dim=1, eps=EPS)
    return torch.where(rows.norm(dim=1, keepdim=True) < EPS, unit.detach(), unit)


def info_nce(
    query: Tensor,
    positive: Tensor,
    queue: Tensor | Any,
    *,
    temperature: float | Tensor = 0.2,
    normalize: bool = True,
    filled: int | Tensor | None = None,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """InfoNCE of rows against a queue (MoCo, eq. 1); see :func:`densecl_ext.ops.info_nce`."""
    if not isinstance(queue, Tensor):  # a KeyQueue
        queue, filled = queue.keys, queue.filled
    dtype = torch.promote_types(torch.promote_types(query.dtype, positive.dtype), torch.float32)
    query, positive = query.to(dtype), positive.to(dtype)
    if normalize:
        query, positive = unit_rows(query), unit_rows(positive)
    query, positive = _round_to(query, queue.dtype), _round_to(positive, queue.dtype)
    if filled is not None:
        queue = queue[: int(filled)]
    positive_logit = (query * positive).sum(dim=1, keepdim=True)  # (M, 1)
    negative_logits = query @ queue.to(dtype).T  # (M, K)
    logits = torch.cat([positive_logit, negative_logits], dim=1) / temperature  # (M, 1 + K)
    target = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    loss = F.cross_entropy(logits, target, reduction="none")  # (M,)
    return _reduce(loss, row_weight, reduction)


def dense_match(query_features: Tensor, key_features: Tensor, *, mutual: bool = False) -> Tensor:
    """Most similar key position of every query position; see :func:`densecl_ext.ops.dense_match`.

    DenseCL, section 3.3, eq. 3.
    """
    dtype = torch.promote_types(query_features.dtype, torch.float32)
    tiny = torch.finfo(dtype).tiny  # in float64 vectors of any float32 length keep their direction
    query = F.normalize(query_features.flatten(2).to(dtype), dim=1, eps=tiny)  # (N, C, Sq)
    key = F.normalize(key_features.flatten(2).to(dtype), dim=1, eps=tiny)  # (N, C, Sk)
    similarity = query.transpose(1, 2) @ key  # (N, Sq, Sk)
    match = similarity.argmax(dim=2)  # (N, Sq)
    if mutual:
        back = similarity.argmax(dim=1)  # (N, Sk)
        own = torch.arange(match.shape[1], device=match.device)
        match = torch.where(back.gather(1, match) == own, match, -1)
    return match


def dense_info_nce(
    query_grid: Tensor,
    key_grid: Tensor,
    match: Tensor,
    queue: Tensor | Any,
    *,
    temperature: float | Tensor = 0.2,
    normalize: bool = True,
    filled: int | Tensor | None = None,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """InfoNCE of every matched position; see :func:`densecl_ext.ops.dense_info_nce`.

    DenseCL, section 3.2, eq. 2.
    """
    dim = query_grid.shape[1]
    query = query_grid.flatten(2)  # (N, D, Sq)
    key = key_grid.flatten(2)  # (N, D, Sk)
    index = match.clamp(min=0).unsqueeze(1).expand(-1, dim, -1)  # (N, D, Sq)
    positive = key.gather(2, index)  # (N, D, Sq)
    loss = info_nce(
        query.transpose(1, 2).reshape(-1, dim),
        positive.transpose(1, 2).reshape(-1, dim),
        queue,
        temperature=temperature,
        normalize=normalize,
        filled=filled,
        reduction="none",
    ).view(match.shape)
    matched = match >= 0
    loss = torch.where(matched, loss, torch.zeros_like(loss))
    weight = matched.to(loss.dtype) if row_weight is None else row_weight * matched
    return _reduce(loss, weight, reduction)


def joint_info_nce(
    query: Tensor,
    positive: Tensor,
    queue: Tensor | Any,
    query_grid: Tensor,
    key_grid: Tensor,
    match: Tensor,
    dense_queue: Tensor | Any,
    *,
    temperature: float | Tensor = 0.2,
    normalize: bool = True,
    filled: int | Tensor | None = None,
    dense_filled: int | Tensor | None = None,
    row_weight: Tensor | None = None,
    dense_row_weight: Tensor | None = None,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    """Both losses of a step; see :func:`densecl_ext.ops.joint_info_nce`."""
    options: dict[str, Any] = {
        "temperature": temperature,
        "normalize": normalize,
        "reduction": reduction,
    }
    return (
        info_nce(query, positive, queue, filled=filled, row_weight=row_weight, **options),
        dense_info_nce(
            query_grid,
            key_grid,
            match,
            dense_queue,
            filled=dense_filled,
            row_weight=dense_row_weight,
            **options,
        ),
    )


@torch.no_grad()
def ema_update_(
    targets: Sequence[Tensor], sources: Sequence[Tensor], momentum: float | Tensor
) -> None:
    """Momentum update, one parameter at a time (MoCo, eq. 2); see ``densecl_ext.ops``."""
    for target, source in zip(targets, sources, strict=True):
        if not isinstance(momentum, Tensor) and momentum in (0.0, 1.0):
            if momentum == 0.0:
                target.copy_(source)  # 0 times an infinite or NaN target would be NaN
            continue
        dtype = torch.promote_types(target.dtype, torch.float32)
        target.copy_(momentum * target.to(dtype) + (1.0 - momentum) * source.to(dtype))


@torch.no_grad()
def enqueue_(
    queue: Tensor,
    pointer: Tensor,
    keys: Tensor,
    *,
    filled: Tensor | None = None,
    normalize: bool = True,
) -> None:
    """Write keys into the queue, wrapping round; see :func:`densecl_ext.ops.enqueue_`."""
    length, batch, start = queue.shape[0], keys.shape[0], int(pointer)
    keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
    if normalize:
        keys = F.normalize(keys, dim=1)
    kept = min(batch, length)
    rows = (start + batch - kept + torch.arange(kept, device=queue.device)) % length
    queue[rows] = keys[batch - kept :].to(queue.dtype)
    pointer.fill_((start + batch) % length)
    if filled is not None:
        filled.fill_(min(length, int(filled) + batch))


def _round_to(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to a 16-bit queue's precision, the operands of its products, gradient straight through.

    A float32 or float64 queue rounds nothing.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return rows
    exact = rows.detach()
    return rows + (exact.to(dtype).to(rows.dtype) - exact)


def _reduce(loss: Tensor, row_weight: Tensor | None, reduction: str) -> Tensor:
    if row_weight is not None:
        loss = loss * row_weight
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    total = row_weight.sum() if row_weight is not None else loss.new_full((), float(loss.numel()))
    return loss.sum() / torch.where(total == 0, torch.ones_like(total), total)
