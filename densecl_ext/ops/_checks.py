"""Argument checks of the ops: every message names op, argument, what was expected and what came.

ValueError for shapes and values, TypeError for types and dtypes, RuntimeError for devices. All
checks run before anything is written. Values inside tensors are looked at on the CPU only (on a
GPU that would wait for the device), and not while torch.compile traces.
"""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from densecl_ext import _native

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
REDUCTIONS = ("mean", "sum", "none")


def is_tensor(op: str, name: str, value: object) -> None:
    """TypeError unless value is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")


def is_float(op: str, name: str, tensor: Tensor) -> None:
    """TypeError unless tensor is a float32, bfloat16 or float16 tensor."""
    is_tensor(op, name, tensor)
    if tensor.dtype not in FLOATS:
        hint = "; cast it with .float()" if tensor.dtype == torch.float64 else ""
        raise TypeError(
            f"{op}: {name} must be float32, bfloat16 or float16, got {short(tensor.dtype)}{hint}"
        )


def is_rows(op: str, name: str, tensor: Tensor, shape: str) -> None:
    """A float matrix; shape is how the message calls it."""
    is_float(op, name, tensor)
    if tensor.dim() != 2:
        hint = "; tokens (N, S, D) are rows by .flatten(0, 1)" if tensor.dim() == 3 else ""
        raise ValueError(f"{op}: {name} must be {shape}, got {size(tensor)}{hint}")


def is_grid(op: str, name: str, tensor: Tensor, shape: str) -> None:
    """A float tensor of images, channels and any number of position axes."""
    is_float(op, name, tensor)
    if tensor.dim() < 3:
        raise ValueError(f"{op}: {name} must be {shape}, got {size(tensor)}")


def is_counter(op: str, name: str, tensor: object, limit: int, *, below: bool) -> None:
    """A one-element int64 tensor in [0, limit], or [0, limit) with below."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be an int64 tensor, got {type(tensor).__name__}")
    if tensor.dtype != torch.int64:
        raise TypeError(f"{op}: {name} must be int64, got {short(tensor.dtype)}")
    if tensor.numel() != 1:
        raise ValueError(f"{op}: {name} must have one element, got {size(tensor)}")
    if values_are_readable(tensor):
        value = int(tensor)
        if value < 0 or value > limit or (below and value == limit):
            bracket = ")" if below else "]"
            raise ValueError(f"{op}: {name} must lie in [0, {limit}{bracket}, got {value}")


def is_writable(op: str, name: str, tensor: Tensor) -> None:
    """ValueError unless every element has a place of its own that holds it as it reads."""
    if not torch.compiler.is_compiling() and (tensor.is_neg() or tensor.is_conj()):
        raise ValueError(
            f"{op}: {name} must hold its values as they read, got a lazily negated or conjugated "
            "view; pass tensor.resolve_neg() or tensor.resolve_conj()"
        )
    if not tensor.is_contiguous() and _overlaps_itself(tensor):
        raise ValueError(
            f"{op}: {name} must have a place of its own for every element, got strides "
            f"{tuple(tensor.stride())} for {size(tensor)}; pass a clone of the view"
        )


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements share a place; where only a list of all places tells, on the CPU."""
    layout = [(s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1]
    if any(step == 0 for step, _ in layout):
        return True
    reach, nested = 0, True
    for step, count in sorted(layout):
        nested = nested and step > reach
        reach += (count - 1) * step
    if nested or not values_are_readable(tensor):
        return False  # the native op looks again before it writes
    places = torch.zeros(1, dtype=torch.int64)
    for step, count in layout:
        places = (places.unsqueeze(1) + step * torch.arange(count)).flatten()
    return places.unique().numel() < places.numel()


def is_queue(op: str, queue: Tensor, dim: int, other: str) -> None:
    """A (K, dim) float matrix with K >= 1 that asks for no gradient."""
    is_float(op, "queue", queue)
    if queue.dim() != 2 or queue.shape[1] != dim:
        turned = queue.dim() == 2 and queue.shape[0] == dim
        hint = "; did you mean queue.T?" if turned else ""
        raise ValueError(
            f"{op}: queue must be (K, {dim}) to match {other}, got {size(queue)}{hint}"
        )
    if queue.shape[0] == 0:
        raise ValueError(f"{op}: queue must have at least one row, got {size(queue)}")
    if queue.requires_grad:
        raise ValueError(
            f"{op}: queue must not require grad, its rows are constants of the loss; "
            "pass queue.detach()"
        )


def is_momentum(op: str, momentum: float | Tensor) -> None:
    """A number in [0, 1], or a floating-point tensor that holds one."""
    if isinstance(momentum, Tensor):
        if not momentum.dtype.is_floating_point:
            raise TypeError(f"{op}: momentum must be floating point, got {short(momentum.dtype)}")
        if momentum.numel() != 1:
            raise ValueError(f"{op}: momentum must have one element, got {size(momentum)}")
        if not values_are_readable(momentum):
            return
    elif not isinstance(momentum, (numbers.Real, torch.SymFloat)):
        raise TypeError(f"{op}: momentum must be a number, got {type(momentum).__name__}")
    value = float(momentum)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{op}: momentum must lie in [0, 1], got {value}")


def is_temperature(op: str, temperature: float | Tensor) -> None:
    """A number in [1e-30, 1e30], or a floating-point tensor that holds one."""
    if isinstance(temperature, Tensor):
        if not temperature.dtype.is_floating_point:
            raise TypeError(
                f"{op}: temperature must be floating point, got {short(temperature.dtype)}"
            )
        if temperature.numel() != 1:
            raise ValueError(f"{op}: temperature must have one element, got {size(temperature)}")
        if not values_are_readable(temperature):
            return
        temperature = float(temperature.detach())
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"{op}: temperature must be positive and finite, got {temperature}")
    if not 1e-30 <= temperature <= 1e30:
        raise ValueError(
            f"{op}: temperature must lie in [1e-30, 1e30], where float32 holds its reciprocal, "
            f"got {temperature}"
        )


def is_reduction(op: str, reduction: str) -> None:
    """ValueError unless one of the known names."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be one of {REDUCTIONS}, got {reduction!r}")


def is_weight(op: str, weight: Tensor | None, shape: tuple[int, ...], rows: Tensor) -> None:
    """A float tensor of the losses' shape."""
    if weight is None:
        return
    is_tensor(op, "row_weight", weight)
    if not weight.dtype.is_floating_point:
        raise TypeError(f"{op}: row_weight must be floating point, got {short(weight.dtype)}")
    if tuple(weight.shape) != shape:
        raise ValueError(f"{op}: row_weight must be {shape}, got {size(weight)}")
    on_one_device(op, {"query": rows, "row_weight": weight})


def on_one_device(op: str, tensors: dict[str, Tensor]) -> None:
    """RuntimeError unless all tensors share a device that our kernels run on."""
    (first, tensor), *others = tensors.items()
    for name, other in others:
        if other.device != tensor.device:
            raise RuntimeError(
                f"{op}: {name} must be on {first}'s device {tensor.device}, got {other.device}"
            )
    _native.require_kernels(op, tensor.device)


def values_are_readable(tensor: Tensor) -> bool:
    """Whether looking at the tensor's values waits for nothing and breaks no trace."""
    return (
        not torch.compiler.is_compiling()
        and tensor.device.type == "cpu"
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def size(tensor: Tensor) -> str:
    """A shape as people write it."""
    return str(tuple(tensor.shape))


def short(dtype: torch.dtype) -> str:
    """A dtype's name without its module."""
    return str(dtype).removeprefix("torch.")
