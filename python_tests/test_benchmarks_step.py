"""The training step's benchmark: the published baseline computes what ours does."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch

from benchmarks.step import published_ops, step, tiny_backbone
from densecl_ext import DenseCL, ops


@pytest.mark.parametrize("loss_lambda", [0.5, 0.0])
def test_the_published_step_is_ours(loss_lambda: float) -> None:
    """Same weights, views and queues: losses, gradients, key encoder and queues agree."""
    ours_op = ops.enqueue_
    models = []
    views = [(torch.randn(8, 3, 32, 32), torch.randn(8, 3, 32, 32)) for _ in range(2)]
    for context in (nullcontext, published_ops):
        torch.manual_seed(0)
        model = DenseCL(
            tiny_backbone(), queue_length=12, queue_init="random", hidden_dim=16, dim=8,
            backbone_channels=32, loss_lambda=loss_lambda, key_bn_groups=1, momentum=0.9,
        )  # fmt: skip
        for view_q, view_k in views:  # the second batch of 8 wraps round a queue of 12
            model.zero_grad()
            with context():
                assert (ops.enqueue_ is ours_op) == (context is nullcontext)
                loss = model(view_q, view_k).loss
                loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.1 * parameter.grad
        models.append(model)
    assert ops.enqueue_ is ours_op
    ours, published = models
    for (name, a), b in zip(ours.named_parameters(), published.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n} {m}")
    for name in ("global_queue", "dense_queue"):
        one, other = getattr(ours, name), getattr(published, name)
        torch.testing.assert_close(one.keys, other.keys)
        assert int(one.pointer) == int(other.pointer)
    assert int(published.global_queue.pointer) == 4


def test_a_loss_that_is_not_finite_is_wrong() -> None:
    case = step(torch.device("cpu"), batch=1, size=8)
    assert case.check("ours", (torch.tensor(1.0),), ()) == {}
    with pytest.raises(AssertionError, match="ours: loss is not finite"):
        case.check("ours", (torch.tensor(math.nan),), ())
