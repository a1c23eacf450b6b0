"""How the benchmarks time: on a clock of ours, and CudaClock on a layer that keeps a record."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import machine
from benchmarks.cases import Candidate
from benchmarks.timing import MODES, Clock, CudaClock, measure


class TestClock:
    """Time passes where a candidate says so; a captured call takes no launch, a cold one more."""

    __test__ = False
    modes, sample, most_calls = MODES, 0.002, 50
    LAUNCH, COLD = 5e-6, 3e-6

    def __init__(self) -> None:
        self.now = 0.0
        self.captured = self.flushed = False
        self.ran: list[str] = []

    def kernel(self, name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.ran.append(name)
            self.now += seconds + (self.COLD if self.flushed else 0.0)
            self.now += 0.0 if self.captured else self.LAUNCH
            self.flushed = False

        return run

    def seconds(self, run: Callable[[], Any], calls: int) -> float:
        before = self.now
        for _ in range(calls):
            run()
        return self.now - before

    def capture(self, run: Callable[[], Any], calls: int) -> Callable[[], None]:
        def replay() -> None:
            self.captured = True
            for _ in range(calls):
                run()
            self.captured = False

        return replay

    def flush(self) -> None:
        self.flushed = True
        self.now += 1.0


def candidate(run: Callable[[], Any], waits: str = "") -> Candidate:
    return Candidate(run, lambda: (), waits)


def test_every_mode_measures_what_it_says() -> None:
    clock = TestClock()
    timed, failed = measure(
        {"a": candidate(clock.kernel("a", 1e-4)), "b": candidate(clock.kernel("b", 2.0))},
        clock, seconds=20.0, least=3, most=9,
    )  # fmt: skip
    assert not failed
    a, b = timed["a"]["modes"], timed["b"]["modes"]
    assert a["graph"] == pytest.approx([1e-4] * len(a["graph"]))
    assert a["cold"] == pytest.approx([1e-4 + clock.COLD] * len(a["cold"]))
    assert a["calls"] == pytest.approx([1e-4 + clock.LAUNCH] * len(a["calls"]))
    assert b["graph"] == pytest.approx([2.0] * len(b["graph"]))
    assert len(a["graph"]) == len(b["graph"]) == 3  # 20 s hold no more rounds
    order = [name for i, name in enumerate(clock.ran) if i == 0 or clock.ran[i - 1] != name]
    assert order == ["a", "b"] * 4  # both are warmed up, then take turns


def test_what_cannot_be_captured_is_still_called_and_what_fails_harms_nobody() -> None:
    clock = TestClock()

    def refuses(run: Callable[[], Any], calls: int) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    def fails() -> None:
        raise torch.OutOfMemoryError("no memory\nfor this")

    timed, failed = measure(
        {"waits": candidate(clock.kernel("a", 1e-4), "reads the pointer"), "no": candidate(fails)},
        clock, seconds=1.0, least=3, most=3,
    )  # fmt: skip
    assert failed == {"no": "no memory"}
    assert timed["waits"]["missing"] == {"graph": "reads the pointer", "cold": "reads the pointer"}
    assert list(timed["waits"]["modes"]) == ["calls"]
    clock.capture = refuses  # type: ignore[method-assign]
    run = candidate(clock.kernel("a", 1e-4))
    timed, _ = measure({"a": run, "b": run}, clock, seconds=1.0, least=1, most=1)
    assert timed["a"]["missing"]["graph"] == (
        "capture failed: operation not permitted when stream is capturing"
    )
    assert timed["b"]["missing"]["graph"] == "not captured, since that of a had failed"
    assert len(timed["a"]["modes"]["calls"]) == len(timed["b"]["modes"]["calls"]) == 1


def test_a_cpu_is_called_alone_and_as_often_as_a_sample_holds() -> None:
    clock = Clock()
    ran: list[str] = []
    timed, failed = measure({"a": candidate(lambda: ran.append("a")), "b": candidate(lambda: None)},
                            clock, seconds=0.0, least=3, most=41, sample=1e-5)  # fmt: skip
    assert not failed and {name: list(made["modes"]) for name, made in timed.items()} == {
        "a": ["calls"], "b": ["calls"]
    }  # fmt: skip
    assert len(timed["a"]["modes"]["calls"]) == len(timed["b"]["modes"]["calls"]) == 3
    calls = (len(ran) - 1 - 1 - 5) / 3
    assert calls == int(calls) > 1


def test_ceilings_that_fail_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> float:
        raise RuntimeError("cuBLAS is not itself")

    monkeypatch.setattr(torch, "mm", fails)
    found = machine.ceilings(Clock(MODES, 1), torch.device("cpu"), quick=True)
    assert found["gemm_bfloat16"] == "not measured: cuBLAS is not itself"
    assert isinstance(found["copy"], float) and found["copy"] > 0.0 and found["launch"] > 0.0
    assert "nvidia-smi" in machine.state() or "driver_version" in machine.state()


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
