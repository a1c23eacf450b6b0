"""One training step: forward, backward, optimizer; plain, compiled, or as one CUDA graph."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from densecl_ext.model import DenseCL
from densecl_ext.phases import phase

PRECISIONS = ("fp32", "bf16")


class StepOutput(NamedTuple):
    """What one :class:`TrainingStep` returns, detached and on the model's device.

    Attributes:
        loss: () the weighted sum.
        loss_global: () InfoNCE of the global vectors, 0 where it is not computed.
        loss_dense: () InfoNCE of the grid positions, 0 where it is not computed.
        metrics: name to 0-d float32 tensor, see :class:`densecl_ext.DenseCL`.
    """

    loss: Tensor
    loss_global: Tensor
    loss_dense: Tensor
    metrics: dict[str, Tensor]

    def scalars(self) -> dict[str, Tensor]:
        """Losses and metrics by name."""
        losses = {name: getattr(self, name) for name in ("loss", "loss_global", "loss_dense")}
        return losses | self.metrics


class TrainingStep:
    """Trains a model by one batch a call, without waiting for the device.

    In this order: momentum update, query forward, key forward, matching, losses, enqueues (all of
    them in the model's forward), backward, optimizer. Gradients are freed at the end.

    Args:
        model: in training mode, on its device, in its memory format; parameters in float32.
        optimizer: over the model's trainable parameters.
        precision: ``"fp32"``, or ``"bf16"`` for autocast to bfloat16 with float32 weights.

    Raises:
        ValueError: an unknown precision.

    Example:
        >>> import torch
        >>> from densecl_ext import DenseCL
        >>> from densecl_ext.train import TrainingStep
        >>> model = DenseCL(torch.nn.Conv2d(3, 64, kernel_size=8, stride=8), queue_length=1024)
        >>> step = TrainingStep(model, torch.optim.SGD(model.parameters(), lr=0.03))
        >>> for _ in range(2):
        ...     out = step(torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32))
        >>> bool(out.loss > 0)
        True
    """

    def __init__(
        self,
        model: DenseCL,
        optimizer: torch.optim.Optimizer,
        *,
        precision: str = "fp32",
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(
                f"TrainingStep: precision must be one of {PRECISIONS}, got {precision!r}"
            )
        self.model = model
        self.optimizer = optimizer
        self.precision = precision
        self.device = next(model.parameters()).device

    def __call__(
        self,
        view_q: Tensor,
        view_k: Tensor,
        crop_q: Tensor | None = None,
        crop_k: Tensor | None = None,
    ) -> StepOutput:
        """Take one step on two views of the same images.

        Args:
            view_q: (N, 3, H, W) on the model's device.
            view_k: (N, 3, H, W), the other views of the same images.
            crop_q: (N, 5) crop box and flip of each query view, where known or needed.
            crop_k: (N, 5) of each key view.

        Raises:
            ValueError: as :class:`densecl_ext.DenseCL` does.
        """
        return self._run(view_q, view_k, crop_q, crop_k)

    def _run(
        self, view_q: Tensor, view_k: Tensor, crop_q: Tensor | None, crop_k: Tensor | None
    ) -> StepOutput:
        bf16 = self.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            output = self.model(view_q, view_k, crop_q=crop_q, crop_k=crop_k)
        with phase("backward"):
            output.loss.backward()
        with phase("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        loss, loss_global, loss_dense = (term.detach() for term in output[:3])
        return StepOutput(loss, loss_global, loss_dense, output.metrics)
