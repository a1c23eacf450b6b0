"""ema_update_ against float64: dtypes, layouts, many tensors, nothing written on an error."""

from __future__ import annotations

import math

import pytest
import torch
from op_cases import (  # noqa: F401
    BACKENDS,
    ISAS,
    QUEUE_DTYPES,
    assert_same_bits,
    device,
    on_each_device,
    randn,
    snapshot,
)
from torch import Tensor, nn

from densecl_ext import ops, reference

# Half a unit in the last place, in units of the value's power of two.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def assert_mixed(target: Tensor, before: Tensor, source: Tensor, momentum: float) -> None:
    """Within the arithmetic's float32 roundings and the target type's own."""
    old, new = momentum * before.double(), (1.0 - momentum) * source.double()
    bound = ROUNDING[target.dtype] * (old + new).abs() + 2.0**-22 * (old.abs() + new.abs())
    bound += 2.0**-24  # float16's step near zero
    assert target.dtype == before.dtype and target.shape == before.shape
    assert ((target.double() - (old + new)).abs() <= bound).all()


@pytest.mark.parametrize("backend", BACKENDS[:-1])
@pytest.mark.parametrize("momentum", [0.0, 0.25, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("source_dtype", QUEUE_DTYPES, ids=str)
@pytest.mark.parametrize("target_dtype", QUEUE_DTYPES, ids=str)
def test_against_float64(
    target_dtype: torch.dtype,
    source_dtype: torch.dtype,
    momentum: float,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if backend in ISAS:
        monkeypatch.setenv("DENSECL_CPU_ISA", backend)
    else:
        monkeypatch.setattr(torch, "get_default_device", lambda: torch.device(backend))
    shapes = [(1,), (3, 5), (7,), (16,), (1023,), (2, 3, 4, 5), (40_000,), ()]
    targets = [randn(*s, seed=i).to(target_dtype) for i, s in enumerate(shapes)]
    sources = [randn(*s, seed=50 + i).to(source_dtype) for i, s in enumerate(shapes)]
    before, given = snapshot(targets), snapshot(sources)
    assert ops.ema_update_(targets, sources, momentum) is None
    for target, old, source in zip(targets, before, sources, strict=True):
        assert_mixed(target, old, source, momentum)
    assert_same_bits(sources, given)
    if momentum == 1.0:
        assert all(torch.equal(t, b) for t, b in zip(targets, before, strict=True))
    if momentum == 0.0:
        copies = [source.to(target_dtype) for source in sources]
        assert all(torch.equal(t, c) for t, c in zip(targets, copies, strict=True))


@on_each_device
@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.999, 1.0])
def test_a_momentum_in_a_tensor_gives_the_bits_of_the_number(momentum: float) -> None:
    expected, target, other = randn(1003), randn(1003), randn(1003, seed=1)
    ops.ema_update_([expected], [other], momentum)
    scheduled = torch.tensor(momentum, dtype=torch.float64)
    ops.ema_update_([target], [other], scheduled)
    assert torch.equal(target, expected)
    target = randn(1003)
    ops.ema_update_([target], [other], scheduled.float().reshape(1))
    assert torch.allclose(target, expected, rtol=0.0, atol=1e-6)
    target = randn(1003)
    torch.ops.densecl_ext.ema_update_(target_list := [target], [other], scheduled)
    assert torch.equal(target_list[0], expected)


def test_a_momentum_in_a_tensor_is_checked() -> None:
    target, other = torch.ones(3), torch.zeros(3)
    for momentum, error, words in [
        (torch.tensor(1.5), ValueError, r"momentum must lie in \[0, 1\], got 1\.5"),
        (torch.ones(2), ValueError, r"momentum must have one element, got \(2,\)"),
        (torch.tensor(1), TypeError, "momentum must be floating point, got int64"),
        (torch.ones((), device="meta"), RuntimeError, "momentum must be on targets"),
        ("0.9", TypeError, "momentum must be a number, got str"),
    ]:
        with pytest.raises(error, match=words):
            ops.ema_update_([target], [other], momentum)  # type: ignore[arg-type]
        assert (target == 1.0).all() and target._version == 0


@on_each_device
def test_hundreds_of_tensors() -> None:
    """Spans of a task cross the borders between tensors; empty ones lie in between.

    More than a GPU's launch takes.
    """
    sizes = [(i * 37) % 500 for i in range(1100)] + [70_000, 0, 1]
    targets = [randn(size, seed=i) for i, size in enumerate(sizes)]
    sources = [randn(size, seed=1000 + i) for i, size in enumerate(sizes)]
    before = snapshot(targets)
    ops.ema_update_(targets, sources, 0.9)
    for target, old, source in zip(targets, before, sources, strict=True):
        assert_mixed(target, old, source, 0.9)


@on_each_device
def test_mixed_dtypes_in_one_list() -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    pairs = [(t, s) for t in dtypes for s in dtypes]
    targets = [randn(100, seed=i).to(t) for i, (t, _) in enumerate(pairs)]
    sources = [randn(100, seed=9 + i).to(s) for i, (_, s) in enumerate(pairs)]
    before = snapshot(targets)
    ops.ema_update_(tuple(targets), sources, 0.5)
    for target, old, source in zip(targets, before, sources, strict=True):
        assert_mixed(target, old, source, 0.5)


def _strided(values: Tensor, kind: str) -> Tensor:
    """The values in a view whose surroundings hold NaN."""
    if kind == "contiguous":
        return values.clone()
    if kind == "channels_last":
        return values.clone(memory_format=torch.channels_last)
    if kind == "transposed":
        return values.transpose(1, 3).contiguous().transpose(1, 3)
    n, c, h, w = values.shape
    wide = torch.full((n, c + 2, h, 2 * w), math.nan)
    view = wide[:, 1:-1, :, ::2]
    view.copy_(values)
    return view


KINDS = ["contiguous", "channels_last", "transposed", "sliced"]


@on_each_device
@pytest.mark.parametrize("source_kind", KINDS)
@pytest.mark.parametrize("target_kind", KINDS)
def test_layouts(target_kind: str, source_kind: str) -> None:
    values, other = randn(3, 5, 4, 6), randn(3, 5, 4, 6, seed=1)
    expected = values.clone()
    ops.ema_update_([expected], [other], 0.75)
    target = _strided(values, target_kind)
    stride = target.stride()
    base = target._base if target._base is not None else target
    outside = base.isnan().sum()
    ops.ema_update_([target], [_strided(other, source_kind)], 0.75)
    assert torch.equal(target, expected)
    assert target.stride() == stride and base.isnan().sum() == outside


@on_each_device
@pytest.mark.parametrize("dtype", QUEUE_DTYPES, ids=str)
def test_tensors_at_odd_addresses(dtype: torch.dtype) -> None:
    """No pair begins where a vector may be read whole."""
    size, count = 40_003, 9
    targets = [randn(size + i, seed=i).to(dtype)[i:] for i in range(count)]
    sources = [randn(size + 3, seed=50 + i)[3:] for i in range(count)]
    before = snapshot(targets)
    ops.ema_update_(targets, sources, 0.9)
    for target, old, source in zip(targets, before, sources, strict=True):
        assert_mixed(target, old, source, 0.9)


@on_each_device
def test_offset_target_leaves_its_neighbours_alone() -> None:
    base = torch.full((50,), 7.0)
    ops.ema_update_([base[3:36]], [torch.zeros(33)], 0.5)
    assert (base[3:36] == 3.5).all() and (base[:3] == 7.0).all() and (base[36:] == 7.0).all()


@on_each_device
def test_expanded_source() -> None:
    target = torch.ones(4, 3)
    ops.ema_update_([target], [torch.tensor([3.0]).expand(4, 3)], 0.5)
    assert (target == 2.0).all()


@on_each_device
def test_empty_lists_and_tensors() -> None:
    ops.ema_update_([], [], 0.5)
    target = torch.ones(2)
    empty = [torch.empty(0), torch.empty(3, 0, 2, dtype=torch.bfloat16)]
    ops.ema_update_([empty[0], target, empty[1]], [empty[0], torch.zeros(2), empty[1]], 0.5)
    assert (target == 0.5).all()


@on_each_device
def test_special_values_pass_as_they_would_in_torch() -> None:
    target = torch.tensor([math.nan, 1.0, math.inf, 1.0, math.inf])
    source = torch.tensor([1.0, math.nan, 1.0, -math.inf, -math.inf])
    ops.ema_update_([target], [source], 0.5)
    expected = torch.tensor([math.nan, math.nan, math.inf, -math.inf, math.nan])
    torch.testing.assert_close(target, expected, equal_nan=True)


@on_each_device
@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("target_dtype", QUEUE_DTYPES, ids=str)
@pytest.mark.parametrize("source_dtype", QUEUE_DTYPES, ids=str)
def test_a_side_without_weight_counts_for_nothing(
    source_dtype: torch.dtype, target_dtype: torch.dtype, scheduled: bool
) -> None:
    """Momentum 1 keeps targets beside NaN sources, 0 replaces NaN targets."""
    bad = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0] * 7)
    good = randn(35)
    for update in (ops.ema_update_, reference.ema_update_):
        if scheduled and update is reference.ema_update_:
            continue
        for value, target, source in ((1.0, good, bad), (0.0, bad, good)):
            momentum = torch.tensor(value) if scheduled else value
            moved, other = target.clone().to(target_dtype), source.to(source_dtype)
            expected = moved.clone() if value == 1.0 else other.to(target_dtype)
            update([moved], [other], momentum)
            assert torch.equal(moved, expected)
            assert torch.equal(moved.signbit(), expected.signbit())


