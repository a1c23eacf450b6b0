"""What is measured: a case is one size of one op, with every way to compute its result.

A function builds it: it draws the inputs on a device. Rows hold such functions with their sizes
bound by functools.partial, which can be sent to another process. The loss is in losses.py, the
training step in step.py.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from densecl_ext import _host, ops, reference

Results = tuple[Tensor, ...]
MOMENTUM = 0.999
FORMULA = "normalise + matmul + max"
FOREACH = ("_foreach_mul_ + _foreach_add_", "_foreach_lerp_")
PUBLISHED_QUEUE = "clone + slice assignment"
INDEXED = ("index_copy_", "index_copy_, device pointer")
# Sizes that take no time, by the name of the function: for tests, and to warm a process up.
SMALL: dict[str, dict[str, Any]] = {
    "dense_match": {"pairs": 2, "channels": 64, "positions": 25},
    "ema_update_": {"count": 8},
    "enqueue_": {"batch": 4, "queue_length": 64, "features": 16},
    "info_nce": {"rows": 48, "queue_length": 512},
    "step": {"backbone": "tiny", "batch": 8, "size": 32, "queue_length": 128},
    "step_loss": {"pairs": 4, "queue_length": 256, "features": 32, "channels": 64},
}


class NotAvailable(RuntimeError):
    """A candidate that cannot run here; the message says why and goes into the table."""


@dataclass
class Candidate:
    """One way to compute a case's result."""

    run: Callable[[], Any]  # what is timed; may write in place
    results: Callable[[], Results]  # what it computes, from inputs that nobody has written to
    waits: str = ""  # why a CUDA graph cannot hold it


@dataclass
class Case:
    """One size of one op."""

    title: str
    names: tuple[str, ...]  # of the candidates, ours first
    candidate: Callable[[str], Candidate]  # by name; "reference" is the tests' truth
    errors: Callable[[Results, Results], dict[str, float]]  # of a candidate's against the truth
    bound: float  # of each error
    work: float = 0.0  # FLOP of one call, 0 where bytes are what counts
    traffic: float = 0.0  # bytes that one call must at least read and write
    images: int = 0  # of one call, where images/s are what counts
    eager_bytes: float = 0.0  # what the published formula holds at its peak
    # Of a whole step: seconds of its parts, by name. Its peak memory counts all that it is made of.
    parts: Callable[[str, Callable[[], Any]], dict[str, float]] | None = None

    def expected(self) -> Results:
        """The truth; none of a whole step, which a test holds against the published one."""
        return () if self.parts else self.candidate("reference").results()

    def check(self, name: str, got: Results, expected: Results) -> dict[str, float]:
        """Errors against the truth; AssertionError where one is too large."""
        errors = self.errors(got, expected)
        for what, error in errors.items():
            if not error <= self.bound:
                far = f"is off by {error:.2e}, allowed {self.bound:.0e}"
                told = "is not finite" if math.isnan(error) else far
                raise AssertionError(f"{name}: {what} {told}")
        return errors


def sizes(build: partial[Case]) -> dict[str, Any]:
    """What a case is, as results.json holds it."""
    found = inspect.signature(build).parameters.items()
    return {"kind": build.func.__name__} | {n: p.default for n, p in found if n != "device"}


def shrunk(build: partial[Case]) -> partial[Case]:
    """At a size that takes no time."""
    return partial(build, **SMALL[build.func.__name__])


def candidate_of(case: Case, name: str) -> Candidate:
    """By name; "ours [NAME=value ...]" runs under those environment settings.

    Raises:
        NotAvailable: it cannot run here.
    """
    base, _, settings = name.partition(" [")
    made = case.candidate(base)
    if not settings:
        return made
    if "DENSECL_CUDA" in settings and not torch.cuda.is_available():
        raise NotAvailable("on a GPU only")
    values = dict(setting.split("=", 1) for setting in settings.rstrip("]").split())
    if (isa := values.get("DENSECL_CPU_ISA")) and isa not in _host.available_isas():
        raise NotAvailable(f"this machine lacks {isa}")
    under = patch.dict(os.environ, values)  # as a decorator: at every call
    return Candidate(under(made.run), under(made.results), made.waits)


def relative(got: Tensor, expected: Tensor, floor: float = 1e-30) -> float:
    """L2 error in units of the expected tensor's length, or of the floor where that is longer."""
    expected = expected.double()
    return float((got.double() - expected).norm() / expected.norm().clamp(min=floor))


def normal_numbers(device: torch.device) -> Callable[..., Tensor]:
    """Seeded draws, made where they are wanted: a GPU draws gigabytes in no time."""
    generator = torch.Generator(device.type).manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator, device=device)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function under torch.compile, one graph for these very shapes."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


def dense_match(
    device: torch.device, *, pairs: int, channels: int = 2048, positions: int = 49,
    dtype: str = "float32", channels_last: bool = False,
) -> Case:  # fmt: skip
    """Matching of image pairs with a number of positions each."""
    draw, shape = normal_numbers(device), (pairs, channels, positions)
    query, noise = draw(*shape), draw(*shape)
    key = query[:, :, draw(positions).argsort()] + noise
    inputs = [features.to(getattr(torch, dtype)).contiguous() for features in (query, key)]
    if channels_last:
        inputs = [features.mT.contiguous().mT for features in inputs]

    def candidate(name: str) -> Candidate:
        known = {"ours": ops.dense_match, "reference": reference.dense_match}
        function = known.get(name, match_as_published)
        if name == "torch.compile":
            function = compiled(function)
        return Candidate(lambda: function(*inputs), lambda: (function(*inputs),))

    def errors(got: Results, expected: Results) -> dict[str, float]:
        # Near-ties may fall either way; the keys are noisy copies, so there are none to speak of.
        wrong = (got[0] != expected[0]).double().mean()
        return {"share of different matches": float(wrong)}

    size = f"N={pairs} C={channels:,} {positions}x{positions}, {dtype}"
    return Case(
        f"dense_match, {size}{', channels-last' * channels_last}",
        ("ours", FORMULA, "torch.compile"), candidate, errors, 1e-3,
        work=2.0 * pairs * channels * positions**2, traffic=2.0 * inputs[0].nbytes,
    )  # fmt: skip


