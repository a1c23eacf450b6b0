"""One run: pre-trains an arm, measures its backbone."""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import math
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from densecl_ext import MomentumEncoder
from densecl_ext.backbones import build_backbone
from densecl_ext.data import TwoViews, build_loader
from densecl_ext.data.memory_loader import MemoryLoader
from densecl_ext.evaluate.correspondence import CorrespondenceOptions, Views, correspondence
from densecl_ext.evaluate.dense import DenseData, evaluate_dense
from densecl_ext.evaluate.incontext import InContext, InContextOptions
from densecl_ext.evaluate.segmentation import Linear, SegmentationOptions
from densecl_ext.train.schedule import cosine_lr
from densecl_ext.train.step import CapturedStep, StepOutput
from experiments.data import PAIRS, STORED, STREET, correspondence_folder, pretraining_folders
from experiments.methods import ARMS
from experiments.views import Stream, moved

WEIGHT_DECAY, TOLD_EVERY = 1e-4, 50


@dataclasses.dataclass(frozen=True)
class Run:
    """What a line of results is the result of."""

    study: str
    set: str
    arm: str
    seed: int
    steps: int
    lr: float
    split: str
    options: str = "{}"  # JSON, on top of the arm's own
    backbone: str = "resnet18"
    output_stride: int = 8
    size: int = 64
    batch: int = 64

    @property
    def key(self) -> str:
        values = dataclasses.asdict(self) | {"options": json.loads(self.options)}
        return json.dumps(values, sort_keys=True)


class Materials:
    """Images, measured data and views, made once and read by every process of a pool.

    Args:
        root: the data, see experiments.data.
        cache: where CamVid's windows are.
        folder: holds what was made.
        workers: threads that decode.
    """

    def __init__(self, root: Path, cache: Path, folder: Path, workers: int = 1) -> None:
        self.root, self.cache, self.folder, self.workers = root, cache, folder, workers
        self._streams: dict[tuple[Any, ...], Stream] = {}
        self._loaders: dict[tuple[Any, ...], MemoryLoader] = {}

    def prepare(self, runs: list[Run]) -> None:
        """Make everything that the runs need."""
        self.pairs()
        for run in {(run.set, run.size, run.batch): run for run in runs if run.steps}.values():
            self.images(run)
        for split in {run.split for run in runs}:
            self.street(split)

    def _made(self, name: str, make: Any) -> Any:
        path = self.folder / f"{name}.pickle"
        if not path.is_file():
            partial = path.with_suffix(".partial")
            partial.write_bytes(pickle.dumps(make(), protocol=5))
            partial.rename(path)
        return pickle.loads(path.read_bytes())

    def images(self, run: Run) -> MemoryLoader:
        """A loader on the CPU."""

        def make() -> Any:
            return build_loader(
                pretraining_folders(run.set, self.root, self.cache), batch_size=run.batch,
                size=run.size, backend="memory", channels_last=True, workers=self.workers,
                cache_size=max(STORED, run.size),
            )  # fmt: skip

        return self._made(f"images-{run.set}-{run.size}-{run.batch}", make)

    def batches(self, run: Run, device: torch.device) -> Iterator[TwoViews]:
        """The batches of the run; those of a seed are the same for every arm."""
        key = (run.set, run.size, run.batch)
        if key not in self._loaders:
            loader = self.images(run)
            self._loaders[key] = moved(loader, device) if device.type == "cuda" else loader
        loader = self._loaders[key]
        if device.type != "cuda":
            loader.seed = run.seed
            return epochs(loader, run.steps)
        stream = self._streams.get(key)
        if stream is None or stream.seed != run.seed:
            stream = self._streams[key] = Stream(loader, run.seed)
        return stream(run.steps)

    @functools.cache  # noqa: B019  (lives as long as its process)
    def street(self, split: str) -> tuple[DenseData, list[Any]]:
        """CamVid at 240 x 180 and the protocols on it."""
        shared: dict[str, Any] = {
            "data": str(self.root / "camvid"),
            "val_split": split,
            "size": STREET,
            "recalibrate": 184,
        }
        linear = SegmentationOptions(**shared, solver="lbfgs", iterations=60)
        data = self._made(f"street-{split}", lambda: DenseData.load(linear))
        return data, [Linear(linear), InContext(InContextOptions(**shared))]

    @functools.cache  # noqa: B019
    def pairs(self) -> tuple[CorrespondenceOptions, Views]:
        """Two crops each of 128 photographs."""
        folder = correspondence_folder(self.root)
        options = CorrespondenceOptions(data=str(folder), images=PAIRS, seed=3)
        return options, self._made("pairs", lambda: Views.load(options))


