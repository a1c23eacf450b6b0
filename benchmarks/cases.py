"""What is measured: a case is one size of one op, with every way to compute its result.

A case is plain data, so that it can be sent to another process; it builds its inputs, and from
these its candidates. The losses have a file of their own, losses.py, the training step step.py.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from densecl_ext import ops, reference

Results = tuple[Tensor, ...]
MOMENTUM = 0.999


class NotAvailable(RuntimeError):
    """A candidate that cannot run here; the message says why and goes into the table."""


@dataclass
class Candidate:
    """One way to compute a case's result."""

    run: Callable[[], Any]  # what is timed; may write in place
    results: Callable[[], Results]  # what it computes, from inputs that nobody has written to
    waits: str = ""  # why a CUDA graph cannot hold it


@dataclass(frozen=True)
class Case:
    """One size of one op. `names` are its candidates, ours first."""

    title: ClassVar[Any]
    names: ClassVar[tuple[str, ...]]
    small: ClassVar[dict[str, Any]]  # a size that takes no time
    images: ClassVar[Any] = 0  # of one call, where images/s are what counts
    whole_memory: ClassVar[bool] = False  # peak memory counts all that a candidate is made of
    work: ClassVar[Any] = 0.0  # FLOP of one call, 0 where bytes are what counts
    traffic: ClassVar[Any] = 0.0  # bytes that one call must at least read and write
    eager_bytes: ClassVar[Any] = 0.0  # what the published formula holds at its peak

    def inputs(self, device: torch.device) -> Any:
        raise NotImplementedError

    def candidate(self, name: str, inputs: Any) -> Candidate:
        """By name; "reference" is what every candidate must agree with: the tests' truth."""
        raise NotImplementedError

    def expected(self, inputs: Any) -> Results:
        return self.candidate("reference", inputs).results()

    def check(self, name: str, got: Results, expected: Results) -> dict[str, float]:
        """Errors against the expected results; AssertionError where they are too large."""
        raise NotImplementedError

    def parts(self, name: str, run: Callable[[], Any], device: torch.device) -> dict[str, float]:
        """Seconds of what a call consists of, by name; of a training step alone."""
        return {}

    def message(self) -> dict[str, Any]:
        """The case as results.json holds it."""
        return {"kind": type(self).__name__, **asdict(self)}

    def shrunk(self) -> Case:
        """At a size that takes no time: for tests, and to warm a process up."""
        return replace(self, **self.small)


def candidate_of(case: Case, name: str, inputs: Any) -> Candidate:
    """By name; "ours [NAME=value ...]" runs under those environment settings.

    Raises:
        NotAvailable: it cannot run here.
    """
    base, _, settings = name.partition(" [")
    made = case.candidate(base, inputs)
    if not settings:
        return made
    if "DENSECL_CUDA" in settings and not torch.cuda.is_available():
        raise NotAvailable("on a GPU only")
    values = dict(setting.split("=", 1) for setting in settings.rstrip("]").split())
    # As a decorator it sets the variables for every call.
    run, results = environment(values)(made.run), environment(values)(made.results)
    return Candidate(run, results, made.waits)


@contextmanager
def environment(settings: dict[str, str]) -> Iterator[None]:
    """The variables have these values inside; costs less than patch.dict, for it is timed too."""
    before = {name: os.environ[name] for name in settings if name in os.environ}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name in settings:
            del os.environ[name]
        os.environ.update(before)


def relative(got: Tensor, expected: Tensor, floor: float = 1e-30) -> float:
    """L2 error in units of the expected tensor's length, or of the floor where that is longer."""
    expected = expected.double()
    return float((got.double() - expected).norm() / expected.norm().clamp(min=floor))


def within(errors: dict[str, float], bound: float, name: str) -> dict[str, float]:
    """The errors, or AssertionError where one is beyond the bound."""
    for what, error in errors.items():
        if not error <= bound:
            raise AssertionError(f"{name}: {what} is off by {error:.2e}, allowed {bound:.0e}")
    return errors


