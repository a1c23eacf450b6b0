"""The metrics that name the position shortcut: on a planted one, and where there is none."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tiny_models import TinyBackbone, crops, two_views
from torch import Tensor, nn

from densecl_ext import DenseCL
from densecl_ext.nn.health import match_metrics, position_metrics, vector_metrics

IMAGES, DIM, SIDE, QUEUE = 16, 32, 4, 64
POSITIONS = SIDE * SIDE


def unit(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator), dim=1)


def positions_alone() -> Tensor:
    """A dense head (N, D, 4, 4) that says where it is and nothing else."""
    return unit(1, DIM, SIDE, SIDE, seed=0).expand(IMAGES, -1, -1, -1)


def content_alone() -> Tensor:
    return unit(IMAGES, DIM, SIDE, SIDE, seed=1)


def own_position() -> Tensor:
    return torch.arange(POSITIONS).expand(IMAGES, -1)


def measured(grid: Tensor, match: Tensor, temperature: float = 0.2) -> dict[str, float]:
    queue = unit(QUEUE, DIM, seed=2)
    found = position_metrics(grid, grid, match, queue, torch.tensor(QUEUE), temperature)
    return {name: float(value) for name, value in found.items()}


def test_a_position_code_is_called_out() -> None:
    found = measured(positions_alone(), own_position())
    assert found["position_share"] == pytest.approx(1.0, abs=1e-5)
    # positive similarity 1, negatives of random directions: about ln(1 + K exp((0 - 1) / T))
    assert found["content_free_loss"] < math.log(1 + QUEUE * math.exp(-1 / 0.2 + 1.0))


def test_content_is_not_called_out() -> None:
    found = measured(content_alone(), own_position())
    # the mean over 16 images explains 1/16 of random vectors: that much is taken off
    assert found["position_share"] < 0.02
    # a mean of 16 random unit vectors has length 1/4: the same similarity with its key, no more
    assert found["content_free_loss"] > 2.5


def test_between_the_two_the_share_is_the_mixture() -> None:
    mixed = 0.7**0.5 * positions_alone() + 0.3**0.5 * content_alone()
    assert measured(mixed, own_position())["position_share"] == pytest.approx(0.7, abs=0.03)


def test_the_content_free_loss_is_the_formula() -> None:
    grid, match = content_alone(), torch.randint(-1, POSITIONS, (IMAGES, POSITIONS))
    queue = unit(QUEUE, DIM, seed=2).double()
    mean = grid.double().flatten(2).mean(dim=0)  # (D, S)
    query = F.normalize(mean, dim=0)
    total, count = 0.0, 0
    for position in range(POSITIONS):
        matches = match[:, position]
        matches = matches[matches >= 0]
        positive = mean[:, matches].mean(dim=1)
        logit = query[:, position] @ positive / 0.2
        negatives = queue @ query[:, position] / 0.2
        loss = torch.logsumexp(torch.cat([logit[None], negatives]), dim=0) - logit
        total, count = total + float(loss) * len(matches), count + len(matches)
    found = measured(grid, match)["content_free_loss"]
    assert found == pytest.approx(total / count, rel=1e-5)


def test_same_index_beside_its_geometric_share() -> None:
    match = own_position().clone()
    truth = match.clone()
    truth[:, : POSITIONS // 2] = -1  # half the positions are outside of the other view
    truth[:, POSITIONS - 4 :] = 0  # and four lie elsewhere
    size = torch.Size((SIDE, SIDE))
    found = {k: float(v) for k, v in match_metrics(match, truth, size, size).items()}
    assert found == {
        "matched": 1.0,
        "same_index": 1.0,
        "same_index_geometric": 0.5,
        "match_agreement": 0.5,
    }
    assert "same_index" not in match_metrics(match, truth, size, torch.Size((SIDE, SIDE + 1)))
    assert "match_agreement" not in match_metrics(truth, truth, size, size)


def test_ranks_and_ranking_of_the_vectors() -> None:
    query = torch.eye(8)
    found = {k: float(v) for k, v in vector_metrics(query, query).items()}
    assert found["top1"] == 1.0
    assert found["effective_rank"] == pytest.approx(7.0)  # centred, eight axes span seven
    assert found["negative_similarity"] == pytest.approx(0.0)
    # one direction and its opposite: rank 1; every key is somebody else's
    line = torch.cat([torch.ones(4, 3), -torch.ones(4, 3)])
    found = {k: float(v) for k, v in vector_metrics(line, -line).items()}
    assert found["effective_rank"] == pytest.approx(1.0)
    assert found["top1"] == 0.0 and found["positive_similarity"] == pytest.approx(-1.0)


class PositionCode(nn.Module):
    """A backbone (N, 3, H, W) -> (N, 12, H/8, W/8) that says where it is, whatever it sees."""

    out_channels = 12

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        height, width = (size // 8 for size in images.shape[2:])
        code = unit(1, 12, height, width, seed=5) * self.scale
        return code.expand(images.shape[0], -1, -1, -1)


@pytest.mark.parametrize("matching", ["backbone", "dense"])
def test_the_model_names_its_shortcut(matching: str) -> None:
    torch.manual_seed(0)
    settings = {"dim": 16, "hidden_dim": 16, "queue_length": 64, "matching": matching}
    views, boxes = two_views(8), {"crop_q": crops(8), "crop_k": crops(8, 1)}
    shortcut = DenseCL(PositionCode(), backbone_channels=12, **settings)  # type: ignore[arg-type]
    metrics = shortcut(*views, **boxes).metrics
    assert metrics["same_index"] == 1.0 and metrics["same_index_geometric"] < 0.5
    assert metrics["position_share"] > 0.99

    content = DenseCL(nn.Conv2d(3, 12, 8, stride=8), **settings)  # type: ignore[arg-type]
    metrics = content(*views, **boxes).metrics
    assert metrics["position_share"] < 0.2


def test_metrics_of_the_branches_that_run() -> None:
    def names(**settings: object) -> set[str]:
        model = DenseCL(TinyBackbone(), dim=8, hidden_dim=8, queue_length=16, **settings)  # type: ignore[arg-type]
        metrics = model(*two_views(4), crop_q=crops(4), crop_k=crops(4, 1)).metrics
        assert all(value.shape == () and not value.requires_grad for value in metrics.values())
        return set(metrics)

    always = {"loss_lambda", "queue_age", "queue_filled"}
    vectors = {"positive_similarity", "negative_similarity", "top1", "feature_std"}
    vectors.add("effective_rank")
    dense = {"matched", "same_index", "same_index_geometric", "match_agreement"}
    dense |= {"position_share", "content_free_loss"}
    assert names() == always | vectors | dense
    assert names(loss_lambda=0.0) == always | vectors
    assert names(loss_lambda=1.0) == always | dense
    assert names(matching="geometric") == always | vectors | dense - {"match_agreement"}
