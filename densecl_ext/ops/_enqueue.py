"""Writing new keys into the ring of negatives."""

from __future__ import annotations

import torch
from torch import Tensor

from densecl_ext.ops import _checks, _mutation, _transforms

_native_op = torch.ops.densecl_ext._enqueue_


def enqueue_(
    queue: Tensor,
    pointer: Tensor,
    keys: Tensor,
    *,
    filled: Tensor | None = None,
    normalize: bool = True,
) -> None:
    """Write keys at rows pointer, pointer + 1, ... of the queue, wrapping round, in place.

    MoCo, section 3.2 and algorithm 1, without its conditions: any batch size, a divisor of the
    queue's length or not, larger than the queue too (then the last K keys remain). The pointer
    advances on the queue's device; nothing waits for it. Never recorded by autograd.

    Args:
        queue: (K, D) float32, bfloat16 or float16, K >= 1; any strides.
        pointer: (1,) int64 in [0, K), on the queue's device; becomes (pointer + B) mod K. On a GPU
            nothing looks at it before the kernel does, which takes any value modulo K.
        keys: (B, D), the same types; B may be 0; rows of the queue itself are fine.
        filled: one-element int64 in [0, K]; becomes min(K, filled + B) (on a GPU, from below 0 too,
            as if it were 0).
        normalize: scale the keys to unit length first, rows shorter than 1e-12 divided by that.

    Raises:
        ValueError: shapes or values that do not fit; a queue that requires grad, that is lazily
            negated, or whose elements share places.
        TypeError: a dtype outside the three, a pointer or filled that is no int64 tensor.
        RuntimeError: tensors on different devices, or on one without kernels; a pointer or filled
            that shares memory with another argument; forward-mode derivatives or torch.func.
    """
    op = "enqueue_"
    _checks.is_rows(op, "keys", keys, "(B, D)")
    _checks.is_queue(op, queue, keys.shape[1], "keys")
    _checks.is_writable(op, "queue", queue)
    _checks.is_counter(op, "pointer", pointer, queue.shape[0], below=True)
    _checks.on_one_device(op, {"queue": queue, "pointer": pointer, "keys": keys})
    if filled is not None:
        _checks.is_counter(op, "filled", filled, queue.shape[0], below=False)
        _checks.on_one_device(op, {"queue": queue, "filled": filled})
    _transforms.refuse_writes(op, (queue, pointer, keys, filled))
    with torch.no_grad():
        _native_op(queue, pointer, keys.detach().resolve_neg(), filled, normalize)
    _mutation.record(queue, pointer, *(() if filled is None else (filled,)))


@torch.library.register_fake("densecl_ext::_enqueue_")
def _fake(
    queue: Tensor, pointer: Tensor, keys: Tensor, filled: Tensor | None, normalize: bool
) -> None:
    return None
