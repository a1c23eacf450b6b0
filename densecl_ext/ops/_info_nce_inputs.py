"""Arguments of the InfoNCE ops, checked, as the native op takes them."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from densecl_ext.ops import _checks

_COUNTS = (int, np.integer, torch.SymInt, type(None))
_SHORTEST_ROW = 1e-12  # as in the kernels: such a row has no direction


class Queue(Protocol):
    """Keys and how many of them there are, as :class:`densecl_ext.KeyQueue` holds them."""

    keys: Tensor  # (K, D)
    filled: Tensor  # () int64


class Inputs(NamedTuple):
    """What the native op computes from; plain rows are grids of one position."""

    query: Tensor  # (N, D, S)
    positive: Tensor  # (N, D, Sk)
    match: Tensor | None  # (N, S)
    queue: Tensor  # (K, D)
    filled: Tensor | None

    def wanted(self) -> tuple[bool, bool]:
        """Whether query and positive ask for a gradient."""
        enabled = torch.is_grad_enabled()
        return enabled and self.query.requires_grad, enabled and self.positive.requires_grad

    def scaled_by(self, temperature: Tensor, normalize: bool) -> Inputs:
        """Inputs that give the same losses with T = 1 and without normalize.

        So the temperature's gradient comes from the query's, by torch's own rules.
        """
        query, positive = self.query.float(), self.positive.float()
        if self.match is not None:  # what may lie at a position without a match must not count
            query = torch.where((self.match >= 0).unsqueeze(1), query, 0.0)
        if normalize:
            query, positive = _unit(query), _unit(positive)
        return self._replace(query=query / temperature.reshape(()).float(), positive=positive)


def row_inputs(
    op: str,
    query: Tensor,
    positive: Tensor,
    queue: Tensor | Queue,
    temperature: float | Tensor,
    filled: int | Tensor | None,
    row_weight: Tensor | None,
    reduction: str,
) -> Inputs:
    """Checked arguments of :func:`info_nce`."""
    _checks.is_rows(op, "query", query, "(M, D)")
    _checks.is_float(op, "positive", positive)
    if positive.shape != query.shape:
        raise ValueError(
            f"{op}: positive must be {_checks.size(query)} to match query, "
            f"got {_checks.size(positive)}"
        )
    keys, filled = _unpacked(op, queue, filled)
    _check_common(op, query, positive, keys, temperature, filled, reduction)
    _checks.is_weight(op, row_weight, (query.shape[0],), query)
    return Inputs(query.unsqueeze(2), positive.unsqueeze(2), None, *_counted(keys, filled))


def grid_inputs(
    op: str,
    query_grid: Tensor,
    key_grid: Tensor,
    match: Tensor,
    queue: Tensor | Queue,
    temperature: float | Tensor,
    filled: int | Tensor | None,
    row_weight: Tensor | None,
    reduction: str,
) -> Inputs:
    """Checked arguments of :func:`dense_info_nce`."""
    _checks.is_grid(op, "query_grid", query_grid, "(N, D, *Sq)")
    _checks.is_grid(op, "key_grid", key_grid, "(N, D, *Sk)")
    keys, filled = _unpacked(op, queue, filled)
    _refuse_tokens(op, query_grid, keys)
    if key_grid.shape[:2] != query_grid.shape[:2]:
        raise ValueError(
            f"{op}: key_grid must be ({query_grid.shape[0]}, {query_grid.shape[1]}, *Sk) to match "
            f"query_grid, got {_checks.size(key_grid)}"
        )
    query, key = query_grid.flatten(2), key_grid.flatten(2)  # (N, D, Sq), (N, D, Sk)
    _checks.is_tensor(op, "match", match)
    if match.dtype != torch.int64:
        raise TypeError(f"{op}: match must be int64, got {_checks.short(match.dtype)}")
    expected = (query.shape[0], query.shape[2])
    if tuple(match.shape) != expected:
        raise ValueError(
            f"{op}: match must be {expected}, a key position for every query position, "
            f"got {_checks.size(match)}"
        )
    _check_common(op, query, key, keys, temperature, filled, reduction)
    _checks.on_one_device(op, {"query_grid": query, "match": match})
    _checks.is_weight(op, row_weight, expected, query)
    if match.numel() and _checks.values_are_readable(match):
        low, high = (int(value) for value in match.aminmax())
        if low < -1 or high >= key.shape[2]:
            raise ValueError(
                f"{op}: match must lie in [-1, {key.shape[2]}), got values from {low} to {high}"
            )
    return Inputs(query, key, match, *_counted(keys, filled))


def _check_common(
    op: str,
    query: Tensor,
    positive: Tensor,
    queue: Tensor,
    temperature: float | Tensor,
    filled: int | Tensor | None,
    reduction: str,
) -> None:
    _checks.is_queue(op, queue, query.shape[1], "query")
    _checks.on_one_device(op, {"query": query, "positive": positive, "queue": queue})
    _checks.is_temperature(op, temperature)
    if isinstance(temperature, Tensor):
        _checks.on_one_device(op, {"query": query, "temperature": temperature})
    _checks.is_reduction(op, reduction)
    if isinstance(filled, Tensor):
        _checks.is_counter(op, "filled", filled, queue.shape[0], below=False)
        _checks.on_one_device(op, {"queue": queue, "filled": filled})
    elif isinstance(filled, bool) or not isinstance(filled, _COUNTS):
        raise TypeError(f"{op}: filled must be an int or a tensor, got {type(filled).__name__}")
    elif filled is not None and not 0 <= filled <= queue.shape[0]:
        raise ValueError(f"{op}: filled must lie in [0, {queue.shape[0]}], got {filled}")


def _counted(queue: Tensor, filled: int | Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A number of rows is a slice; a count on the device stays one."""
    if filled is not None and not isinstance(filled, Tensor):
        return queue[:filled], None
    return queue, filled


def _unpacked(
    op: str, queue: Tensor | Queue, filled: int | Tensor | None
) -> tuple[Tensor, int | Tensor | None]:
    """The keys of a queue and how many count."""
    if isinstance(queue, Tensor) or not hasattr(queue, "filled"):
        return queue, filled  # type: ignore[return-value]
    if filled is not None:
        raise ValueError(f"{op}: filled must be None with a KeyQueue, which has its own")
    return queue.keys, queue.filled


def _refuse_tokens(op: str, query_grid: Tensor, keys: object) -> None:
    """ValueError for (N, S, D) tokens, told by the queue's feature size."""
    if not isinstance(keys, Tensor) or keys.dim() != 2 or query_grid.dim() != 3:
        return
    positions, features = query_grid.shape[1:]
    if keys.shape[1] == features and features != positions:
        raise ValueError(
            f"{op}: query_grid must be (N, {features}, *Sq) to match queue {_checks.size(keys)}, "
            f"got {_checks.size(query_grid)}; tokens (N, S, D) are a grid by .transpose(1, 2)"
        )


def _unit(grid: Tensor) -> Tensor:
    """Vectors (N, D, S) of length 1; those without a direction stay short and get no gradient."""
    unit = F.normalize(grid, dim=1, eps=_SHORTEST_ROW)
    return torch.where(grid.norm(dim=1, keepdim=True) < _SHORTEST_ROW, unit.detach(), unit)
