"""Metrics that show what a run learns: 0-d float32 tensors on the device, never read here.

The position shortcut, which they are made to name: zero padding tells a convolution where it is, so
features can hold the grid position instead of the content. Matching by such features pairs equal
grid positions, and keys pooled over the grid hold no position, so a vector that says nothing but
where it is meets a perfect positive and no negative: the loss falls and nothing is learned.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from densecl_ext import ops


@torch.no_grad()
def vector_metrics(query: Tensor, key: Tensor) -> dict[str, Tensor]:
    """Similarities, spread and rank of the global vectors query (N, D) and key (N, D)."""
    images, dim = query.shape
    query = F.normalize(query.float(), dim=1)
    key = F.normalize(key.float(), dim=1)
    similarity = query @ key.T  # (N, N)
    positive = similarity.diagonal()
    centred = query - query.mean(dim=0)
    gram = centred @ centred.T  # (N, N), with the eigenvalues of the covariance
    others = similarity.sum() - positive.sum()
    return {
        "positive_similarity": positive.mean(),
        "negative_similarity": others / max(1, images * (images - 1)),
        "top1": (positive >= similarity.amax(dim=1)).float().mean(),
        "feature_std": centred.square().mean(dim=0).sqrt().mean() * dim**0.5,
        "effective_rank": gram.trace().square() / gram.square().sum().clamp(min=1e-12),
    }


@torch.no_grad()
def match_metrics(
    match: Tensor, truth: Tensor | None, query_grid: torch.Size, key_grid: torch.Size
) -> dict[str, Tensor]:
    """What the matches (N, prod(Sq)) look like, beside the geometric ones where crops are known.

    Args:
        match: the match that the loss uses.
        truth: the geometric match; the same tensor where the loss uses that.
        query_grid: sizes of the query grid.
        key_grid: sizes of the key grid.
    """
    metrics = {"matched": (match >= 0).float().mean()}
    if query_grid == key_grid:
        same = torch.arange(match.shape[1], device=match.device)
        metrics["same_index"] = _share(match == same, match >= 0)
        if truth is not None:
            metrics["same_index_geometric"] = _share(truth == same, truth >= 0)
    if truth is not None and truth is not match:
        metrics["match_agreement"] = _share(match == truth, truth >= 0)
    return metrics


@torch.no_grad()
def position_metrics(
    query_grid: Tensor,
    key_grid: Tensor,
    match: Tensor,
    queue: Tensor,
    filled: Tensor | None,
    temperature: float | Tensor,
) -> dict[str, Tensor]:
    """How much of the dense head's output (N, D, *Sq) is its grid position.

    ``position_share``: share of the unit vectors' variance that the position explains, 0 to 1,
    without the part that the mean over N images has by chance. ``content_free_loss``: the dense
    loss that the position means alone would have: every vector replaced by the mean of its
    position over the batch, against the same negatives. It lies near the loss's own value where
    position is all that was learned, and far above it where content was.
    """
    query = F.normalize(query_grid.float().flatten(2), dim=1)  # (N, D, Sq)
    key = F.normalize(key_grid.float().flatten(2), dim=1)  # (N, D, Sk)
    images, dim, positions = query.shape
    mean = query.mean(dim=0)  # (D, Sq), what a position looks like whatever the image
    total = (query - query.mean(dim=(0, 2), keepdim=True)).square().sum(dim=1).mean()
    within = (query - mean).square().sum(dim=1).mean()
    by_chance = within / max(1, images - 1)
    between = (total - within - by_chance).clamp(min=0.0)

    known = match >= 0  # (N, Sq)
    index = match.clamp(min=0).unsqueeze(1).expand(-1, dim, -1)
    key_mean = key.mean(dim=0, keepdim=True).expand(images, -1, -1)  # (N, D, Sk), a view
    positive = (key_mean.gather(2, index) * known.unsqueeze(1)).sum(dim=0)  # (D, Sq)
    count = known.sum(dim=0).float()  # (Sq,)
    loss = ops.info_nce(
        F.normalize(mean, dim=0).T,
        (positive / count.clamp(min=1.0)).T,
        queue,
        temperature=temperature,
        normalize=False,
        filled=filled,
        row_weight=count,
    )
    return {
        "position_share": between / total.clamp(min=1e-12),
        "content_free_loss": loss.float(),
    }


def _share(chosen: Tensor, among: Tensor) -> Tensor:
    """Share of the positions ``among`` that are ``chosen`` too; 0 where there is none."""
    return (chosen & among).float().sum() / among.float().sum().clamp(min=1.0)
