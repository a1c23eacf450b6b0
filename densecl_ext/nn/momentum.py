"""The key encoder: a slowly moving copy of the query encoder (MoCo, section 3.2, eq. 2)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from densecl_ext import ops
from densecl_ext.nn.batchnorm import split_batch_norms
from densecl_ext.ops._parameters import paired_parameters, plain_name, unwrapped


class MomentumEncoder(nn.Module):
    """Holds a deep copy of a module whose parameters follow it: ``k <- m k + (1 - m) q``.

    The copy never receives gradients and always runs under ``torch.no_grad``. Buffers do not
    follow: the copy keeps running statistics of its own batches, as MoCo's key encoder does.
    Parameters that are tied in the module are tied in the copy and move once per update.

    Args:
        module: the query encoder. What it holds now, pre-trained or not, is where the copy starts.
        momentum: m in [0, 1]. The attribute may be reassigned between updates (a schedule), also by
            a 0-d tensor on the parameters' device, which a captured CUDA graph then follows.
        bn_groups: with more than 1, the copy's batch norms normalise this many groups of the batch
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
        self.module = copy.deepcopy(unwrapped(module))
        if bn_groups != 1:
            self.module = split_batch_norms(self.module, bn_groups)
        self.module.requires_grad_(False)

    @torch.no_grad()
    def update_(self, module: nn.Module | Mapping[str, nn.Module]) -> None:
        """Move every parameter towards ``module``'s, all in one launch.

        Args:
            module: the query encoder; also inside torch.compile's, DataParallel's or
                DistributedDataParallel's wrapper, or as its parts by name.

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
        names = {plain_name(name): name for name in self.module.state_dict()}
        state = {plain_name(name): value for name, value in unwrapped(module).state_dict().items()}
        self.module.load_state_dict({names.get(name, name): state[name] for name in state})

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the copy, without gradient."""
        return self.module(*args, **kwargs)

    def extra_repr(self) -> str:
        """Settings for ``print(encoder)``."""
        return f"momentum={float(self.momentum):g}"

    def _pairs(
        self, module: nn.Module | Mapping[str, nn.Module]
    ) -> tuple[list[Tensor], list[Tensor]]:
        return paired_parameters("MomentumEncoder", self.module, module)
