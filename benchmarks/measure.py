"""Timing: every candidate once per round, in turn, so that they share whatever the machine does."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

SHORTEST_SAMPLE = 0.004  # seconds; shorter calls are repeated within a sample


def synchronise(device: torch.device) -> None:
    """Wait for what was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def repeated(run: Callable[[], Any], calls: int, device: torch.device) -> Callable[[], None]:
    """A sample: the call, so many times, and the wait for the device."""

    def sample() -> None:
        for _ in range(calls):
            run()
        synchronise(device)

    return sample


def seconds_of(sample: Callable[[], None]) -> float:
    """Wall time of one sample."""
    start = time.perf_counter()
    sample()
    return time.perf_counter() - start


def warm_up(run: Callable[[], Any], device: torch.device) -> tuple[int, float]:
    """Calls that fill a sample, and seconds of one such sample."""
    once = repeated(run, 1, device)
    once()
    seconds = seconds_of(once)
    if seconds < SHORTEST_SAMPLE:  # the first timing of a short call says little
        seconds = seconds_of(repeated(run, 10, device)) / 10
    calls = max(1, math.ceil(SHORTEST_SAMPLE / max(seconds, 1e-7)))
    return calls, calls * seconds


def rounds_within(budget: float, samples: Mapping[str, float], least: int, most: int) -> int:
    """How many rounds of all candidates fit into the budget (seconds); odd, for the median."""
    fitting = int(budget / max(sum(samples.values()), 1e-9))
    return max(least, min(most, fitting)) | 1
