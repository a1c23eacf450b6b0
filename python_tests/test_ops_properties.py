"""Property tests: shapes, strides, dtypes, counters and pointers drawn by hypothesis."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_cases import (
    ISAS,
    QUEUE_DTYPES,
    Result,
    Rows,
    assert_close_to_truth,
    one_thread,  # noqa: F401
    run,
    unit,
)
from torch import Tensor

from densecl_ext import ops, reference

pytestmark = pytest.mark.usefixtures("one_thread")
quick = settings(
    deadline=None,
    max_examples=80,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
dtypes = st.sampled_from(QUEUE_DTYPES)
isas = st.sampled_from(ISAS)


@st.composite
def strided(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random values in a view with drawn order of axes, steps and offsets; NaN around them."""
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.integers(1, 3)) for _ in shape]
    offsets = [draw(st.integers(0, 2)) for _ in shape]
    sizes = [offsets[d] + steps[d] * shape[d] + 1 for d in order]
    base = torch.full(sizes, math.nan, dtype=dtype)
    inverse = [order.index(d) for d in range(len(shape))]
    view = base.permute(inverse)
    for d in range(len(shape)):
        view = view.narrow(d, offsets[d], steps[d] * shape[d])
    view = view[tuple(slice(None, None, step) for step in steps)]
    assert view.shape == shape
    seed = draw(st.integers(0, 2**16))
    view.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
    return view


@st.composite
def info_nce_rows(draw: st.DrawFn) -> Rows:
    m, k, d = draw(st.integers(1, 40)), draw(st.integers(1, 150)), draw(st.integers(1, 70))
    query, positive = draw(strided((m, d), draw(dtypes))), draw(strided((m, d), draw(dtypes)))
    queue = draw(strided((k, d), draw(dtypes)))
    with torch.no_grad():
        near = min(m, k)
        queue[:near] += 2.0 * query[:near].to(queue.dtype)
        queue.copy_(unit(queue.float()))
    filled = draw(st.integers(1, k))
    queue[filled:] = math.nan
    options = {
        "temperature": draw(st.sampled_from([0.05, 0.2, 1.0])),
        "normalize": draw(st.booleans()),
        "filled": torch.tensor(filled) if draw(st.booleans()) else filled,
    }
    return Rows(query, positive, queue, options)


@quick
@given(info_nce_rows(), isas)
def test_info_nce(rows: Rows, isa: str) -> None:
    query, positive = (t.detach().requires_grad_() for t in (rows.query, rows.positive))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DENSECL_CPU_ISA", isa)
        wide = Rows(query.detach().float(), positive.detach().float(), rows.queue, rows.options)
        got = run(ops.info_nce, wide)
        loss = ops.info_nce(query, positive, rows.queue, reduction="none", **rows.options)
        loss.sum().backward()
    # Strides and input types change nothing but the gradients' type.
    assert torch.equal(loss.detach(), got.loss)
    assert torch.equal(query.grad, got.grad_query.to(query.dtype))
    assert torch.equal(positive.grad, got.grad_positive.to(positive.dtype))
    filled = int(rows.options["filled"])
    counted = Rows(
        wide.query,
        wide.positive,
        rows.queue[:filled],
        {k: v for k, v in rows.options.items() if k != "filled"},
    )
    truth: Result = run(reference.info_nce, counted, double=True)
    assert_close_to_truth(counted, got, truth, run(reference.info_nce, counted))


