from __future__ import annotations

import pytest
import torch
from torch import Tensor

from densecl_ext import reference
from densecl_ext.nn.losses import DenseCLLoss, InfoNCELoss
from densecl_ext.nn.queue import KeyQueue


def filled_queue(keys: int = 9, length: int = 20, dim: int = 6) -> KeyQueue:
    queue = KeyQueue(length, dim)
    queue.enqueue_(torch.randn(keys, dim))
    return queue


@pytest.fixture
def batch() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "query_global": torch.randn(4, 6, requires_grad=True),
        "key_global": torch.randn(4, 6),
        "query_dense": torch.randn(4, 6, 3, 3, requires_grad=True),
        "key_dense": torch.randn(4, 6, 3, 3),
        "query_features": torch.randn(4, 10, 3, 3),
        "key_features": torch.randn(4, 10, 3, 3),
    }


def test_info_nce_counts_only_the_keys_that_are_there(batch: dict[str, Tensor]) -> None:
    queue = filled_queue()
    query, key = batch["query_global"], batch["key_global"]
    loss = InfoNCELoss(0.1)(query, key, queue)
    expected = reference.info_nce(query, key, queue.keys[:9], temperature=0.1)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(InfoNCELoss(0.1)(query, key, queue.keys[:9]), expected)
    rows = InfoNCELoss(0.1, reduction="none")(query, key, queue)
    assert rows.shape == (4,)
    weight = torch.tensor([1.0, 0.0, 2.0, 0.5])
    weighted = InfoNCELoss(0.1)(query, key, queue, weight)
    torch.testing.assert_close(weighted, (rows * weight).sum() / weight.sum())


def test_info_nce_takes_unscaled_rows_when_asked(batch: dict[str, Tensor]) -> None:
    queue = filled_queue()
    query, key = 0.5 * batch["query_global"], batch["key_global"]
    loss = InfoNCELoss(normalize=False)(query, key, queue)
    expected = reference.info_nce(query, key, queue.keys[:9], normalize=False)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("weight", [0.3, torch.tensor(0.3)])
def test_sum_of_both_terms(batch: dict[str, Tensor], weight: float | Tensor) -> None:
    queues = filled_queue(), filled_queue(keys=30)
    fixed = isinstance(weight, float)
    criterion = DenseCLLoss(weight if fixed else 0.9, 0.2)
    out = criterion(
        *list(batch.values())[:4],
        *queues,
        query_features=batch["query_features"],
        key_features=batch["key_features"],
        loss_lambda=None if fixed else weight,
    )
    match = reference.dense_match(batch["query_features"], batch["key_features"])
    loss_global = reference.info_nce(
        batch["query_global"], batch["key_global"], queues[0].keys, filled=9
    )
    loss_dense = reference.dense_info_nce(
        batch["query_dense"], batch["key_dense"], match, queues[1].keys
    )
    torch.testing.assert_close(out.loss_global, loss_global)
    torch.testing.assert_close(out.loss_dense, loss_dense)
    torch.testing.assert_close(out.loss, 0.7 * loss_global + 0.3 * loss_dense)
    out.loss.backward()
    assert batch["query_global"].grad is not None and batch["query_dense"].grad is not None


def test_match_can_be_given(batch: dict[str, Tensor]) -> None:
    match = torch.full((4, 9), -1)
    match[:, 2] = 5
    queues = filled_queue(), filled_queue()
    criterion = DenseCLLoss()
    out = criterion(*list(batch.values())[:4], *queues, match=match)
    expected = reference.info_nce(
        batch["query_dense"].flatten(2)[:, :, 2],
        batch["key_dense"].flatten(2)[:, :, 5],
        queues[1].keys,
        filled=9,
    )
    torch.testing.assert_close(out.loss_dense, expected)


def test_mutual_matching_drops_positions(batch: dict[str, Tensor]) -> None:
    queues = filled_queue(), filled_queue()
    features = {k: v for k, v in batch.items() if k.endswith("features")}
    inputs = list(batch.values())[:4]
    out = DenseCLLoss(mutual=True)(*inputs, *queues, **features)
    match = reference.dense_match(*features.values(), mutual=True)
    assert (match < 0).any() and (match >= 0).any()
    torch.testing.assert_close(
        out.loss_dense, DenseCLLoss()(*inputs, *queues, match=match).loss_dense
    )


def test_a_term_without_weight_is_not_computed(batch: dict[str, Tensor]) -> None:
    queues = filled_queue(), filled_queue()
    query, key, query_dense, key_dense = list(batch.values())[:4]
    only_global = DenseCLLoss(0.0)(query, key, None, None, *queues)
    assert only_global.loss_dense == 0 and torch.equal(only_global.loss, only_global.loss_global)
    match = torch.zeros(4, 9, dtype=torch.int64)
    only_dense = DenseCLLoss(1.0)(None, None, query_dense, key_dense, *queues, match=match)
    assert only_dense.loss_global == 0 and torch.equal(only_dense.loss, only_dense.loss_dense)


def test_empty_queue_gives_zero_loss_and_gradient(batch: dict[str, Tensor]) -> None:
    empty = KeyQueue(20, 6), KeyQueue(20, 6)
    match = torch.zeros(4, 9, dtype=torch.int64)
    loss = DenseCLLoss()(*list(batch.values())[:4], *empty, match=match).loss
    loss.backward()
    assert loss == 0
    assert not batch["query_global"].grad.any() and not batch["query_dense"].grad.any()


def test_errors(batch: dict[str, Tensor]) -> None:
    for wrong in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="loss_lambda"):
            DenseCLLoss(wrong)
    for module in (DenseCLLoss, InfoNCELoss):
        with pytest.raises(ValueError, match="temperature"):
            module(temperature=0.0)
    with pytest.raises(ValueError, match="reduction"):
        InfoNCELoss(reduction="max")
    queues = filled_queue(), filled_queue()
    with pytest.raises(ValueError, match="query_features"):
        DenseCLLoss()(*list(batch.values())[:4], *queues)
    with pytest.raises(ValueError, match="query_dense"):
        DenseCLLoss()(
            batch["query_global"],
            batch["key_global"],
            None,
            None,
            *queues,
            match=torch.zeros(4, 9, dtype=torch.int64),
        )
    with pytest.raises(ValueError, match="loss_lambda"):
        DenseCLLoss()(*list(batch.values())[:4], *queues, loss_lambda=2.0)
