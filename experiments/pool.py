"""Runs shared among worker processes; the parent hands them out and writes the results."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from experiments.training import Materials, Run

GRACE = 10.0  # seconds after the last start within which runs may still finish


@dataclasses.dataclass(frozen=True)
class Setting:
    """How every run is computed."""

    device: str = "cpu"
    threads: int = 1
    graph: bool = True


def work(pipe: Connection, materials: Materials, setting: Setting) -> None:
    """A worker: takes runs until it is told None; answers with a line, or with what went wrong."""
    import torch

    from experiments.training import perform

    torch.set_num_threads(setting.threads)
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32, as on a CPU
    torch.backends.cudnn.deterministic = True
    device = torch.device(setting.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
        torch.zeros(1, device=device)  # makes the context while the parent prepares
    pipe.send(("ready", None))
    while (run := pipe.recv()) is not None:
        try:
            pipe.send(("line", perform(run, materials, device, graph=setting.graph)))
        except FloatingPointError:
            pipe.send(("failed", traceback.format_exc()))
        except Exception as error:
            # A GPU's process may be unable to go on, and would fail everything after.
            uncaptured = setting.graph and "could not be captured" in str(error)
            kind = "uncaptured" if uncaptured else "broken" if device.type == "cuda" else "failed"
            pipe.send((kind, traceback.format_exc()))
            if kind != "failed":
                return


class Pool:
    """Worker processes, and the results that they have brought.

    Args:
        processes: how many workers.
        results: folder of the studies' lines.
        seconds: no run is started later than this after `begun`, nor one that would end more than
            GRACE later; what still runs then is ended. None has no limit.
        begun: `time.monotonic()` of the beginning.
        target: what a worker does.
    """

    def __init__(
        self,
        processes: int,
        materials: Materials,
        setting: Setting,
        results: Path,
        seconds: float | None = None,
        begun: float | None = None,
        target: Callable[[Connection, Materials, Setting], None] = work,
    ) -> None:
        self.results, self.failed, self.finished = results, 0, 0
        self.materials, self.setting, self.target = materials, setting, target
        begun = time.monotonic() if begun is None else begun
        self.deadline = float("inf") if seconds is None else begun + seconds
        self._speed: dict[tuple[Any, ...], tuple[float, float]] = {}
        self._busy: dict[Connection, Run | None] = {}  # None: not ready yet
        self._idle: list[Connection] = []
        os.environ["OMP_NUM_THREADS"] = str(setting.threads)  # read when a worker imports NumPy
        self._workers: dict[Connection, Any] = {}
        self._again: list[Run] = []
        self._spare = processes  # workers that may still be replaced
        for _ in range(processes):
            self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        worker = context.Process(
            target=self.target, args=(theirs, self.materials, self.setting), daemon=True
        )
        worker.start()
        theirs.close()
        self._workers[ours] = worker
        self._busy[ours] = None

    def run(self, jobs: Iterator[Run]) -> None:
        """Work on the runs, in their order. A job may ask for `drain` before it is handed out."""
        while True:
            while not self._idle and self._busy:
                self._receive()
                if time.monotonic() > self.deadline:
                    break
            if not self._idle or time.monotonic() > self.deadline:
                break
            run = self._again.pop() if self._again else next(jobs, None)
            if run is None:
                self.drain()
                if not self._again:
                    break
            elif time.monotonic() + self._expected(run) > self.deadline + GRACE:
                print(f"left out for want of time: {run.key}", flush=True)
            else:
                pipe = self._idle.pop()
                self._busy[pipe] = run
                pipe.send(run)
        self.drain()

    def drain(self, study: str | None = None) -> None:
        """Wait for the runs at work; of one study alone where it is given."""
        while any(run and study in (None, run.study) for run in self._busy.values()):
            if time.monotonic() > self.deadline + GRACE:
                return
            self._receive()

    def close(self) -> None:
        """End the workers, and with them what they still do."""
        for pipe in self._idle:
            pipe.send(None)
        for pipe, worker in self._workers.items():
            if pipe not in self._idle:
                worker.terminate()
        for worker in self._workers.values():
            worker.join(5)
            if worker.is_alive():
                worker.kill()

    def _receive(self) -> None:
        """Take what the next workers say; returns at the deadline too."""
        left = self.deadline + GRACE - time.monotonic()
        for pipe in wait(list(self._busy), timeout=max(0.0, min(left, 3600.0))):
            assert isinstance(pipe, Connection)
            run = self._busy.pop(pipe)
            try:
                kind, said = pipe.recv()
            except (EOFError, OSError):
                kind, said = "broken", "its process died"
            if kind == "uncaptured":
                print(f"{said}\ngoing on without graphs", flush=True)
                self.setting = dataclasses.replace(self.setting, graph=False)
                self._again += [run] if run else []
                self._start()  # which cannot happen to it again
                continue
            if kind == "broken":
                self.failed += 1
                print(f"failed: {run.key if run else 'a worker'}\n{said}", flush=True)
                if self._spare:
                    self._spare -= 1
                    self._start()
                continue
            self._idle.append(pipe)
            if run is None:
                continue
            if kind == "failed":
                self.failed += 1
                print(f"failed: {run.key}\n{said}", flush=True)
                continue
            self.finished += 1
            self._learn(run, said["training"])
            print(json.dumps(said), flush=True)
            with (self.results / f"{run.study}.jsonl").open("a") as file:
                file.write(json.dumps(said) + "\n")

    def _learn(self, run: Run, training: dict[str, Any]) -> None:
        trained = training.get("train_seconds", 0.0)
        per_step = trained / max(1, run.steps)
        self._speed[_kind(run)] = per_step, training["seconds"] - trained

    def _expected(self, run: Run) -> float:
        """Seconds that the run will take, as far as its like have shown."""
        per_step, rest = self._speed.get(_kind(run), (0.0, 0.0))
        return per_step * run.steps + rest


def _kind(run: Run) -> tuple[Any, ...]:
    return run.arm, run.backbone, run.output_stride, run.size, run.batch, run.truncate, run.also
