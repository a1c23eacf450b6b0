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
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase, _NormBase

from densecl_ext.ops._split_batch_norm import split_batch_norm, takes

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class SplitBatchNorm(_NormBase):
    """Batch norm over groups of the batch; parameters and buffers named as in ``nn.BatchNorm2d``.

    In training, the batch is cut into G blocks of consecutive samples, equal up to one sample, and
    each is normalised with its own mean and variance. G is ``groups``, or N // 2 where that is
    less, so that no group is a single sample (batches of 2 and 3 form one group, unsplit). Running
    statistics move towards the mean of the groups' statistics. In evaluation it is plain batch
    norm.

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
        factor = average_factor(self) if self.training else 0.0
        samples = x.shape[0]
        groups = max(1, min(self.groups, samples // 2))
        if groups == 1:
            mean = self.running_mean if self.training else None
            var = self.running_var if self.training else None
            return F.batch_norm(x, mean, var, self.weight, self.bias, True, factor, self.eps)

        copied = torch.is_grad_enabled() or torch.compiler.is_compiling()
        statistics = (self.running_mean, self.running_var) if self.training else (None, None)
        if not copied and takes(x, self.weight, self.bias, *statistics):
            return split_batch_norm(
                x, self.weight, self.bias, *statistics, groups=groups, factor=factor, eps=self.eps
            )

        # Groups are blocks, so a group is a dense part of x in every memory format: nothing is
        # gathered first. Nor are results copied together, where they can be written in place;
        # torch does that rightly in its own two memory formats alone, and takes unused statistics
        # of one dtype on every device only beside float32 parameters.
        bounds = [group * samples // groups for group in range(groups + 1)]
        parts = [x[first:last] for first, last in zip(bounds, bounds[1:], strict=False)]
        means = _repeated(self.running_mean if self.training else None, groups)  # G x (C,)
        variances = _repeated(self.running_var if self.training else None, groups)
        in_place = x.is_contiguous() or x.is_contiguous(memory_format=_channels_last(x))
        narrow = any(t is not None and t.dtype != torch.float32 for t in (self.weight, means[0]))
        if copied or narrow or not in_place:
            y = torch.cat(
                [
                    F.batch_norm(part, mean, var, self.weight, self.bias, True, factor, self.eps)
                    for part, mean, var in zip(parts, means, variances, strict=True)
                ]
            )
        else:
            y = torch.empty_like(x)
            unused = x.new_empty(2, self.num_features, dtype=torch.float32)
            for group, part in enumerate(parts):
                out = y[bounds[group] : bounds[group + 1]]
                torch.native_batch_norm(
                    part,
                    self.weight,
                    self.bias,
                    means[group],
                    variances[group],
                    True,
                    factor,
                    self.eps,
                    out=(out, unused[0], unused[1]),
                )
        if self.training and self.running_mean is not None:
            with torch.no_grad():
                self.running_mean.copy_(torch.stack(means).mean(dim=0))  # type: ignore
                self.running_var.copy_(torch.stack(variances).mean(dim=0))  # type: ignore
        return y

    def extra_repr(self) -> str:
        """Settings for ``print(layer)``."""
        return f"{super().extra_repr()}, groups={self.groups}"


def average_factor(layer: _NormBase) -> float:
    """Counts a batch; the weight of its statistics in the running ones, as in torch's layers."""
    if layer.num_batches_tracked is None:
        return 0.0 if layer.momentum is None else layer.momentum
    layer.num_batches_tracked.add_(1)
    if layer.momentum is None:
        return 1.0 / float(layer.num_batches_tracked)
    return layer.momentum


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

    def twin(layer: _BatchNorm) -> SplitBatchNorm:
        return SplitBatchNorm(
            layer.num_features,
            groups,
            layer.eps,
            layer.momentum,
            layer.affine,
            layer.track_running_stats,
        )

    hint = (
        "split; use key_bn_groups=1 (which leaks batch statistics) or a backbone with "
        "nn.BatchNorm2d layers"
    )
    return replace_batch_norms(module, twin, hint)


def replace_batch_norms(
    module: ModuleT, twin_of: Callable[[_BatchNorm], _NormBase], hint: str
) -> ModuleT:
    """Replace every batch norm inside ``module``, in place; a layer that is shared stays shared.

    Args:
        module: a module with batch norms, or none.
        twin_of: makes the layer for another; its parameters, buffers and mode are then taken over.
        hint: ends the error: what a batch norm of its own kind cannot be, and the way out.

    Returns:
        ``module`` itself, or its replacement where it is a batch norm.

    Raises:
        ValueError: a batch-norm class with a forward of its own, which a replacement would lose.
    """
    replaced: dict[nn.Module, nn.Module] = {}

    def convert(layer: nn.Module, name: str) -> nn.Module:
        if isinstance(layer, _BatchNorm):
            if layer not in replaced:
                _require_plain(layer, name, hint)
                replaced[layer] = _taken_over(layer, twin_of(layer))
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
    # As a view: torch 2.11's inductor fails on an index that comes from randperm itself.
    order = torch.randperm(images.shape[0], device=images.device).view(-1, 1).squeeze(1)
    back = torch.argsort(order)
    outputs = module(images[order], **kwargs)
    ordered = [None if output is None else output[back] for output in outputs]
    make = getattr(type(outputs), "_make", tuple)  # a named tuple stays one
    return make(ordered)


