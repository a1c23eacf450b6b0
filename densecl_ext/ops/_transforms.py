"""Forward-mode derivatives, and torch.func: what is supported, and a clear no to the rest.

The native ops are registered with reverse-mode autograd, which keeps no track of forward-mode
tangents: without a look from here they would silently be zero.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad


def active() -> bool:
    """Whether any forward-mode level or torch.func transform is entered; well below 1 us.

    Raises:
        RuntimeError: a forward-mode level while torch.compile traces, where tangents go unseen.
    """
    if torch.compiler.is_compiling():
        if forward_ad._current_level >= 0:
            raise RuntimeError(
                "densecl_ext: forward-mode derivatives of the ops are not supported inside "
                "torch.compile; compute them outside, or use densecl_ext.reference"
            )
        return False
    return forward_ad._current_level >= 0 or _functorch.peek_interpreter_stack() is not None


def tangents(
    op: str, tensors: Iterable[Tensor], constants: Iterable[Tensor]
) -> list[Tensor | None]:
    """The forward-mode tangent of each tensor, None where it has none.

    Raises:
        RuntimeError: a tensor that asks for reverse mode beside or within a transform, nested
            transforms whose tangents cannot be seen from here, or a constant with a tangent.
    """
    found = [_tangent(op, tensor) for tensor in tensors]
    if any(_tangent(op, constant) is not None for constant in constants):
        raise RuntimeError(f"{op}: queue is constant in the loss and must have no tangent")
    forward = any(tangent is not None for tangent in found)
    if forward and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError(
            f"{op}: forward-mode derivatives do not mix with requires_grad (there is no second "
            "derivative); use torch.no_grad() or .detach(), or densecl_ext.reference"
        )
    return found


def refuse_writes(op: str, tensors: Iterable[Tensor | None]) -> None:
    """RuntimeError where an op that writes in place meets tangents or torch.func."""
    if not active():
        return
    for tensor in tensors:
        if tensor is not None and (_layers(tensor) or _plain_tangent(tensor) is not None):
            raise RuntimeError(
                f"{op}: writes in place, which forward-mode derivatives and torch.func do not "
                "follow; call it outside of them"
            )


def _layers(tensor: Tensor) -> list[Tensor]:
    """The wrappers that vmap and derivatives of torch.func put around a tensor, outermost first."""
    layers = []
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_gradtrackingtensor(tensor) or _functorch.is_batchedtensor(tensor):
            layers.append(tensor)
        tensor = _functorch.get_unwrapped(tensor)
    return [*layers, tensor] if layers else []


def _plain_tangent(tensor: Tensor) -> Tensor | None:
    return None if forward_ad._current_level < 0 else forward_ad.unpack_dual(tensor).tangent


def _tangent(op: str, tensor: Tensor) -> Tensor | None:
    layers = _layers(tensor)
    if not layers:
        return _plain_tangent(tensor)
    if torch.is_grad_enabled() and any(layer.requires_grad for layer in layers):
        raise RuntimeError(
            f"{op}: torch.func's grad, vjp, jacrev and hessian, and vmap over tensors that require "
            "grad, are not supported; use torch.autograd.grad, or densecl_ext.reference"
        )
    derivatives = [layer for layer in layers if _functorch.is_gradtrackingtensor(layer)]
    if not derivatives:
        return None
    if len(derivatives) > 1 or derivatives[0] is not layers[0]:
        raise RuntimeError(
            f"{op}: torch.func's derivatives are not supported nested or around a vmap (a vmap "
            "around jvp is); use densecl_ext.reference"
        )
    return _plain_tangent(tensor)
