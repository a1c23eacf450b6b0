"""`incontext`: segmentation by nearest neighbours in a memory bank; nothing is trained.

As in Hummingbird (Balazevic et al. 2023, arXiv 2306.01667): a position's label is the average of
its nearest neighbours' labels, weighted by a softmax of cosine / T.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from densecl_ext.evaluate.dense import DenseData, RowOptions, Rows, Scorer, evaluate_dense
from densecl_ext.evaluate.options import require_at_least, require_positive
from densecl_ext.evaluate.report import Report

CHUNK = 512
"""Query positions at a time: their similarities to a bank of 16,384 take 32 MiB."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InContextOptions(RowOptions):
    """Nearest-neighbour segmentation of frozen features.

    Attributes:
        bank: size of the memory bank: it holds the first of the drawn training positions.
        neighbours: k.
        temperature: T of the softmax over the neighbours' cosine similarities.
    """

    bank: int = 16_384
    neighbours: int = 30
    temperature: float = 0.07

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "bank", "neighbours")
        require_positive(self, "temperature")


def incontext(
    backbone: nn.Module, options: InContextOptions, *, data: DenseData | None = None
) -> Report:
    """Segment by nearest neighbours among the training images' grid positions.

    Args:
        backbone: (N, 3, H, W) to (N, C, h, w), on the device where everything is computed; given
            back as it was.
        options: of the protocol.
        data: what :meth:`DenseData.load` read with the same options; None reads it.

    Returns:
        mIoU, pixel accuracy and frequency-weighted IoU over all pixels of the validation images.

    Raises:
        ValueError: data or options that do not fit.
    """
    data = data or DenseData.load(options)
    return evaluate_dense(backbone, data, [InContext(options)])["incontext"]


@dataclasses.dataclass(frozen=True)
class InContext:
    """In-context segmentation for :func:`evaluate_dense`."""

    options: InContextOptions
    name: str = "incontext"

    def fit(self, rows: Rows) -> tuple[Scorer, dict[str, Any]]:
        """Keep the bank."""
        options = self.options
        bank = F.normalize(rows.features[: options.bank], dim=1)  # (R, C)
        labels = rows.labels[: options.bank]  # (R, K)
        k = min(options.neighbours, len(bank))

        def scorer(features: Tensor) -> Tensor:
            n, _, h, w = features.shape
            query = F.normalize(features.permute(0, 2, 3, 1).flatten(0, 2), dim=1)
            scores = vote(query, bank, labels, k, options.temperature, options.precision)
            return scores.view(n, h, w, -1).permute(0, 3, 1, 2)

        stated = {
            "bank": len(bank),
            "neighbours": k,
            "temperature": options.temperature,
            "similarity": "cosine of standardised features",
        }
        return scorer, stated


@torch.no_grad()
def vote(
    query: Tensor,
    bank: Tensor,
    labels: Tensor,
    k: int,
    temperature: float,
    precision: str = "float32",
) -> Tensor:
    """Average the labels of the k nearest bank rows, weighted by softmax(cosine / T).

    Args:
        query: float32 (Q, C), unit rows.
        bank: float32 (R, C), unit rows.
        labels: float32 (R, K).
        k: at most R.
        temperature: T.
        precision: "bfloat16" finds the neighbours by products of bfloat16; weights stay float32.

    Returns:
        float32 (Q, K).
    """
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    keys = bank.to(dtype).T.contiguous()
    similarity = torch.empty(min(CHUNK, len(query)), len(bank), dtype=dtype, device=bank.device)
    out = []
    for part in query.split(CHUNK):
        near = torch.mm(part.to(dtype), keys, out=similarity[: len(part)])
        cosine, where = near.topk(k, dim=1)  # (q, k)
        if dtype != torch.float32:
            cosine = torch.einsum("qc,qkc->qk", part, bank[where])
        weight = F.softmax(cosine / temperature, dim=1)
        out.append(torch.einsum("qk,qkc->qc", weight, labels[where]))
    return torch.cat(out)