@on_each_device
def test_one_tensor_as_source_of_many_and_of_itself() -> None:
    targets, source = [torch.zeros(5), torch.ones(5)], torch.full((5,), 2.0)
    ops.ema_update_(targets, [source, source], 0.5)
    assert (targets[0] == 1.0).all() and (targets[1] == 1.5).all()
    ops.ema_update_([source], [source], 0.25)
    assert (source == 2.0).all()


@on_each_device
def test_a_modules_parameters() -> None:
    """As it is used: parameters that require grad on both sides, nothing recorded."""
    key, query = nn.Linear(6, 4), nn.Linear(6, 4)
    before = snapshot(list(key.parameters()))
    ops.ema_update_(list(key.parameters()), list(query.parameters()), 0.9)
    for target, old, source in zip(key.parameters(), before, query.parameters(), strict=True):
        assert_mixed(target.detach(), old, source.detach(), 0.9)
        assert target.is_leaf and target.requires_grad and target.grad_fn is None
        assert source.grad is None and source.is_leaf


@on_each_device
def test_the_version_counter_moves() -> None:
    targets, source = [torch.ones(3), torch.ones(4)], torch.ones(3)
    versions = [t._version for t in targets]
    ops.ema_update_(targets, [source, torch.zeros(4)], 0.5)
    assert all(t._version > v for t, v in zip(targets, versions, strict=True))
    assert source._version == 0


