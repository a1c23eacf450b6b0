"""The reference against numbers worked out by hand, so that the truth of the other tests is one."""

from __future__ import annotations

import math

import pytest
import torch

from densecl_ext import reference

DOUBLE = torch.float64


def tensor(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=DOUBLE)


def test_info_nce_of_one_row() -> None:
    """Logits 0.6 / 0.5, 0 / 0.5, 1 / 0.5: written out."""
    query, positive = tensor([[1.0, 0.0]]), tensor([[0.6, 0.8]])
    queue = tensor([[0.0, 1.0], [1.0, 0.0]])
    loss = reference.info_nce(query, positive, queue, temperature=0.5)
    assert loss.item() == pytest.approx(math.log(math.exp(1.2) + 1.0 + math.exp(2.0)) - 1.2)


def test_info_nce_scales_query_and_positive_but_not_the_queue() -> None:
    query, positive, queue = tensor([[5.0, 0.0]]), tensor([[3.0, 4.0]]), tensor([[3.0, 0.0]])
    loss = reference.info_nce(query, positive, queue, temperature=1.0)
    assert loss.item() == pytest.approx(math.log(math.exp(0.6) + math.exp(3.0)) - 0.6)
    raw = reference.info_nce(query, positive, queue, temperature=1.0, normalize=False)
    assert raw.item() == pytest.approx(math.log(math.exp(15.0) + math.exp(15.0)) - 15.0)


def test_info_nce_gradient_by_hand() -> None:
    """dl/dq = (sum_j w_j n_j - (1 - w_+) p) / T, dl/dp = -(1 - w_+) q / T."""
    query = tensor([[1.0, 0.0]]).requires_grad_()
    positive = tensor([[0.6, 0.8]]).requires_grad_()
    queue = tensor([[0.0, 1.0], [1.0, 0.0]])
    reference.info_nce(query, positive, queue, temperature=0.5, normalize=False).backward()
    total = math.exp(1.2) + 1.0 + math.exp(2.0)
    own, first, second = math.exp(1.2) / total, 1.0 / total, math.exp(2.0) / total
    expected = tensor([[(second - (1 - own) * 0.6) / 0.5, (first - (1 - own) * 0.8) / 0.5]])
    torch.testing.assert_close(query.grad, expected)
    torch.testing.assert_close(positive.grad, tensor([[-(1 - own) / 0.5, 0.0]]))


def test_info_nce_gradient_goes_through_the_scaling() -> None:
    """Length 2: the part across the row, halved."""
    query = tensor([[2.0, 0.0]]).requires_grad_()
    positive, queue = tensor([[0.6, 0.8]]), tensor([[0.0, 1.0], [1.0, 0.0]])
    reference.info_nce(query, positive, queue, temperature=0.5).backward()
    total = math.exp(1.2) + 1.0 + math.exp(2.0)
    across = (1.0 / total - (1 - math.exp(1.2) / total) * 0.8) / 0.5
    torch.testing.assert_close(query.grad, tensor([[0.0, across / 2.0]]))


def test_filled_row_weight_and_reductions() -> None:
    query, positive = tensor([[1.0, 0.0], [0.0, 1.0]]), tensor([[1.0, 0.0], [1.0, 0.0]])
    queue = tensor([[0.0, 1.0], [math.nan, 7.0]])
    losses = [math.log(math.e + 1.0) - 1.0, math.log(1.0 + math.e)]

    def info_nce(**options: object) -> torch.Tensor:
        return reference.info_nce(query, positive, queue, temperature=1.0, filled=1, **options)

    torch.testing.assert_close(info_nce(reduction="none"), tensor(losses))
    assert info_nce(reduction="sum").item() == pytest.approx(sum(losses))
    assert info_nce().item() == pytest.approx(sum(losses) / 2)
    weight = tensor([1.0, 3.0])
    assert info_nce(row_weight=weight).item() == pytest.approx((losses[0] + 3 * losses[1]) / 4)
    torch.testing.assert_close(
        info_nce(row_weight=weight, reduction="none"), tensor([losses[0], 3 * losses[1]])
    )
    assert info_nce(row_weight=tensor([0.0, 0.0])).item() == 0.0
    none = reference.info_nce(query, positive, queue, filled=0, reduction="none")
    assert not none.any()


