"""Data, truths and error measures that the tests of the ops share.

The truth is :mod:`densecl_ext.reference` in float64 on the same inputs (for a 16-bit queue: on the
same rounded operands), the yardstick the same reference in float32, the eager code of today.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from densecl_ext import _host, ops, reference

ISAS: list[str] = _host.available_isas()
# Everything that may compute an op: the CPU's instruction sets, and the GPU's kernels, the best
# for the device and those for any.
BACKENDS = [
    *ISAS,
    pytest.param("cuda", marks=pytest.mark.gpu),
    pytest.param("cuda-portable", marks=pytest.mark.gpu),
]
QUEUE_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (loss, absolute; gradient, relative to the size of its terms) by the queue's dtype.
BOUNDS = {
    torch.float32: (1e-5, 1e-5),
    torch.bfloat16: (1e-4, 1e-3),
    torch.float16: (1e-4, 1e-3),
}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For many small calls: waking a second thread takes longer than what it would do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


_device = "cpu"


def use_backend(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has `run` and `on_device` compute by one of BACKENDS until the test ends."""
    if backend in ISAS:
        monkeypatch.setenv("DENSECL_CPU_ISA", backend)
        return
    monkeypatch.setitem(globals(), "_device", "cuda")
    _, _, kernel = backend.partition("-")
    monkeypatch.setenv("DENSECL_CUDA_KERNEL", kernel)


