"""CudaClock against a layer of events, streams and graphs that only keeps a record."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu_timing import CudaClock


class Layer:
    """Stands in for torch.cuda: a call takes 1 ms, a captured one when it is replayed."""

    def __init__(self) -> None:
        self.now = 0.0
        self.recording: list[float] | None = None
        self.log: list[str] = []
        self.pools: set[Any] = set()
        layer = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = layer.now

            def synchronize(self) -> None:
                layer.log.append("wait")

            def elapsed_time(self, end: Any) -> float:
                return 1e3 * (end.at - self.at)

        class CUDAGraph:
            calls: list[float]

            def replay(self) -> None:
                for seconds in self.calls:
                    layer.work(seconds)

        class Stream:
            def __init__(self, device: torch.device) -> None:
                pass

            def wait_stream(self, other: Any) -> None:
                layer.log.append("side stream waits")

        self.Event, self.CUDAGraph, self.Stream = Event, CUDAGraph, Stream

    def work(self, seconds: float = 1e-3) -> None:
        if self.recording is not None:
            self.recording.append(seconds)
        else:
            self.now += seconds

    @contextmanager
    def graph(self, *arguments: Any, **named: Any) -> Iterator[None]:
        found = inspect.signature(real_graph).bind(*arguments, **named).arguments
        self.pools.add(found["pool"])
        assert found["stream"] is not None
        self.recording = found["cuda_graph"].calls = []
        yield
        self.recording = None

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        yield

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("Event", "CUDAGraph", "Stream", "graph", "stream"):
            assert hasattr(torch.cuda, name)
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        functions = {
            "graph_pool_handle": lambda: (0, 1),
            "current_stream": lambda device: None,
            "synchronize": lambda device: self.log.append("synchronize"),
            "empty_cache": lambda: self.log.append("empty cache"),
            "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=1 << 10),
        }
        for name, function in functions.items():
            assert hasattr(torch.cuda, name)
            monkeypatch.setattr(torch.cuda, name, function)


real_graph = torch.cuda.graph


def test_the_gpus_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer()
    layer.patch(monkeypatch)
    clock = CudaClock(torch.device("cpu"))
    assert clock.seconds(layer.work, 3) == pytest.approx(3e-3)
    layer.log.clear()
    before = layer.now
    replay = clock.capture(layer.work, 5)
    # two calls first, outside of the graph, on a stream that has waited; then one replay
    assert layer.now - before == pytest.approx((2 + 5) * 1e-3)
    assert layer.log == ["side stream waits", "synchronize", "empty cache", "synchronize"]
    assert clock.seconds(replay, 2) == pytest.approx(10e-3)
    assert layer.pools == {(0, 1)}  # one pool for all, the anchor's too
    clock.flush()
