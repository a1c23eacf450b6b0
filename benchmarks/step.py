"""The whole training step: ours, with a CUDA graph, compiled, and as published.

Query and key encoder, matching, losses, backward, optimizer, momentum update and enqueues, on
random views that lie on the device already: no loader takes part.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import Candidate, Case, Results, ema_loop, normal_numbers, relative, within
from densecl_ext import DenseCL, DenseCLLoss, ops, reference
from densecl_ext.nn.phases import Stopwatch
from densecl_ext.train import TrainingStep

VIT = "timm/vit_small_patch16_224"
COMPARED = ("ours", "reference")
WARM_UP = 6  # with a CUDA graph the fourth step captures


@dataclass(frozen=True)
class StepCase(Case):
    """A step on a batch of images; a candidate is a model of its own."""

    names = (*COMPARED, "lambda 0", "CUDA graph", "compiled", "backbone alone")
    small = {"backbone": "tiny", "batch": 8, "size": 32, "queue_length": 128}
    whole_memory = True
    batch: int
    backbone: str = "resnet50"
    size: int = 224
    queue_length: int = 65536
    precision: str = "bf16"

    @property
    def title(self) -> str:
        name = {"resnet50": "ResNet-50", VIT: "ViT-S/16"}.get(self.backbone, self.backbone)
        return f"training step, {name}, batch {self.batch}"

    @property
    def images(self) -> int:  # type: ignore[override]
        return self.batch

    def inputs(self, device: torch.device) -> list[Tensor]:
        draw = normal_numbers(device)
        views = [draw(self.batch, 3, self.size, self.size) for _ in range(2)]
        return [view.contiguous(memory_format=torch.channels_last) for view in views]

    def candidate(self, name: str, inputs: list[Tensor]) -> Candidate:
        device = inputs[0].device
        torch.manual_seed(0)
        half = self.precision == "bf16" and name != "reference"
        tiny = self.backbone == "tiny"
        model = DenseCL(
            tiny_backbone() if tiny else self.backbone,
            queue_length=self.queue_length,
            queue_dtype=torch.bfloat16 if half else torch.float32,
            queue_init="random",
            loss_lambda=0.0 if name == "lambda 0" else 0.5,
            backbone_channels=32 if tiny else None,
        )
        model.to(device=device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        parameters = [p for p in model.parameters() if p.requires_grad]
        rates = {"lr": 0.03, "momentum": 0.9, "weight_decay": 1e-4, "fused": True}
        optimizer = torch.optim.SGD(parameters, **rates)  # type: ignore[arg-type]
        options = {"cuda_graph": name == "CUDA graph", "compile": name == "compiled"}
        step = TrainingStep(model, optimizer, precision=self.precision, **options)

        def run() -> Tensor:
            with published_ops() if name == "reference" else nullcontext():
                return step(*inputs).loss

        def encoders_alone() -> Tensor:
            query, key = model.neck(model.backbone(inputs[0])), model.momentum_encoder(inputs[1])
            loss = (query.vector * key.vector).sum() + (query.grid * key.grid).sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        chosen = encoders_alone if name == "backbone alone" else run
        return Candidate(
            chosen, lambda: ([chosen() for _ in range(WARM_UP)][-1],), "timed as it is called"
        )

    def expected(self, inputs: list[Tensor]) -> Results:
        return ()

    def check(self, name: str, got: Results, expected: Results) -> dict[str, float]:
        """Only that the loss is finite: a test holds the published step against ours."""
        if not bool(torch.isfinite(got[0])):
            raise AssertionError(f"{name}: the loss is {float(got[0])}")
        return {}

    def parts(self, name: str, run: Callable[[], Any], device: torch.device) -> dict[str, float]:
        """Seconds of a step's parts, and of all of it; a graph's cannot be told apart."""
        if name == "CUDA graph":
            return {}
        run()
        with Stopwatch(device) as stopwatch:
            start = time.perf_counter()
            for _ in range(4):
                run()
            parts = stopwatch.seconds()
            whole = time.perf_counter() - start
        return {name: seconds / 4 for name, seconds in parts.items()} | {"step": whole / 4}


@dataclass(frozen=True)
class StepLossCase(Case):
    """What a step does with the encoders' outputs: matching, both losses, their gradients."""

    names = ("ours", "reference")
    small = {"pairs": 4, "queue_length": 256, "features": 32, "channels": 64}
    pairs: int
    queue_length: int = 65536
    features: int = 128
    channels: int = 2048
    grid: int = 7
    dtype: str = "bfloat16"

    @property
    def title(self) -> str:
        size = f"N={self.pairs} K={self.queue_length:,}"
        return f"matching and both losses, {size}, {self.dtype}"

    def inputs(self, device: torch.device) -> tuple[list[Tensor], dict[str, Tensor]]:
        draw, dtype = normal_numbers(device), getattr(torch, self.dtype)
        sides = self.pairs, self.grid, self.grid
        query = [draw(self.pairs, self.features)]  # (N, D), then (N, D, S, S), (N, C, S, S)
        query += [draw(sides[0], size, *sides[1:]) for size in (self.features, self.channels)]
        key = [output + draw(*output.shape) for output in query]
        queues = [F.normalize(draw(self.queue_length, self.features), dim=1) for _ in range(2)]
        rows = [query[0].requires_grad_(), key[0], query[1].requires_grad_(), key[1]]
        maps = (x[2].to(dtype, memory_format=torch.channels_last) for x in (query, key))
        features = dict(zip(("query_features", "key_features"), maps, strict=True))
        return [*rows, *(queue.to(dtype) for queue in queues)], features

    def candidate(self, name: str, inputs: tuple[list[Tensor], dict[str, Tensor]]) -> Candidate:
        tensors, features = inputs

        def results() -> Results:
            with nullcontext() if name == "ours" else published_ops():
                loss = DenseCLLoss()(*tensors, **features).loss
            return loss.detach(), *torch.autograd.grad(loss, (tensors[0], tensors[2]))

        return Candidate(results, results)

    def check(self, name: str, got: Results, expected: Results) -> dict[str, float]:
        errors = {"loss": float((got[0].double() - expected[0].double()).abs())}
        for what, a, b in zip(("gradient", "grid's gradient"), got[1:], expected[1:], strict=True):
            errors[what] = relative(a, b)
        return within(errors, 2e-2, name)

    @property
    def work(self) -> float:
        rows = self.pairs * (1 + self.grid**2)
        return 4.0 * rows * self.queue_length * self.features


