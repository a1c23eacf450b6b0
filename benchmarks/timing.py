"""Timing: every candidate takes its turn in every round, so that all share what the machine does.

calls   plain calls from Python: what a program without CUDA graphs pays
graph   on a GPU: several calls in one CUDA graph: kernels, and no launch from Python
cold    on a GPU: one call in a graph, after a buffer larger than the L2 was written

torch.utils.benchmark takes two calls before every sample, which triples rounds of calls that last
seconds; triton's do_bench_cudagraph measures one function alone. Neither interleaves.
"""

from __future__ import annotations

import gc
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.cases import Candidate

Run = Callable[[], Any]
MODES = ("graph", "cold", "calls")
CAPTURE_FAILED = "capture failed: "


class Clock:
    """The processor's time. With all MODES a loop stands for the graph, to try that code."""

    sample = 0.004  # seconds that a sample of repeated calls fills
    most_calls = 1 << 20  # in one sample

    def __init__(self, modes: tuple[str, ...] = ("calls",), megabytes: int = 64) -> None:
        self.modes = modes
        self._buffer = torch.empty(megabytes << 20 if len(modes) > 1 else 0, dtype=torch.int8)

    def seconds(self, run: Run, calls: int) -> float:
        """Time of a number of calls, from the first one's start to the last one's end."""
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return time.perf_counter() - start

    def capture(self, run: Run, calls: int) -> Run:
        """Something that repeats these calls without their launches; raises where that fails."""
        return lambda: self.seconds(run, calls)

    def flush(self) -> None:
        """Nothing that was read or written before is in the last level of cache."""
        self._buffer.fill_(1)


class CudaClock(Clock):
    """CUDA events and CUDA graphs.

    All graphs share one pool of memory: each writes its intermediates before it reads them, and
    they are never replayed at the same time, so a row's candidates need the memory of the largest.
    """

    modes, sample, most_calls = MODES, 0.002, 50

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


@dataclass
class Prepared:
    """A candidate ready for the rounds."""

    run: Run
    calls: int  # in a sample of "graph" and of "calls"
    round_seconds: float
    graphs: tuple[Run, Run] | None = None  # of that many calls, and of one
    samples: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    missing: dict[str, str] = field(default_factory=dict)  # why a mode is


def prepare(candidate: Candidate, clock: Clock, waits: str, sample: float) -> Prepared:
    """Warm up, find out how many calls fill a sample, capture unless something `waits`.

    Raises whatever the candidate raises.
    """
    run = candidate.run
    run()
    single = clock.seconds(run, 1)
    if single < clock.sample:  # the first timing of a short call says little
        single = clock.seconds(run, 5) / 5
    calls = max(1, min(clock.most_calls, math.ceil(sample / max(single, 1e-7))))
    made = Prepared(run, calls, single * (calls if len(clock.modes) == 1 else 3 * calls + 2))
    if "graph" in clock.modes and not waits:
        try:
            replay = clock.capture(run, calls)
            made.graphs = replay, replay if calls == 1 else clock.capture(run, 1)
        except Exception as error:
            waits = f"{CAPTURE_FAILED}{first_line(error)}"
    if "graph" in clock.modes and waits:
        made.missing = {"graph": waits, "cold": waits}
    return made


def take_sample(prepared: Prepared, clock: Clock) -> None:
    """One round of a candidate: a sample in every mode it can run in."""
    samples, calls = prepared.samples, prepared.calls
    if prepared.graphs:
        several, one = prepared.graphs
        # The work in front of the timed one gives the host the time to launch it, so that the
        # events do not see the launch; here it also fills the cache, below it empties it.
        several()
        samples["graph"].append(clock.seconds(several, 1) / calls)
        clock.flush()
        samples["cold"].append(clock.seconds(one, 1))
    if len(clock.modes) > 1:
        prepared.run()
    samples["calls"].append(clock.seconds(prepared.run, calls) / calls)


def measure(
    candidates: Mapping[str, Candidate],
    clock: Clock,
    *,
    seconds: float,
    least: int,
    most: int,
    sample: float | None = None,
) -> tuple[dict[str, Prepared], dict[str, str]]:
    """Interleaved rounds of all candidates within a time limit.

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
            made = prepare(candidate, clock, candidate.waits or broken, sample or clock.sample)
        except Exception as error:
            failed[name] = first_line(error)
            continue
        ready[name] = made
        if made.missing.get("graph", "").startswith(CAPTURE_FAILED):
            broken = f"not captured, since that of {name} had failed"
    cost = sum(prepared.round_seconds for prepared in ready.values())
    rounds = max(least, min(most, int(seconds / max(cost, 1e-9)))) | 1  # odd, for the median
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for prepared in ready.values():
                take_sample(prepared, clock)
    finally:
        gc.enable()
    return ready, failed


def first_line(error: BaseException) -> str:
    """The error in one line of a table."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
