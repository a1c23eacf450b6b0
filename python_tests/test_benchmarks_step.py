"""The training step's benchmark: the published baseline computes what ours does."""

from __future__ import annotations

import argparse
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import benchmarks.__main__ as command
from benchmarks.step import StepCase, largest_batch, published_ops, tiny_backbone
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
    case = StepCase(8)
    assert case.check("ours", (torch.tensor(1.0),), ()) == {}
    with pytest.raises(AssertionError, match="ours: the loss is nan"):
        case.check("ours", (torch.tensor(math.nan),), ())


@pytest.mark.parametrize("capacity", [0, 15, 16, 250, 517, 1040, 3000])
@pytest.mark.parametrize("guess", [16, 512, 1111])
def test_largest_batch(capacity: int, guess: int) -> None:
    tried: list[int] = []

    def fits(batch: int) -> bool:
        assert batch not in tried and batch % 16 == 0 and batch > 0
        tried.append(batch)
        return batch <= capacity

    found = largest_batch(fits, guess, 16, 200)
    assert found == (capacity // 16 * 16 or None)
    tried.clear()
    few = largest_batch(fits, guess, 16, 4)
    assert len(tried) <= 4 and (few is None or few <= capacity)


def test_first_guess_follows_the_peaks() -> None:
    benchmarks = [
        {"extra_info": {"row": f"step-{n}", "candidates": {"ours": {"peak_bytes": 2e9 + 1e8 * n}}}}
        for n in (32, 256)
    ]
    found: dict[str, Any] = {"benchmarks": benchmarks}
    assert math.isclose(command.first_guess(found, "ours", 80e9), 740, abs_tol=1)
    assert command.first_guess(found, "reference", 80e9) == 512
    assert command.first_guess({"benchmarks": []}, "ours", 0.0) == 512


@pytest.mark.parametrize(
    ("answers", "batch", "reason"),
    [
        ({}, 512, None),
        ({"error": "failed: out of memory"}, None, None),
        ({"error": "failed: no answer within 45 s"}, None, "failed: no answer within 45 s"),
    ],
)
def test_the_largest_batch_is_bisected_and_a_fault_is_no_limit(
    answers: dict[str, Any], batch: int | None, reason: str | None, tmp_path: Path
) -> None:
    chosen = argparse.Namespace(suite="step", device="cpu", quick=True, k="", seconds=9.0,
                                variant=[], portable=[])  # fmt: skip
    run = command.Run(tmp_path, chosen)
    chosen.quick = False
    run.ask = lambda request, limit: answers  # type: ignore[method-assign]
    run._largest()
    found = run.results["largest"]["ours"]
    assert found.get("reason") == reason
    assert (found.get("batch") or 0) >= (batch or 0) and bool(found.get("batch")) == bool(batch)
    assert all(text == answers.get("error", "fits") for text in found["tries"].values())
