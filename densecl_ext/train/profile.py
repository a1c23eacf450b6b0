"""Where a training step's time goes: a few steps of a configuration, measured and traced."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from densecl_ext.checkpoints.run_folder import RunFolder
from densecl_ext.checkpoints.storage import atomic_file
from densecl_ext.data import TwoViews, ViewLoader
from densecl_ext.nn.phases import PHASES, Stopwatch, phase
from densecl_ext.train.config import PretrainConfig
from densecl_ext.train.machine import pick_device, set_up
from densecl_ext.train.run import build_run
from densecl_ext.train.step import WARMUP_STEPS, TrainingStep

STEPS = 20
TRACED_STEPS = 3
REST = "rest"


@dataclasses.dataclass(frozen=True)
class Profile:
    """Means over the measured steps.

    Attributes:
        folder: where profile.json, profile.md and trace.json.gz lie.
        device: name of the device.
        settings: what was measured.
        steps: how many steps were measured.
        step_seconds: wall-clock of one step, data included.
        images_per_second: batch size / step_seconds.
        phases: seconds in each part of a step, "rest" being what no part covers.
        peak_memory: bytes; on a GPU torch's peak of allocated memory, on the CPU the process's
            largest resident size.
        graph_step_seconds: wall-clock of one replayed step with cuda_graph, else None.
    """

    folder: Path
    device: str
    settings: dict[str, Any]
    steps: int
    step_seconds: float
    images_per_second: float
    phases: dict[str, float]
    peak_memory: int
    graph_step_seconds: float | None

    def table(self) -> str:
        """The numbers as a Markdown table."""
        lines = [
            f"{', '.join(f'{name} {value}' for name, value in self.settings.items())}; "
            f"{self.device}; mean of {self.steps} steps",
            "",
            "| part of the step | ms | share |",
            "|---|---:|---:|",
        ]
        for name, seconds in self.phases.items():
            share = seconds / self.step_seconds
            lines.append(f"| {name.replace('_', ' ')} | {seconds * 1e3:.2f} | {share:.1%} |")
        lines += [
            f"| **step** | **{self.step_seconds * 1e3:.2f}** | **100.0%** |",
            "",
            f"{self.images_per_second:.1f} images/s, "
            f"peak memory {self.peak_memory / 2**20:,.0f} MiB",
        ]
        if self.graph_step_seconds is not None:
            images = self.images_per_second * self.step_seconds / self.graph_step_seconds
            lines.append(
                f"as a CUDA graph: {self.graph_step_seconds * 1e3:.2f} ms a step, "
                f"{images:.1f} images/s"
            )
        return "\n".join(lines)


def profile(
    config: PretrainConfig,
    *,
    steps: int = STEPS,
    backbone: nn.Module | None = None,
    loader: ViewLoader | None = None,
    message: Callable[[str], None] = lambda text: None,
) -> Profile:
    """Trains for a few steps as `pretrain` would, and measures them.

    After a warm-up, `steps` steps are measured part by part, without a profiler, which would slow
    them down; then a few more are traced by torch.profiler. With `config.cuda_graph` the parts are
    those of the eager step, and as many replays are measured as a whole.

    Writes OUT/profile/profile.md, profile.json and trace.json.gz (for https://ui.perfetto.dev), and
    nothing else: a run in OUT stays as it is, and no checkpoint is made.

    Args:
        config: what to measure.
        steps: measured steps, at least 1.
        backbone: a network of your own instead of `config.backbone`, as in `pretrain`.
        loader: a loader of your own instead of `config.data`, as in `pretrain`.
        message: told what is going on.

    Raises:
        ValueError: an option does not fit the data; `steps` below 1.
        OSError: the output cannot be written.
        RuntimeError: the device is not there.
    """
    if steps < 1:
        raise ValueError(f"profile: steps must be at least 1, got {steps}")
    if loader is None and not config.data:
        raise ValueError("profile: data must name a folder of images, got nothing (--data DIR)")
    device = pick_device(config.device)
    if config.cuda_graph and device.type != "cuda":
        raise ValueError(f"pretrain: cuda_graph needs a GPU, the run's device is {device}")
    set_up(device, config.threads)
    cuda_graph, folder = config.cuda_graph, RunFolder(config.output).profile
    folder.mkdir(parents=True, exist_ok=True)
    built = build_run(
        dataclasses.replace(config, cuda_graph=False), device, backbone=backbone, loader=loader
    )
    config = built.config
    try:
        step, views = built.training_step, endless(built.loader)
        message(f"profile: {WARMUP_STEPS} steps to warm up, {steps} measured on {device}")
        run(step, views, config, WARMUP_STEPS)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with Stopwatch(device) as stopwatch:
            seconds = run(step, views, config, steps) / steps
        parts = {name: total / steps for name, total in stopwatch.seconds().items()}
        memory = peak_memory(device)
        message(f"profile: {TRACED_STEPS} steps traced")
        with torch.profiler.profile(acc_events=True) as trace:
            run(step, views, config, TRACED_STEPS)
        trace.export_chrome_trace(str(folder / "trace.json.gz"))
        graph_seconds = None
        if cuda_graph:
            step = built.new_step(cuda_graph=True)
            run(step, views, config, WARMUP_STEPS + 1)
            graph_seconds = run(step, views, config, steps) / steps
    finally:
        if loader is None:
            built.loader.close()
    result = Profile(
        folder=folder,
        device=device_name(device),
        settings={
            "backbone": config.backbone,
            "image size": config.image_size,
            "batch": config.batch_size,
            "queue": f"{config.queue_length} {config.queue_dtype}",
            "lambda": config.loss_lambda,
            "precision": config.precision,
            "loader": config.loader,
            "compile": config.compile,
        },
        steps=steps,
        step_seconds=seconds,
        images_per_second=config.batch_size / seconds,
        phases=ordered(parts, seconds),
        peak_memory=memory,
        graph_step_seconds=graph_seconds,
    )
    with atomic_file(folder / "profile.md") as file:
        file.write((result.table() + "\n").encode())
    with atomic_file(folder / "profile.json") as file:
        values = {**dataclasses.asdict(result), "folder": str(folder)}
        file.write((json.dumps(values, indent=2) + "\n").encode())
    return result


def run(step: TrainingStep, views: Iterator[TwoViews], config: PretrainConfig, steps: int) -> float:
    """Takes steps as the loop does; returns the seconds until the device has done them."""
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    wait = torch.cuda.synchronize if step.device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    for _ in range(steps):
        with phase("data"):
            batch = next(views)
            view_q = batch.view_q.contiguous(memory_format=memory_format)
            view_k = batch.view_k.contiguous(memory_format=memory_format)
        step.schedule(lr=float(config.lr), key_momentum=float(config.key_momentum))
        step(view_q, view_k, batch.crop_q, batch.crop_k)
    wait()
    return time.perf_counter() - began


def endless(loader: ViewLoader) -> Iterator[TwoViews]:
    """The loader's batches, epoch after epoch."""
    for epoch in itertools.count():
        loader.set_epoch(epoch)
        yield from loader


def ordered(parts: dict[str, float], step_seconds: float) -> dict[str, float]:
    """The parts in the order of a step, and what they leave."""
    found = {name: parts[name] for name in PHASES if name in parts}
    return {**found, REST: max(0.0, step_seconds - sum(found.values()))}


def peak_memory(device: torch.device) -> int:
    """Bytes; see :class:`Profile`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"
