"""What the model does with other processes: Shuffle-BN, the exchange, whole-graph compilation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("lightning")
if not dist.is_available():
    pytest.skip("torch was built without distributed", allow_module_level=True)

from rank_processes import run_ranks
from tiny_models import TinyBackbone, two_views
from torch import Tensor, nn

from densecl_ext import DenseCL
from densecl_ext.nn.batchnorm import ShuffleRoute, split_batch_norms
from densecl_ext.nn.distributed import KeyExchange, queue_checksum
from densecl_ext.train.launch import Ranks, launch

IMAGES = 8
OPTIONS = {"dim": 8, "hidden_dim": 16, "queue_length": 20, "queue_init": "random"}


def build(**settings: Any) -> DenseCL:
    torch.manual_seed(0)
    return DenseCL(TinyBackbone(), **{**OPTIONS, **settings})


def keys(model: DenseCL, view_k: Tensor) -> list[Tensor]:
    """Vector, grid and features; the permutation is drawn from seed 7."""
    torch.manual_seed(7)
    return list(model._key(view_k))


def shuffled(ranks: Ranks, wrong: bool) -> tuple[list[Tensor], list[Tensor]]:
    """This rank's keys, in both memory formats; `wrong` leaves the dense ones as they came."""
    model = build(key_bn="shuffle").train()
    view_k = two_views(IMAGES)[1].chunk(ranks.world)[ranks.rank]
    right = ShuffleRoute.send_back
    if wrong:  # as in an implementation that puts the global keys back and forgets the dense ones
        ShuffleRoute.send_back = lambda self, x: right(self, x) if x.dim() == 2 else x
    try:
        found = keys(model, view_k)
        other = keys(model, view_k.contiguous(memory_format=torch.channels_last))
    finally:
        ShuffleRoute.send_back = right
    return found, other


def expected(world: int) -> list[Tensor]:
    """The keys of one process that normalises the permuted batch in as many groups."""
    model = build(key_bn_groups=1).train()
    split_batch_norms(model.momentum_encoder.module, world)
    torch.manual_seed(7)
    order = torch.randperm(IMAGES)
    outputs = model.momentum_encoder(two_views(IMAGES)[1][order])
    return [output[order.argsort()] for output in outputs]


def shuffled_by_four() -> tuple[list[Tensor], list[Tensor]]:
    return shuffled(launch("cpu", timeout=60), False)


def all_of_two() -> dict[str, Any]:
    """What two ranks compute for the tests below."""
    ranks = launch("cpu", timeout=60)
    return {
        "shuffled": shuffled(ranks, False),
        "shuffled wrongly": shuffled(ranks, True),
        "exchanged": exchanged(ranks),
        "wrapped": wrapped(ranks),
    }


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(2, tmp_path_factory.mktemp("two"), all_of_two)


@pytest.mark.parametrize("world", [2, 4])
def test_shuffled_keys_are_those_of_one_process_in_groups(
    world: int, two: list[dict[str, Any]], tmp_path: Path
) -> None:
    if world == 2:
        got = [result["shuffled"] for result in two]
    else:
        got = run_ranks(4, tmp_path, shuffled_by_four)
    for form in range(2):
        for part, one in enumerate(expected(world)):
            ours = torch.cat([result[form][part] for result in got])
            torch.testing.assert_close(ours, one, atol=1e-5, rtol=1e-4)


def test_a_wrong_unshuffle_of_dense_keys_shows(two: list[dict[str, Any]]) -> None:
    got = [result["shuffled wrongly"] for result in two]
    vector, grid, features = (
        torch.cat([result[0][part] for result in got]) - one for part, one in enumerate(expected(2))
    )
    assert vector.abs().max() < 1e-5
    assert grid.abs().max() > 0.1 and features.abs().max() > 0.1


def exchanged(ranks: Ranks) -> list[Any]:
    exchange = KeyExchange(ranks.device)
    exchange.tell(stop=ranks.rank == 1, failed=False)
    own = torch.arange(12.0).reshape(2, 3, 2) + 100 * ranks.rank
    own[0, 0, 0] = torch.nan
    found = exchange(own)
    first = exchange.notes
    exchange.tell(stop=False, failed=ranks.rank == 0, checksum=queue_checksum(own))
    exchange(own)
    return [own, found, first, exchange.notes]


def test_keys_and_notes_travel_together(two: list[dict[str, Any]]) -> None:
    (own, found, first, second), (other, *_) = (result["exchanged"] for result in two)
    torch.testing.assert_close(found, torch.cat([own, other]), equal_nan=True, atol=0, rtol=0)
    assert first.tolist() == [[0, 0, 0, 0], [1, 0, 0, 0]]
    assert second[:, :3].tolist() == [[0, 1, 1], [0, 0, 1]]
    assert second[0, 3] != second[1, 3]


def test_the_checksum_of_queues_tells_rows_and_their_places() -> None:
    queue, other = torch.randn(20, 8), torch.randn(20, 8)
    sums = [queue_checksum(queue, other), queue_checksum(queue.flip(0), other)]
    sums += [queue_checksum(other, queue), queue_checksum(queue.bfloat16(), other)]
    nudged = queue.clone()
    nudged[3, 3] = torch.nextafter(nudged[3, 3], torch.tensor(9.0))
    sums.append(queue_checksum(nudged, other))
    assert len({int(total) for total in sums}) == len(sums)
    assert queue_checksum(queue.clone(), other) == sums[0]


def compiled() -> dict[str, float]:
    """How far a step of the whole model, compiled in one graph inside DDP, is from an eager one.

    For each key_bn. DDP's own forward is left out: torch 2.11 cannot trace the logger in it. Of
    shuffle the parts that the trainer compiles: how many images go where is known on the host.
    """
    ranks = launch("cpu", timeout=60)
    views = [view.chunk(ranks.world)[ranks.rank] for view in two_views(IMAGES)]
    errors = {}
    for key_bn in ("split", "shuffle", "sync"):
        gradients = []
        for backend in (None, "aot_eager"):
            model = build(key_bn=key_bn)
            whole, parts = [model], [model.backbone, model.neck, model.momentum_encoder.module]
            for module in (parts if key_bn == "shuffle" else whole) if backend else ():
                module.compile(fullgraph=True, backend=backend)
            parallel = ranks.wrap(model)
            torch.manual_seed(1)
            parallel(*views).loss.backward()
            gradients.append(
                torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
            )
        eager, graph = gradients
        errors[key_bn] = float((graph - eager).abs().max() / eager.abs().max())
        torch._dynamo.reset()
    return errors


def test_a_step_with_other_ranks_compiles_in_one_graph(tmp_path: Path) -> None:
    for errors in run_ranks(2, tmp_path, compiled):
        assert len(errors) == 3 and max(errors.values()) < 1e-5, errors


def wrapped(ranks: Ranks) -> dict[str, Any]:
    parallel = ranks.wrap(nn.Linear(2, 2))
    names = ("broadcast_buffers", "gradient_as_bucket_view", "find_unused_parameters")
    return {name: getattr(parallel, name) for name in names}


def test_how_gradients_are_averaged(two: list[dict[str, Any]]) -> None:
    assert two[0]["wrapped"] == {
        "broadcast_buffers": False,
        "gradient_as_bucket_view": True,
        "find_unused_parameters": False,
    }
