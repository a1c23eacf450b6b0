"""enqueue_ against a loop over keys: every wrap-round, types, strides, autograd's books."""

from __future__ import annotations

import math

import pytest
import torch
from op_cases import QUEUE_DTYPES, device, on_each_device, randn, unit  # noqa: F401
from torch import Tensor

from densecl_ext import ops, reference


def _expected(queue: Tensor, pointer: int, keys: Tensor, normalize: bool) -> tuple[Tensor, int]:
    """One key after the other, as the contract says it."""
    where, queue = queue.device, queue.cpu().clone()
    rows = keys.double().cpu()
    if normalize:
        rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
    for row in rows:
        queue[pointer] = row.to(queue.dtype)
        pointer = (pointer + 1) % len(queue)
    return queue.to(where), pointer


@on_each_device
@pytest.mark.parametrize("length", [1, 2, 7, 64])
def test_every_pointer_and_batch(length: int) -> None:
    """B from 0 past 2 K: divisors and others, equal, larger; several steps in a row."""
    for pointer in sorted({0, 1 % length, length // 2, length - 1}):
        for batch in sorted({0, 1, 3, length - 1, length, length + 1, 2 * length + 3, 150}):
            queue = randn(length, 5)
            at, filled = torch.tensor([pointer]), torch.tensor([min(2, length)])
            expected, expected_at = queue.clone(), pointer
            for step in range(3):
                keys = randn(batch, 5, seed=10 + step)
                expected, expected_at = _expected(expected, expected_at, keys, True)
                assert ops.enqueue_(queue, at, keys, filled=filled) is None
                torch.testing.assert_close(queue, expected, atol=1e-7, rtol=1e-6)
                assert at.tolist() == [expected_at]
                assert filled.item() == min(length, min(2, length) + (step + 1) * batch)


@on_each_device
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("key_dtype", QUEUE_DTYPES, ids=str)
@pytest.mark.parametrize("queue_dtype", QUEUE_DTYPES, ids=str)
def test_dtypes_and_the_reference(
    queue_dtype: torch.dtype, key_dtype: torch.dtype, normalize: bool
) -> None:
    queue, keys = randn(11, 33).to(queue_dtype), (3.0 * randn(7, 33, seed=1)).to(key_dtype)
    twin, at, twin_at = queue.clone(), torch.tensor([8]), torch.tensor([8])
    ops.enqueue_(queue, at, keys, normalize=normalize)
    # In float64, so that rounding to 16 bits happens once.
    reference.enqueue_(twin, twin_at, keys.double(), normalize=normalize)
    if queue_dtype == torch.float32:
        torch.testing.assert_close(queue, twin, atol=1e-7, rtol=1e-6)
    elif queue.is_cuda:  # sums in float32 may round the other way
        torch.testing.assert_close(queue, twin, atol=1e-6, rtol=2.0**-7)
    else:
        assert torch.equal(queue, twin)
    assert torch.equal(at, twin_at)
    assert queue.dtype == queue_dtype


@on_each_device
@pytest.mark.parametrize("queue_dtype", QUEUE_DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "features"), [(512, 128), (513, 128), (600, 120), (4000, 70)])
def test_many_keys(batch: int, features: int, queue_dtype: torch.dtype) -> None:
    """Around 65,536 numbers, above which a GPU's blocks must agree on the pointer."""
    length = batch + 11
    queue, filled = torch.zeros(length, features, dtype=queue_dtype), torch.tensor(3)
    at = torch.tensor([length - 5])
    for step in range(2):
        keys = randn(batch, features, seed=step)
        expected, expected_at = _expected(queue, int(at), keys, True)
        ops.enqueue_(queue, at, keys, filled=filled)
        torch.testing.assert_close(queue, expected)
        assert at.tolist() == [expected_at]
    assert filled.item() == length


@on_each_device
@pytest.mark.parametrize("features", [1, 3, 128, 1024])
def test_written_rows_have_unit_length(features: int) -> None:
    queue, keys = torch.zeros(70, features), 100.0 * randn(70, features)
    ops.enqueue_(queue, torch.zeros(1, dtype=torch.int64), keys)
    torch.testing.assert_close(
        queue.double().norm(dim=1), torch.ones(70).double(), atol=1e-6, rtol=0.0
    )
    torch.testing.assert_close(queue, unit(keys.double()).float())


@on_each_device
def test_a_zero_key_stays_zero_and_a_tiny_one_small() -> None:
    queue = torch.full((3, 4), 9.0)
    keys = torch.zeros(3, 4)
    keys[1, 2], keys[2, 0] = 1e-13, 1e-11
    ops.enqueue_(queue, torch.tensor([0]), keys)
    expected = torch.zeros(3, 4)
    expected[1, 2], expected[2, 0] = 0.1, 1.0
    torch.testing.assert_close(queue, expected)


@on_each_device
def test_bad_keys_stay_visible() -> None:
    """A NaN or infinite key is stored as NaN or so: the loss then shows it."""
    for bad in (math.nan, math.inf):
        queue, keys = torch.zeros(4, 3), torch.ones(2, 3)
        keys[1, 0] = bad
        ops.enqueue_(queue, torch.tensor([0]), keys)
        assert queue[1].isnan().any() and queue[0].isfinite().all() and not queue[2:].any()


@on_each_device
def test_keys_that_are_rows_of_the_queue() -> None:
    """Shifting a queue by itself reads every row before it is overwritten."""
    for start, pointer in ((0, 1), (2, 0), (0, 8), (3, 3)):
        queue = unit(randn(10, 6))
        expected, _ = _expected(queue, pointer, queue[start : start + 7].clone(), True)
        ops.enqueue_(queue, torch.tensor([pointer]), queue[start : start + 7])
        torch.testing.assert_close(queue, expected, atol=1e-6, rtol=1e-6)
    queue = unit(randn(130, 6))
    flipped = queue.clone()
    ops.enqueue_(queue, torch.tensor([1]), queue, normalize=False)
    assert torch.equal(queue, flipped.roll(1, 0))


@on_each_device
@pytest.mark.parametrize("queue_dtype", QUEUE_DTYPES, ids=str)
def test_strided_queue_and_keys(queue_dtype: torch.dtype) -> None:
    """A column slice of a wider buffer: its other columns stay as they are."""
    wide = torch.full((9, 20), 5.0, dtype=queue_dtype)
    queue = wide[1:8, 3:13:2]
    assert queue.shape == (7, 5) and not queue.is_contiguous()
    keys = randn(5, 4, seed=1).T.contiguous()[:, :].T  # (5, 4) -> transposed storage
    keys = torch.cat([keys, keys[:, :1]], dim=1).T.contiguous().T[:4]  # (4, 5)
    assert not keys.is_contiguous()
    expected, _ = _expected(queue.contiguous(), 5, keys, True)
    ops.enqueue_(queue, torch.tensor([5]), keys)
    torch.testing.assert_close(queue, expected)
    outside = torch.ones(9, 20, dtype=torch.bool)
    outside[1:8, 3:13:2] = False
    assert (wide[outside] == 5.0).all()


@on_each_device
def test_transposed_queue() -> None:
    storage = torch.zeros(5, 7)
    expected, _ = _expected(torch.zeros(7, 5), 6, randn(3, 5), True)
    ops.enqueue_(storage.T, torch.tensor([6]), randn(3, 5))
    torch.testing.assert_close(storage.T, expected)


@on_each_device
def test_expanded_keys() -> None:
    queue = torch.zeros(6, 4)
    ops.enqueue_(queue, torch.tensor([4]), torch.tensor([[0.0, 2.0, 0.0, 0.0]]).expand(4, 4))
    assert (queue[[4, 5, 0, 1], 1] == 1.0).all() and not queue[2:4].any()


@on_each_device
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_counters_of_one_element(shape: tuple[int, ...]) -> None:
    queue = torch.zeros(4, 2)
    pointer = torch.zeros(shape, dtype=torch.int64)
    filled = torch.zeros(shape, dtype=torch.int64)
    ops.enqueue_(queue, pointer, torch.ones(3, 2), filled=filled)
    assert pointer.item() == 3 and filled.item() == 3
    assert pointer.shape == shape


@on_each_device
def test_filled_saturates() -> None:
    queue, pointer, filled = torch.zeros(5, 2), torch.tensor([0]), torch.tensor(0)
    seen = []
    for _ in range(4):
        ops.enqueue_(queue, pointer, torch.ones(2, 2), filled=filled)
        seen.append((filled.item(), pointer.item()))
    assert seen == [(2, 2), (4, 4), (5, 1), (5, 3)]


@on_each_device
def test_version_counters_move() -> None:
    queue, pointer, filled = torch.zeros(5, 2), torch.tensor([0]), torch.tensor(0)
    keys = torch.ones(2, 2)
    ops.enqueue_(queue, pointer, keys, filled=filled)
    assert queue._version and pointer._version and filled._version and not keys._version


@on_each_device
def test_backward_refuses_an_overwritten_queue() -> None:
    """The reference saves the queue; the native loss has its gradient already and does not."""
    queue, query = unit(randn(6, 4)), randn(3, 4, seed=1).requires_grad_()
    positive = randn(3, 4, seed=2)
    eager = reference.info_nce(query, positive, queue)
    native = ops.info_nce(query, positive, queue)
    expected = torch.autograd.grad(ops.info_nce(query, positive, queue), query)[0]
    ops.enqueue_(queue, torch.tensor([0]), randn(2, 4, seed=3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        eager.backward()
    native.backward()
    assert torch.equal(query.grad, expected)


@on_each_device
def test_keys_with_a_graph_are_stored_without_it() -> None:
    queue, keys = torch.zeros(4, 2), torch.ones(2, 2, requires_grad=True)
    ops.enqueue_(queue, torch.tensor([0]), keys * 2.0)
    assert not queue.requires_grad and queue.grad_fn is None and queue[:2].any()


@on_each_device
def test_inference_tensors() -> None:
    with torch.inference_mode():
        queue, pointer = torch.zeros(4, 2), torch.tensor([3])
        ops.enqueue_(queue, pointer, torch.ones(2, 2), normalize=False)
        assert queue[:, 0].tolist() == [1.0, 0.0, 0.0, 1.0] and pointer.item() == 1


def test_an_expanded_queue_is_refused() -> None:
    """All its rows are one: it cannot hold different keys."""
    row = torch.zeros(1, 3)
    with pytest.raises((ValueError, RuntimeError), match="enqueue_"):
        ops.enqueue_(row.expand(4, 3), torch.tensor([0]), randn(2, 3))
    assert not row.any()