def test_a_zero_row_has_a_loss_and_no_gradient() -> None:
    query = torch.zeros(1, 2, dtype=DOUBLE, requires_grad=True)
    loss = reference.info_nce(query, tensor([[1.0, 0.0]]), tensor([[1.0, 0.0], [0.0, 1.0]]))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(3.0))
    assert not query.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_queue_rounds_the_operands(dtype: torch.dtype) -> None:
    """0.1 is not a 16-bit number; the gradient passes through the rounding."""
    query, positive = tensor([[0.1]]).requires_grad_(), tensor([[1.0]])
    queue = torch.tensor([[3.0]], dtype=dtype)
    loss = reference.info_nce(query, positive, queue, temperature=1.0, normalize=False)
    rounded = torch.tensor(0.1, dtype=dtype).item()
    assert abs(rounded - 0.1) > 1e-5
    assert loss.item() == pytest.approx(math.log(1.0 + math.exp(2.0 * rounded)), rel=1e-12)
    loss.backward()
    share = 1.0 / (1.0 + math.exp(-2.0 * rounded))
    assert query.grad.item() == pytest.approx(2.0 * share, rel=1e-12)


def test_dense_match_of_three_positions() -> None:
    """Directions 0, 40 and 90 degrees against 100, 45 and 10: lengths do not matter."""

    def grid(*polar: tuple[float, float]) -> torch.Tensor:
        points = [(r * math.cos(math.radians(a)), r * math.sin(math.radians(a))) for r, a in polar]
        return tensor(points).T.unsqueeze(0)  # (1, 2, S)

    query, key = grid((1, 0), (3, 40), (0.1, 90)), grid((100, 100), (1, 45), (0.2, 10))
    assert reference.dense_match(query, key).tolist() == [[2, 1, 0]]
    # Position 45 prefers 40 (5 degrees), not 60 (15); 100 prefers 90; nobody prefers 60.
    query = grid((1, 40), (1, 60), (1, 90))
    key = grid((1, 100), (1, 45))
    assert reference.dense_match(query, key).tolist() == [[1, 1, 0]]
    assert reference.dense_match(query, key, mutual=True).tolist() == [[1, -1, 0]]


def test_dense_info_nce_by_hand() -> None:
    """Two images of two positions each, in one dimension, where the sign is the direction."""
    query = tensor([[[2.0, -1.0]], [[1.0, 3.0]]])  # (2, 1, 2)
    key = tensor([[[5.0, -5.0]], [[-1.0, 1.0]]])
    match = torch.tensor([[0, 0], [-1, 1]])
    queue = tensor([[1.0]])
    losses = reference.dense_info_nce(query, key, match, queue, temperature=1.0, reduction="none")
    like, unlike = math.log(2 * math.e) - 1.0, math.log(2 * math.exp(-1.0)) + 1.0
    torch.testing.assert_close(losses, tensor([[like, unlike], [0.0, like]]))
    mean = reference.dense_info_nce(query, key, match, queue, temperature=1.0)
    assert mean.item() == pytest.approx((2 * like + unlike) / 3)
    weight = tensor([[1.0, 0.0], [100.0, 1.0]])
    mean = reference.dense_info_nce(query, key, match, queue, temperature=1.0, row_weight=weight)
    assert mean.item() == pytest.approx(like)


def test_ema_by_hand() -> None:
    target = tensor([1.0, 2.0])
    reference.ema_update_([target], [tensor([3.0, -2.0])], 0.75)
    assert target.tolist() == [1.5, 1.0]


def test_enqueue_by_hand() -> None:
    queue, pointer = torch.zeros(3, 2, dtype=DOUBLE), torch.tensor([2])
    filled = torch.tensor(1)
    reference.enqueue_(queue, pointer, tensor([[3.0, 4.0], [0.0, -2.0]]), filled=filled)
    torch.testing.assert_close(queue, tensor([[0.0, -1.0], [0.0, 0.0], [0.6, 0.8]]))
    assert pointer.item() == 1 and filled.item() == 3
    # Five keys into three rows: the last three remain, the pointer goes on from 1 to 6 mod 3.
    keys = tensor([[float(i), 0.0] for i in range(10, 15)])
    reference.enqueue_(queue, pointer, keys, filled=filled, normalize=False)
    assert queue[:, 0].tolist() == [12.0, 13.0, 14.0]
    assert pointer.item() == 0 and filled.item() == 3
