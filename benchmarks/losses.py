"""The loss: published formula, torch.compile, attention kernels, lightly, and ours."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

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
    within,
)
from densecl_ext import ops, reference

TEMPERATURE = 0.2
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
Attention = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # rows, keys -> output, log-sum-exp


class Rows(NamedTuple):
    """Arguments of the loss."""

    query: Tensor  # (M, D) float32, requires grad where the gradient is wanted
    positive: Tensor  # (M, D) float32
    queue: Tensor  # (K, D) in the case's dtype


@dataclass(frozen=True)
class InfoNceCase(Case):
    """info_nce of M rows against K negatives, as in training: a gradient for the query alone."""

    names = ("ours", "ours, before backward", "eager", "eager TF32", "eager autocast",
             "torch.compile", "torch.compile autocast", "flash attention", "cuDNN attention",
             "lightly")  # fmt: skip
    small = {"rows": 48, "queue_length": 512}
    rows: int
    queue_length: int
    features: int = 128
    dtype: str = "float32"
    gradient: bool = True

    @property
    def title(self) -> str:
        what = "info_nce" if self.gradient else "info_nce, loss alone"
        return f"{what}, M={self.rows:,} K={self.queue_length:,} D={self.features}, {self.dtype}"

    def inputs(self, device: torch.device) -> Rows:
        draw = normal_numbers(device)
        query = draw(self.rows, self.features)
        positive = query + draw(self.rows, self.features)
        queue = F.normalize(draw(self.queue_length, self.features), dim=1)
        query.requires_grad_(self.gradient)
        return Rows(query, positive, queue.to(getattr(torch, self.dtype)))

    def candidate(self, name: str, inputs: Rows) -> Candidate:
        function, (query, positive, queue) = self._function(name, inputs), inputs
        if "autocast" not in name and name.startswith(("eager", "torch.compile")):
            queue = queue.float()

        def results() -> Results:
            with tf32_products(name == "eager TF32"), torch.set_grad_enabled(self.gradient):
                loss = function(query, positive, queue)
                if not self.gradient or name == "ours, before backward":
                    return (loss.detach(),)
                return loss.detach(), *torch.autograd.grad(loss, query)

        return Candidate(results, results)

    def _function(self, name: str, inputs: Rows) -> Loss:
        if self.dtype == "float32" and ("autocast" in name or name == "cuDNN attention"):
            raise NotAvailable("16-bit queues only")
        if name == "cuDNN attention" and not inputs.queue.is_cuda:
            raise NotAvailable("on a GPU only")
        if name == "lightly":
            return lightly_loss(inputs.queue.float())
        if name.endswith("attention"):
            return attention_formulation(flash_attention if "flash" in name else cudnn_attention)
        if name.startswith("ours"):
            return ops.info_nce
        eager = eager_autocast if "autocast" in name else reference.info_nce
        return compiled(eager) if name.startswith("torch.compile") else eager

    def expected(self, inputs: Rows) -> Results:
        return in_chunks(inputs)[: 2 if self.gradient else 1]

    def check(self, name: str, got: Results, expected: Results) -> dict[str, float]:
        errors = {"loss": float((got[0].double() - expected[0].double()).abs())}
        if self.gradient and len(got) > 1:
            # The gradient is a difference of two terms of this size; with D = 1 nothing is left.
            terms = self.features**-0.5 / (TEMPERATURE * self.rows**0.5)
            errors["gradient"] = relative(got[1], expected[1], floor=terms)
        return within(errors, 1e-4 if self.dtype == "float32" else 2e-2, name)

    @property
    def work(self) -> float:
        return (4.0 if self.gradient else 2.0) * self.rows * self.queue_length * self.features

    @property
    def eager_bytes(self) -> float:
        """About four matrices of logits."""
        return 4.2 * 4.0 * self.rows * (self.queue_length + 1)


def in_chunks(inputs: Rows, logits: int = 2**28) -> Results:
    """The published formula in float32, few enough rows at a time for the logits to fit."""
    queue, count = inputs.queue.float(), len(inputs.query)
    chunk = max(1, logits // len(queue))
    loss, gradients = 0.0, []
    for query, positive in zip(
        inputs.query.detach().split(chunk), inputs.positive.split(chunk), strict=True
    ):
        query.requires_grad_()
        part = reference.info_nce(query, positive, queue, reduction="sum")
        gradients.append(torch.autograd.grad(part, query)[0] / count)
        loss = loss + part.detach().double() / count
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
    if importlib.util.find_spec("lightly") is None:
        raise NotAvailable("lightly is not installed")
    from lightly.loss import NTXentLoss

    module = NTXentLoss(temperature=TEMPERATURE, memory_bank_size=tuple(queue.shape))
    module.memory_bank.bank = queue.clone()

    def loss(query: Tensor, positive: Tensor, _: Tensor) -> Tensor:
        return module(query, positive)

    return loss