def tiny_backbone() -> nn.Module:
    """A network that takes no time on a CPU, to 32 channels."""
    layers = nn.Conv2d(3, 16, 8, stride=8), nn.BatchNorm2d(16), nn.ReLU()
    return nn.Sequential(*layers, nn.Conv2d(16, 32, 2, stride=2))


@contextmanager
def published_ops() -> Iterator[None]:
    """Inside, the model's ops are the published code: logits in memory, a loop over parameters.

    The losses read clones of the queues, which the enqueue changes before the backward pass; all
    rows of the queues count, so that nobody waits for their number. The enqueue reads its pointer
    on the host.
    """

    def info_nce(query: Tensor, key: Tensor, queue: Tensor, **options: Any) -> Tensor:
        return reference.info_nce(query, key, queue.clone(), **options | {"filled": None})

    def joint_info_nce(*tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        query, key, queue, query_grid, key_grid, match, dense_queue = tensors
        grids = query_grid, key_grid, match, dense_queue.clone()
        options |= {"filled": None, "dense_filled": None}
        return reference.joint_info_nce(query, key, queue.clone(), *grids, **options)

    published = {
        "info_nce": info_nce, "joint_info_nce": joint_info_nce, "ema_update_": ema_loop,
        "dense_match": reference.dense_match, "enqueue_": reference.enqueue_,
    }  # fmt: skip
    ours = {name: getattr(ops, name) for name in published}
    vars(ops).update(published)
    try:
        yield
    finally:
        vars(ops).update(ours)
