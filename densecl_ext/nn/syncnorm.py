"""Batch norm over the batch of all processes, on a CPU too, where torch has none."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules._functions import SyncBatchNorm as _on_gpu
from torch.nn.modules.batchnorm import _BatchNorm

from densecl_ext.nn.batchnorm import ModuleT, average_factor, replace_batch_norms
from densecl_ext.nn.distributed import world_size


class SyncBatchNorm(_BatchNorm):
    """Batch norm over the N images of all processes; parameters and buffers as in ``BatchNorm2d``.

    On a GPU it runs ``nn.SyncBatchNorm``'s kernels, which has none for a CPU. On a CPU, over gloo,
    sums are float64, so that R processes of N images and one of R N images differ by no more than
    float32's rounding: one all-reduce in the forward and one in the backward. Alone, and in
    evaluation, it is plain batch norm.

    Shape:
        (N, C, ...) to the same; N may differ between processes.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (N, C, ...)."""
        if not self.training or world_size() == 1:
            return super().forward(x)
        factor = average_factor(self)
        if x.is_cuda:
            group = dist.group.WORLD
            buffers = self.running_mean, self.running_var
            return _on_gpu.apply(
                x, self.weight, self.bias, *buffers, self.eps, factor, group, world_size()
            )
        y, mean, variance, count = _Normalise.apply(x, self.weight, self.bias, self.eps)
        if self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                unbiased = variance * (count / (count - 1).clamp(min=1))
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), factor)
        return y

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"SyncBatchNorm: input must be (N, C, ...), got {tuple(x.shape)}")


class _Normalise(torch.autograd.Function):
    """y = (x - mean) / sqrt(variance + eps) * weight + bias over all processes."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        channels = x.shape[1]
        wide = x.double()
        axes = [axis for axis in range(x.dim()) if axis != 1]
        count = wide.new_full((1,), x.numel() // channels)
        sums = torch.cat([wide.sum(axes), wide.square().sum(axes), count])
        dist.all_reduce(sums)
        count = sums[2 * channels]
        mean = sums[:channels] / count
        variance = (sums[channels : 2 * channels] / count - mean.square()).clamp(min=0)
        scale = (variance + eps).rsqrt()
        shape = [1, channels] + [1] * (x.dim() - 2)
        y = (wide - mean.view(shape)) * scale.view(shape)
        if weight is not None and bias is not None:
            y = y * weight.view(shape) + bias.view(shape)
        ctx.save_for_backward(x, weight, mean, scale, count)
        ctx.mark_non_differentiable(mean, variance, count)
        return y.to(x.dtype), mean, variance, count

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor, *_: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        x, weight, mean, scale, count = ctx.saved_tensors
        channels, axes = x.shape[1], [axis for axis in range(x.dim()) if axis != 1]
        shape = [1, channels] + [1] * (x.dim() - 2)
        wide = dy.double()
        centred = (x.double() - mean.view(shape)) * scale.view(shape)
        own = torch.cat([wide.sum(axes), (wide * centred).sum(axes)])
        sums = own.clone()
        dist.all_reduce(sums)
        by_bias, by_scale = (part.view(shape) / count for part in sums.split(channels))
        dx = (wide - by_bias - centred * by_scale) * scale.view(shape)
        if weight is None:
            return dx.to(x.dtype), None, None, None
        dx = dx * weight.view(shape)
        bias_gradient, weight_gradient = own.to(weight.dtype).split(channels)
        return dx.to(x.dtype), weight_gradient, bias_gradient, None


def sync_batch_norms(module: ModuleT) -> ModuleT:
    """Replace every batch norm inside ``module`` by a :class:`SyncBatchNorm`, in place.

    Parameters and buffers are taken over as they are, so state dicts keep their keys.

    Raises:
        ValueError: a batch-norm class with a forward of its own, which a replacement would lose.
    """

    def twin(layer: _BatchNorm) -> SyncBatchNorm:
        return SyncBatchNorm(
            layer.num_features,
            layer.eps,
            layer.momentum,
            layer.affine,
            layer.track_running_stats,
        )

    return replace_batch_norms(module, twin, "synchronised; use key_bn split or shuffle")
