"""Both losses of a DenseCL step in one native op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from densecl_ext.ops import _checks, _info_nce, _transforms
from densecl_ext.ops._info_nce_inputs import Inputs, Queue, grid_inputs, row_inputs

_native_op = torch.ops.densecl_ext._joint_info_nce


def joint_info_nce(
    query: Tensor,
    positive: Tensor,
    queue: Tensor | Queue,
    query_grid: Tensor,
    key_grid: Tensor,
    match: Tensor,
    dense_queue: Tensor | Queue,
    *,
    temperature: float | Tensor = 0.2,
    normalize: bool = True,
    filled: int | Tensor | None = None,
    dense_filled: int | Tensor | None = None,
    row_weight: Tensor | None = None,
    dense_row_weight: Tensor | None = None,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    """The global and the dense loss of DenseCL (section 3.2, eq. 1 and 2) in one go.

    The same as, bit for bit::

        info_nce(query, positive, queue, filled=filled, row_weight=row_weight, ...),
        dense_info_nce(query_grid, key_grid, match, dense_queue, filled=dense_filled,
                       row_weight=dense_row_weight, ...)

    On a GPU that is three kernel launches instead of six where both queues have the same dtype, D
    lies in the same 64 and gradients of both queries are wanted or of neither: the few rows of the
    global loss fill the places that the dense one's last wave leaves empty.

    Args:
        query: (M, D) float32, bfloat16 or float16.
        positive: (M, D), the same types.
        queue: (K, D), negatives of the global loss; or a :class:`densecl_ext.KeyQueue`.
        query_grid: (N, D', *Sq), the same types.
        key_grid: (N, D', *Sk), the same types.
        match: (N, prod(Sq)) int64, key position or -1.
        dense_queue: (K', D'), negatives of the dense loss; or a :class:`densecl_ext.KeyQueue`.
        temperature: of both, as in :func:`info_nce`.
        normalize: scale all vectors to unit length first.
        filled: int or one-element int64 tensor: only queue[:filled] counts.
        dense_filled: the same of dense_queue.
        row_weight: (M,) floating point weights.
        dense_row_weight: (N, prod(Sq)) floating point weights.
        reduction: of both, "mean", "sum" or "none", as in :func:`info_nce`.

    Returns:
        The global loss, as of :func:`info_nce`, and the dense one, as of :func:`dense_info_nce`.

    Raises:
        ValueError, TypeError, RuntimeError: as those two, under their names; RuntimeError too where
            the two losses' tensors are on different devices.
    """
    rows = row_inputs(
        "info_nce", query, positive, queue, temperature, filled, row_weight, reduction
    )
    grids = grid_inputs(
        "dense_info_nce",
        query_grid,
        key_grid,
        match,
        dense_queue,
        temperature,
        dense_filled,
        dense_row_weight,
        reduction,
    )
    _checks.on_one_device("joint_info_nce", {"query": query, "query_grid": query_grid})
    loss, dense_loss = _losses(rows, grids, temperature, normalize)
    return (
        _info_nce.reduce_rows(loss, row_weight, reduction),
        _info_nce.reduce_grid(dense_loss, match, dense_row_weight, reduction),
    )


def _losses(
    rows: Inputs,
    grids: Inputs,
    temperature: float | Tensor,
    normalize: bool,
) -> tuple[Tensor, Tensor]:  # (M, 1), (N, S)
    if _transforms.active():
        return (
            _info_nce.losses("info_nce", rows, temperature, normalize),
            _info_nce.losses("dense_info_nce", grids, temperature, normalize),
        )
    if isinstance(temperature, Tensor):
        rows, grids = (both.scaled_by(temperature, normalize) for both in (rows, grids))
        temperature, normalize = 1.0, False
    assert grids.match is not None
    loss, _, _, dense_loss, _, _ = _native_op(
        rows.query,
        rows.positive,
        rows.queue,
        rows.filled,
        grids.query,
        grids.positive,
        grids.match,
        grids.queue,
        grids.filled,
        float(temperature),
        normalize,
        *rows.wanted(),
        *grids.wanted(),
    )
    return loss, dense_loss


@torch.library.register_fake("densecl_ext::_joint_info_nce")
def _fake(
    query: Tensor,
    positive: Tensor,
    queue: Tensor,
    filled: Tensor | None,
    query_grid: Tensor,
    key_grid: Tensor,
    match: Tensor,
    dense_queue: Tensor,
    dense_filled: Tensor | None,
    temperature: float,
    normalize: bool,
    grad_query: bool,
    grad_positive: bool,
    grad_query_grid: bool,
    grad_key_grid: bool,
) -> tuple[Tensor, ...]:
    return (
        *_info_nce.fake_outputs(query, grad_query, grad_positive),
        *_info_nce.fake_outputs(query_grid, grad_query_grid, grad_key_grid),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, positive, _, _, query_grid, key_grid, match = inputs[:7]
    _, grad_query, grad_positive, _, grad_query_grid, grad_key_grid = output
    gradients = (grad_query, grad_positive, grad_query_grid, grad_key_grid)
    ctx.mark_non_differentiable(*gradients)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*gradients, match)
    ctx.dtypes = query.dtype, positive.dtype, query_grid.dtype, key_grid.dtype
    ctx.key_positions = positive.shape[2], key_grid.shape[2]


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Each loss's incoming factor, times what the forward sweep left."""
    grad_query, grad_positive, grad_query_grid, grad_key_grid, match = ctx.saved_tensors
    needs = ctx.needs_input_grad
    query, positive = _info_nce.row_gradients(
        grads[0], grad_query, grad_positive, None, ctx.key_positions[0], ctx.dtypes[:2], needs[:2]
    )
    query_grid, key_grid = _info_nce.row_gradients(
        grads[3],
        grad_query_grid,
        grad_key_grid,
        match,
        ctx.key_positions[1],
        ctx.dtypes[2:],
        needs[4:6],
    )
    return (query, positive, None, None, query_grid, key_grid, *(None,) * 9)


torch.library.register_autograd(
    "densecl_ext::_joint_info_nce", _backward, setup_context=_setup_context
)
