"""dense_info_nce against a loop over positions, gathering plus info_nce, and float64."""

from __future__ import annotations

import math

import pytest
import torch
from op_cases import (
    BACKENDS,
    QUEUE_DTYPES,
    Rows,
    assert_close_to_truth,
    on_device,
    one_thread,  # noqa: F401
    randn,
    run,
    unit,
    use_backend,
)
from torch import Tensor

from densecl_ext import ops, reference

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [  # (N, D, Sq, Sk)
    (1, 1, (1,), (1,)),
    (2, 8, (5,), (3,)),
    (3, 32, (4, 3), (2, 5)),
    (2, 33, (7, 7), (7, 7)),
    (1, 128, (2, 3, 2), (3, 1, 2)),
    (5, 16, (1,), (40,)),
]


def _grids(n: int, d: int, sq: tuple[int, ...], sk: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    key = randn(n, d, *sk, seed=1)
    query = randn(n, d, *sq)
    query.flatten(2)[:, :, 0] += key.flatten(2)[:, :, 0]
    return query, key


def _match(n: int, sq: int, sk: int, *, unmatched: bool = True) -> Tensor:
    """Every third position without a match; few keys, so that positions share them."""
    match = torch.randint(max(1, sk // 2), (n, sq), generator=torch.Generator().manual_seed(3))
    if unmatched:
        match.view(-1)[1::3] = -1
    return match


def _queue(d: int, near: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    queue = randn(90, d, seed=2)
    rows = near.flatten(2).transpose(1, 2).reshape(-1, d)[:30]
    queue[: len(rows)] += rows
    return unit(queue).to(dtype)


def _gathered(query: Tensor, key: Tensor, match: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (matched, D) of query and positive, by a loop."""
    queries, positives = [], []
    for n, i in (match >= 0).nonzero().tolist():
        queries.append(query.flatten(2)[n, :, i])
        positives.append(key.flatten(2)[n, :, match[n, i]])
    return torch.stack(queries), torch.stack(positives)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("queue_dtype", QUEUE_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64_and_gathered_rows(
    shape: tuple, queue_dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_backend(backend, monkeypatch)
    n, d, sq, sk = shape
    query, key = _grids(*shape)
    match = _match(n, math.prod(sq), math.prod(sk))
    queue = _queue(d, query, queue_dtype)
    query.requires_grad_()
    key.requires_grad_()
    dense_info_nce = on_device(ops.dense_info_nce)
    losses = dense_info_nce(query, key, match, queue, reduction="none", temperature=0.1)
    assert losses.shape == match.shape and losses.dtype == torch.float32
    losses.sum().backward()

    # The losses are those of the gathered rows, position by position.
    rows = Rows(*(r.detach() for r in _gathered(query, key, match)), queue, {"temperature": 0.1})
    alone = run(ops.info_nce, rows)
    torch.testing.assert_close(losses[match >= 0].detach(), alone.loss, atol=1e-6, rtol=1e-6)
    assert not losses[match < 0].any()
    assert_close_to_truth(
        rows, alone, run(reference.info_nce, rows, double=True), run(reference.info_nce, rows)
    )

    # The gradients are those rows' gradients, added up where positions share a key.
    expected_query, expected_key = torch.zeros_like(query), torch.zeros_like(key)
    for row, (i, s) in enumerate((match >= 0).nonzero().tolist()):
        expected_query.view(n, d, -1)[i, :, s] += alone.grad_query[row]
        expected_key.view(n, d, -1)[i, :, match[i, s]] += alone.grad_positive[row]
    torch.testing.assert_close(query.grad, expected_query, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(key.grad, expected_key, atol=5e-6, rtol=1e-5)
    assert query.grad.shape == query.shape and key.grad.shape == key.shape

    wide = queue.double() if queue_dtype == torch.float32 else queue
    q64, k64 = (t.detach().double().requires_grad_() for t in (query, key))
    truth = reference.dense_info_nce(q64, k64, match, wide, reduction="none", temperature=0.1)
    truth.sum().backward()
    loss_bound, grad_bound = (1e-5, 2e-5) if queue_dtype == torch.float32 else (1e-4, 1e-3)
    assert (losses - truth).abs().max() <= loss_bound
    for got, exact in ((query.grad, q64.grad), (key.grad, k64.grad)):
        assert (got - exact).norm() <= grad_bound * exact.norm() + 1e-5


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
def test_reductions_count_matched_positions(reduction: str, weighted: bool) -> None:
    query, key = _grids(3, 16, (4, 3), (2, 5))
    match, queue = _match(3, 12, 10), _queue(16, query)
    weight = torch.rand(3, 12, generator=torch.Generator().manual_seed(0)) if weighted else None
    query.requires_grad_()
    loss = ops.dense_info_nce(query, key, match, queue, row_weight=weight, reduction=reduction)
    loss.backward()
    each = ops.dense_info_nce(query, key, match, queue, reduction="none").detach()
    w = (match >= 0).float() if weight is None else weight * (match >= 0)
    expected = (w * each).sum() / (w.sum() if reduction == "mean" else 1.0)
    torch.testing.assert_close(loss.detach(), expected)
    q64 = query.detach().double().requires_grad_()
    reference.dense_info_nce(
        q64,
        key.double(),
        match,
        queue.double(),
        reduction=reduction,
        row_weight=None if weight is None else weight.double(),
    ).backward()
    torch.testing.assert_close(query.grad.double(), q64.grad, atol=1e-6, rtol=1e-5)
    none = ops.dense_info_nce(query, key, match, queue, row_weight=weight, reduction="none")
    torch.testing.assert_close(none.detach(), each if weight is None else weight * each)


def test_nothing_matched() -> None:
    query, key = _grids(2, 8, (3,), (4,))
    query.requires_grad_()
    key.requires_grad_()
    match = torch.full((2, 3), -1)
    loss = ops.dense_info_nce(query, key, match, _queue(8, query.detach()))
    loss.backward()
    assert loss == 0.0 and not query.grad.any() and not key.grad.any()


def test_no_key_position_and_nothing_matched() -> None:
    query = randn(2, 8, 3).requires_grad_()
    key = torch.empty(2, 8, 0, requires_grad=True)
    loss = ops.dense_info_nce(query, key, torch.full((2, 3), -1), unit(randn(5, 8, seed=2)))
    loss.backward()
    assert loss == 0.0 and not query.grad.any() and key.grad.shape == (2, 8, 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_values_where_nothing_matches_do_not_matter(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_backend(backend, monkeypatch)
    dense_info_nce = on_device(ops.dense_info_nce)
    query, key = _grids(2, 8, (5,), (6,))
    match = torch.tensor([[0, -1, 2, 1, 1], [3, 3, -1, 0, 0]])
    queue = _queue(8, query)
    clean = dense_info_nce(query, key, match, queue, reduction="none")
    bad_query, bad_key = query.clone(), key.clone()
    bad_query[0, :, 1] = math.nan
    bad_query[1, 3, 2] = math.inf
    bad_key[:, :, 5] = math.nan
    bad_key[0, 0, 3] = -math.inf
    bad_query.requires_grad_()
    bad_key.requires_grad_()
    losses = dense_info_nce(bad_query, bad_key, match, queue, reduction="none")
    torch.testing.assert_close(losses.detach(), clean, atol=2e-6, rtol=1e-5)
    losses.sum().backward()
    assert bad_query.grad.isfinite().all() and bad_key.grad.isfinite().all()
    # A matched one does: its position and its key, no other.
    bad_key = key.clone()
    bad_key[0, 2, 1] = math.nan
    bad_key.requires_grad_()
    losses = dense_info_nce(query, bad_key, match, queue, reduction="none")
    assert (losses.isnan() == torch.tensor([[0, 0, 0, 1, 1], [0] * 5]).bool()).all()
    losses[0].sum().backward()
    assert bad_key.grad[0, :, 1].isnan().all() and bad_key.grad[0, :, [0, 2]].isfinite().all()


@pytest.mark.parametrize("images,positions", [(0, 4), (2, 0), (0, 0)])
def test_empty(images: int, positions: int) -> None:
    query = torch.empty(images, 8, positions, requires_grad=True)
    key = torch.empty(images, 8, 5, requires_grad=True)
    match = torch.empty(images, positions, dtype=torch.int64)
    queue = unit(randn(6, 8))
    losses = ops.dense_info_nce(query, key, match, queue, reduction="none")
    assert losses.shape == (images, positions)
    loss = ops.dense_info_nce(query, key, match, queue)
    loss.backward()
    assert loss == 0.0
    assert query.grad.shape == query.shape and key.grad.shape == key.shape and not key.grad.any()


def test_layouts_give_the_same_bits() -> None:
    """Channels-last, transposed, sliced and expanded grids; a strided match and weight."""
    query, key = _grids(3, 20, (4, 3), (5, 2))
    match, queue = _match(3, 12, 10), _queue(20, query)
    weight = randn(3, 12, seed=5).abs()

    def losses(q: Tensor, k: Tensor, m: Tensor = match, w: Tensor = weight) -> list[Tensor]:
        q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
        loss = ops.dense_info_nce(q, k, m, queue, row_weight=w, reduction="none")
        loss.sum().backward()
        return [loss.detach(), q.grad, k.grad]

    def channels_last(grid: Tensor) -> Tensor:
        return grid.contiguous(memory_format=torch.channels_last)

    def sliced(grid: Tensor) -> Tensor:
        wide = torch.full((6, grid.shape[1] + 3, grid.shape[2] + 2, 2 * grid.shape[3]), math.nan)
        view = wide[::2, 2:-1, 1:-1, ::2]
        view.copy_(grid)
        return view

    def transposed(grid: Tensor) -> Tensor:
        return grid.transpose(2, 3).contiguous().transpose(2, 3)

    expected = losses(query, key)
    for layout in (channels_last, sliced, transposed):
        assert not layout(query).is_contiguous()
        got = losses(layout(query), layout(key))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), layout
    strided = [torch.stack([t, t], dim=2)[:, :, 0] for t in (match, weight)]
    got = losses(query, key, *strided)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))

    one = key[:1].expand(3, -1, -1, -1)
    got = losses(query, one)
    again = losses(query, one.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.parametrize("key_dtype", QUEUE_DTYPES, ids=str)
@pytest.mark.parametrize("query_dtype", QUEUE_DTYPES, ids=str)
def test_mixed_dtypes(query_dtype: torch.dtype, key_dtype: torch.dtype) -> None:
    query, key = _grids(2, 24, (9,), (9,))
    query = query.to(query_dtype).requires_grad_()
    key = key.to(key_dtype).requires_grad_()
    match, queue = _match(2, 9, 9), _queue(24, query.detach().float())
    loss = ops.dense_info_nce(query, key, match, queue)
    loss.backward()
    wide_query, wide_key = (t.detach().float().requires_grad_() for t in (query, key))
    wide = ops.dense_info_nce(wide_query, wide_key, match, queue)
    wide.backward()
    assert loss.dtype == torch.float32 and torch.equal(loss, wide)
    assert torch.equal(query.grad, wide_query.grad.to(query_dtype))
    assert torch.equal(key.grad, wide_key.grad.to(key_dtype))


@pytest.mark.parametrize("as_tensor", [False, True])
def test_filled(as_tensor: bool) -> None:
    query, key = _grids(2, 8, (5,), (6,))
    match, queue = _match(2, 5, 6), _queue(8, query)
    for filled in (0, 1, 17, len(queue)):
        dirty = queue.clone()
        dirty[filled:] = math.nan
        count = torch.tensor(filled) if as_tensor else filled
        loss = ops.dense_info_nce(query, key, match, dirty, filled=count)
        if filled == 0:
            assert loss == 0.0
        else:
            exact = reference.dense_info_nce(
                query.double(), key.double(), match, queue[:filled].double()
            )
            torch.testing.assert_close(loss.double(), exact, atol=1e-5, rtol=0.0)


def test_zero_vectors() -> None:
    query, key = _grids(1, 8, (4,), (4,))
    query[0, :, 1] = 0.0
    key[0, :, 2] = 0.0
    query.requires_grad_()
    key.requires_grad_()
    match, queue = torch.tensor([[0, 1, 2, 2]]), _queue(8, query.detach())
    loss = ops.dense_info_nce(query, key, match, queue)
    loss.backward()
    assert loss.isfinite() and query.grad.isfinite().all() and key.grad.isfinite().all()
    assert not query.grad[0, :, 1].any() and not key.grad[0, :, 2].any()
    assert query.grad[0, :, 2].any() and key.grad[0, :, 0].any()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("layout", ["dense", "transposed", "sliced"])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (3, 49, 49, 128), (2, 784, 5, 40), (2, 20, 784, 9)], ids=str
)
def test_key_gradient_sums_rows_in_order(
    shape: tuple[int, int, int, int], layout: str, device: str
) -> None:
    """Against float64, and bit for bit against additions one after the other."""
    n, s, keys, d = shape
    match = _match(n, s, 2 * keys).to(device)  # every key, some of them often
    rows = randn(n, s, d).to(device)
    if layout == "transposed":
        rows = rows.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "sliced":
        rows = torch.cat([rows, rows], dim=2)[:, :, d:]
        match = torch.stack([match, match], dim=2)[:, :, 1]
    got = torch.ops.densecl_ext._key_gradient(rows, match, keys)
    expected, exact = torch.zeros(n, keys, d), torch.zeros(n, keys, d, dtype=torch.float64)
    for image, i in (match >= 0).nonzero().tolist():
        expected[image, match[image, i]] += rows[image, i].cpu()
        exact[image, match[image, i]] += rows[image, i].cpu()
    assert torch.equal(got.cpu(), expected)
    torch.testing.assert_close(got.cpu().double(), exact, rtol=0, atol=2e-5)


@pytest.mark.gpu
def test_key_gradient_repeats_its_bits_on_a_gpu() -> None:
    """Hundreds of positions that share a key: atomics would add them in another order each time."""
    query, key = randn(8, 64, 784).cuda(), randn(8, 64, 4, seed=1).cuda().requires_grad_()
    match = (torch.arange(784).expand(8, -1) % 5 - 1).cuda()
    queue = unit(randn(500, 64, seed=2)).cuda()

    def once() -> Tensor:
        loss = ops.dense_info_nce(query, key, match, queue)
        return torch.autograd.grad(loss, key)[0]

    expected = once()
    assert all(torch.equal(once(), expected) for _ in range(20))


@pytest.mark.gpu
def test_a_match_out_of_range_is_nan_on_a_gpu() -> None:
    """Where looking at the values would wait for the device, the rows that hold them tell."""
    query, key = _grids(2, 8, (3,), (4,))
    match = torch.tensor([[0, 4, -1], [3, 1, -2]])
    queue = _queue(8, query)
    leaves = [t.cuda().requires_grad_() for t in (query, key)]
    losses = ops.dense_info_nce(*leaves, match.cuda(), queue.cuda(), reduction="none")
    assert losses.isnan().tolist() == [[False, True, False], [False, False, True]]
    assert losses[0, 2] == 0.0
    losses.nansum().backward()
    assert leaves[0].grad is not None and leaves[0].grad[0, :, 0].any()
