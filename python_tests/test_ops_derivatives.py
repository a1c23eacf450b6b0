"""Derivatives beyond plain reverse mode: forward mode, the temperature's, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as fwd
from hypothesis import given
from hypothesis import strategies as st
from op_cases import one_thread, randn, unit  # noqa: F401
from test_ops_properties import quick
from torch import Tensor, func, nn

from densecl_ext import DenseCLLoss, InfoNCELoss, ops, reference

pytestmark = pytest.mark.usefixtures("one_thread")


def rows() -> tuple[Tensor, Tensor, Tensor]:
    query, queue = randn(5, 8), randn(9, 8, seed=2)
    queue[:5] += query
    return query, randn(5, 8, seed=1), unit(queue)


def grids() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    match = torch.tensor([[0, 1, -1, 4, 4, 2], [3, 3, 3, 0, -1, -1]])
    return randn(2, 8, 3, 2), randn(2, 8, 5, seed=1), match, rows()[2]


@quick
@given(st.data())
def test_forward_mode_against_float64(data: st.DataObject) -> None:
    """Tangents of query, positive or both, of rows and grids, weights and reductions included."""
    normalize, dense = data.draw(st.booleans()), data.draw(st.booleans())
    which = data.draw(st.sampled_from([(True, True), (True, False), (False, True)]))
    options = {
        "normalize": normalize,
        "temperature": data.draw(st.sampled_from([0.1, 0.5])),
        "reduction": data.draw(st.sampled_from(["mean", "sum", "none"])),
        "filled": data.draw(st.sampled_from([None, 3, 9])),
    }
    n, s, keys, d = (data.draw(st.integers(1, high)) for high in (3, 6, 5, 12))
    seed = data.draw(st.integers(0, 999))
    shapes = ((n, d, s), (n, d, keys)) if dense else ((s, d), (s, d))
    leaves = [randn(*shape, seed=seed + i) for i, shape in enumerate(shapes)]
    tangents = [
        randn(*shape, seed=seed + 7 + i) if wanted else torch.zeros(shape)
        for i, (shape, wanted) in enumerate(zip(shapes, which, strict=True))
    ]
    match = torch.randint(-1, keys, (n, s), generator=torch.Generator().manual_seed(seed))
    queue = unit(randn(9, d, seed=seed + 3))

    def loss(module: object, q: Tensor, p: Tensor, negatives: Tensor) -> Tensor:
        if dense:
            return module.dense_info_nce(q, p, match, negatives, **options)
        return module.info_nce(q, p, negatives, **options)

    exact_loss, exact = func.jvp(
        lambda q, p: loss(reference, q, p, queue.double()),
        tuple(t.double() for t in leaves),
        tuple(t.double() for t in tangents),
    )
    with fwd.dual_level():
        duals = [
            fwd.make_dual(leaf, tangent) if wanted else leaf
            for leaf, tangent, wanted in zip(leaves, tangents, which, strict=True)
        ]
        got = fwd.unpack_dual(loss(ops, *duals, queue))
    with_func = func.jvp(lambda q, p: loss(ops, q, p, queue), tuple(leaves), tuple(tangents))
    # A query nearly at its positive moves the loss by far less than its terms.
    close = {"atol": 2e-5 * (1 + float(exact.abs().max())), "rtol": 1e-4}
    torch.testing.assert_close(got.primal.double(), exact_loss, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(with_func[1].double(), exact, **close)
    if got.tangent is None:
        assert not exact.any()
    else:
        torch.testing.assert_close(got.tangent.double(), exact, **close)


def test_joint_forward_mode_and_jacfwd() -> None:
    query, positive, queue = rows()
    arguments = query, positive, queue, *grids()
    tangent = randn(2, 8, 3, 2, seed=9)

    def dense_loss(module: object, grid: Tensor) -> Tensor:
        return sum(module.joint_info_nce(*arguments[:3], grid, *arguments[4:]))

    got = func.jvp(lambda grid: dense_loss(ops, grid), (arguments[3],), (tangent,))
    exact = func.jvp(lambda grid: dense_loss(reference, grid), (arguments[3],), (tangent,))
    torch.testing.assert_close(got, exact, atol=1e-5, rtol=1e-4)
    jacobian = func.jacfwd(lambda q: ops.info_nce(q, positive, queue, reduction="none"))(query)
    truth = func.jacrev(lambda q: reference.info_nce(q, positive, queue, reduction="none"))(query)
    torch.testing.assert_close(jacobian, truth, atol=1e-5, rtol=1e-4)
    together = torch.stack([query, 2 * query])
    batched = func.vmap(lambda q: ops.info_nce(q, positive, queue))(together)
    assert torch.equal(batched, torch.stack([ops.info_nce(q, positive, queue) for q in together]))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_what_torch_func_cannot_do_says_so() -> None:
    query, positive, queue = rows()
    grid, key, match, _ = grids()
    weight = query.clone().requires_grad_()

    def loss(q: Tensor) -> Tensor:
        return ops.info_nce(q, positive, queue)

    def dense(k: Tensor) -> Tensor:
        return ops.dense_info_nce(grid, k, match, queue)

    def nested(q: Tensor) -> Tensor:
        return func.jvp(lambda x: func.jvp(loss, (x,), (positive,))[1], (q,), (positive,))[1]

    calls: list[Callable[[], object]] = [
        lambda: func.grad(loss)(query),
        lambda: func.vjp(loss, query)[0],
        lambda: func.jacrev(dense)(key),
        lambda: func.hessian(loss)(query),
        lambda: func.vmap(func.grad(lambda q: loss(q.expand(5, -1))))(query),
        lambda: func.grad(lambda x: func.vmap(loss)(x).sum())(query.expand(2, -1, -1)),
        lambda: func.vmap(loss)(weight.expand(2, -1, -1)),
        lambda: func.jvp(lambda x: func.vmap(loss)(x).sum(), (query[None],), (query[None],)),
        lambda: nested(query),
        lambda: func.jvp(lambda n: ops.info_nce(query, positive, n), (queue,), (queue,)),
        lambda: func.jvp(lambda q: ops.info_nce(q, weight, queue), (query,), (query,)),
    ]
    for number, call in enumerate(calls):
        with pytest.raises(RuntimeError, match=r"^(dense_)?info_nce: [^\n]+$") as raised:
            call()
        assert "\n" not in str(raised.value), number
    target = torch.zeros(5, 8)
    writes: list[Callable[[Tensor], object]] = [
        lambda x: ops.enqueue_(target, torch.tensor([0]), x),
        lambda x: ops.ema_update_([target], [x], 0.5),
        lambda x: ops.ema_update_([x], [target], 0.5),
    ]
    for write in writes:
        with pytest.raises(RuntimeError, match="_: writes in place.*torch.func"):
            func.jvp(lambda x, write=write: write(x) or x, (query,), (positive,))
        with pytest.raises(RuntimeError, match="_: writes in place"), fwd.dual_level():
            write(fwd.make_dual(query, positive))
    assert not target.any()


def test_forward_mode_inside_a_compiled_function_is_refused() -> None:
    query, positive, queue = rows()
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q: func.jvp(lambda x: ops.info_nce(x, positive, queue), (q,), (positive,))[1],
        fullgraph=True,
        backend="aot_eager",
    )
    with pytest.raises(Exception, match="densecl_ext: forward-mode derivatives of the ops are not"):
        compiled(query)
    torch._dynamo.reset()


@quick
@given(st.data())
def test_the_temperature_gets_its_gradient(data: st.DataObject) -> None:
    normalize, dense = data.draw(st.booleans()), data.draw(st.booleans())
    options = {"normalize": normalize, "reduction": data.draw(st.sampled_from(["mean", "sum"]))}
    value = data.draw(st.floats(0.05, 2.0))
    shape = data.draw(st.sampled_from([(), (1,)]))
    query, positive, queue = grids()[0], grids()[1], rows()[2]
    if not dense:
        query, positive, _ = rows()
    if not normalize:
        query, positive = unit(query), unit(positive)

    def run(module: object, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [t.detach().clone().to(dtype).requires_grad_() for t in (query, positive)]
        temperature = torch.full(shape, value, dtype=dtype, requires_grad=True)
        negatives = queue.to(dtype)
        if dense:
            loss = module.dense_info_nce(
                *leaves, grids()[2], negatives, temperature=temperature, **options
            )
        else:
            loss = module.info_nce(*leaves, negatives, temperature=temperature, **options)
        loss.backward()
        assert temperature.grad is not None and temperature.grad.shape == temperature.shape
        return (loss.detach(), *(leaf.grad for leaf in leaves), temperature.grad)

    got, exact = run(ops, torch.float32), run(reference, torch.float64)
    for ours, truth in zip(got, exact, strict=True):
        scale = 1 + float(truth.abs().max())
        torch.testing.assert_close(ours.double(), truth, atol=2e-5 * scale, rtol=0.0)


def test_a_16_bit_queue_and_a_learnt_temperature() -> None:
    query, positive, queue = rows()
    for dtype in (torch.bfloat16, torch.float16):
        temperature = torch.tensor(0.3, requires_grad=True)
        truth = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        loss = ops.info_nce(query, positive, queue.to(dtype), temperature=temperature)
        exact = reference.info_nce(
            query.double(), positive.double(), queue.to(dtype), temperature=truth
        )
        loss.backward()
        exact.backward()
        assert abs(loss.item() - exact.item()) < 1e-2
        assert temperature.grad == pytest.approx(float(truth.grad), rel=2e-2)


def test_the_temperature_in_every_way_it_is_given() -> None:
    """Both losses at once, through torch.ops, compiled, by forward mode, and where nothing fits."""
    query, positive, queue = rows()
    grid, key, match, _ = grids()
    expected = torch.tensor(0.3, requires_grad=True)
    (
        ops.info_nce(query, positive, queue, temperature=expected)
        + ops.dense_info_nce(grid, key, match, queue, temperature=expected)
    ).backward()
    joint = (query, positive, queue, grid, key, match, queue)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda t: sum(ops.joint_info_nce(*joint, temperature=t)),
        fullgraph=True,
        backend="aot_eager",
    )
    ways: list[Callable[[Tensor], Tensor]] = [
        lambda t: sum(ops.joint_info_nce(*joint, temperature=t)),
        lambda t: sum(torch.ops.densecl_ext.joint_info_nce(*joint, temperature=t)),
        lambda t: (
            torch.ops.densecl_ext.info_nce(query, positive, queue, temperature=t)
            + torch.ops.densecl_ext.dense_info_nce(grid, key, match, queue, temperature=t)
        ),
        compiled,
    ]
    for way in ways:
        temperature = torch.tensor(0.3, requires_grad=True)
        way(temperature).backward()
        torch.testing.assert_close(temperature.grad, expected.grad)
    _, tangent = func.jvp(ways[0], (torch.tensor(0.3),), (torch.ones(()),))
    torch.testing.assert_close(tangent, expected.grad)
    torch._dynamo.reset()

    bad = grid.clone()
    bad.flatten(2)[0, :, 2] = torch.nan  # no match there
    temperature = torch.tensor(0.3, requires_grad=True)
    ops.dense_info_nce(bad.requires_grad_(), key, match, queue, temperature=temperature).backward()
    assert temperature.grad.isfinite() and bad.grad.isfinite().all()
    short = query.clone()
    short[1] = 0.0
    ops.info_nce(short.requires_grad_(), positive, queue, temperature=temperature).backward()
    assert short.grad.isfinite().all() and not short.grad[1].any()
    with pytest.raises(RuntimeError, match="no second derivative"):
        loss = ops.info_nce(query, positive, queue, temperature=temperature)
        torch.autograd.grad(loss, temperature, create_graph=True)


@pytest.mark.parametrize("module", [InfoNCELoss, DenseCLLoss])
def test_a_loss_learns_its_temperature(module: type) -> None:
    query, positive, queue = rows()
    grid, key, match, _ = grids()
    temperature = nn.Parameter(torch.tensor(0.2))
    criterion = module(temperature=temperature)
    assert list(criterion.parameters()) == [temperature]
    assert "temperature=0.2" in repr(criterion)
    optimizer = torch.optim.SGD(criterion.parameters(), lr=0.01)
    losses = []
    for _ in range(3):
        if module is InfoNCELoss:
            loss = criterion(query, positive, queue)
        else:
            loss = criterion(query, positive, grid, key, queue, queue, match=match).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    with pytest.raises(ValueError, match="temperature"):
        module(temperature=torch.tensor(-1.0))
