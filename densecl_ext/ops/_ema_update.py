"""The momentum update of the key encoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from densecl_ext import _native
from densecl_ext.ops import _checks, _mutation, _transforms
from densecl_ext.ops._parameters import paired_parameters

_native_op = torch.ops.densecl_ext._ema_update_


def ema_update_(
    targets: Sequence[Tensor] | nn.Module,
    sources: Sequence[Tensor] | nn.Module,
    momentum: float | Tensor,
) -> None:
    """``targets = momentum * targets + (1 - momentum) * sources``, in place, all in one launch.

    MoCo, eq. 2. Arithmetic in float32 for every type. Nothing is written unless every pair fits.
    On a GPU up to 1,020 tensors are one launch; tensors of several devices may be mixed. Never
    recorded by autograd.

    Args:
        targets: tensors of any shapes and strides, float32, bfloat16 or float16, mixed as wished;
            or a module, of which the parameters move, and no buffers.
        sources: as many tensors of the same shapes and devices; dtypes may differ from targets'.
            Or a module with parameters of the same names.
        momentum: in [0, 1]; 1 changes nothing, 0 copies. A floating-point tensor of one element on
            the targets' device is read there when the update runs, so that a captured CUDA graph
            follows a schedule; on a GPU its value is not checked. Float64 spares a conversion and
            gives the bits of the same Python float. A side whose weight is exactly 0 counts for
            nothing, NaN or not.

    Raises:
        ValueError: lists of different lengths, shapes that differ, momentum outside [0, 1], a
            target that is lazily negated or whose elements share places; modules whose parameters
            have different names.
        TypeError: not a list of tensors, a dtype outside the three, integer buffers for example; a
            momentum that is no number.
        RuntimeError: devices that differ, or without kernels; a target that shares memory with
            another tensor (its own source may be itself); forward-mode derivatives or torch.func.
    """
    op = "ema_update_"
    if isinstance(targets, nn.Module) and isinstance(sources, nn.Module):
        targets, sources = paired_parameters(op, targets, sources)
    for name, tensors in (("targets", targets), ("sources", sources)):
        if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
            raise TypeError(
                f"{op}: {name} must be a list of tensors, got {type(tensors).__name__}"
                + ("; did you mean list(...)?" if hasattr(tensors, "__iter__") else "")
                + ("; pass two modules, or their parameters" if hasattr(tensors, "modules") else "")
            )
    assert isinstance(targets, Sequence) and isinstance(sources, Sequence)
    if len(targets) != len(sources):
        raise ValueError(
            f"{op}: sources must be as many as targets, {len(targets)}, got {len(sources)}"
        )
    _checks.is_momentum(op, momentum)
    if not targets:
        return
    if _transforms.active():
        _transforms.refuse_writes(op, (*targets, *sources))
    value, scheduled = (0.0, momentum) if isinstance(momentum, Tensor) else (float(momentum), None)
    with torch.no_grad():
        if scheduled is not None:
            scheduled = scheduled.detach().to(torch.float64)
        devices = _devices(targets, sources, momentum)
        if len(devices) == 1 and not torch.compiler.is_compiling():
            _native.require_kernels(op, devices.pop())
            try:
                # The native op looks at everything before it writes. Looking here as well would
                # take longer than the launch for hundreds of tensors.
                _native_op(targets, sources, value, scheduled)
            except RuntimeError:
                _check_pairs(op, targets, sources, momentum)
                if not any(source.is_neg() for source in sources):
                    raise
                _native_op(targets, [s.resolve_neg() for s in sources], value, scheduled)
        else:
            _check_pairs(op, targets, sources, momentum)
            for device in dict.fromkeys(target.device for target in targets):
                here = [i for i in range(len(targets)) if targets[i].device == device]
                _native_op([targets[i] for i in here], [sources[i] for i in here], value, scheduled)
    _mutation.record(*targets)


def _devices(
    targets: Sequence[Tensor], sources: Sequence[Tensor], momentum: float | Tensor
) -> set[torch.device]:
    """All devices, none where something is no tensor."""
    try:
        devices = {target.device for target in targets}
        devices.update([source.device for source in sources])
    except AttributeError:
        return set()
    return devices | {momentum.device} if isinstance(momentum, Tensor) else devices


def _check_pairs(
    op: str, targets: Sequence[Tensor], sources: Sequence[Tensor], momentum: float | Tensor
) -> None:
    """All that the pairs must satisfy, with the errors that say what does not."""
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
        if isinstance(momentum, Tensor):
            _checks.on_one_device(op, {f"targets[{i}]": target, "momentum": momentum})


@torch.library.register_fake("densecl_ext::_ema_update_")
def _fake(
    targets: list[Tensor],
    sources: list[Tensor],
    momentum: float,
    scheduled: Tensor | None = None,
) -> None:
    _check_pairs("ema_update_", targets, sources, momentum)
