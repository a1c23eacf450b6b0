"""InfoNCE against a queue, for rows and for grids: two views of one native op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from densecl_ext.ops import _transforms
from densecl_ext.ops._info_nce_inputs import Inputs, Queue, grid_inputs, row_inputs

_native_op = torch.ops.densecl_ext._info_nce
_key_gradient = torch.ops.densecl_ext._key_gradient


def info_nce(
    query: Tensor,
    positive: Tensor,
    queue: Tensor | Queue,
    *,
    temperature: float | Tensor = 0.2,
    normalize: bool = True,
    filled: int | Tensor | None = None,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """InfoNCE of M rows, each against its positive and the rows of a queue.

    ``l_i = log(exp(q_i.p_i / T) + sum_j exp(q_i.n_j / T)) - q_i.p_i / T`` (MoCo, eq. 1; DenseCL,
    eq. 1). One sweep over the queue yields loss and gradient; the (M, K) logits are never stored.

    The queue's dtype chooses the arithmetic: float32 keeps float32 accuracy, bfloat16 and float16
    round query and positive (after scaling) to that type and sum in float32. The gradient passes
    straight through that rounding. Results are the same bits for every number of threads.

    Args:
        query: (M, D) float32, bfloat16 or float16; any strides; M may be 0.
        positive: (M, D), the same types.
        queue: (K, D), K >= 1, the same types; rows are used as stored; must not require grad. Or
            a :class:`densecl_ext.KeyQueue`, of which the rows that hold a key count.
        temperature: T in [1e-30, 1e30]; or a floating-point tensor of one element on the device of
            query, which gets its gradient (on a GPU its value is not checked). Query and positive
            are then scaled outside the kernel, and with a 16-bit queue q / T is what is rounded.
        normalize: scale query and positive rows to unit length first. A row shorter than 1e-12
            has no direction: it is divided by 1e-12 and gets no gradient.
        filled: int or one-element int64 tensor on the queue's device: only queue[:filled] counts.
            With 0 there are no negatives: loss 0, gradient 0.
        row_weight: (M,) floating point weights of the rows.
        reduction: "mean" is sum(w l) / sum(w), and 0 where the weights sum to 0 (no rows, say);
            "sum"; "none" gives w l.

    Returns:
        float32: a 0-d tensor, or (M,) with reduction "none". NaN or infinity in a row makes that
        row's loss and gradient NaN; in the queue, every row's.

    Raises:
        ValueError: shapes or values that do not fit; a queue that requires grad.
        TypeError: a dtype outside the three.
        RuntimeError: tensors on different devices, or on one without kernels; more than 256
            features on a GPU; asking for a second derivative, or for torch.func's grad, vjp,
            jacrev or hessian (forward mode, jvp, jacfwd and vmap work).
    """
    inputs = row_inputs(
        "info_nce", query, positive, queue, temperature, filled, row_weight, reduction
    )
    loss = losses("info_nce", inputs, temperature, normalize)
    return reduce_rows(loss, row_weight, reduction)


def dense_info_nce(
    query_grid: Tensor,
    key_grid: Tensor,
    match: Tensor,
    queue: Tensor | Queue,
    *,
    temperature: float | Tensor = 0.2,
    normalize: bool = True,
    filled: int | Tensor | None = None,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """InfoNCE of every grid position against its matched key position and a queue.

    DenseCL, section 3.2, eq. 2: :func:`info_nce` with a row for every position and
    ``positive[n, i] = key_grid[n, :, match[n, i]]``, gathered inside the kernel.

    Args:
        query_grid: (N, D, *Sq) float32, bfloat16 or float16; any strides.
        key_grid: (N, D, *Sk), the same types.
        match: (N, prod(Sq)) int64, flat index of a key position, or -1 for a position without a
            match, which carries no loss and no gradient.
        queue: (K, D), K >= 1; must not require grad; or a :class:`densecl_ext.KeyQueue`.
        temperature: as in :func:`info_nce`.
        normalize: scale query and key vectors to unit length first.
        filled: int or one-element int64 tensor: only queue[:filled] counts.
        row_weight: (N, prod(Sq)) floating point weights of the positions.
        reduction: "mean" is sum(w l) / sum(w) over the matched positions, 0 where there is none;
            "sum"; "none" gives w l.

    Returns:
        float32: a 0-d tensor, or (N, prod(Sq)) with reduction "none".

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`info_nce`; ValueError too for a match
            outside [-1, prod(Sk)), on the CPU. On a GPU, where looking would wait for the device,
            such a position's loss and gradients are NaN.
    """
    inputs = grid_inputs(
        "dense_info_nce",
        query_grid,
        key_grid,
        match,
        queue,
        temperature,
        filled,
        row_weight,
        reduction,
    )
    loss = losses("dense_info_nce", inputs, temperature, normalize)
    return reduce_grid(loss, match, row_weight, reduction)


def losses(op: str, inputs: Inputs, temperature: float | Tensor, normalize: bool) -> Tensor:
    """Losses (N, S) of checked inputs."""
    if isinstance(temperature, Tensor):
        inputs, temperature, normalize = inputs.scaled_by(temperature, normalize), 1.0, False
    if _transforms.active():
        with_tangent = _forward_losses(op, inputs, temperature, normalize)
        if with_tangent is not None:
            return with_tangent
    return _native_op(*inputs, float(temperature), normalize, *inputs.wanted())[0]


def _forward_losses(op: str, inputs: Inputs, temperature: float, normalize: bool) -> Tensor | None:
    """Losses (N, S) with their forward-mode tangent; None where no input has one.

    The gradients that the sweep yields for reverse mode are the derivatives of each row's loss.
    """
    query, positive = _transforms.tangents(op, inputs[:2], (inputs.queue,))
    if query is None and positive is None:
        return None
    plain = inputs._replace(
        query=forward_ad.unpack_dual(inputs.query).primal,
        positive=forward_ad.unpack_dual(inputs.positive).primal,
    )
    wanted = query is not None, positive is not None
    loss, grad_query, grad_positive = _native_op(*plain, float(temperature), normalize, *wanted)
    tangent = torch.zeros_like(loss)
    if query is not None:
        tangent = tangent + (grad_query.transpose(1, 2) * query).sum(dim=1)
    if positive is not None:
        if inputs.match is not None:
            index = inputs.match.clamp(min=0).unsqueeze(1).expand(-1, positive.shape[1], -1)
            positive = positive.gather(2, index)  # (N, D, S)
        tangent = tangent + (grad_positive.transpose(1, 2) * positive).sum(dim=1)
    return forward_ad.make_dual(loss, tangent)


def reduce_rows(loss: Tensor, row_weight: Tensor | None, reduction: str) -> Tensor:
    """Losses (M, 1) as the caller wants them."""
    return _reduce(loss.squeeze(1), row_weight, reduction)


def reduce_grid(loss: Tensor, match: Tensor, row_weight: Tensor | None, reduction: str) -> Tensor:
    """Losses (N, S) as the caller wants them: positions without a match carry none."""
    matched = (match >= 0).to(loss.dtype)
    return _reduce(loss, matched if row_weight is None else row_weight * matched, reduction)


def _reduce(loss: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    if weight is not None:
        loss = loss * weight.to(loss.dtype)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if weight is None:
        return loss.mean() if loss.numel() else loss.sum()
    total = weight.to(loss.dtype).sum()
    return loss.sum() / torch.where(total == 0, torch.ones_like(total), total)


@torch.library.register_fake("densecl_ext::_info_nce")
def _fake(
    query: Tensor,
    positive: Tensor,
    match: Tensor | None,
    queue: Tensor,
    filled: Tensor | None,
    temperature: float,
    normalize: bool,
    grad_query: bool,
    grad_positive: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_outputs(query, grad_query, grad_positive)


def fake_outputs(
    query: Tensor, grad_query: bool, grad_positive: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients of a query (N, D, S), their shapes alone."""
    images, dim, positions = query.shape

    def gradient(wanted: bool) -> Tensor:
        shape = (images, positions, dim) if wanted else (0,)
        return query.new_empty(shape, dtype=torch.float32)

    loss = query.new_empty((images, positions), dtype=torch.float32)
    return loss, gradient(grad_query), gradient(grad_positive)