def epochs(loader: Any, steps: int) -> Iterator[TwoViews]:
    """The given number of batches, epoch after epoch."""
    done = epoch = 0
    while True:
        loader.set_epoch(epoch)
        for views in loader:
            yield views
            done += 1
            if done == steps:
                loader.set_epoch(0)
                return
        epoch += 1


def network(run: Run) -> nn.Module:
    """By default ResNet-18 up to its second stage: 128 channels, 0.7 million weights."""
    padding = "reflect" if run.arm.endswith("_reflect") else "zeros"
    return build_backbone(
        run.backbone, output_stride=run.output_stride, truncate=True, padding=padding
    )


class Training:
    """Steps of an arm; on a GPU, where the arm allows it, as a CUDA graph."""

    def __init__(self, run: Run, arm: nn.Module, device: torch.device, *, graph: bool) -> None:
        self.run, self.arm, self.device = run, arm, device
        weights = [parameter for parameter in arm.parameters() if parameter.requires_grad]
        on_gpu = device.type == "cuda"
        self.optimizer = torch.optim.SGD(
            weights, run.lr, momentum=0.9, weight_decay=WEIGHT_DECAY, fused=on_gpu or None
        )
        self.captured: CapturedStep | None = None
        if on_gpu and graph and getattr(arm, "capturable", False):
            for group in self.optimizer.param_groups:
                group["lr"] = torch.tensor(run.lr, dtype=torch.float32, device=device)
            for module in arm.modules():
                if isinstance(module, MomentumEncoder):
                    module.momentum = torch.tensor(
                        float(module.momentum), dtype=torch.float64, device=device
                    )
            self.captured = CapturedStep(self.one, device)

    def one(self, q: Tensor, k: Tensor, crop_q: Tensor, crop_k: Tensor) -> StepOutput:
        """Forward, backward, optimizer."""
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.arm(q, k, crop_q, crop_k)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss = loss.detach()
        return StepOutput(loss, loss, loss, {})

    def __call__(self, step: int, views: TwoViews, *, telling: bool) -> Tensor:
        """The loss of step number `step`; `telling` fills the arm's health."""
        rate = cosine_lr(self.run.lr, step, self.run.steps)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self.arm.telling = telling  # type: ignore[assignment]
        # the first steps are not captured anyway, and a graph could not tell
        eager = self.captured is None or (telling and step > 0)
        take = self.one if eager else self.captured
        return take(views.view_q, views.view_k, views.crop_q, views.crop_k).loss


def pretrain(
    run: Run, materials: Materials, device: torch.device, *, graph: bool = True
) -> tuple[nn.Module, nn.Module | None, dict[str, Any]]:
    """The backbone, the dense head where there is one, and what the training said."""
    torch.manual_seed(run.seed)
    backbone = network(run)
    if run.arm == "random":
        return backbone.to(device), None, {}
    method, options, _ = ARMS[run.arm]
    arm = method(backbone, run.steps, **{**options, **json.loads(run.options)})
    arm.to(device=device, memory_format=torch.channels_last).train()
    training = Training(run, arm, device, graph=graph)
    said: dict[str, Any] = {}
    seconds, clock = time.process_time(), time.perf_counter()
    for step, views in enumerate(materials.batches(run, device)):
        telling = step % TOLD_EVERY == 0 or step == run.steps - 1
        loss = training(step, views, telling=telling)
        if telling:
            said = {"loss": round(float(loss), 3), **getattr(arm, "health", {})}
            if not math.isfinite(said["loss"]):
                raise FloatingPointError(f"loss {said['loss']} at step {step}")
    said["train_seconds"] = round(time.perf_counter() - clock, 1)
    said["train_cpu_seconds"] = round(time.process_time() - seconds, 1)
    return backbone, getattr(arm, "dense_head", None), said


def measure(
    backbone: nn.Module, dense_head: nn.Module | None, materials: Materials, split: str
) -> dict[str, Any]:
    """Linear and in-context segmentation, and correspondence, of a frozen backbone."""
    data, protocols = materials.street(split)
    options, views = materials.pairs()
    backbone.eval()
    numbers: dict[str, Any] = {}
    for name, report in evaluate_dense(backbone, data, protocols).items():
        numbers[name] = round(100 * report.value, 3)
    report = correspondence(backbone, options, dense_head=dense_head, views=views)
    numbers |= {name: round(value, 4) for name, value in report.numbers.items()}
    return numbers


def perform(
    run: Run, materials: Materials, device: torch.device, *, graph: bool = True
) -> dict[str, Any]:
    """Train and measure; the line of results."""
    begun = time.perf_counter()
    backbone, dense_head, said = pretrain(run, materials, device, graph=graph)
    gc.collect()  # a captured step and its memory, held in cycles
    numbers = measure(backbone, dense_head, materials, run.split)
    said["seconds"] = round(time.perf_counter() - begun, 1)
    said["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"run": dataclasses.asdict(run), "numbers": numbers, "training": said}