def normal_numbers(device: torch.device) -> Callable[..., Tensor]:
    """Seeded draws, made where they are wanted: a GPU draws gigabytes in no time."""
    generator = torch.Generator(device.type).manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator, device=device)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function under torch.compile, one graph for these very shapes."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


@dataclass(frozen=True)
class MatchCase(Case):
    """dense_match of N image pairs with `positions` positions each."""

    names = ("ours", "normalise + matmul + max", "torch.compile")
    small = {"pairs": 2, "channels": 64, "positions": 25}
    pairs: int
    channels: int = 2048
    positions: int = 49
    dtype: str = "float32"
    channels_last: bool = False

    @property
    def title(self) -> str:
        size = f"N={self.pairs} C={self.channels:,} {self.positions}x{self.positions}"
        return f"dense_match, {size}, {self.dtype}{', channels-last' * self.channels_last}"

    def inputs(self, device: torch.device) -> list[Tensor]:
        draw, shape = normal_numbers(device), (self.pairs, self.channels, self.positions)
        query, noise = draw(*shape), draw(*shape)
        key = query[:, :, draw(self.positions).argsort()] + noise
        found = [features.to(getattr(torch, self.dtype)).contiguous() for features in (query, key)]
        if self.channels_last:
            return [features.mT.contiguous().mT for features in found]
        return found

    def candidate(self, name: str, inputs: list[Tensor]) -> Candidate:
        known = {"ours": ops.dense_match, "reference": reference.dense_match}
        function = known.get(name, match_as_published)
        if name == "torch.compile":
            function = compiled(function)
        return Candidate(lambda: function(*inputs), lambda: (function(*inputs),))

    def check(self, name: str, got: Results, expected: Results) -> dict[str, float]:
        # Near-ties may fall either way; the keys are noisy copies, so there are none to speak of.
        wrong = (got[0] != expected[0]).double().mean()
        return within({"share of different matches": float(wrong)}, 1e-3, name)

    @property
    def work(self) -> float:
        return 2.0 * self.pairs * self.channels * self.positions**2

    @property
    def traffic(self) -> float:
        size = getattr(torch, self.dtype).itemsize
        return 2.0 * self.pairs * self.channels * self.positions * size


def match_as_published(query: Tensor, key: Tensor) -> Tensor:
    """DenseCL, section 3.3: normalise (N, C, S), multiply, take the best."""
    query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
    return (query.transpose(1, 2) @ key).max(dim=2)[1]


