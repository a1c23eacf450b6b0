"""Timing on a GPU: by its own clock, in three ways.

graph   several calls captured in one CUDA graph and replayed: kernels, and no launch from Python
cold    one call in a graph, after a buffer larger than the L2 was written: nothing is cached
calls   plain calls from Python: what a training loop without graphs pays

Every candidate takes its turn in every round. The clock is a parameter: :class:`HostClock` times
the same way on a CPU, where the "graph" is a loop, so that all of this runs without a GPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from benchmarks.cases import Candidate

Run = Callable[[], Any]
MODES = ("graph", "cold", "calls")
SAMPLE = 0.002  # seconds that a sample of repeated calls fills
MOST_CALLS = 50  # in one sample
CAPTURE_FAILED = "capture failed: "


class Clock(Protocol):
    """What a device can time."""

    def seconds(self, run: Run, calls: int) -> float:
        """Time of so many calls, from the first one's start to the last one's end."""
        ...

    def capture(self, run: Run, calls: int) -> Run:
        """Something that repeats these calls without their launches; raises where that fails."""
        ...

    def flush(self) -> None:
        """Nothing that was read or written before is in the last level of cache."""
        ...


class CudaClock:
    """CUDA events and CUDA graphs.

    All graphs share one pool of memory: each writes its intermediates before it reads them, and
    they are never replayed at the same time, so a row's candidates need the memory of the largest.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        level2 = torch.cuda.get_device_properties(device).L2_cache_size
        self._buffer = torch.empty(4 * level2, dtype=torch.int8, device=device)
        self._anchor = self.capture(self._buffer[:1].zero_, 1)  # the pool lives with its graphs

    def seconds(self, run: Run, calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def capture(self, run: Run, calls: int) -> Run:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for _ in range(2):  # whatever a call sets up once must not be captured
                run()
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()  # the pool cannot take what the ordinary cache holds
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            for _ in range(calls):
                run()
        graph.replay()
        torch.cuda.synchronize(self._device)
        return graph.replay

    def flush(self) -> None:
        self._buffer.fill_(1)


class HostClock:
    """The processor's time, for the same code without a GPU."""

    def __init__(self, megabytes: int = 64) -> None:
        self._buffer = torch.empty(megabytes << 20, dtype=torch.int8)

    def seconds(self, run: Run, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return time.perf_counter() - start

    def capture(self, run: Run, calls: int) -> Run:
        def replay() -> None:
            for _ in range(calls):
                run()

        replay()
        return replay

    def flush(self) -> None:
        self._buffer.fill_(1)


def clock_for(device: torch.device) -> Clock:
    """The device's own clock."""
    return CudaClock(device) if device.type == "cuda" else HostClock()


@dataclass
class Timings:
    """Seconds of one call, a sample a round, by mode; and why a mode is missing."""

    samples: dict[str, list[float]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


@dataclass
class Prepared:
    """A candidate ready for the rounds."""

    run: Run
    calls: int  # in a sample of "graph" and of "calls"
    replay: Run | None  # that many calls
    replay_one: Run | None
    timings: Timings
    round_seconds: float


def prepare(candidate: Candidate, clock: Clock, waits: str = "") -> Prepared:
    """Warm up, find out how many calls fill a sample, capture unless something `waits`.

    Raises whatever the candidate raises.
    """
    run = candidate.run
    for _ in range(3):
        run()
    single = clock.seconds(run, 1)
    single = clock.seconds(run, 5 if single < SAMPLE else 1) / (5 if single < SAMPLE else 1)
    calls = max(1, min(MOST_CALLS, math.ceil(SAMPLE / max(single, 1e-7))))
    timings, replay, replay_one = Timings(), None, None
    try:
        if not waits:
            replay = clock.capture(run, calls)
            replay_one = replay if calls == 1 else clock.capture(run, 1)
    except Exception as error:
        replay = replay_one = None
        waits = f"{CAPTURE_FAILED}{first_line(error)}"
    if waits:
        timings.missing["graph"] = timings.missing["cold"] = waits
    round_seconds = single * (3 * calls + 2)
    return Prepared(run, calls, replay, replay_one, timings, round_seconds)


def sample(prepared: Prepared, clock: Clock) -> None:
    """One round of a candidate: a sample in every mode it can run in."""
    found = prepared.timings.samples
    if prepared.replay is not None and prepared.replay_one is not None:
        # The work in front of the timed one gives the host the time to launch it, so that the
        # events do not see the launch; here it also fills the cache, below it empties it.
        prepared.replay()
        seconds = clock.seconds(prepared.replay, 1) / prepared.calls
        found.setdefault("graph", []).append(seconds)
        clock.flush()
        found.setdefault("cold", []).append(clock.seconds(prepared.replay_one, 1))
    prepared.run()
    seconds = clock.seconds(prepared.run, prepared.calls) / prepared.calls
    found.setdefault("calls", []).append(seconds)


def measure(
    candidates: Mapping[str, Candidate], clock: Clock, *, seconds: float, least: int, most: int
) -> tuple[dict[str, Timings], dict[str, str]]:
    """Interleaved rounds of all candidates within so many seconds.

    After a capture that failed torch's allocator thinks that it still goes on, and no other one
    succeeds in this process: the remaining candidates are then called only, and say so.

    Returns:
        The timings by candidate, and why a candidate has none.
    """
    ready: dict[str, Prepared] = {}
    failed: dict[str, str] = {}
    broken = ""
    for name, candidate in candidates.items():
        try:
            ready[name] = prepare(candidate, clock, candidate.waits or broken)
        except Exception as error:
            failed[name] = first_line(error)
            continue
        if ready[name].timings.missing.get("graph", "").startswith(CAPTURE_FAILED):
            broken = f"not captured, since that of {name} had failed"
    cost = sum(prepared.round_seconds for prepared in ready.values())
    rounds = max(least, min(most, int(seconds / max(cost, 1e-9)))) | 1  # odd, for the median
    for _ in range(rounds):
        for prepared in ready.values():
            sample(prepared, clock)
    return {name: prepared.timings for name, prepared in ready.items()}, failed


def first_line(error: BaseException) -> str:
    """The error in one line of a table."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


def spread(samples: Iterable[float]) -> tuple[float, float, float]:
    """Median, 10th and 90th percentile, interpolated between samples."""
    ordered = sorted(samples)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return at(0.5), at(0.1), at(0.9)