def exchanged_forward(module: Callable[..., tuple], images: Tensor, **kwargs: Any) -> tuple:
    """Run ``module`` on images that the processes have exchanged at random: MoCo's Shuffle-BN.

    A process normalises keys over other images than its queries, and gets the outputs of its own
    images back, in their order. Every image travels once, and so do its outputs (all-to-all), not
    as in MoCo every image to every process. The permutation comes from the CPU's global generator,
    which must be in the same state on all processes.

    Args:
        module: called as ``module(images, **kwargs)``; returns a (named) tuple of tensors whose
            first dimension is the batch, or None.
        images: (N, ...), N equal on all processes.
        **kwargs: handed to ``module``.

    Returns:
        The tuple: row i belongs to ``images[i]``.
    """
    route = ShuffleRoute(images.shape[0])
    outputs = module(route.send(images), **kwargs)
    returned = [None if output is None else route.send_back(output) for output in outputs]
    make = getattr(type(outputs), "_make", tuple)  # a named tuple stays one
    return make(returned)


class ShuffleRoute:
    """Which images every process gives to, and gets from, every other one.

    Args:
        rows: N, images of this process, equal on all.
    """

    def __init__(self, rows: int) -> None:
        ranks, rank = dist.get_world_size(), dist.get_rank()
        order = torch.randperm(ranks * rows)  # image at every place
        places = order.argsort()  # place of every image
        own = places[rank * rows : (rank + 1) * rows]
        self._give = own.argsort()  # own images, by the process and the place they go to
        self._given = torch.bincount(own // rows, minlength=ranks).tolist()
        sources = order[rank * rows : (rank + 1) * rows] // rows
        # What comes lies by the process it comes from, then by place.
        self._got = torch.bincount(sources, minlength=ranks).tolist()
        self._arrive = sources.argsort(stable=True)

    def send(self, images: Tensor) -> Tensor:
        """Own images (N, ...) go out, the shuffled ones (N, ...) come in, in order of place."""
        came = _all_to_all(_rows(images, self._give), self._given, self._got)
        return _rows(came, self._arrive.argsort())

    def send_back(self, outputs: Tensor) -> Tensor:
        """Outputs (N, ...) of the shuffled images go home, those of the own come in, in order."""
        came = _all_to_all(_rows(outputs, self._arrive), self._got, self._given)
        return _rows(came, self._give.argsort())


def _rows(tensor: Tensor, index: Tensor) -> Tensor:
    if tensor.is_cuda:  # from other memory the copy would make the host wait
        index = index.pin_memory().to(tensor.device, non_blocking=True)
    return tensor[index]


def _all_to_all(rows: Tensor, given: list[int], got: list[int]) -> Tensor:
    if rows.dim() == 4 and rows.is_contiguous(memory_format=torch.channels_last):
        return _all_to_all(rows.permute(0, 2, 3, 1), given, got).permute(0, 3, 1, 2)
    rows = rows.contiguous()
    came = torch.empty_like(rows)
    dist.all_to_all_single(came, rows, got, given)
    return came


def _channels_last(x: Tensor) -> torch.memory_format:
    return {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim(), torch.contiguous_format)


def _repeated(values: Tensor | None, groups: int) -> list[Tensor | None]:
    """A copy of (C,) for every group, or None for every one; one launch."""
    return [None] * groups if values is None else list(values.repeat(groups, 1).unbind())


def _require_plain(layer: _BatchNorm, name: str, hint: str) -> None:
    own_forward = type(layer).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
    if own_forward or isinstance(layer, _LazyNormBase):
        raise ValueError(
            f"split_batch_norms: layer {name!r} is a {type(layer).__name__}, which is not a plain "
            f"batch norm and cannot be {hint}"
        )


def _taken_over(layer: _BatchNorm, twin: _NormBase) -> nn.Module:
    twin.weight, twin.bias = layer.weight, layer.bias
    twin.running_mean, twin.running_var = layer.running_mean, layer.running_var
    twin.num_batches_tracked = layer.num_batches_tracked
    return twin.train(layer.training)
