"""`python -m benchmarks.step --out DIR`: the whole training step on a GPU, ours and as published.

Query and key encoder, matching, losses, backward, optimizer, momentum update and enqueues of a
ResNet-50 at 224 px in bfloat16 autocast. The views are random numbers that lie on the device
already: no loader takes part. Each group of configurations runs in a process of its own, in
interleaved rounds; step.json and step.md are rewritten after every one.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import step_report
from benchmarks.child import Child, Lost

GROUP_LIMIT, COMPILE_LIMIT, TRY_LIMIT = 110.0, 240.0, 45.0  # seconds without an answer
LARGEST = 4096
OUT_OF_MEMORY = "out of memory"  # the worker's word for it


@dataclass(frozen=True)
class Config:
    """One way to train.

    Attributes:
        id: its name in the report.
        model: "ours" or "reference".
        batch: images in a step.
        rounds, steps: timed rounds, and steps in each.
    """

    id: str
    model: str
    batch: int
    loss_lambda: float = 0.5
    cuda_graph: bool = False
    compile: bool = False
    backbone: str = "resnet50"
    image: int = 224
    queue: int = 65536
    precision: str = "bf16"
    rounds: int = 7
    steps: int = 4


def groups() -> list[list[Config]]:
    """Configurations that are compared run together; the first groups matter most."""

    def eager(batch: int, steps: int) -> list[Config]:
        return [
            Config(f"reference, batch {batch}", "reference", batch, steps=steps),
            Config(f"ours, batch {batch}", "ours", batch, steps=steps),
        ]

    def graph(batch: int, steps: int) -> Config:
        name = f"ours, CUDA graph, batch {batch}"
        return Config(name, "ours", batch, cuda_graph=True, steps=steps)

    mocov2 = Config("ours, lambda 0, batch 256", "ours", 256, loss_lambda=0.0)
    vit = Config("ours, ViT-S/16, batch 256", "ours", 256, backbone="vit_small_patch16_224")
    compiled = [
        Config(f"ours, compiled, batch {batch}", "ours", batch, compile=True) for batch in (256, 32)
    ]
    # A capture comes last: one that fails keeps the process from starting another configuration.
    first = [*eager(256, 4), mocov2, graph(256, 4)]
    return [first, [*eager(32, 20), graph(32, 20)], [vit], compiled[:1], compiled[1:]]


def tiny(config: Config) -> Config:
    """The same with a network and a batch that take no time, for a machine without a GPU."""
    batch = max(4, config.batch // 32)
    return replace(config, batch=batch, backbone="tiny", image=32, queue=128, rounds=2, steps=2)


def largest_batch(fits: Callable[[int], bool], first: int, step: int, tries: int) -> int | None:
    """The largest multiple of `step` that fits, as far as so many tries tell; None: none did.

    Looks up or down from the first guess by an eighth of it at a time, then halves what is left.
    """
    low, high = 0, None  # low fits, high does not
    guess = max(step, first // step * step)
    stride = max(step, guess // 8 // step * step)
    for _ in range(tries):
        if fits(guess):
            low = guess
        else:
            high = guess
        if high is not None and high - low <= step:
            break
        if high is None:
            guess = low + stride
        elif low == 0:
            guess = max(step, high - stride)
            if guess == high:
                break
        else:
            guess = (low + high) // 2 // step * step
            if guess == low:
                break
    return low or None


def first_guess(found: dict[str, Any], model: str, total: float) -> int:
    """Where memory ends by a straight line through the peaks at batches 32 and 256."""
    peaks = [found.get(f"{model}, batch {n}", {}).get("peak_bytes") for n in (32, 256)]
    if not all(peaks):
        return 512
    slope = (peaks[1] - peaks[0]) / (256 - 32)
    return min(LARGEST, int((0.95 * total - peaks[0]) / max(slope, 1.0)) + 32)


class Run:
    """The measurement and what is known so far."""

    def __init__(self, out: Path, device: str, *, quick: bool, seconds: float) -> None:
        self._out, self._device, self._quick = out, device, quick
        self._end, self._seconds = time.monotonic() + seconds, seconds
        self.results: dict[str, Any] = {
            "suite": "step",
            "machine_info": None,
            "datetime": datetime.datetime.now(datetime.timezone.utc).isoformat(),
            "quick": quick,
            "configs": {},
            "largest": {},
        }

    def everything(self) -> None:
        """Groups, then the largest batches after the first two groups."""
        answer = self._ask({"machine": True}, TRY_LIMIT)
        self.results["machine_info"] = answer.get("info")
        wanted = [[tiny(c) for c in group] if self._quick else group for group in groups()]
        for group in wanted[:2]:
            self.group(group)
        for model in ("ours", "reference"):
            self.largest(model)
        for group in wanted[2:]:
            self.group(group)

    def group(self, configs: list[Config]) -> None:
        """Measure together; where that loses the process, each by itself."""
        limit = COMPILE_LIMIT if any(c.compile for c in configs) else GROUP_LIMIT
        answer = self._ask({"measure": [asdict(c) for c in configs]}, limit)
        found: dict[str, Any] = answer.get("found", {})
        if not found and len(configs) > 1:
            for config in configs:
                answer = self._ask({"measure": [asdict(config)]}, limit)
                found |= answer.get("found", {config.id: {"reason": answer.get("error")}})
        for config in configs:
            result = found.get(config.id, {"reason": answer.get("error")})
            self.results["configs"][config.id] = asdict(config) | result
            self._tell(f"{config.id}: {step_report.line(result)}")

    def largest(self, model: str) -> None:
        """Bisect, each try in a process of its own."""
        config = Config(f"largest batch, {model}", model, 0)
        total = (self.results["machine_info"] or {}).get("device", {}).get("memory_gb", 0.0) * 1e9
        tries: dict[int, str] = {}

        def fits(batch: int) -> bool:
            asked = replace(tiny(config) if self._quick else config, batch=batch)
            answer = self._ask({"fits": asdict(asked)}, TRY_LIMIT)
            tries[batch] = answer.get("error", "fits")
            if tries[batch] not in ("fits", OUT_OF_MEMORY):
                raise RuntimeError(tries[batch])
            return tries[batch] == "fits"

        result: dict[str, Any] = {"tries": tries}
        guess = 8 if self._quick else first_guess(self.results["configs"], model, total)
        try:
            result["batch"] = largest_batch(fits, guess, 16, 1 if self._quick else 5)
        except RuntimeError as error:
            result["reason"] = str(error)
        if self._quick:
            result.setdefault("reason", "a quick run tries one batch")
        self.results["largest"][model] = result
        self._tell(f"largest batch, {model}: {result}")

    def _ask(self, request: dict[str, Any], limit: float) -> dict[str, Any]:
        """An answer of a process that lives for this request alone."""
        left = self._end - time.monotonic()
        if left <= 0:
            return {"error": f"not run: the {self._seconds:.0f} s were over"}
        child = Child("benchmarks.step_worker", self._device)
        try:
            return child.ask(request, min(limit, max(left, 5.0)))
        except Lost as error:
            return {"error": f"failed: {error}"}
        finally:
            child.kill()

    def _tell(self, text: str) -> None:
        print(text, flush=True)
        self.write()

    def write(self) -> None:
        """step.json and step.md, each whole at any time."""
        for name, text in (
            ("step.json", json.dumps(self.results, indent=1) + "\n"),
            ("step.md", step_report.markdown(self.results)),
        ):
            partial = self._out / f".{name}"
            partial.write_text(text, encoding="utf-8")
            partial.replace(self._out / name)


def main() -> int:
    """Exit status: 0 where every configuration of ResNet-50 ran."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder to write")
    parser.add_argument("--device", default="cuda", help="cpu only with --quick")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument("--seconds", type=float, default=240.0, help="nothing starts after these")
    options = parser.parse_args()
    if options.device == "cpu" and not options.quick:
        parser.error("--device cpu measures nothing: only with --quick")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    run = Run(out, options.device, quick=options.quick, seconds=options.seconds)
    try:
        run.everything()
    finally:
        run.write()
    print(step_report.asked_table(run.results))
    print(f"wrote step.json and step.md in {out}")
    configs = run.results["configs"].values()
    graphs = options.device == "cuda"  # a CPU has none
    missing = [c["id"] for c in configs if c.get("reason") and (graphs or not c["cuda_graph"])]
    return int(any("ViT" not in name and "compiled" not in name for name in missing))


if __name__ == "__main__":
    sys.exit(main())