@quick
@given(st.data(), isas, st.booleans())
def test_dense_match(data: st.DataObject, isa: str, mutual: bool) -> None:
    n, c = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 140))
    sq, sk = (data.draw(st.tuples(st.integers(1, 12), st.integers(1, 12))) for _ in range(2))
    query = data.draw(strided((n, c, *sq), data.draw(dtypes)))
    key = data.draw(strided((n, c, *sk), data.draw(dtypes)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DENSECL_CPU_ISA", isa)
        match = ops.dense_match(query, key, mutual=mutual)
        plain = ops.dense_match(query.float().contiguous(), key.float().contiguous())
    similarity = torch.nn.functional.normalize(query.double().flatten(2), dim=1).transpose(
        1, 2
    ) @ torch.nn.functional.normalize(key.double().flatten(2), dim=1)
    best = similarity.amax(dim=2)
    chosen = similarity.gather(2, plain.unsqueeze(2)).squeeze(2)
    assert (best - chosen <= 2e-6).all()
    assert torch.equal(match[match >= 0], plain[match >= 0])
    if not mutual:
        assert torch.equal(match, plain)
    else:
        back = similarity.amax(dim=1)  # (N, Sk): each key's own best
        lost = match < 0
        taken = back.gather(1, plain)
        assert (taken[~lost] - chosen[~lost] <= 2e-6).all()
        # A lost position's key likes another query at least as much.
        assert (taken[lost] - chosen[lost] >= -2e-6).all()
        for image in range(n):
            kept = match[image][~lost[image]]
            assert len(kept.unique()) == len(kept)


@quick
@given(st.data(), isas, st.booleans())
def test_dense_match_at_every_scale(data: st.DataObject, isa: str, channels_last: bool) -> None:
    """Every position has a length of its own, all that its type holds; some are zero vectors."""
    n, c, sq, sk = (data.draw(st.integers(1, high)) for high in (2, 40, 70, 70))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    low, high = data.draw(st.sampled_from([(-120, 115), (-100, -60), (58, 115), (-1, 1)]))

    def grid(positions: int) -> Tensor:
        values = torch.randn(n, c, positions, generator=generator, dtype=torch.float64)
        power = torch.randint(low, high + 1, (n, 1, positions), generator=generator)
        zero = torch.rand(n, 1, positions, generator=generator) < 0.1
        values = torch.where(zero, 0.0, torch.ldexp(values, power)).to(dtype)
        return values.transpose(1, 2).contiguous().transpose(1, 2) if channels_last else values

    query, key = grid(sq), grid(sk)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DENSECL_CPU_ISA", isa)
        match = ops.dense_match(query, key)
    tiny = torch.finfo(torch.float64).tiny
    similarity = torch.nn.functional.normalize(query.double(), dim=1, eps=tiny).transpose(
        1, 2
    ) @ torch.nn.functional.normalize(key.double(), dim=1, eps=tiny)
    chosen = similarity.gather(2, match.unsqueeze(2)).squeeze(2)
    assert (similarity.amax(dim=2) - chosen <= 2e-6).all()


@quick
@given(st.data())
def test_enqueue(data: st.DataObject) -> None:
    k, b, d = (data.draw(st.integers(low, high)) for low, high in ((1, 12), (0, 30), (1, 9)))
    queue = data.draw(strided((k, d), data.draw(dtypes)))
    keys = data.draw(strided((b, d), data.draw(dtypes)))
    pointer = torch.tensor([data.draw(st.integers(0, k - 1))])
    filled = torch.tensor(data.draw(st.integers(0, k)))
    normalize = data.draw(st.booleans())
    twins = [queue.clone(), pointer.clone(), filled.clone()]
    nans = queue._base.isnan().sum() if queue._base is not None else 0
    for _ in range(2):
        ops.enqueue_(queue, pointer, keys, filled=filled, normalize=normalize)
        reference.enqueue_(twins[0], twins[1], keys.double(), filled=twins[2], normalize=normalize)
    unit_step = torch.finfo(queue.dtype).eps
    torch.testing.assert_close(queue, twins[0], atol=1e-7, rtol=unit_step)
    assert torch.equal(pointer, twins[1]) and torch.equal(filled, twins[2])
    assert queue._base is None or queue._base.isnan().sum() == nans


@quick
@given(st.data(), st.floats(0.0, 1.0), isas)
def test_ema_update(data: st.DataObject, momentum: float, isa: str) -> None:
    shapes = data.draw(st.lists(st.lists(st.integers(0, 6), max_size=4).map(tuple), max_size=5))
    targets = [data.draw(strided(shape, data.draw(dtypes))) for shape in shapes]
    sources = [data.draw(strided(shape, data.draw(dtypes))) for shape in shapes]
    before = [target.double() for target in targets]
    nans = [t._base.isnan().sum() if t._base is not None else 0 for t in targets]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DENSECL_CPU_ISA", isa)
        ops.ema_update_(targets, sources, momentum)
    for target, old, source, count in zip(targets, before, sources, nans, strict=True):
        exact = momentum * old + (1.0 - momentum) * source.double()
        size = old.abs() + source.double().abs() + 1e-6
        rounding = 1.01 * torch.finfo(target.dtype).eps
        assert ((target.double() - exact).abs() <= rounding * size).all()
        assert target._base is None or target._base.isnan().sum() == count
