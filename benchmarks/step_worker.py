"""The process that measures training steps: `python -m benchmarks.step_worker DEVICE`.

It answers requests of step.py: {"measure": [configurations]} and {"fits": configuration}.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import gpu_machine, machine
from benchmarks.gpu_timing import first_line
from benchmarks.step import OUT_OF_MEMORY
from benchmarks.step_models import build
from densecl_ext.nn.phases import Stopwatch
from densecl_ext.train import TrainingStep

Step = Callable[[], Any]
WARM_UP = 6  # with a CUDA graph the fourth step captures


def synchronise(device: torch.device) -> None:
    """Wait for what was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def prepare(config: dict[str, Any], device: torch.device) -> Step:
    """A training step on views that are already on the device."""
    model, optimizer = build(config, device)
    options = {name: True for name in ("cuda_graph", "compile") if config[name]}
    step = TrainingStep(model, optimizer, precision=config["precision"], **options)
    shape = config["batch"], 3, config["image"], config["image"]
    views = [
        torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
        for _ in range(2)
    ]
    return lambda: step(*views)


def warm_up(config: dict[str, Any], device: torch.device) -> tuple[Step, int | None]:
    """The step, and the peak memory of all that it is: weights, optimizer, queues, activations."""
    gc.collect()
    before = 0
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    step = prepare(config, device)
    for _ in range(WARM_UP):
        output = step()
    if not bool(torch.isfinite(output.loss)):
        raise RuntimeError(f"the loss is {float(output.loss)}")
    if device.type != "cuda":
        return step, None
    return step, torch.cuda.max_memory_allocated(device) - before


def measure(configs: list[dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """Images/s in interleaved rounds, peak memory, share of the parts; by configuration."""
    found: dict[str, Any] = {}
    steps: dict[str, Step] = {}
    for config in configs:
        try:
            steps[config["id"]], peak = warm_up(config, device)
            found[config["id"]] = {"peak_bytes": peak, "images_per_second": []}
        except Exception as error:
            found[config["id"]] = {"reason": first_line(error)}
    by_id = {config["id"]: config for config in configs}
    for _ in range(max((config["rounds"] for config in configs), default=0)):
        for name, step in steps.items():
            config = by_id[name]
            synchronise(device)
            start = time.perf_counter()
            for _ in range(config["steps"]):
                step()
            synchronise(device)
            seconds = time.perf_counter() - start
            found[name]["images_per_second"].append(config["batch"] * config["steps"] / seconds)
    for name, step in steps.items():
        if not by_id[name]["cuda_graph"]:  # a graph's parts cannot be told apart from outside
            found[name]["phases"] = phases(step, by_id[name]["steps"], device)
    return found


def phases(step: Step, count: int, device: torch.device) -> dict[str, float]:
    """Seconds of one step's parts, and of all of it under "step"."""
    synchronise(device)
    with Stopwatch(device) as stopwatch:
        start = time.perf_counter()
        for _ in range(count):
            step()
        parts = stopwatch.seconds()
        whole = time.perf_counter() - start
    return {name: seconds / count for name, seconds in parts.items()} | {"step": whole / count}


def main() -> None:
    """Answer until there are no more requests."""
    from benchmarks.child import requests

    device = torch.device(sys.argv[1])
    torch.backends.cudnn.benchmark = True  # as the trainer has it
    if device.type == "cpu":
        torch.set_num_threads(1)  # a tiny network on a machine that does other things
    for request, answer in requests():
        try:
            if "machine" in request:
                info = machine.describe() | {"device": gpu_machine.describe(device)}
                answer({"info": info | {"state": gpu_machine.state()}})
            elif "fits" in request:
                answer({"peak_bytes": warm_up(request["fits"], device)[1]})
            else:
                answer({"found": measure(request["measure"], device)})
        except Exception as error:
            memory = isinstance(error, torch.OutOfMemoryError)
            answer({"error": OUT_OF_MEMORY if memory else first_line(error)})


if __name__ == "__main__":
    main()
