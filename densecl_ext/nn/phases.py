"""Names for the parts of a training step, for profilers and for the step's own stopwatch."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.autograd.profiler import record_function

PREFIX = "densecl::"
PHASES = (
    "data",
    "momentum",
    "query_forward",
    "key_forward",
    "matching",
    "losses",
    "metrics",
    "enqueue",
    "backward",
    "optimizer",
)

_stopwatch: Stopwatch | None = None


def phase(name: str) -> AbstractContextManager[object]:
    """Marks what runs inside as the part ``name`` of a step.

    A profiler shows it as ``densecl::name``, and a running :class:`Stopwatch` measures it. A few
    microseconds otherwise; nothing while torch.compile traces.
    """
    if torch.compiler.is_compiling():
        return contextlib.nullcontext()
    return record_function(PREFIX + name) if _stopwatch is None else _stopwatch.measure(name)


class Stopwatch:
    """Measures the phases of all steps that run while it is the active one.

    On a GPU by events on the current stream: the time from the end of the work before a phase to
    the end of the phase's own, waits for the host included. Nothing waits until `seconds` is read.
    Phases of a step that is captured in a CUDA graph, or replayed, cannot be measured.

    Args:
        device: where the steps run.

    Example:
        >>> import torch
        >>> from densecl_ext.nn.phases import Stopwatch, phase
        >>> with Stopwatch(torch.device("cpu")) as stopwatch, phase("backward"):
        ...     pass
        >>> list(stopwatch.seconds())
        ['backward']
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: list[tuple[str, Any, Any]] = []  # name, start, end: seconds or events

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Measures what runs inside and adds it to ``name``."""
        start = self._now()
        with record_function(PREFIX + name):
            yield
        self._spans.append((name, start, self._now()))

    def seconds(self) -> dict[str, float]:
        """Seconds of every phase, summed over the steps. Waits for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        sums: dict[str, float] = {}
        for name, start, end in self._spans:
            on_host = isinstance(start, float)
            span = end - start if on_host else start.elapsed_time(end) / 1e3
            sums[name] = sums.get(name, 0.0) + span
        return sums

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __enter__(self) -> Stopwatch:
        """Becomes the active one."""
        global _stopwatch
        if _stopwatch is not None:
            raise RuntimeError("Stopwatch: another one is running")
        _stopwatch = self
        return self

    def __exit__(self, *_: object) -> None:
        """Lets the phases run unmeasured again."""
        global _stopwatch
        _stopwatch = None
