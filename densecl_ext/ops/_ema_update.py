"""The momentum update of the key encoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from densecl_ext.ops import _checks, _mutation

_native_op = torch.ops.densecl_ext._ema_update_


def ema_update_(targets: Sequence[Tensor], sources: Sequence[Tensor], momentum: float) -> None:
    """``targets = momentum * targets + (1 - momentum) * sources``, in place, all in one launch.

    MoCo, eq. 2. Arithmetic in float32 for every type. Nothing is written unless every pair fits.
    On a GPU up to 1,020 tensors are one launch; tensors of several devices may be mixed. Never
    recorded by autograd.

    Args:
        targets: tensors of any shapes and strides, float32, bfloat16 or float16, mixed as wished.
        sources: as many tensors of the same shapes and devices; dtypes may differ from targets'.
        momentum: in [0, 1]; 1 changes nothing, 0 copies.

    Raises:
        ValueError: lists of different lengths, shapes that differ, momentum outside [0, 1], an
            expanded target.
        TypeError: not a list of tensors, a dtype outside the three, integer buffers for example.
        RuntimeError: devices that differ, or without kernels.
    """
    op = "ema_update_"
    for name, tensors in (("targets", targets), ("sources", sources)):
        if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
            raise TypeError(
                f"{op}: {name} must be a list of tensors, got {type(tensors).__name__}"
                + ("; did you mean list(...)?" if hasattr(tensors, "__iter__") else "")
            )
    if len(targets) != len(sources):
        raise ValueError(
            f"{op}: sources must be as many as targets, {len(targets)}, got {len(sources)}"
        )
    if not 0.0 <= momentum <= 1.0:
        raise ValueError(f"{op}: momentum must lie in [0, 1], got {momentum}")
    for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
        _checks.is_float(op, f"targets[{i}]", target)
        _checks.is_float(op, f"sources[{i}]", source)
        if target.shape != source.shape:
            raise ValueError(
                f"{op}: sources[{i}] must be {_checks.size(target)} to match targets[{i}], "
                f"got {_checks.size(source)}"
            )
        _checks.is_writable(op, f"targets[{i}]", target)
        _checks.on_one_device(op, {f"targets[{i}]": target, f"sources[{i}]": source})
    if not targets:
        return
    with torch.no_grad():
        for device in dict.fromkeys(target.device for target in targets):
            here = [i for i, target in enumerate(targets) if target.device == device]
            _native_op(
                [targets[i] for i in here], [sources[i].detach() for i in here], float(momentum)
            )
    _mutation.record(*targets)


@torch.library.register_fake("densecl_ext::_ema_update_")
def _fake(targets: list[Tensor], sources: list[Tensor], momentum: float) -> None:
    return None
