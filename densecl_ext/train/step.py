"""One training step: forward, backward, optimizer; plain, compiled, or as one CUDA graph."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from densecl_ext.nn.model import DenseCL
from densecl_ext.nn.phases import phase

PRECISIONS = ("fp32", "bf16")
WARMUP_STEPS = 3
_UNUSABLE = (
    "TrainingStep: this step could not be captured in a CUDA graph and is unusable, and this "
    "process can capture no other. Start again from a checkpoint, without cuda_graph to go on "
    "eagerly."
)


class StepOutput(NamedTuple):
    """What one :class:`TrainingStep` returns, detached and on the model's device.

    Attributes:
        loss: () the weighted sum.
        loss_global: () InfoNCE of the global vectors, 0 where it is not computed.
        loss_dense: () InfoNCE of the grid positions, 0 where it is not computed.
        metrics: name to 0-d float32 tensor, see :class:`densecl_ext.DenseCL`, and
            ``gradient_norm``, the L2 norm of all gradients together.
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
        cuda_graph: capture the whole step in a CUDA graph and replay it. The first three calls run
            as they would without (they are steps like any other, and make the state that the graph
            then works on), the fourth captures. Load checkpoints before the first call; views and
            crops must keep their shapes, and :meth:`schedule` is the way to change a rate. The
            optimizer must read its learning rate on the device: ``torch.optim.SGD(...,
            fused=True)``, or another one with ``capturable=True``.
        compile: compile both encoders with torch.compile, in place; takes a while at first.
        accumulate: take every batch in this many parts, one after the other, whose gradients add up
            to those of their mean loss. The key encoder moves, keys enter the queues and the
            optimizer steps once. Batch norm sees a part, and a part's dense loss is the mean over
            its own matched positions.

    Raises:
        ValueError: an unknown precision, an optimizer that a graph cannot hold, or `accumulate`
            below 1.
        RuntimeError: ``cuda_graph`` with a model that is not on a GPU.

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
        cuda_graph: bool = False,
        compile: bool = False,
        accumulate: int = 1,
    ) -> None:
        if accumulate < 1:
            raise ValueError(f"TrainingStep: accumulate must be at least 1, got {accumulate}")
        if precision not in PRECISIONS:
            raise ValueError(
                f"TrainingStep: precision must be one of {PRECISIONS}, got {precision!r}"
            )
        self.model = model
        self.optimizer = optimizer
        self.precision = precision
        self.accumulate = accumulate
        self._forward: torch.nn.Module = model  # or what averages its gradients over processes
        self.device = next(model.parameters()).device
        self._graph = CapturedStep(self._run, self.device) if cuda_graph else None
        if self.device.type == "cuda":
            _rates_on_device(optimizer, self.device)
        if cuda_graph:
            _check_capturable(optimizer)
            momentum = float(model.momentum_encoder.momentum)
            model.momentum_encoder.momentum = torch.tensor(
                momentum, dtype=torch.float64, device=self.device
            )
        if compile:
            for module in (model.backbone, model.neck, model.momentum_encoder.module):
                module.compile()

    def schedule(self, *, lr: float | None = None, key_momentum: float | None = None) -> None:
        """Set the rates of the steps to come; nothing waits, and a captured graph follows.

        Args:
            lr: learning rate of all parameter groups, times a group's ``lr_scale`` where it has
                one; None leaves it.
            key_momentum: momentum of the key encoder, in [0, 1]; None leaves it.

        Raises:
            ValueError: ``key_momentum`` outside [0, 1].
        """
        if lr is not None:
            for group in self.optimizer.param_groups:
                scaled = lr * group.get("lr_scale", 1.0)
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(scaled)
                else:
                    group["lr"] = scaled
        if key_momentum is not None:
            if not 0.0 <= key_momentum <= 1.0:
                raise ValueError(
                    f"TrainingStep.schedule: key_momentum must lie in [0, 1], got {key_momentum}"
                )
            encoder = self.model.momentum_encoder
            if isinstance(encoder.momentum, Tensor):
                encoder.momentum.fill_(key_momentum)
            else:
                encoder.momentum = float(key_momentum)

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
            ValueError: as :class:`densecl_ext.DenseCL` does; with a CUDA graph also for inputs of
                another shape, dtype or presence than the first call's.
        """
        run = self._run if self._graph is None else self._graph
        return run(view_q, view_k, crop_q, crop_k)

    def _run(
        self, view_q: Tensor, view_k: Tensor, crop_q: Tensor | None, crop_k: Tensor | None
    ) -> StepOutput:
        parts = self.accumulate
        if view_q.shape[0] % parts:
            raise ValueError(
                f"TrainingStep: {view_q.shape[0]} images cannot be taken in {parts} equal parts"
            )
        inputs = (view_q, view_k, crop_q, crop_k)
        pieces = [[None] * parts if x is None else x.chunk(parts) for x in inputs]
        outputs = [self._part(part, *piece) for part, piece in enumerate(zip(*pieces, strict=True))]
        with phase("optimizer"):
            norm = self._gradient_norm()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        output = outputs[0] if parts == 1 else _mean(outputs)
        return output._replace(metrics=output.metrics | {"gradient_norm": norm})

    def _part(
        self,
        part: int,
        view_q: Tensor,
        view_k: Tensor,
        crop_q: Tensor | None,
        crop_k: Tensor | None,
    ) -> StepOutput:
        """Forward and backward of one part; gradients travel with the last."""
        crops = {"crop_q": crop_q, "crop_k": crop_k}
        last = part == self.accumulate - 1
        waits = not last and isinstance(self._forward, DistributedDataParallel)
        bf16 = self.precision == "bf16"
        with self._forward.no_sync() if waits else nullcontext():  # type: ignore[operator]
            with torch.autocast(self.device.type, torch.bfloat16) if bf16 else nullcontext():
                output = self._forward(view_q, view_k, **crops, part=part, parts=self.accumulate)
            with phase("backward"):
                (output.loss / self.accumulate).backward()
        loss, loss_global, loss_dense = (term.detach() for term in output[:3])
        return StepOutput(loss, loss_global, loss_dense, output.metrics)

    def average(self, wrap: Callable[[torch.nn.Module], torch.nn.Module]) -> None:
        """Average gradients over processes from now on.

        Args:
            wrap: puts the model into ``DistributedDataParallel``.
        """
        self._forward = wrap(self.model)

    @torch.no_grad()
    def _gradient_norm(self) -> Tensor:
        """() the L2 norm of all gradients together."""
        groups = self.optimizer.param_groups
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients).float()


class CapturedStep:
    """A step as a CUDA graph: real steps first, then one capture, then replays.

    All calls work on the same input buffers, into which the inputs are copied (and brought into the
    first call's memory format on the way). The graph draws from the default CUDA generator, whose
    state torch moves on at every replay as the eager step would.

    Args:
        run: the step; reads and writes tensors that stay in place, apart from its inputs.
        device: where it runs.

    Raises:
        RuntimeError: not a GPU; and from the call that captures on, where the capture fails.
    """

    def __init__(self, run: Callable[..., StepOutput], device: torch.device) -> None:
        if device.type != "cuda":
            raise RuntimeError(
                f"TrainingStep: cuda_graph needs the model on a GPU, got one on {device}"
            )
        self._run = run
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._inputs: list[Tensor | None] | None = None
        self._steps = 0
        self._failed = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._names: list[str] = []
        self._outputs: Tensor | None = None  # (losses and metrics,), overwritten by every replay

    def __call__(self, *inputs: Tensor | None) -> StepOutput:
        """Run the step on these inputs."""
        if self._failed:
            raise RuntimeError(_UNUSABLE)
        buffers = self._load(inputs)
        if self._steps < WARMUP_STEPS:
            self._steps += 1
            current = torch.cuda.current_stream(self._device)
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                output = self._run(*buffers)
            current.wait_stream(self._stream)
            return output
        if self._graph is None:
            self._capture(buffers)
        assert self._graph is not None and self._outputs is not None
        self._graph.replay()
        values = dict(zip(self._names, self._outputs.clone().unbind(), strict=True))
        losses = values.pop("loss"), values.pop("loss_global"), values.pop("loss_dense")
        return StepOutput(*losses, values)

    def _capture(self, buffers: list[Tensor | None]) -> None:
        graph = torch.cuda.CUDAGraph()
        # A collection might free device memory or events of others, which a capture forbids.
        collects = gc.isenabled()
        gc.disable()
        try:
            # thread_local: the loader's threads may pin memory meanwhile.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                scalars = self._run(*buffers).scalars()
                self._outputs = torch.stack([value.float() for value in scalars.values()])
        except Exception as error:
            self._failed = True
            raise RuntimeError(f"{_UNUSABLE} The capture failed: {error}") from error
        finally:
            if collects:
                gc.enable()
        self._names = list(scalars)
        self._graph = graph

    def _load(self, inputs: tuple[Tensor | None, ...]) -> list[Tensor | None]:
        """Copy the inputs into the buffers."""
        if self._inputs is None:
            self._inputs = [None if x is None else torch.empty_like(x) for x in inputs]
        names = ("view_q", "view_k", "crop_q", "crop_k")
        for name, buffer, given in zip(names, self._inputs, inputs, strict=True):
            if _form(buffer) != _form(given):
                raise ValueError(
                    f"TrainingStep: with cuda_graph {name} must stay {_form(buffer)}, as in the "
                    f"first call, got {_form(given)}"
                )
        for buffer, given in zip(self._inputs, inputs, strict=True):
            if buffer is not None and given is not None:
                buffer.copy_(given, non_blocking=True)
        return self._inputs


def _mean(outputs: list[StepOutput]) -> StepOutput:
    """Losses and metrics, each the mean over a step's parts."""
    scalars = [output.scalars() for output in outputs]
    means = {name: torch.stack([s[name] for s in scalars]).mean(dim=0) for name in scalars[0]}
    losses = means.pop("loss"), means.pop("loss_global"), means.pop("loss_dense")
    return StepOutput(*losses, means)


def _form(tensor: Tensor | None) -> str:
    """Shape and dtype, or None."""
    if tensor is None:
        return "None"
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _rates_on_device(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Learning rates as float32 tensors where the optimizer's kernels read them there.

    For eager steps too: a rate given as a number is not rounded to float32, and a captured step
    would differ from an eager one in the last bits.
    """
    for group in optimizer.param_groups:
        if (group.get("fused") or group.get("capturable")) and not isinstance(group["lr"], Tensor):
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float32, device=device)


def _check_capturable(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        if not (group.get("fused") or group.get("capturable")):
            raise ValueError(
                "TrainingStep: cuda_graph needs an optimizer that reads its learning rate on the "
                f"device, got {type(optimizer).__name__} without fused=True or capturable=True"
            )
