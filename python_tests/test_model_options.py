"""Options of the model beyond the paper: negatives, schedule of the matching, weights, symmetry."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_models import TinyBackbone, crops, two_views
from torch import Tensor, nn

from densecl_ext import DenseCL, dense_info_nce, info_nce
from densecl_ext.nn.matching import (
    feature_match,
    geometric_match,
    overlap_weight,
    similarity_weight,
)

IMAGES = 6


def build(**settings: object) -> DenseCL:
    torch.manual_seed(0)
    defaults = {"dim": 8, "hidden_dim": 16, "queue_length": 24, "key_bn_groups": 1}
    return DenseCL(TinyBackbone(), **{**defaults, **settings})  # type: ignore[arg-type]


def batch(seed: int = 0) -> dict[str, Tensor]:
    view_q, view_k = two_views(IMAGES, seed=seed)
    return {
        "view_q": view_q,
        "view_k": view_k,
        "crop_q": crops(IMAGES, seed),
        "crop_k": crops(IMAGES, seed + 50),
    }


def matches_of(model: DenseCL, **inputs: Tensor) -> list[Tensor]:
    seen: list[Tensor] = []
    handle = model.criterion.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["match"]), with_kwargs=True
    )
    model(**inputs)
    handle.remove()
    return seen


@pytest.mark.parametrize("count", [1, 3])
def test_single_positions_enter_the_queue(count: int) -> None:
    model = build(dense_negatives="position", positions_per_image=count)
    inputs = batch()
    keys: list[Tensor] = []
    model.momentum_encoder.register_forward_hook(lambda _, args, out: keys.append(out.grid))
    model(**inputs)
    assert int(model.dense_queue.filled) == IMAGES * count
    assert int(model.global_queue.filled) == IMAGES
    positions = F.normalize(keys[0].flatten(2), dim=1)  # (N, D, S)
    stored = model.dense_queue.keys[: IMAGES * count].reshape(IMAGES, count, -1)
    for image in range(IMAGES):
        similarity = stored[image] @ positions[image]  # (n, S)
        torch.testing.assert_close(similarity.amax(dim=1), torch.ones(count))
    # drawn anew for every image: not one position for all
    where = (stored @ positions).argmax(dim=2)
    assert len(where.unique()) > 1


def test_pooled_negatives_stay_the_papers() -> None:
    model = build()
    keys: list[Tensor] = []
    model.momentum_encoder.register_forward_hook(lambda _, args, out: keys.append(out.grid))
    model(**batch())
    expected = F.normalize(keys[0].mean(dim=(2, 3)), dim=1)
    torch.testing.assert_close(model.dense_queue.keys[:IMAGES], expected)


def test_geometric_steps_come_first() -> None:
    model = build(matching="backbone", geometric_steps=2)
    for step in range(4):
        inputs = batch(step)
        with torch.no_grad():
            before = copy.deepcopy(model)
            before.momentum_encoder.update_(
                type(before.momentum_encoder.module)(before.backbone, before.neck)
            )
            query = before.neck(before.backbone(inputs["view_q"]))
            key = before.momentum_encoder(inputs["view_k"])
        geometric = geometric_match(inputs["crop_q"], inputs["crop_k"], query.grid.shape[2:])
        expected = geometric if step < 2 else feature_match(query.features, key.features)
        assert torch.equal(matches_of(model, **inputs)[0], expected), step


@pytest.mark.parametrize("row_weight", ["overlap", "similarity"])
def test_row_weights_reach_the_loss(row_weight: str) -> None:
    model = build(row_weight=row_weight, matching="geometric", queue_init="random", momentum=1.0)
    inputs = batch()
    query = model.neck(model.backbone(inputs["view_q"]))
    key = model.momentum_encoder(inputs["view_k"])
    boxes, size = (inputs["crop_q"], inputs["crop_k"]), query.grid.shape[2:]
    match = geometric_match(*boxes, size)
    weight = (
        overlap_weight(*boxes, match, size)
        if row_weight == "overlap"
        else similarity_weight(query.features, key.features, match)
    )
    expected = dense_info_nce(
        query.grid, key.grid, match, model.dense_queue.keys.clone(), row_weight=weight
    )
    torch.testing.assert_close(model(**inputs).loss_dense, expected)


def test_a_temperature_of_its_own_for_the_dense_loss() -> None:
    model = build(dense_temperature=0.5, queue_init="random", momentum=1.0)
    inputs = batch()
    query = model.neck(model.backbone(inputs["view_q"]))
    key = model.momentum_encoder(inputs["view_k"])
    match = feature_match(query.features, key.features)
    queues = model.global_queue.keys.clone(), model.dense_queue.keys.clone()
    out = model(**inputs)
    torch.testing.assert_close(out.loss_global, info_nce(query.vector, key.vector, queues[0]))
    dense = dense_info_nce(query.grid, key.grid, match, queues[1], temperature=0.5)
    torch.testing.assert_close(out.loss_dense, dense)


def test_symmetric_is_the_mean_of_both_directions() -> None:
    settings = {"queue_init": "random", "matching": "geometric", "momentum": 1.0}
    both, one = build(symmetric=True, **settings), build(**settings)
    other = copy.deepcopy(one)
    inputs = batch()
    turned = {
        "view_q": inputs["view_k"],
        "view_k": inputs["view_q"],
        "crop_q": inputs["crop_k"],
        "crop_k": inputs["crop_q"],
    }
    out, first, second = both(**inputs), one(**inputs), other(**turned)
    torch.testing.assert_close(out.loss, (first.loss + second.loss) / 2)
    # the keys of both views enter the queue, in this order
    for queue in ("global_queue", "dense_queue"):
        kept = getattr(both, queue).keys[: 2 * IMAGES]
        expected = [getattr(model, queue).keys[:IMAGES] for model in (one, other)]
        torch.testing.assert_close(kept, torch.cat(expected))


def test_the_predictor_stands_on_the_query_side_alone() -> None:
    model = build(predictor_dim=32, queue_init="random")
    assert not [n for n, _ in model.momentum_encoder.named_parameters() if "predictor" in n]
    calls: list[nn.Module] = []
    assert model.predictor is not None
    model.predictor.register_forward_hook(lambda module, args, out: calls.append(module))
    out = model(**batch())
    out.loss.backward()
    assert len(calls) == 1
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.predictor.parameters())
    none_for_the_grid = build(predictor_dim=32, loss_lambda=0.0).predictor
    assert none_for_the_grid is not None and none_for_the_grid.dense_predictor is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dense_negatives": "mean"}, "dense_negatives must be one of"),
        ({"positions_per_image": 0}, "positions_per_image must be at least 1, got 0"),
        ({"geometric_steps": -1}, "geometric_steps must be at least 0, got -1"),
        ({"row_weight": "area"}, "row_weight must be one of"),
        ({"dense_temperature": 0.0}, "temperature must be positive"),
        ({"mutual_matching": True, "matching": "random"}, "mutual_matching needs matching"),
    ],
)
def test_options_out_of_range(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**settings)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"matching": "geometric"}, "matching 'geometric'"),
        ({"geometric_steps": 5}, "geometric_steps"),
        ({"row_weight": "overlap"}, "row_weight 'overlap'"),
    ],
)
def test_options_that_need_crops_say_so(settings: dict[str, object], name: str) -> None:
    views = two_views(IMAGES)
    with pytest.raises(ValueError, match=f"{name} needs crop_q and crop_k"):
        build(**settings)(*views)
