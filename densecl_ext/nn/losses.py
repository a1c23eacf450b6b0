"""The losses of DenseCL as modules: the global term, the dense term, and their sum."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from densecl_ext import ops
from densecl_ext.nn.distributed import mean_over_ranks
from densecl_ext.nn.queue import KeyQueue


class DenseCLTerms(NamedTuple):
    """What :class:`DenseCLLoss` returns; all three are 0-d tensors.

    Attributes:
        loss: ``(1 - lambda) * loss_global + lambda * loss_dense``.
        loss_global: InfoNCE of the global vectors (0 where it was not computed).
        loss_dense: InfoNCE of the grid positions (0 where it was not computed).
    """

    loss: Tensor
    loss_global: Tensor
    loss_dense: Tensor


class InfoNCELoss(nn.Module):
    """InfoNCE of queries against their positives and a queue of negatives (MoCo, eq. 1).

    Args:
        temperature: T > 0, the divisor of the cosine similarities; a ``nn.Parameter`` is learnt.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        normalize: scale queries and positives to unit length first.

    Example:
        >>> import torch
        >>> from densecl_ext import InfoNCELoss, KeyQueue
        >>> criterion, queue = InfoNCELoss(temperature=0.2), KeyQueue(4096, 128)
        >>> queue.enqueue_(torch.randn(64, 128))
        >>> query = torch.randn(32, 128, requires_grad=True)
        >>> positive = torch.randn(32, 128)
        >>> criterion(query, positive, queue).backward()
        >>> queue.enqueue_(positive)
    """

    def __init__(
        self, temperature: float | Tensor = 0.2, reduction: str = "mean", *, normalize: bool = True
    ) -> None:
        super().__init__()
        self.temperature = _checked_temperature("InfoNCELoss", temperature)
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(
                f"InfoNCELoss: reduction must be 'mean', 'sum' or 'none', got {reduction!r}"
            )
        self.reduction = reduction
        self.normalize = normalize

    def forward(
        self,
        query: Tensor,
        positive: Tensor,
        queue: KeyQueue | Tensor,
        row_weight: Tensor | None = None,
    ) -> Tensor:
        """Loss of query (M, D) and positive (M, D) against the queue's keys (K, D).

        Args:
            query: (M, D).
            positive: (M, D), the key of each query.
            queue: a :class:`KeyQueue`, of which only the rows that hold a key count, or a tensor
                (K, D) of unit rows, of which all count.
            row_weight: optional (M,) weights; ``"mean"`` divides by their sum.

        Returns:
            A 0-d tensor, or (M,) with reduction ``"none"``. An empty queue gives 0.
        """
        keys, filled = _keys_and_filled(queue)
        return ops.info_nce(
            query,
            positive,
            keys,
            temperature=self.temperature,
            normalize=self.normalize,
            filled=filled,
            row_weight=row_weight,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """Settings for ``print(loss)``."""
        return f"temperature={_number(self.temperature):g}, reduction={self.reduction!r}"


class DenseCLLoss(nn.Module):
    """Both terms of DenseCL (section 3.2, eq. 3): ``(1 - lambda) L_global + lambda L_dense``.

    A term whose weight is exactly 0 (lambda 0 or 1) is not computed at all, and its inputs may be
    None; it is returned as 0. Queries and keys are scaled to unit length inside.

    Under ``torch.distributed``, in training mode, the dense term's mean is over the matched
    positions of all processes: each gets its share, whose average over the processes is that mean
    (:func:`densecl_ext.nn.distributed.mean_over_ranks`). Every process must then call it.

    Args:
        loss_lambda: weight of the dense term, in [0, 1]; the paper's value is 0.5.
        temperature: T > 0 of both terms; the paper's value is 0.2. A ``nn.Parameter`` is learnt.
        dense_temperature: T > 0 of the dense term where it shall differ.
        mutual: with matching by features, drop the positions whose best match is not mutual.

    Raises:
        ValueError: a setting out of its range, or an input that the settings need is missing.

    Example:
        >>> import torch
        >>> from densecl_ext import DenseCLLoss, DenseCLNeck, KeyQueue
        >>> neck = DenseCLNeck(512)
        >>> query, key = neck(torch.randn(4, 512, 7, 7)), neck(torch.randn(4, 512, 7, 7))
        >>> queues = KeyQueue(4096, 128), KeyQueue(4096, 128)
        >>> loss, loss_global, loss_dense = DenseCLLoss()(
        ...     query.vector, key.vector, query.grid, key.grid, *queues,
        ...     query_features=query.features, key_features=key.features)
    """

    def __init__(
        self,
        loss_lambda: float = 0.5,
        temperature: float | Tensor = 0.2,
        *,
        dense_temperature: float | None = None,
        mutual: bool = False,
    ) -> None:
        super().__init__()
        self.loss_lambda = checked_lambda("DenseCLLoss", loss_lambda)
        self.temperature = _checked_temperature("DenseCLLoss", temperature)
        self.own_dense_temperature = dense_temperature
        if dense_temperature is not None:
            _checked_temperature("DenseCLLoss", dense_temperature)
        self.mutual = mutual

    @property
    def dense_temperature(self) -> float | Tensor:
        """T of the dense term."""
        own = self.own_dense_temperature
        return self.temperature if own is None else own

    def forward(
        self,
        query_global: Tensor | None,
        key_global: Tensor | None,
        query_dense: Tensor | None,
        key_dense: Tensor | None,
        global_queue: KeyQueue | Tensor,
        dense_queue: KeyQueue | Tensor,
        *,
        query_features: Tensor | None = None,
        key_features: Tensor | None = None,
        match: Tensor | None = None,
        row_weight: Tensor | None = None,
        loss_lambda: float | Tensor | None = None,
    ) -> DenseCLTerms:
        """Compute the loss of one batch.

        Args:
            query_global: (N, D) from the query encoder's global head.
            key_global: (N, D) from the key encoder's global head.
            query_dense: (N, D, *Sq) from the query encoder's dense head.
            key_dense: (N, D, *Sk) from the key encoder's dense head.
            global_queue: negatives of the global term: a KeyQueue or a tensor (K, D).
            dense_queue: negatives of the dense term.
            query_features: (N, C, *Sq) backbone features on the grid of ``query_dense``; with
                ``key_features`` they give the match by cosine similarity (section 3.3).
            key_features: (N, C, *Sk) backbone features on the grid of ``key_dense``.
            match: (N, prod(Sq)) int64 instead of features: flat key position of every query
                position, -1 for no loss there.
            row_weight: (N, prod(Sq)) weights of the dense term's positions; the mean divides by
                their sum.
            loss_lambda: replaces the module's weight in this call, e.g. during a warm-up. A 0-d
                tensor is multiplied in on its device, so both terms are then always computed.

        Returns:
            The sum and its two terms; gradients flow to whatever requires them.
        """
        weight = self.loss_lambda if loss_lambda is None else loss_lambda
        if not isinstance(weight, Tensor):
            checked_lambda("DenseCLLoss", weight)
        with_global = isinstance(weight, Tensor) or weight < 1.0
        with_dense = isinstance(weight, Tensor) or weight > 0.0

        if with_dense and match is None:
            match = ops.dense_match(
                _given("query_features (or match)", query_features),
                _given("key_features (or match)", key_features),
                mutual=self.mutual,
            )
        keys, filled = _keys_and_filled(global_queue)
        dense_keys, dense_filled = _keys_and_filled(dense_queue)

        loss_global: Tensor | None = None
        loss_dense: Tensor | None = None
        if with_global and with_dense and self.own_dense_temperature is None:
            assert match is not None
            loss_global, loss_dense = ops.joint_info_nce(
                _given("query_global", query_global),
                _given("key_global", key_global),
                keys,
                _given("query_dense", query_dense),
                _given("key_dense", key_dense),
                match,
                dense_keys,
                temperature=self.temperature,
                filled=filled,
                dense_filled=dense_filled,
                dense_row_weight=row_weight,
            )
            if self.training:
                loss_dense = mean_over_ranks(loss_dense, match, row_weight)
            return DenseCLTerms(weighted(loss_global, loss_dense, weight), loss_global, loss_dense)
        if with_global:
            loss_global = ops.info_nce(
                _given("query_global", query_global),
                _given("key_global", key_global),
                keys,
                temperature=self.temperature,
                filled=filled,
            )
        if with_dense:
            assert match is not None
            loss_dense = ops.dense_info_nce(
                _given("query_dense", query_dense),
                _given("key_dense", key_dense),
                match,
                dense_keys,
                temperature=self.dense_temperature,
                filled=dense_filled,
                row_weight=row_weight,
            )
            if self.training:
                loss_dense = mean_over_ranks(loss_dense, match, row_weight)
        if loss_dense is None:
            assert loss_global is not None
            return DenseCLTerms(loss_global, loss_global, torch.zeros_like(loss_global))
        if loss_global is None:
            return DenseCLTerms(loss_dense, torch.zeros_like(loss_dense), loss_dense)
        return DenseCLTerms(weighted(loss_global, loss_dense, weight), loss_global, loss_dense)

    def extra_repr(self) -> str:
        """Settings for ``print(loss)``."""
        return (
            f"loss_lambda={self.loss_lambda}, temperature={_number(self.temperature):g}, "
            f"dense_temperature={_number(self.dense_temperature):g}"
        )


def weighted(loss_global: Tensor, loss_dense: Tensor, loss_lambda: float | Tensor) -> Tensor:
    """``(1 - lambda) L_global + lambda L_dense`` (DenseCL, eq. 3)."""
    return (1.0 - loss_lambda) * loss_global + loss_lambda * loss_dense


def checked_lambda(owner: str, loss_lambda: float) -> float:
    """Return ``loss_lambda`` as float, or raise ValueError where it lies outside [0, 1]."""
    if not 0.0 <= loss_lambda <= 1.0:
        raise ValueError(f"{owner}: loss_lambda must lie in [0, 1], got {loss_lambda}")
    return float(loss_lambda)


def _checked_temperature(owner: str, temperature: float | Tensor) -> float | Tensor:
    value = _number(temperature)
    if not value > 0.0:
        raise ValueError(f"{owner}: temperature must be positive, got {value}")
    return temperature if isinstance(temperature, Tensor) else value


def _number(value: float | Tensor) -> float:
    return float(value.detach() if isinstance(value, Tensor) else value)


def _keys_and_filled(queue: KeyQueue | Tensor) -> tuple[Tensor, Tensor | None]:
    return (queue.keys, queue.filled) if isinstance(queue, KeyQueue) else (queue, None)


def _given(name: str, tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise ValueError(f"DenseCLLoss: {name} must be given with this loss_lambda, got None")
    return tensor
