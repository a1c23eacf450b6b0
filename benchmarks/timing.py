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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Settings:
    """Of a process."""

    device: torch.device
    suite: str = "cpu"
    quick: bool = False
    threads: int = 0  # 0: torch's choice

    def clock(self) -> Clock:
        """A GPU's, or a CPU's that stands in for one in a GPU's suite."""
        torch.backends.cudnn.benchmark = True  # as the trainer has it
        if self.threads:
            torch.set_num_threads(self.threads)
        if self.device.type == "cuda":
            return CudaClock(self.device)
        return Clock(MODES if self.suite == "gpu" else ("calls",))


def samplers(
    candidate: Candidate, clock: Clock, waits: str, sample: float
) -> tuple[dict[str, Callable[[], float]], str, float]:
    """By mode what takes a sample: seconds of one call; why there is no graph; a round's seconds.

    Finds out how many calls fill a sample. Raises whatever the candidate raises.
    """
    run, found = candidate.run, {}
    run()
    single = clock.seconds(run, 1)
    if single < clock.sample:  # the first timing of a short call says little
        single = clock.seconds(run, 5) / 5
    calls = max(1, min(clock.most_calls, math.ceil(sample / max(single, 1e-7))))

    # In front of what is timed there is work that gives the host the time to launch it, so that
    # the events do not see the launch; it fills the cache, or empties it.
    def warm() -> float:
        several()
        return clock.seconds(several, 1) / calls

    def cold() -> float:
        clock.flush()
        return clock.seconds(one, 1)

    def plain() -> float:
        if len(clock.modes) > 1:
            run()
        return clock.seconds(run, calls) / calls

    if "graph" in clock.modes and not waits:
        try:
            several = clock.capture(run, calls)
            one = several if calls == 1 else clock.capture(run, 1)
            found = {"graph": warm, "cold": cold}
        except Exception as error:
            waits = f"{CAPTURE_FAILED}{first_line(error)}"
    cost = single * (calls if len(clock.modes) == 1 else 3 * calls + 2)
    return {**found, "calls": plain}, waits, cost


def measure(
    candidates: Mapping[str, Candidate], clock: Clock, *, seconds: float, least: int, most: int,
    sample: float = 0.0,
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:  # fmt: skip
    """Interleaved rounds of all candidates within a time limit.

    After a capture that failed torch's allocator thinks that it still goes on, and no other one
    succeeds in this process: the remaining candidates are then called only, and say so.

    Returns:
        By candidate {"modes": {mode: seconds of one call, a sample a round}, "missing": {mode: why
        there is none}}; and why a candidate has no times.
    """
    ready: dict[str, dict[str, Callable[[], float]]] = {}
    timed: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    broken, cost = "", 0.0
    for name, candidate in candidates.items():
        waits = candidate.waits or broken
        try:
            takes, waits, took = samplers(candidate, clock, waits, sample or clock.sample)
        except Exception as error:
            failed[name] = first_line(error)
            continue
        if waits.startswith(CAPTURE_FAILED):
            broken = f"not captured, since that of {name} had failed"
        missing = {mode: waits for mode in clock.modes if mode not in takes}
        timed[name] = {"modes": {mode: [] for mode in takes}, "missing": missing}
        ready[name], cost = takes, cost + took
    rounds = max(least, min(most, int(seconds / max(cost, 1e-9)))) | 1  # odd, for the median
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, takes in ready.items():
                for mode, take in takes.items():
                    timed[name]["modes"][mode].append(take())
    finally:
        gc.enable()
    return timed, failed


def first_line(error: BaseException) -> str:
    """The error in one line of a table."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
