"""info_nce against float64: regimes, sizes, instruction sets, special values, arguments."""

from __future__ import annotations

import math

import pytest
import torch
from op_cases import (
    BACKENDS,
    BOUNDS,
    ISAS,
    QUEUE_DTYPES,
    REGIMES,
    Result,
    Rows,
    assert_close_to_truth,
    case,
    check_case,
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

TEMPERATURES = [0.01, 0.05, 0.07, 0.2, 1.0]
ROWS = [1, 5, 12, 13, 49, 97]
LENGTHS = [1, 3, 31, 33, 257, 1000, 5000]
FEATURES = [1, 3, 16, 100, 128, 129, 200, 512, 1024]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("queue_dtype", QUEUE_DTYPES, ids=str)
@pytest.mark.parametrize("regime", REGIMES)
def test_regimes(
    regime: str, queue_dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_backend(backend, monkeypatch)
    for temperature in TEMPERATURES:
        check_case(regime, 25, 700, 48, temperature, queue_dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("queue_dtype", QUEUE_DTYPES[:2], ids=str)
@pytest.mark.parametrize("features", FEATURES)
def test_sizes(
    features: int, queue_dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_backend(backend, monkeypatch)
    if features > 256 and backend not in ISAS:
        pytest.skip("the CUDA kernels take at most 256 features")
    for i, length in enumerate(LENGTHS):
        if features * length > 1_100_000:
            continue
        for j in (0, 2, 5):  # every length meets three numbers of rows, every number of rows three
            rows = ROWS[(i + j + features) % len(ROWS)]
            check_case("random", rows, length, features, 0.1, queue_dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("queue_dtype", QUEUE_DTYPES[:2], ids=str)
def test_long_queue_of_equal_rows(
    queue_dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums of 65,536 equal terms, where the roundings of a running sum all point one way."""
    use_backend(backend, monkeypatch)
    check_case("all_equal", 12, 65536, 16, 0.2, queue_dtype)


@pytest.mark.parametrize("queue_dtype", QUEUE_DTYPES[:2], ids=str)
def test_long_queue(queue_dtype: torch.dtype) -> None:
    check_case("clustered", 49, 65536, 32, 0.07, queue_dtype)


def test_the_data_show_a_wrong_weighted_sum() -> None:
    """The negatives make up a fair share of the gradient, or the tests above prove little."""
    for regime in REGIMES:
        rows, truth, _ = case(regime, 25, 700, 48, 0.2, torch.float32)
        alone = run(
            reference.info_nce,
            Rows(rows.query, rows.positive, rows.queue[:1] * 0, rows.options),
            double=True,
        )
        if regime != "all_equal":
            difference = (truth.grad_query - alone.grad_query).norm() / truth.grad_query.norm()
            assert difference > 0.05, regime


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("queue_dtype", QUEUE_DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_zero_rows(
    normalize: bool, queue_dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_backend(backend, monkeypatch)
    query, positive, queue = randn(6, 24), randn(6, 24, seed=1), unit(randn(50, 24, seed=2))
    query[1] = positive[2] = query[3] = positive[3] = 0.0
    queue[7] = 0.0
    rows = Rows(query, positive, queue.to(queue_dtype), {"normalize": normalize})
    got = run(ops.info_nce, rows)
    truth = run(reference.info_nce, rows, double=True)
    for name in ("loss", "grad_query", "grad_positive"):
        value, exact = getattr(got, name), getattr(truth, name)
        assert value.isfinite().all()
        # A GPU rounds query and weights to the queue's 16 bits.
        rounds = name != "loss" and "cuda" in backend and queue_dtype != torch.float32
        off = BOUNDS[queue_dtype][1] * float(exact.abs().max()) if rounds else 2e-5
        torch.testing.assert_close(value.double(), exact, atol=off, rtol=1e-5)
    if normalize:
        assert not got.grad_query[[1, 3]].any() and not got.grad_positive[[2, 3]].any()
    assert got.grad_query[2].any() and got.grad_positive[0].any()


def test_a_row_just_below_the_shortest_length_is_divided_by_it() -> None:
    """Length 1e-13: unit would be 0.1 long after the division by 1e-12, with no gradient."""
    direction = unit(randn(1, 8))
    rows = Rows(1e-13 * direction, direction.clone(), unit(randn(20, 8, seed=1)))
    got = run(ops.info_nce, rows)
    logits = torch.cat([torch.tensor([0.1]), (0.1 * direction @ rows.queue.T)[0]]) / 0.2
    torch.testing.assert_close(got.loss[0], logits.logsumexp(0) - logits[0])
    assert not got.grad_query.any()
    assert got.grad_positive.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("queue_dtype", QUEUE_DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_rows_come_out_as_nan_and_touch_no_other(
    bad: float,
    normalize: bool,
    queue_dtype: torch.dtype,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_backend(backend, monkeypatch)
    query, positive = randn(30, 20), randn(30, 20, seed=1)
    queue = unit(randn(70, 20, seed=2)).to(queue_dtype)
    options = {"normalize": normalize}
    clean = run(ops.info_nce, Rows(query, positive, queue, options))
    query, positive = query.clone(), positive.clone()
    query[4, 19] = bad
    positive[13, 0] = bad
    got = run(ops.info_nce, Rows(query, positive, queue, options))
    hit = torch.zeros(30, dtype=torch.bool)
    hit[[4, 13]] = True
    for name in ("loss", "grad_query", "grad_positive"):
        value, expected = getattr(got, name), getattr(clean, name)
        assert value[hit].isnan().all()
        # A bad row may change how its neighbours' sums are shifted: their rounding, no more.
        torch.testing.assert_close(value[~hit], expected[~hit], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("queue_dtype", QUEUE_DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 300, 699])
def test_a_bad_queue_row_makes_every_row_nan(
    where: int, bad: float, queue_dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_backend(backend, monkeypatch)
    queue = unit(randn(700, 33, seed=2)).to(queue_dtype)
    queue[where, 32] = bad
    got = run(ops.info_nce, Rows(randn(14, 33), randn(14, 33, seed=1), queue))
    assert got.loss.isnan().all()
    assert got.grad_query.isnan().all() and got.grad_positive.isnan().all()
    assert on_device(ops.info_nce)(randn(14, 33), randn(14, 33, seed=1), queue).isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_overflow_is_never_a_wrong_number(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finite rows whose products leave float32: NaN or the right value, nothing else."""
    use_backend(backend, monkeypatch)
    query, positive, queue = randn(12, 16), randn(12, 16, seed=1), randn(40, 16, seed=2)
    for q_scale, p_scale, n_scale in [
        (1e30, 1.0, 1.0),
        (1e20, 1e20, 1e20),
        (1.0, 1e37, 1e37),
        (1e-30, 1.0, 1e30),
        (1e-38, 1e-38, 1e-38),
    ]:
        rows = Rows(query * q_scale, positive * p_scale, queue * n_scale, {"normalize": False})
        got, truth = run(ops.info_nce, rows), run(reference.info_nce, rows, double=True)
        right = (got.loss.double() - truth.loss).abs() <= 1e-4 * truth.loss.abs() + 1e-5
        overflowed = truth.loss > torch.finfo(torch.float32).max
        assert (right | got.loss.isnan() | (overflowed & got.loss.isinf())).all()


@pytest.mark.parametrize("as_tensor", [False, True], ids=["int", "tensor"])
@pytest.mark.parametrize("queue_dtype", QUEUE_DTYPES[:2], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_filled(
    backend: str, queue_dtype: torch.dtype, as_tensor: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows from filled on hold NaN and do not matter."""
    use_backend(backend, monkeypatch)
    query, positive = randn(7, 40), randn(7, 40, seed=1)
    for length in (1, 37, 600):
        full = unit(randn(length, 40, seed=2)).to(queue_dtype)
        counts = {0, 1, length // 2, length - 1, length}
        for filled in sorted(counts):
            queue = full.clone()
            queue[filled:] = math.nan
            given = torch.tensor(filled) if as_tensor else filled
            rows = Rows(query, positive, queue, {"filled": given})
            got = run(ops.info_nce, rows)
            if filled == 0:
                assert not got.loss.any()
                assert not got.grad_query.any() and not got.grad_positive.any()
                continue
            expected = run(ops.info_nce, Rows(query, positive, full[:filled]))
            # The plan follows the queue's length, so sums may be cut elsewhere.
            for name in ("loss", "grad_query", "grad_positive"):
                torch.testing.assert_close(getattr(got, name), getattr(expected, name))


def test_filled_may_have_one_axis() -> None:
    query, queue = randn(3, 8), unit(randn(9, 8, seed=1))
    expected = ops.info_nce(query, query, queue, filled=4)
    assert torch.equal(ops.info_nce(query, query, queue, filled=torch.tensor([4])), expected)


def test_filled_zero_keeps_nan_in_bad_rows() -> None:
    query = randn(3, 8)
    query[1, 2] = math.nan
    loss = ops.info_nce(query, randn(3, 8), randn(5, 8), filled=0, reduction="none")
    assert loss[1].isnan() and not loss[[0, 2]].any()


def test_empty_batch() -> None:
    query = torch.empty(0, 16, requires_grad=True)
    positive = torch.empty(0, 16, requires_grad=True)
    queue = unit(randn(5, 16))
    losses = ops.info_nce(query, positive, queue, reduction="none")
    assert losses.shape == (0,) and losses.dtype == torch.float32
    for reduction in ("mean", "sum"):
        loss = ops.info_nce(query, positive, queue, reduction=reduction)
        assert loss.shape == () and loss == 0.0
        grads = torch.autograd.grad(loss, [query, positive])
        assert all(grad.shape == (0, 16) for grad in grads)
    weight = torch.empty(0)
    assert ops.info_nce(query, positive, queue, row_weight=weight) == 0.0


def test_no_features_leaves_a_uniform_softmax() -> None:
    loss = ops.info_nce(torch.empty(3, 0), torch.empty(3, 0), torch.empty(6, 0), reduction="none")
    torch.testing.assert_close(loss, torch.full((3,), math.log(7.0)))


def _layouts(rows: Tensor) -> dict[str, Tensor]:
    """The same values in other clothes."""
    count, dim = rows.shape
    wide = torch.full((count + 3, 2 * dim + 5), math.nan)
    wide[2 : 2 + count, 3 : 3 + 2 * dim : 2] = rows
    return {
        "transposed": rows.T.contiguous().T,
        "sliced": wide[2 : 2 + count, 3 : 3 + 2 * dim : 2],
        "offset": torch.cat([torch.full((1,), math.nan), rows.flatten()])[1:].view(count, dim),
    }


@pytest.mark.parametrize("layout", ["transposed", "sliced", "offset"])
@pytest.mark.parametrize("dtype", QUEUE_DTYPES, ids=str)
def test_layouts_give_the_same_bits(layout: str, dtype: torch.dtype) -> None:
    query, positive, queue = randn(13, 37), randn(13, 37, seed=1), unit(randn(70, 37, seed=2))
    query, positive, queue = (rows.to(dtype) for rows in (query, positive, queue))
    expected = run(ops.info_nce, Rows(query, positive, queue))
    strided = [_layouts(rows.float())[layout] for rows in (query, positive, queue)]
    views = []
    for values, rows in zip(strided, (query, positive, queue), strict=True):
        base = torch.empty_strided(values.shape, values.stride(), dtype=dtype)
        base.copy_(rows)
        views.append(base)
        if layout != "offset":
            assert not base.is_contiguous()
    leaves = [view.detach().requires_grad_() for view in views[:2]]
    loss = ops.info_nce(leaves[0], leaves[1], views[2], reduction="none")
    loss.sum().backward()
    assert torch.equal(loss.detach(), expected.loss)
    assert torch.equal(leaves[0].grad, expected.grad_query)
    assert torch.equal(leaves[1].grad, expected.grad_positive)


def test_offset_storage_and_neighbours_of_a_slice_do_not_matter() -> None:
    rows = [randn(13, 37), randn(13, 37, seed=1), unit(randn(70, 37, seed=2))]
    expected = ops.info_nce(*rows)
    for name in ("sliced", "offset"):
        assert torch.equal(ops.info_nce(*(_layouts(r)[name] for r in rows)), expected)


def test_expanded_inputs() -> None:
    """Stride 0: one query against many positives, and a queue of one row repeated."""
    query, positive = randn(1, 20), randn(9, 20, seed=1)
    queue = unit(randn(1, 20, seed=2)).expand(33, 20)
    leaf = query.clone().requires_grad_()
    loss = ops.info_nce(leaf.expand(9, 20), positive, queue, reduction="sum")
    loss.backward()
    rows = Rows(query.repeat(9, 1), positive, queue.contiguous())
    expected = run(ops.info_nce, rows)
    assert torch.equal(loss.detach(), expected.loss.sum())
    torch.testing.assert_close(leaf.grad, expected.grad_query.sum(0, keepdim=True))


@pytest.mark.parametrize("queue_dtype", QUEUE_DTYPES, ids=str)
@pytest.mark.parametrize("positive_dtype", QUEUE_DTYPES, ids=str)
@pytest.mark.parametrize("query_dtype", QUEUE_DTYPES, ids=str)
def test_mixed_dtypes(
    query_dtype: torch.dtype, positive_dtype: torch.dtype, queue_dtype: torch.dtype
) -> None:
    query, positive = randn(13, 48), randn(13, 48, seed=1)
    rows = Rows(
        query.to(query_dtype),
        positive.to(positive_dtype),
        unit(query.repeat(5, 1) + randn(65, 48, seed=2)).to(queue_dtype),
    )
    exact = Rows(rows.query.float(), rows.positive.float(), rows.queue)
    truth, eager = (run(reference.info_nce, exact, double=double) for double in (True, False))
    got = run(ops.info_nce, rows)
    assert got.loss.dtype == torch.float32
    assert got.grad_query.dtype == query_dtype and got.grad_positive.dtype == positive_dtype
    wide = run(ops.info_nce, exact)
    assert torch.equal(got.loss, wide.loss)
    # The gradients are the float32 ones, rounded once to the input's type.
    assert torch.equal(got.grad_query, wide.grad_query.to(query_dtype))
    assert torch.equal(got.grad_positive, wide.grad_positive.to(positive_dtype))
    assert_close_to_truth(exact, wide, truth, eager)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_row_weight_and_reductions(weight_dtype: torch.dtype) -> None:
    rows = Rows(randn(6, 16), randn(6, 16, seed=1), unit(randn(20, 16, seed=2)))
    weight = torch.tensor([0.0, 1.0, 2.5, 0.25, 3.0, 1.0], dtype=weight_dtype)
    losses = ops.info_nce(rows.query, rows.positive, rows.queue, reduction="none").double()
    weighted = losses * weight.double()
    expected = {
        "none": weighted,
        "sum": weighted.sum(),
        "mean": weighted.sum() / 7.75,
    }
    for reduction, value in expected.items():
        query = rows.query.clone().requires_grad_()
        loss = ops.info_nce(
            query, rows.positive, rows.queue, row_weight=weight, reduction=reduction
        )
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), value)
        loss.sum().backward()
        exact = rows.query.double().requires_grad_()
        reference.info_nce(
            exact,
            rows.positive.double(),
            rows.queue.double(),
            row_weight=weight.double(),
            reduction=reduction,
        ).sum().backward()
        torch.testing.assert_close(query.grad.double(), exact.grad, atol=1e-6, rtol=1e-5)
        assert not query.grad[0].any()
    plain = {
        "sum": losses.sum(),
        "mean": losses.mean(),
    }
    for reduction, value in plain.items():
        loss = ops.info_nce(rows.query, rows.positive, rows.queue, reduction=reduction)
        torch.testing.assert_close(loss.double(), value)


def test_mean_of_no_weight_is_zero() -> None:
    query = randn(4, 8).requires_grad_()
    loss = ops.info_nce(query, randn(4, 8), randn(5, 8), row_weight=torch.zeros(4))
    loss.backward()
    assert loss == 0.0 and not query.grad.any()


def test_row_weight_gets_its_gradient() -> None:
    """The weights are an ordinary differentiable factor."""
    query, positive, queue = randn(4, 8), randn(4, 8, seed=1), unit(randn(5, 8, seed=2))
    weight = torch.rand(4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ops.info_nce(query, positive, queue, row_weight=weight).backward()
    losses = ops.info_nce(query, positive, queue, reduction="none")
    total = weight.detach().sum()
    expected = losses / total - (weight.detach() * losses).sum() / total**2
    torch.testing.assert_close(weight.grad, expected)


def test_no_gradient_wanted_gives_the_same_loss() -> None:
    query, positive, queue = randn(13, 40), randn(13, 40, seed=1), unit(randn(300, 40, seed=2))
    expected = run(ops.info_nce, Rows(query, positive, queue))
    assert torch.equal(ops.info_nce(query, positive, queue, reduction="none"), expected.loss)
    for wanted in ("query", "positive"):
        leaves = {"query": query.clone(), "positive": positive.clone()}
        leaves[wanted].requires_grad_()
        ops.info_nce(leaves["query"], leaves["positive"], queue, reduction="sum").backward()
        assert torch.equal(leaves[wanted].grad, getattr(expected, f"grad_{wanted}"))


def test_inputs_are_left_alone() -> None:
    query, positive, queue = randn(5, 8), randn(5, 8, seed=1), randn(9, 8, seed=2)
    before = [query.clone(), positive.clone(), queue.clone()]
    ops.info_nce(query.requires_grad_(), positive.requires_grad_(), queue).backward()
    assert all(torch.equal(a, b) for a, b in zip((query, positive, queue), before, strict=True))


def test_the_incoming_gradient_scales_each_row() -> None:
    rows = Rows(randn(5, 8), randn(5, 8, seed=1), unit(randn(9, 8, seed=2)))
    expected: Result = run(ops.info_nce, rows)
    factor = torch.tensor([0.0, -1.0, 0.5, 2.0, 100.0])
    query = rows.query.clone().requires_grad_()
    loss = ops.info_nce(query, rows.positive, rows.queue, reduction="none")
    loss.backward(factor)
    torch.testing.assert_close(query.grad, expected.grad_query * factor.unsqueeze(1))