@torch.library.register_fake("densecl_ext::_key_gradient")
def _fake_key_gradient(grad_rows: Tensor, match: Tensor, key_positions: int) -> Tensor:
    return grad_rows.new_empty((grad_rows.shape[0], key_positions, grad_rows.shape[2]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, positive, match = inputs[:3]
    _, grad_query, grad_positive = output
    ctx.mark_non_differentiable(grad_query, grad_positive)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad_query, grad_positive, match)
    ctx.dtypes = query.dtype, positive.dtype
    ctx.key_positions = positive.shape[2]


def _backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    grad_query, grad_positive, match = ctx.saved_tensors
    gradients = row_gradients(
        grad_loss,
        grad_query,
        grad_positive,
        match,
        ctx.key_positions,
        ctx.dtypes,
        ctx.needs_input_grad[:2],
    )
    return (*gradients, None, None, None, None, None, None, None)


def row_gradients(
    grad_loss: Tensor | None,  # (N, S)
    grad_query: Tensor,  # (N, S, D)
    grad_positive: Tensor,  # (N, S, D)
    match: Tensor | None,  # (N, S)
    key_positions: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:  # (N, D, S), (N, D, Sk)
    """The gradients were computed in the forward sweep: what is left is the incoming factor."""
    if grad_loss is None:
        return None, None
    if torch.is_grad_enabled():
        raise RuntimeError(
            "info_nce: the native op has no second derivative (create_graph=True was asked for); "
            "use densecl_ext.reference for it"
        )
    factor = grad_loss.unsqueeze(2)  # (N, S, 1)
    query = positive = None
    if wanted[0]:
        query = (factor * grad_query).transpose(1, 2).to(dtypes[0])  # (N, D, S)
    if wanted[1]:
        rows = factor * grad_positive  # (N, S, D)
        if match is not None:
            # Positions that share a key add up, in their order.
            rows = _key_gradient(rows, match, key_positions)  # (N, Sk, D)
        positive = rows.transpose(1, 2).to(dtypes[1])  # (N, D, Sk)
    return query, positive


torch.library.register_autograd("densecl_ext::_info_nce", _backward, setup_context=_setup_context)