def match_as_published(query: Tensor, key: Tensor) -> Tensor:
    """DenseCL, section 3.3: normalise (N, C, S), multiply, take the best."""
    query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
    return (query.transpose(1, 2) @ key).max(dim=2)[1]


def ema_update_(device: torch.device, *, count: int = 161) -> Case:
    """Momentum update of ResNet-50's parameters, or of the first few of them."""
    draw, shapes = normal_numbers(device), resnet50_shapes()[:count]
    targets, sources = ([draw(*shape) for shape in shapes] for _ in range(2))
    updates: dict[str, Callable[[list[Tensor], list[Tensor]], Any]] = {
        "ours": partial(ops.ema_update_, momentum=MOMENTUM),
        "reference": partial(reference.ema_update_, momentum=MOMENTUM),
        "loop": ema_loop,
        FOREACH[0]: ema_mul_add,
        FOREACH[1]: lambda a, b: torch._foreach_lerp_(a, b, 1.0 - MOMENTUM),
    }

    def candidate(name: str) -> Candidate:
        update, waits = updates[name], "gives every parameter new storage" * (name == "loop")
        own = [target.clone() for target in targets] if waits else targets

        def results() -> Results:
            copies = [target.clone() for target in targets]
            update(copies, sources)
            return tuple(copies)

        return Candidate(lambda: update(own, sources), results, waits)

    def errors(got: Results, expected: Results) -> dict[str, float]:
        return {"relative error": max(map(relative, got, expected))}

    return Case(
        "ema_update_, ResNet-50's 161 parameters",
        ("ours", "loop", *FOREACH), candidate, errors, 1e-6,
        traffic=12.0 * sum(map(math.prod, shapes)),  # both are read, the target is written
    )  # fmt: skip


@torch.no_grad()
def ema_loop(targets: Sequence[Tensor], sources: Sequence[Tensor], momentum: float = 0.999) -> None:
    """MoCo's and DenseCL's published code, parameter by parameter."""
    for target, source in zip(targets, sources, strict=True):
        target.data = target.data * momentum + source.data * (1.0 - momentum)


@torch.no_grad()
def ema_mul_add(targets: list[Tensor], sources: list[Tensor]) -> None:
    """The two-pass form of today's libraries."""
    torch._foreach_mul_(targets, MOMENTUM)
    torch._foreach_add_(targets, sources, alpha=1.0 - MOMENTUM)


@cache
def resnet50_shapes() -> list[tuple[int, ...]]:
    """Shapes of torchvision's ResNet-50 parameters, in order: 161 of them, 25,557,032 numbers."""
    from torchvision.models import resnet50

    with torch.device("meta"):
        return [tuple(parameter.shape) for parameter in resnet50().parameters()]


def enqueue_(device: torch.device, *, batch: int, queue_length: int, features: int = 128) -> Case:
    """Writing B new keys of D numbers into a queue of K."""
    draw = normal_numbers(device)
    queue, keys = F.normalize(draw(queue_length, features), dim=1), draw(batch, features)
    steps: dict[str, Callable[..., Any]] = {
        "ours": ops.enqueue_,
        "reference": reference.enqueue_,
        PUBLISHED_QUEUE: enqueue_as_published,
        INDEXED[0]: lambda rows, pointer, keys: by_index(rows, pointer, keys, int(pointer)),
        INDEXED[1]: lambda rows, pointer, keys: by_index(rows, pointer, keys, pointer),
    }

    def candidate(name: str) -> Candidate:
        step, published = steps[name], name == PUBLISHED_QUEUE

        def state() -> tuple[Tensor, Tensor]:
            rows = queue.T.contiguous() if published else queue.clone()  # published: (D, K)
            return rows, torch.zeros(1, dtype=torch.int64, device=device)

        def results() -> Results:
            rows, pointer = state()
            step(rows, pointer, keys)
            return (rows.T if published else rows), pointer

        own = state()
        waits = "reads the pointer on the host" * (name in (PUBLISHED_QUEUE, INDEXED[0]))
        return Candidate(lambda: step(*own, keys), results, waits)

    def errors(got: Results, expected: Results) -> dict[str, float]:
        pointer = float((got[1] - expected[1]).abs().max())
        return {"relative error": relative(got[0], expected[0]), "pointer": pointer}

    return Case(
        f"enqueue_, B={batch} K={queue_length:,} D={features}, float32",
        ("ours", PUBLISHED_QUEUE, *INDEXED), candidate, errors, 1e-6,
    )  # fmt: skip


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
def by_index(queue: Tensor, pointer: Tensor, keys: Tensor, start: int | Tensor) -> None:
    """What PyTorch alone can do for a (K, D) queue that wraps round anywhere."""
    rows = (start + torch.arange(len(keys), device=queue.device)) % len(queue)
    queue.index_copy_(0, rows, F.normalize(keys, dim=1))
    pointer.copy_((pointer + len(keys)) % len(queue))