def on_device(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function computed where use_backend said; arguments, gradients and result on the CPU."""

    def move(value: Any) -> Any:
        return value.to(_device) if isinstance(value, Tensor) else value

    def call(*args: Any, **options: Any) -> Tensor:
        return function(*map(move, args), **{k: move(v) for k, v in options.items()}).cpu()

    return call


def generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    """The same numbers on every device, on the one that new tensors go to."""
    drawn = torch.randn(shape, generator=generator(seed), device="cpu")
    return drawn.to(torch.get_default_device())


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test's new tensors go to each device in turn."""
    torch.set_default_device(request.param)
    yield request.param
    torch.set_default_device(None)


on_each_device = pytest.mark.usefixtures("device")


def unit(rows: Tensor) -> Tensor:
    return F.normalize(rows, dim=1)


@dataclass
class Rows:
    """Arguments of one info_nce call."""

    query: Tensor  # (M, D)
    positive: Tensor  # (M, D)
    queue: Tensor  # (K, D)
    options: dict[str, Any] = field(default_factory=dict)


def _random(m: int, k: int, d: int, g: torch.Generator) -> Rows:
    # Some queue rows lie near some queries: among far rows alone the softmax is so flat that a
    # wrong weighted sum would not show.
    query = torch.randn(m, d, generator=g)
    queue = torch.randn(k, d, generator=g)
    near = torch.arange(0, k, 3)
    queue[near] = query[near % m] + 0.7 * queue[near]
    positive = query + torch.randn(m, d, generator=g)
    return Rows(2.0 * query, positive, unit(queue))


def _clustered(m: int, k: int, d: int, g: torch.Generator) -> Rows:
    centres = torch.randn(4, d, generator=g)

    def draw(count: int) -> Tensor:
        which = torch.randint(4, (count,), generator=g)
        return centres[which] + 0.3 * torch.randn(count, d, generator=g)

    return Rows(draw(m), draw(m), unit(draw(k)))


def _one_dominant(m: int, k: int, d: int, g: torch.Generator) -> Rows:
    direction = torch.randn(d, generator=g)
    query = direction + 0.2 * torch.randn(m, d, generator=g)
    queue = 0.2 * torch.randn(k, d, generator=g) - direction
    queue[k // 2] = direction
    return Rows(query, torch.randn(m, d, generator=g), unit(queue))


def _duplicated(m: int, k: int, d: int, g: torch.Generator) -> Rows:
    few = torch.randn(3, d, generator=g)
    query = few[torch.arange(m) % 3] + 0.5 * torch.randn(m, d, generator=g)
    positive = query + torch.randn(m, d, generator=g)
    return Rows(query, positive, unit(few[torch.arange(k) % 3]))


def _positive_in_queue(m: int, k: int, d: int, g: torch.Generator) -> Rows:
    rows = _random(m, k, d, g)
    shared = min(m, k)
    rows.queue[k - shared :] = unit(rows.positive)[:shared]
    return rows


def _all_equal(m: int, k: int, d: int, g: torch.Generator) -> Rows:
    row = torch.randn(1, d, generator=g)
    return Rows(row.repeat(m, 1), row.repeat(m, 1), unit(row).repeat(k, 1))


def _lengths(count: int, low: float, high: float) -> Tensor:
    return torch.logspace(math.log10(low), math.log10(high), count).unsqueeze(1)


def _long_and_short(m: int, k: int, d: int, g: torch.Generator) -> Rows:
    """Rows of length 0.01 to 1,000, taken as they are."""
    rows = _clustered(m, k, d, g)
    query = unit(rows.query) * _lengths(m, 0.01, 1e3)
    positive = unit(rows.positive) * _lengths(m, 0.01, 1e3).flip(0)
    return Rows(query, positive, rows.queue, {"normalize": False})


def _long_queue(m: int, k: int, d: int, g: torch.Generator) -> Rows:
    """Queue rows of length 0.1 to 30, the longest first, beside unit queries."""
    rows = _clustered(m, k, d, g)
    return Rows(rows.query, rows.positive, rows.queue * _lengths(k, 0.1, 30.0).flip(0))


def _opposed(m: int, k: int, d: int, g: torch.Generator) -> Rows:
    """Every negative far on the other side: the largest logit of a row is far below zero."""
    direction = torch.randn(d, generator=g)
    query = direction + 0.1 * torch.randn(m, d, generator=g)
    queue = unit(0.1 * torch.randn(k, d, generator=g) - direction)
    return Rows(query, 0.3 * randn(m, d) - direction, queue * _lengths(k, 5.0, 50.0).flip(0))


REGIMES: dict[str, Callable[[int, int, int, torch.Generator], Rows]] = {
    "random": _random,
    "clustered": _clustered,
    "one_dominant": _one_dominant,
    "duplicated": _duplicated,
    "positive_in_queue": _positive_in_queue,
    "all_equal": _all_equal,
    "long_and_short": _long_and_short,
    "long_queue": _long_queue,
    "opposed": _opposed,
}


@dataclass
class Result:
    loss: Tensor  # (M,)
    grad_query: Tensor  # (M, D)
    grad_positive: Tensor  # (M, D)


def run(function: Callable[..., Tensor], rows: Rows, *, double: bool = False) -> Result:
    """Losses of the rows, and the gradients of their sum."""
    query, positive, queue = rows.query, rows.positive, rows.queue
    if function is ops.info_nce:
        function = on_device(function)
    if double:
        query, positive = query.double(), positive.double()
        # A 16-bit queue keeps its type, by which the reference rounds the operands.
        queue = queue.double() if queue.dtype == torch.float32 else queue
    query = query.detach().clone().requires_grad_()
    positive = positive.detach().clone().requires_grad_()
    loss = function(query, positive, queue, reduction="none", **rows.options)
    loss.sum().backward()
    assert query.grad is not None and positive.grad is not None
    return Result(loss.detach(), query.grad, positive.grad)


def term_sizes(rows: Rows) -> tuple[Tensor, Tensor]:
    """Lengths of the two terms, added, whose difference is a row's gradient: (M,), (M,)."""
    options = rows.options
    temperature, normalize = options.get("temperature", 0.2), options.get("normalize", True)
    query, positive, queue = rows.query.double(), rows.positive.double(), rows.queue.double()
    query_length = query.norm(dim=1) if normalize else torch.ones(len(query))
    positive_length = positive.norm(dim=1) if normalize else torch.ones(len(query))
    if normalize:
        query, positive = unit(query), unit(positive)
    negatives = query @ queue.T / temperature  # (M, K)
    excess = negatives.logsumexp(dim=1) - (query * positive).sum(dim=1) / temperature
    # The float64 truth subtracts a probability from 1, so shares below 1e-10 drown in its rounding.
    pull = torch.sigmoid(excess).clamp(min=1e-10) / temperature  # (M,)
    mean_negative = negatives.softmax(dim=1) @ queue  # (M, D)
    grad_query = pull * (positive.norm(dim=1) + mean_negative.norm(dim=1)) / query_length
    return grad_query, pull * query.norm(dim=1) / positive_length


def row_errors(got: Tensor, truth: Tensor, size: Tensor) -> Tensor:
    """L2 error of each row, in units of size (M,)."""
    return (got.double() - truth.double()).norm(dim=1) / size.clamp(min=1e-30)


def rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt()) if values.numel() else 0.0


@lru_cache(maxsize=256)
def case(
    regime: str, m: int, k: int, d: int, temperature: float, queue_dtype: torch.dtype
) -> tuple[Rows, Result, Result]:
    """Rows of a regime with their truth and eager float32's results."""
    rows = REGIMES[regime](m, k, d, generator(m + 7 * k + 31 * d))
    rows.queue = rows.queue.to(queue_dtype)
    rows.options["temperature"] = temperature
    return rows, run(reference.info_nce, rows, double=True), run(reference.info_nce, rows)


def assert_close_to_truth(rows: Rows, got: Result, truth: Result, eager: Result) -> None:
    """The promise: within the dtype's bounds, or twice eager float32's own error.

    Errors are compared as root mean squares over the rows, since the largest of a handful of
    roundings is a matter of luck; a single row may stray to three times eager's largest.
    """
    loss_bound, grad_bound = BOUNDS[rows.queue.dtype]
    error = (got.loss.double() - truth.loss).abs()
    eager_error = (eager.loss.double() - truth.loss).abs()
    # A float32 result is no better than its last digit, however it was computed.
    last_digit = 2.0**-23 * truth.loss.abs()
    assert not (truth.loss.isnan() | got.loss.isnan()).any()
    excess = (error - last_digit).clamp(min=0.0)
    assert rms(excess) <= max(loss_bound, 2.0 * rms(eager_error))
    assert excess.max() <= max(loss_bound, 3.0 * float(eager_error.max()))
    for name, size in zip(("grad_query", "grad_positive"), term_sizes(rows), strict=True):
        exact = getattr(truth, name)
        eager_error = row_errors(getattr(eager, name), exact, size)
        error = row_errors(getattr(got, name), exact, size)
        assert rms(error) <= max(grad_bound, 2.0 * rms(eager_error)), name
        assert error.max() <= max(grad_bound, 3.0 * float(eager_error.max())), name


def check_case(
    regime: str, m: int, k: int, d: int, temperature: float, queue_dtype: torch.dtype
) -> None:
    rows, truth, eager = case(regime, m, k, d, temperature, queue_dtype)
    assert_close_to_truth(rows, run(ops.info_nce, rows), truth, eager)


def snapshot(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def assert_same_bits(now: list[Tensor], before: list[Tensor]) -> None:
    for a, b in zip(now, before, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        if a.device.type != "meta":
            assert torch.equal(_bits(a), _bits(b))


def _bits(tensor: Tensor) -> Tensor:
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
    return tensor.detach().contiguous().view(-1).view(integer[tensor.element_size()])


def similarities(query: Tensor, key: Tensor) -> Tensor:
    """(N, Sq, Sk) cosines in float64."""
    unit_query, unit_key = (
        F.normalize(x.double().flatten(2), dim=1, eps=1e-300) for x in (query, key)
    )
    return unit_query.transpose(1, 2) @ unit_key


def assert_best(query: Tensor, key: Tensor, match: Tensor) -> None:
    """Equal to the float64 argmax but where the float64 values tie within float32 rounding."""
    similarity = similarities(query, key)
    assert match.dtype == torch.int64 and match.shape == similarity.shape[:2]
    assert ((match >= 0) & (match < similarity.shape[2])).all()
    chosen = similarity.gather(2, match.unsqueeze(2)).squeeze(2)
    best = similarity.amax(dim=2)
    rounding = 2.0**-23 * max(4.0, query.shape[1] ** 0.5)
    assert (best - chosen <= rounding).all(), float((best - chosen).max())
    clear = (similarity >= (best - rounding).unsqueeze(2)).sum(dim=2) == 1
    assert torch.equal(match[clear], similarity.argmax(dim=2)[clear])


def assert_mutual(query: Tensor, key: Tensor, match: Tensor) -> None:
    """Where nothing ties within rounding, mutual matches are those of float64."""
    similarity = similarities(query, key)
    rounding = 2.0**-23 * max(4.0, query.shape[1] ** 0.5)

    def clear(dim: int) -> Tensor:
        best = similarity.amax(dim=dim, keepdim=True)
        return (similarity >= best - rounding).sum(dim=dim) == 1

    expected = reference.dense_match(query.double(), key.double(), mutual=True)
    forward = similarity.argmax(dim=2)
    certain = clear(2) & clear(1).gather(1, forward)
    assert certain.float().mean() > 0.9
    assert torch.equal(match[certain], expected[certain])
