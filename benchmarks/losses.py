"""The loss: published formula, torch.compile, attention kernels, lightly, and ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import (
    Candidate,
    Case,
    NotAvailable,
    Results,
    compiled,
    normal_numbers,
    relative,
)
from densecl_ext import ops, reference

TEMPERATURE = 0.2
BEFORE, FLASH, CUDNN = "ours, before backward", "flash attention", "cuDNN attention"
NAMES = ("ours", BEFORE, "eager", "eager TF32", "eager autocast", "torch.compile",
         "torch.compile autocast", FLASH, CUDNN, "lightly")  # fmt: skip
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
Attention = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # rows, keys -> output, log-sum-exp


def info_nce(
    device: torch.device, *, rows: int, queue_length: int, features: int = 128,
    dtype: str = "float32", gradient: bool = True,
) -> Case:  # fmt: skip
    """M rows against K negatives, as in training: a gradient for the query alone."""
    draw = normal_numbers(device)
    query = draw(rows, features)  # (M, D) float32
    positive = query + draw(rows, features)
    unit = F.normalize(draw(queue_length, features), dim=1)
    queue = unit.to(getattr(torch, dtype))  # (K, D)
    query.requires_grad_(gradient)

    def loss_of(name: str) -> Loss:
        if dtype == "float32" and ("autocast" in name or name == CUDNN):
            raise NotAvailable("16-bit queues only")
        if name == CUDNN and not queue.is_cuda:
            raise NotAvailable("on a GPU only")
        if name == "lightly":
            return lightly_loss(queue.float())
        if name in (FLASH, CUDNN):
            return attention_formulation(flash_attention if name == FLASH else cudnn_attention)
        if name.startswith("ours"):
            return ops.info_nce
        eager = eager_autocast if "autocast" in name else reference.info_nce
        return compiled(eager) if name.startswith("torch.compile") else eager

    def truth() -> Results:
        return in_chunks(query, positive, queue)[: 1 + gradient]

    def candidate(name: str) -> Candidate:
        if name == "reference":
            return Candidate(truth, truth)
        loss_function, exact = loss_of(name), name in ("eager", "eager TF32", "torch.compile")
        own = queue.float() if exact else queue

        def results() -> Results:
            with tf32_products(name == "eager TF32"), torch.set_grad_enabled(gradient):
                loss = loss_function(query, positive, own)
                if not gradient or name == BEFORE:
                    return (loss.detach(),)
                return loss.detach(), *torch.autograd.grad(loss, query)

        return Candidate(results, results)

    def errors(got: Results, expected: Results) -> dict[str, float]:
        found = {"loss": float((got[0].double() - expected[0].double()).abs())}
        if gradient and len(got) > 1:
            # The gradient is a difference of two terms of this size; with D = 1 nothing is left.
            terms = features**-0.5 / (TEMPERATURE * rows**0.5)
            found["gradient"] = relative(got[1], expected[1], floor=terms)
        return found

    size = f"M={rows:,} K={queue_length:,} D={features}, {dtype}"
    return Case(
        f"info_nce, {'' if gradient else 'loss alone, '}{size}", NAMES, candidate, errors,
        1e-4 if dtype == "float32" else 2e-2,
        work=(4.0 if gradient else 2.0) * rows * queue_length * features,
        eager_bytes=4.2 * 4.0 * rows * (queue_length + 1),  # about four matrices of logits
    )  # fmt: skip


def in_chunks(query: Tensor, positive: Tensor, queue: Tensor, logits: int = 2**28) -> Results:
    """The published formula in float32, few enough rows at a time for the logits to fit."""
    queue, count = queue.float(), len(query)
    chunk = max(1, logits // len(queue))
    loss, gradients = torch.zeros((), dtype=torch.float64, device=queue.device), []
    for rows, others in zip(query.detach().split(chunk), positive.split(chunk), strict=True):
        rows.requires_grad_()
        part = reference.info_nce(rows, others, queue, reduction="sum")
        gradients.append(torch.autograd.grad(part, rows)[0] / count)
        loss += part.detach().double() / count
    return loss.float(), torch.cat(gradients)


@contextmanager
def tf32_products(allowed: bool) -> Iterator[None]:
    """Inside, float32 matrix products on a GPU may keep ten bits of their operands, or must not."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def eager_autocast(query: Tensor, positive: Tensor, queue: Tensor) -> Tensor:
    """The published formula with bfloat16 products, as mixed-precision training runs it."""
    query, positive = F.normalize(query, dim=1), F.normalize(positive, dim=1)
    with torch.autocast(query.device.type, torch.bfloat16):
        positive_logit = torch.einsum("md,md->m", query, positive).unsqueeze(1)  # (M, 1)
        negative_logits = torch.einsum("md,kd->mk", query, queue)  # (M, K)
        logits = torch.cat([positive_logit, negative_logits], dim=1) / TEMPERATURE
        target = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        return F.cross_entropy(logits.float(), target)


class AttentionLoss(torch.autograd.Function):
    """Loss of unit rows by attention with K = V = queue: output and log-sum-exp are all it needs.

    L = log(exp(s_p) + exp(lse)), dl/dq = (1/T) [exp(lse - L) output - (1 - exp(s_p - L)) p].
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, positive: Tensor, queue: Tensor, kernel: Attention
    ) -> Tensor:
        rows, keys = query.to(queue.dtype)[None, None], queue[None, None]  # (1, 1, M or K, D)
        output, lse = kernel(rows, keys)
        output, lse = output[0, 0], lse.flatten()[: len(query)]  # (M, D), (M,)
        positive_logit = (query * positive).sum(dim=1) / TEMPERATURE  # (M,)
        total = torch.logaddexp(lse, positive_logit)  # (M,)
        weight = (lse - total).exp().unsqueeze(1)
        ctx.gradient = weight * (output.float() - positive) / (TEMPERATURE * len(query))
        return (total - positive_logit).mean()

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad[0] * ctx.gradient, None, None, None


def attention_formulation(kernel: Attention) -> Loss:
    """The fastest that PyTorch alone can do: one of its fused attention kernels."""

    def loss(query: Tensor, positive: Tensor, queue: Tensor) -> Tensor:
        query, positive = F.normalize(query, dim=1), F.normalize(positive, dim=1)
        return AttentionLoss.apply(query, positive, queue, kernel)

    return loss


def flash_attention(rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(q n / T) n and its log-sum-exp by torch's flash attention, or the next best.

    On a GPU it splits the keys over the blocks as its own heuristic sees fit.
    """
    aten, scale = torch.ops.aten, 1.0 / TEMPERATURE
    if rows.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(rows, keys, keys, scale=scale)
    if rows.dtype == torch.float32:  # flash attention is for 16 bits
        efficient = aten._scaled_dot_product_efficient_attention
        return efficient(rows, keys, keys, None, True, scale=scale)[:2]
    return aten._scaled_dot_product_flash_attention(rows, keys, keys, scale=scale)[:2]


def cudnn_attention(rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """The same by cuDNN."""
    run = torch.ops.aten._scaled_dot_product_cudnn_attention
    return run(rows, keys, keys, None, True, scale=1.0 / TEMPERATURE)[:2]


def lightly_loss(queue: Tensor) -> Loss:
    """lightly's NTXentLoss with its memory bank holding the queue; updates the bank, as it does."""
    from lightly.loss import NTXentLoss

    module = NTXentLoss(temperature=TEMPERATURE, memory_bank_size=tuple(queue.shape))
    module.memory_bank.bank = queue.clone()

    def loss(query: Tensor, positive: Tensor, _: Tensor) -> Tensor:
        return module(query, positive)

    return loss