@on_each_device
def test_backward_refuses_an_updated_weight() -> None:
    weight = torch.ones(3)
    x = torch.ones(3, requires_grad=True)
    product = (x * weight).sum()
    ops.ema_update_([weight], [torch.zeros(3)], 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@on_each_device
def test_inference_tensors() -> None:
    with torch.inference_mode():
        target = torch.ones(3)
        ops.ema_update_([target], [torch.zeros(3)], 0.25)
        assert (target == 0.25).all()


@pytest.mark.parametrize(
    "targets,sources,momentum,error",
    [
        ([torch.ones(3)], [torch.zeros(3), torch.zeros(3)], 0.5, ValueError),
        ([torch.ones(3), torch.ones(4)], [torch.zeros(3), torch.zeros(5)], 0.5, ValueError),
        ([torch.ones(3), torch.ones(4)], [torch.zeros(3), torch.zeros(2, 2)], 0.5, ValueError),
        ([torch.ones(3)], [torch.zeros(3)], 1.5, ValueError),
        ([torch.ones(3)], [torch.zeros(3)], -0.5, ValueError),
        ([torch.ones(3)], [torch.zeros(3)], math.nan, ValueError),
        ([torch.ones(3), torch.ones(4).long()], [torch.zeros(3), torch.zeros(4)], 0.5, TypeError),
        ([torch.ones(3), torch.ones(4)], [torch.zeros(3), torch.zeros(4).double()], 0.5, TypeError),
        ([torch.ones(3), torch.ones(4)], [torch.zeros(3), None], 0.5, TypeError),
        ([torch.ones(3), torch.ones(4)], [torch.zeros(3), torch.zeros(4, device="meta")], 0.5,
         RuntimeError),
        # An expanded target: several elements in one place cannot hold several values.
        ([torch.ones(3), torch.ones(1).expand(4)], [torch.zeros(3), torch.arange(4.0)], 0.5,
         (ValueError, RuntimeError)),
    ],
)  # fmt: skip
def test_nothing_is_written_on_an_error(
    targets: list[Tensor], sources: list[Tensor], momentum: float, error: type[Exception]
) -> None:
    targets = [t if 0 in t.stride() else t.clone() for t in targets]
    before = snapshot(targets)
    with pytest.raises(error, match=r"ema_update_"):
        ops.ema_update_(targets, sources, momentum)
    assert_same_bits(targets, before)
    assert all(t._version == 0 for t in targets)


def test_an_unknown_instruction_set_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    target = torch.ones(3)
    monkeypatch.setenv("DENSECL_CPU_ISA", "nonsense")
    with pytest.raises(RuntimeError, match="DENSECL_CPU_ISA"):
        ops.ema_update_([target], [torch.zeros(3)], 0.5)
    assert (target == 1.0).all()
