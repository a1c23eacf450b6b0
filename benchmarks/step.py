"""The whole training step: ours, with a CUDA graph, compiled, and as published.

Query and key encoder, matching, losses, backward, optimizer, momentum update and enqueues, on
random views that lie on the device already: no loader takes part.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import Candidate, Case, Results, ema_loop, normal_numbers, relative
from densecl_ext import DenseCL, DenseCLLoss, ops, reference
from densecl_ext.nn.phases import Stopwatch
from densecl_ext.train import TrainingStep

VIT = "timm/vit_small_patch16_224"
GRAPH, ENCODERS = "CUDA graph", "encoders alone"
CAPTURED_AT = 6  # steps until a CUDA graph is there and used


def step(
    device: torch.device, *, batch: int, backbone: str = "resnet50", size: int = 224,
    queue_length: int = 65536, precision: str = "bf16",
) -> Case:  # fmt: skip
    """A step on a batch of images; a candidate is a model of its own."""
    draw, tiny = normal_numbers(device), backbone == "tiny"
    views = [draw(batch, 3, size, size) for _ in range(2)]
    views = [view.contiguous(memory_format=torch.channels_last) for view in views]

    def candidate(name: str) -> Candidate:
        torch.manual_seed(0)
        half = precision == "bf16" and name != "reference"
        model = DenseCL(
            tiny_backbone() if tiny else backbone,
            queue_length=queue_length,
            queue_dtype=torch.bfloat16 if half else torch.float32,
            queue_init="random",
            loss_lambda=0.0 if name == "lambda 0" else 0.5,
            backbone_channels=32 if tiny else None,
        )
        model.to(device=device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        parameters = [p for p in model.parameters() if p.requires_grad]
        rates = {"lr": 0.03, "momentum": 0.9, "weight_decay": 1e-4, "fused": True}
        optimizer = torch.optim.SGD(parameters, **rates)  # type: ignore[arg-type]
        options = {"cuda_graph": name == GRAPH, "compile": name == "compiled"}
        whole = TrainingStep(model, optimizer, precision=precision, **options)

        def run() -> Tensor:
            with published_ops() if name == "reference" else nullcontext():
                return whole(*views).loss

        def encoders_alone() -> Tensor:
            query, key = model.neck(model.backbone(views[0])), model.momentum_encoder(views[1])
            loss = (query.vector * key.vector).sum() + (query.grid * key.grid).sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        chosen = encoders_alone if name == ENCODERS else run
        steps = range(CAPTURED_AT if device.type == "cuda" else 2)
        return Candidate(chosen, lambda: ([chosen() for _ in steps][-1],), "timed as it is called")

    def parts(name: str, run: Callable[[], Any]) -> dict[str, float]:
        """Seconds of a step's parts, and of all of it; a graph's cannot be told apart."""
        if name in (GRAPH, ENCODERS):
            return {}
        run()
        with Stopwatch(device) as stopwatch:
            start = time.perf_counter()
            for _ in range(4):
                run()
            found = stopwatch.seconds() | {"step": time.perf_counter() - start}
        return {name: seconds / 4 for name, seconds in found.items()}

    def errors(got: Results, expected: Results) -> dict[str, float]:
        return {} if bool(torch.isfinite(got[0])) else {"loss": math.nan}

    network = {"resnet50": "ResNet-50", VIT: "ViT-S/16"}.get(backbone, backbone)
    return Case(
        f"training step, {network}, batch {batch}",
        ("ours", "reference", "lambda 0", GRAPH, "compiled", ENCODERS), candidate, errors, 0.0,
        images=batch, parts=parts,
    )  # fmt: skip


def step_loss(
    device: torch.device, *, pairs: int, queue_length: int = 65536, features: int = 128,
    channels: int = 2048, grid: int = 7, dtype: str = "bfloat16",
) -> Case:  # fmt: skip
    """What a step does with the encoders' outputs: matching, both losses, their gradients."""
    draw, half = normal_numbers(device), getattr(torch, dtype)
    query = [draw(pairs, features)]  # (N, D), then (N, D, S, S), (N, C, S, S)
    query += [draw(pairs, size, grid, grid) for size in (features, channels)]
    key = [output + draw(*output.shape) for output in query]
    queues = [F.normalize(draw(queue_length, features), dim=1).to(half) for _ in range(2)]
    tensors = [query[0].requires_grad_(), key[0], query[1].requires_grad_(), key[1], *queues]
    maps = [side[2].to(half, memory_format=torch.channels_last) for side in (query, key)]

    def candidate(name: str) -> Candidate:
        def results() -> Results:
            with nullcontext() if name == "ours" else published_ops():
                loss = DenseCLLoss()(*tensors, query_features=maps[0], key_features=maps[1]).loss
            return loss.detach(), *torch.autograd.grad(loss, (tensors[0], tensors[2]))

        return Candidate(results, results)

    def errors(got: Results, expected: Results) -> dict[str, float]:
        found = {"loss": float((got[0].double() - expected[0].double()).abs())}
        names = ("gradient", "grid's gradient")
        return found | dict(zip(names, map(relative, got[1:], expected[1:]), strict=True))

    return Case(
        f"matching and both losses, N={pairs} K={queue_length:,}, {dtype}",
        ("ours", "reference"), candidate, errors, 2e-2,
        work=4.0 * pairs * (1 + grid**2) * queue_length * features,
    )  # fmt: skip


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