@dataclass(frozen=True)
class EmaCase(Case):
    """Momentum update of ResNet-50's parameters, or of the first `count` of them."""

    title = "ema_update_, ResNet-50's 161 parameters"
    names = ("ours", "loop", "_foreach_mul_ + _foreach_add_", "_foreach_lerp_")
    small = {"count": 8}
    count: int = 161

    def inputs(self, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
        draw, shapes = normal_numbers(device), resnet50_shapes()[: self.count]
        return [draw(*shape) for shape in shapes], [draw(*shape) for shape in shapes]

    def candidate(self, name: str, inputs: tuple[list[Tensor], list[Tensor]]) -> Candidate:
        targets, sources = inputs
        waits = ""
        if name == "loop":
            targets = [target.clone() for target in targets]
            waits = "gives every parameter new storage"
        update: Callable[[list[Tensor]], Any] = {
            "ours": lambda targets: ops.ema_update_(targets, sources, MOMENTUM),
            "reference": lambda targets: reference.ema_update_(targets, sources, MOMENTUM),
            "loop": lambda targets: ema_loop(targets, sources, MOMENTUM),
            "_foreach_mul_ + _foreach_add_": lambda targets: ema_mul_add(targets, sources),
            "_foreach_lerp_": lambda t: torch._foreach_lerp_(t, sources, 1.0 - MOMENTUM),
        }[name]

        def results() -> Results:
            copies = [target.clone() for target in targets]
            update(copies)
            return tuple(copies)

        return Candidate(lambda: update(targets), results, waits)

    def check(self, name: str, got: Results, expected: Results) -> dict[str, float]:
        worst = max(relative(a, b) for a, b in zip(got, expected, strict=True))
        return within({"relative error": worst}, 1e-6, name)

    @property
    def traffic(self) -> float:  # both are read, the target is written
        return 12.0 * sum(math.prod(shape) for shape in resnet50_shapes()[: self.count])


@torch.no_grad()
def ema_loop(targets: Sequence[Tensor], sources: Sequence[Tensor], momentum: float) -> None:
    """MoCo's and DenseCL's published code, parameter by parameter."""
    for target, source in zip(targets, sources, strict=True):
        target.data = target.data * momentum + source.data * (1.0 - momentum)


@torch.no_grad()
def ema_mul_add(targets: list[Tensor], sources: list[Tensor]) -> None:
    """The two-pass form of today's libraries."""
    torch._foreach_mul_(targets, MOMENTUM)
    torch._foreach_add_(targets, sources, alpha=1.0 - MOMENTUM)


@functools.cache
def resnet50_shapes() -> list[tuple[int, ...]]:
    """Shapes of torchvision's ResNet-50 parameters, in order: 161 of them, 25,557,032 numbers."""
    from torchvision.models import resnet50

    with torch.device("meta"):
        return [tuple(parameter.shape) for parameter in resnet50().parameters()]


@dataclass(frozen=True)
class EnqueueCase(Case):
    """Writing B new keys of D numbers into a queue of K."""

    names = ("ours", "clone + slice assignment", "index_copy_", "index_copy_, device pointer")
    small = {"batch": 4, "queue_length": 64, "features": 16}
    batch: int
    queue_length: int
    features: int = 128

    @property
    def title(self) -> str:
        size = f"B={self.batch} K={self.queue_length:,} D={self.features}"
        return f"enqueue_, {size}, float32"

    def inputs(self, device: torch.device) -> tuple[Tensor, Tensor]:
        draw = normal_numbers(device)
        queue = F.normalize(draw(self.queue_length, self.features), dim=1)
        return queue, draw(self.batch, self.features)

    def candidate(self, name: str, inputs: tuple[Tensor, Tensor]) -> Candidate:
        queue, keys = inputs
        step = {
            "ours": ops.enqueue_,
            "reference": reference.enqueue_,
            "clone + slice assignment": enqueue_as_published,
            "index_copy_": lambda *state: enqueue_by_index(*state, int(state[1])),
            "index_copy_, device pointer": lambda *state: enqueue_by_index(*state, state[1]),
        }[name]
        published = name == "clone + slice assignment"

        def state() -> tuple[Tensor, Tensor]:
            rows = queue.T.contiguous() if published else queue.clone()  # published: (D, K)
            return rows, torch.zeros(1, dtype=torch.int64, device=queue.device)

        own = state()

        def results() -> Results:
            rows, pointer = state()
            step(rows, pointer, keys)
            return (rows.T if published else rows), pointer

        waits = "reads the pointer on the host" if name in self.names[1:3] else ""
        return Candidate(lambda: step(*own, keys), results, waits)

    def check(self, name: str, got: Results, expected: Results) -> dict[str, float]:
        errors = {"relative error": relative(got[0], expected[0])}
        errors["pointer"] = float((got[1] - expected[1]).abs().max())
        return within(errors, 1e-6, name)


@torch.no_grad()
def enqueue_as_published(queue: Tensor, pointer: Tensor, keys: Tensor) -> Tensor:
    """MoCo's and DenseCL's published step around a (D, K) queue.

    The loss reads a clone, since the queue is about to be written: the clone is part of the price.
    """
    negatives = queue.clone().detach()  # (D, K)
    keys = F.normalize(keys, dim=1)
    batch, length, start = keys.shape[0], queue.shape[1], int(pointer)
    queue[:, start : start + batch] = keys.T
    pointer[0] = (start + batch) % length
    return negatives


@torch.no_grad()
def enqueue_by_index(queue: Tensor, pointer: Tensor, keys: Tensor, start: int | Tensor) -> None:
    """What PyTorch alone can do for a (K, D) queue that wraps round anywhere."""
    rows = (start + torch.arange(len(keys), device=queue.device)) % len(queue)
    queue.index_copy_(0, rows, F.normalize(keys, dim=1))
    pointer.copy_((pointer + len(keys)) % len(queue))
