"""The loss: published formula, torch.compile, attention kernels, lightly, and ours."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Candidate, Case, NotAvailable, Results, compiled, relative, within
from densecl_ext import ops, reference

TEMPERATURE = 0.2
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Rows:
    """Arguments of the loss."""

    query: Tensor  # (M, D) float32, requires grad where the gradient is wanted
    positive: Tensor  # (M, D) float32
    queue: Tensor  # (K, D) in the case's dtype


@dataclass(frozen=True)
class InfoNceCase(Case):
    """info_nce of M rows against K negatives, as in training: a gradient for the query alone."""

    names = ("ours", "eager", "eager autocast", "torch.compile", "flash attention", "lightly")
    rows: int
    queue_length: int
    features: int = 128
    dtype: str = "float32"
    gradient: bool = True

    def inputs(self, device: torch.device) -> Rows:
        generator = torch.Generator().manual_seed(0)

        def draw(count: int) -> Tensor:
            return torch.randn(count, self.features, generator=generator)

        query = draw(self.rows)
        positive = query + draw(self.rows)
        queue = F.normalize(draw(self.queue_length), dim=1).to(device, getattr(torch, self.dtype))
        query = query.to(device).requires_grad_(self.gradient)
        return Rows(query, positive.to(device), queue)

    def candidate(self, name: str, inputs: Rows) -> Candidate:
        function, queue = self._function(name, inputs)
        query, positive = inputs.query, inputs.positive

        def results() -> Results:
            if not self.gradient:
                with torch.no_grad():
                    return (function(query, positive, queue),)
            query.grad = None
            loss = function(query, positive, queue)
            loss.backward()
            assert query.grad is not None
            return loss.detach(), query.grad

        return Candidate(results, results)

    def _function(self, name: str, inputs: Rows) -> tuple[Loss, Tensor]:
        """The candidate's loss and the queue that it is given, in its preferred dtype."""
        if name == "ours":
            return ops.info_nce, inputs.queue
        if name == "eager":
            return reference.info_nce, inputs.queue.float()
        if name == "eager autocast":
            if self.dtype == "float32":
                raise NotAvailable("16-bit queues only")
            return eager_autocast, inputs.queue
        if name == "torch.compile":
            return compiled(reference.info_nce), inputs.queue.float()
        if name == "flash attention":
            return attention_formulation, inputs.queue
        return lightly_loss(inputs.queue.float()), inputs.queue

    def expected(self, inputs: Rows) -> Results:
        if self.eager_bytes <= 2e9:
            return self.candidate("eager", inputs).results()
        # Too large for eager; the attention formulation in float32 was held against it at the
        # sizes that are not.
        exact = replace(inputs, queue=inputs.queue.float())
        return self.candidate("flash attention", exact).results()

    def check(self, name: str, got: Results, expected: Results) -> dict[str, float]:
        errors = {"loss": float((got[0].double() - expected[0].double()).abs())}
        if self.gradient:
            # The gradient is a difference of two terms of this size; with D = 1 nothing is left.
            terms = self.features**-0.5 / (TEMPERATURE * self.rows**0.5)
            errors["gradient"] = relative(got[1], expected[1], floor=terms)
        return within(errors, 1e-4 if self.dtype == "float32" else 2e-2, name)

    def shrunk(self) -> InfoNceCase:
        return replace(self, rows=48, queue_length=512)

    @property
    def work(self) -> float:
        return (4.0 if self.gradient else 2.0) * self.rows * self.queue_length * self.features

    @property
    def eager_bytes(self) -> float:
        """What the published formula holds at its peak: about four matrices of logits."""
        return 4.2 * 4.0 * self.rows * (self.queue_length + 1)


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
    def forward(ctx: Any, query: Tensor, positive: Tensor, queue: Tensor) -> Tensor:
        output, lse = attention(query.to(queue.dtype), queue)  # (M, D), (M,)
        positive_logit = (query * positive).sum(dim=1) / TEMPERATURE  # (M,)
        total = torch.logaddexp(lse, positive_logit)  # (M,)
        weight = (lse - total).exp().unsqueeze(1)
        ctx.gradient = weight * (output.float() - positive) / (TEMPERATURE * len(query))
        return (total - positive_logit).mean()

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad[0] * ctx.gradient, None, None


def attention_formulation(query: Tensor, positive: Tensor, queue: Tensor) -> Tensor:
    """The fastest that PyTorch alone can do: its fused attention kernels."""
    return AttentionLoss.apply(F.normalize(query, dim=1), F.normalize(positive, dim=1), queue)


def attention(query: Tensor, queue: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(q n / T) n and its log-sum-exp: (M, D), (M,)."""
    rows, keys = query[None, None], queue[None, None]  # (1, 1, M, D), (1, 1, K, D)
    aten, scale = torch.ops.aten, 1.0 / TEMPERATURE
    if query.device.type == "cpu":
        flash = aten._scaled_dot_product_flash_attention_for_cpu
        output, lse = flash(rows, keys, keys, scale=scale)
    elif query.dtype == torch.float32:
        efficient = aten._scaled_dot_product_efficient_attention
        output, lse = efficient(rows, keys, keys, None, True, scale=scale)[:2]
    else:
        output, lse = aten._scaled_dot_product_flash_attention(rows, keys, keys, scale=scale)[:2]
    return output[0, 0], lse[0, 0, : query.shape[0]]


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
