from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from densecl_ext import ops, reference
from densecl_ext.nn.queue import KeyQueue


@pytest.mark.parametrize("batch", [1, 3, 7, 10, 25])
def test_holds_the_last_keys_in_ring_order(batch: int) -> None:
    torch.manual_seed(0)
    queue = KeyQueue(10, 4)
    rows: list[torch.Tensor] = [torch.zeros(4)] * 10
    written = 0
    for _ in range(4):
        keys = 3.0 * torch.randn(batch, 4)
        queue.enqueue_(keys)
        for key in keys:
            rows[written % 10] = F.normalize(key, dim=0)
            written += 1
        assert int(queue.filled) == min(10, written)
        assert int(queue.pointer) == written % 10
        torch.testing.assert_close(queue.keys, torch.stack(rows))


def test_starts_empty_or_full_of_random_directions() -> None:
    empty = KeyQueue(6, 4)
    assert int(empty.filled) == 0 and len(empty) == 6
    random = KeyQueue(600, 16, init="random")
    assert int(random.filled) == 600 and int(random.pointer) == 0
    torch.testing.assert_close(random.keys.norm(dim=1), torch.ones(600))
    assert random.keys.mean(dim=0).norm() < 0.1  # no preferred direction


def test_state_dict_continues_the_ring() -> None:
    first, second = KeyQueue(5, 3), KeyQueue(5, 3)
    first.enqueue_(torch.randn(7, 3))
    assert set(first.state_dict()) == {"keys", "pointer", "filled"}
    second.load_state_dict(first.state_dict())
    more = torch.randn(2, 3)
    first.enqueue_(more)
    second.enqueue_(more)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])


def test_bfloat16_keys() -> None:
    queue = KeyQueue(8, 4, torch.bfloat16)
    keys = torch.randn(3, 4, requires_grad=True)
    queue.enqueue_(keys)
    assert queue.keys.dtype == torch.bfloat16 and not queue.keys.requires_grad
    assert torch.equal(queue.keys[:3], F.normalize(keys.detach(), dim=1).bfloat16())
    assert "bfloat16" in repr(queue)


def test_errors() -> None:
    with pytest.raises(ValueError, match="length and dim"):
        KeyQueue(0, 4)
    with pytest.raises(TypeError, match="float64"):
        KeyQueue(4, 4, torch.float64)
    with pytest.raises(ValueError, match="'full'"):
        KeyQueue(4, 4, init="full")
    with pytest.raises(ValueError, match="keys"):
        KeyQueue(4, 4).enqueue_(torch.randn(2, 2, 4))


def test_losses_take_the_queue_itself() -> None:
    """Forgetting `filled` would count rows that hold no key."""
    torch.manual_seed(0)
    queue, dense_queue = KeyQueue(16, 8), KeyQueue(12, 8)
    queue.enqueue_(torch.randn(3, 8))
    dense_queue.enqueue_(torch.randn(4, 8))
    query, positive = torch.randn(2, 8), torch.randn(2, 8)
    grid, key, match = torch.randn(2, 8, 5), torch.randn(2, 8, 4), torch.zeros(2, 5).long()
    for module in (ops, reference):
        expected = module.info_nce(query, positive, queue.keys[:3])
        dense = module.dense_info_nce(grid, key, match, dense_queue.keys[:4])
        torch.testing.assert_close(module.info_nce(query, positive, queue), expected)
        torch.testing.assert_close(module.dense_info_nce(grid, key, match, dense_queue), dense)
        both = module.joint_info_nce(query, positive, queue, grid, key, match, dense_queue)
        torch.testing.assert_close(both, (expected, dense))
    assert not torch.allclose(ops.info_nce(query, positive, queue.keys), expected)
    for filled in (2, queue.filled):
        with pytest.raises(ValueError, match="info_nce: filled must be None with a KeyQueue"):
            ops.info_nce(query, positive, queue, filled=filled)
    compiled = torch.compile(ops.info_nce, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(query, positive, queue), ops.info_nce(query, positive, queue)
    )
    torch._dynamo.reset()
