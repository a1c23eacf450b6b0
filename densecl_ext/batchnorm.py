"""Batch norm of the key encoder that does not leak which images are a pair.

Batch norm lets the images of a batch see each other. When queries and keys are normalised over the
same images, the network can tell from the shared statistics which key belongs to which query
without looking at the content (MoCo, section 3.3). MoCo shuffles the keys over the GPUs; on one
process the same end is reached by normalising groups of the batch apart, after a permutation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase, _NormBase

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class SplitBatchNorm(_NormBase):
    """Batch norm over groups of the batch; parameters and buffers named as in ``nn.BatchNorm2d``.

    In training, sample n belongs to group ``n % G`` and is normalised with its group's mean and
    variance. G is ``groups``, or N // 2 where that is less, so that no group is a single sample
    (batches of 2 and 3 form one group and are not split). Running statistics move towards the mean
    of the groups' statistics. In evaluation it is plain batch norm.

    It does not derive from ``nn.BatchNorm2d``, so ``convert_sync_batchnorm`` leaves it alone.

    Args:
        num_features: C.
        groups: number of groups, at least 1.
        eps: added to the variance.
        momentum: weight of the new statistics, None for their cumulative mean.
        affine: learn a scale and a shift.
        track_running_stats: keep running statistics.

    Shape:
        (N, C) or (N, C, ...) to the same; float32, bfloat16 or float16.
    """

    def __init__(
        self,
        num_features: int,
        groups: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        if groups < 1:
            raise ValueError(f"SplitBatchNorm: groups must be at least 1, got {groups}")
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (N, C, ...)."""
        if x.dim() < 2 or x.shape[1] != self.num_features:
            raise ValueError(
                f"SplitBatchNorm: input must be (N, {self.num_features}, ...), got {tuple(x.shape)}"
            )
        if not self.training and self.running_mean is not None:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        factor = self._average_factor() if self.training else 0.0
        samples = x.shape[0]
        groups = max(1, min(self.groups, samples // 2))
        if groups == 1:
            mean = self.running_mean if self.training else None
            var = self.running_var if self.training else None
            return F.batch_norm(x, mean, var, self.weight, self.bias, True, factor, self.eps)

        repeated_mean = self._repeated(self.running_mean, groups)  # (G * C,)
        repeated_var = self._repeated(self.running_var, groups)
        if samples % groups == 0 and x.is_contiguous():
            # Sample n = a * G + g is row a of group g: in memory (N, C, ...) already is
            # (N / G, G * C, ...), so one call over G * C channels does all groups, without a copy.
            stacked = x.view(samples // groups, groups * self.num_features, *x.shape[2:])
            y = F.batch_norm(
                stacked,
                repeated_mean,
                repeated_var,
                self._repeated(self.weight, groups),
                self._repeated(self.bias, groups),
                True,
                factor,
                self.eps,
            ).view_as(x)
        else:
            # Compact copies: strided slices take a path of batch norm that is three times slower.
            layout = _memory_format(x)
            y = torch.empty_like(x)
            channels = self.num_features
            for group in range(groups):
                own = slice(group * channels, (group + 1) * channels)
                y[group::groups] = F.batch_norm(
                    x[group::groups].contiguous(memory_format=layout),
                    None if repeated_mean is None else repeated_mean[own],
                    None if repeated_var is None else repeated_var[own],
                    self.weight,
                    self.bias,
                    True,
                    factor,
                    self.eps,
                )
        if self.training and repeated_mean is not None and repeated_var is not None:
            with torch.no_grad():
                self.running_mean.copy_(repeated_mean.view(groups, -1).mean(dim=0))  # type: ignore
                self.running_var.copy_(repeated_var.view(groups, -1).mean(dim=0))  # type: ignore
        return y

    def extra_repr(self) -> str:
        """Settings for ``print(layer)``."""
        return f"{super().extra_repr()}, groups={self.groups}"

    def _average_factor(self) -> float:
        if self.num_batches_tracked is None:
            return 0.0 if self.momentum is None else self.momentum
        self.num_batches_tracked.add_(1)
        if self.momentum is None:
            return 1.0 / float(self.num_batches_tracked)
        return self.momentum

    @staticmethod
    def _repeated(values: Tensor | None, groups: int) -> Tensor | None:
        return None if values is None else values.repeat(groups)


def split_batch_norms(module: ModuleT, groups: int) -> ModuleT:
    """Replace every batch norm inside ``module`` by a :class:`SplitBatchNorm`, in place.

    Parameters and buffers are taken over as they are, so state dicts keep their keys.

    Args:
        module: a module with ``nn.BatchNorm1d/2d/3d`` or ``nn.SyncBatchNorm`` layers, or none.
        groups: groups of the batch that are normalised apart, at least 1.

    Returns:
        ``module`` itself, or its replacement where it is a batch norm.

    Raises:
        ValueError: ``groups`` below 1, or a batch-norm class with a forward of its own, which a
            replacement would lose.
    """
    if groups < 1:
        raise ValueError(f"split_batch_norms: groups must be at least 1, got {groups}")
    replaced: dict[nn.Module, nn.Module] = {}

    def convert(layer: nn.Module, name: str) -> nn.Module:
        if isinstance(layer, _BatchNorm):
            if layer not in replaced:
                replaced[layer] = _split_twin(layer, groups, name)
            return replaced[layer]
        for child_name, child in layer.named_children():
            twin = convert(child, f"{name}.{child_name}" if name else child_name)
            if twin is not child:
                setattr(layer, child_name, twin)
        return layer

    return convert(module, "")  # type: ignore[return-value]


def shuffled_forward(module: Callable[..., tuple], images: Tensor, **kwargs: Any) -> tuple:
    """Run ``module`` on the images in random order and give its outputs in the original order.

    With it the groups of :class:`SplitBatchNorm` hold other images at every step. The permutation
    is drawn on the images' device by its global generator, so that nothing waits and a captured
    CUDA graph draws a new one at every replay: ``torch.manual_seed`` repeats it, and saving
    ``torch.get_rng_state()`` or ``torch.cuda.get_rng_state()`` resumes it.

    Args:
        module: called as ``module(images, **kwargs)``; returns a (named) tuple of tensors whose
            first dimension is the batch, or None.
        images: (N, ...).
        **kwargs: handed to ``module``.

    Returns:
        The tuple, every tensor of it un-permuted: row i belongs to ``images[i]``.
    """
    order = torch.randperm(images.shape[0], device=images.device)
    back = torch.argsort(order)
    outputs = module(images[order], **kwargs)
    ordered = [None if output is None else output[back] for output in outputs]
    make = getattr(type(outputs), "_make", tuple)  # a named tuple stays one
    return make(ordered)


def _memory_format(x: Tensor) -> torch.memory_format:
    """channels_last where x is laid out so."""
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
        return torch.channels_last_3d
    return torch.contiguous_format


def _split_twin(layer: _BatchNorm, groups: int, name: str) -> SplitBatchNorm:
    own_forward = type(layer).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
    if own_forward or isinstance(layer, _LazyNormBase):
        raise ValueError(
            f"split_batch_norms: layer {name!r} is a {type(layer).__name__}, which is not a plain "
            "batch norm and cannot be split; use key_bn_groups=1 (which leaks batch statistics) or "
            "a backbone with nn.BatchNorm2d layers"
        )
    twin = SplitBatchNorm(
        layer.num_features,
        groups,
        layer.eps,
        layer.momentum,
        layer.affine,
        layer.track_running_stats,
    )
    twin.weight, twin.bias = layer.weight, layer.bias
    twin.running_mean, twin.running_var = layer.running_mean, layer.running_var
    twin.num_batches_tracked = layer.num_batches_tracked
    return twin.train(layer.training)
