"""The key encoder: a slowly moving copy of the query encoder (MoCo, section 3.2, eq. 2)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from densecl_ext import ops
from densecl_ext.nn.batchnorm import split_batch_norms


class MomentumEncoder(nn.Module):
    """Holds a deep copy of a module whose parameters follow it: ``k <- m k + (1 - m) q``.

    The copy never receives gradients and always runs under ``torch.no_grad``. Buffers do not
    follow: the copy keeps running statistics of its own batches, as MoCo's key encoder does.
    Parameters that are tied in the module are tied in the copy and move once per update.

    Args:
        module: the query encoder. What it holds now, pre-trained or not, is where the copy starts.
        momentum: m in [0, 1]. The attribute may be reassigned between updates (a schedule), also by
            a 0-d tensor on the parameters' device, which a captured CUDA graph then follows.
        bn_groups: with more than 1, the copy's batch norms normalise so many groups of the batch
            apart (:class:`densecl_ext.nn.batchnorm.SplitBatchNorm`).

    Raises:
        ValueError: ``momentum`` outside [0, 1], or a module of another build is passed to a method.

    Example:
        >>> import torch
        >>> from densecl_ext import MomentumEncoder
        >>> encoder = torch.nn.Linear(8, 4)
        >>> key_encoder = MomentumEncoder(encoder, momentum=0.999)
        >>> key_encoder.update_(encoder)
        >>> key_encoder(torch.randn(2, 8)).requires_grad
        False
    """

    def __init__(self, module: nn.Module, momentum: float = 0.999, *, bn_groups: int = 1) -> None:
        super().__init__()
        if not 0.0 <= momentum <= 1.0:
            raise ValueError(f"MomentumEncoder: momentum must lie in [0, 1], got {momentum}")
        self.momentum: float | Tensor = float(momentum)
        self.module = copy.deepcopy(module)
        if bn_groups != 1:
            self.module = split_batch_norms(self.module, bn_groups)
        self.module.requires_grad_(False)

    @torch.no_grad()
    def update_(self, module: nn.Module) -> None:
        """Move every parameter towards ``module``'s, all in one launch.

        Raises:
            ValueError: names or shapes of the parameters differ from the copy's.
        """
        targets, sources = self._pairs(module)
        ops.ema_update_(targets, sources, self.momentum)

    @torch.no_grad()
    def copy_(self, module: nn.Module) -> None:
        """Restart from ``module``: take over its parameters and buffers as they are.

        For weights that were loaded into the query encoder after this copy was made.

        Raises:
            ValueError: names or shapes of the parameters differ from the copy's.
        """
        self._pairs(module)
        self.module.load_state_dict(module.state_dict())

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the copy, without gradient."""
        return self.module(*args, **kwargs)

    def extra_repr(self) -> str:
        """Settings for ``print(encoder)``."""
        return f"momentum={float(self.momentum):g}"

    def _pairs(self, module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """Parameters of the copy and of ``module``, paired by name, tied ones once."""
        targets = dict(self.module.named_parameters())
        sources = dict(module.named_parameters())
        if targets.keys() != sources.keys():
            lacking = sorted(targets.keys() - sources.keys())
            unknown = sorted(sources.keys() - targets.keys())
            raise ValueError(
                "MomentumEncoder: module must have the parameters of the one it was copied from; "
                f"it lacks {lacking[:3]} and has besides {unknown[:3]} "
                f"({len(lacking)} and {len(unknown)} in all)"
            )
        for name, target in targets.items():
            if target.shape != sources[name].shape:
                raise ValueError(
                    f"MomentumEncoder: parameter {name!r} must have shape {tuple(target.shape)}, "
                    f"got {tuple(sources[name].shape)}"
                )
        return list(targets.values()), [sources[name] for name in targets]
