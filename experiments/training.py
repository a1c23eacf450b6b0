"""One run: pre-trains an arm, measures its backbone."""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import math
import pickle
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from densecl_ext import MomentumEncoder
from densecl_ext.backbones import build_backbone
from densecl_ext.data import Augmentation, TwoViews, build_loader
from densecl_ext.data.memory_loader import MemoryLoader
from densecl_ext.evaluate.classification import ClassifiedImages, KnnOptions, knn
from densecl_ext.evaluate.coco import BoxedImages
from densecl_ext.evaluate.correspondence import CorrespondenceOptions, Views, correspondence
from densecl_ext.evaluate.dense import DenseData, evaluate_dense
from densecl_ext.evaluate.detection import DetectionOptions, detection, load_detection
from densecl_ext.evaluate.finetune import FinetuneOptions, finetune
from densecl_ext.evaluate.incontext import InContext, InContextOptions
from densecl_ext.evaluate.segmentation import Linear, SegmentationOptions
from densecl_ext.train.schedule import cosine_lr
from densecl_ext.train.step import CapturedStep, StepOutput
from experiments.data import (
    PAIRS,
    STREET,
    correspondence_folder,
    pretraining_folders,
    stored,
)
from experiments.methods import ARMS
from experiments.views import Stream

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
    truncate: bool = True  # end the network where it reaches the stride, instead of dilating
    views: str = "{}"  # JSON, on top of MoCo v2's augmentation
    start: str = ""  # weights that it starts from: study-set-arm-steps of a run of the same seed
    also: str = ""  # protocols that are measured beside the cheap ones, see ALSO

    @property
    def key(self) -> str:
        values = dataclasses.asdict(self) | {"options": json.loads(self.options)}
        return json.dumps(values, sort_keys=True)

    @property
    def images(self) -> tuple[str, int, int, str]:
        """What says which views it sees, but for the seed."""
        return self.set, self.size, self.batch, self.views

    @property
    def weights(self) -> str:
        """Under which name its weights are kept; the study's last of this name stays."""
        return f"{self.study}-{self.set}-{self.arm}-{self.steps}-seed{self.seed}.pt"

    @property
    def start_weights(self) -> str:
        """The name of those that it starts from."""
        return f"{self.start}-seed{self.seed}.pt"


class Materials:
    """Images, measured data and views, made once and read by every process of a pool.

    Args:
        root: the data, see experiments.data.
        cache: where CamVid's windows are, and the weights of finished runs.
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
        for run in {run.images: run for run in runs if run.steps}.values():
            self.images(run)
        for split in {run.split for run in runs}:
            self.street(split)
        also = {name for run in runs for name in run.also.split()}
        if "detection" in also:
            self.boxes()
        if "knn" in also:
            self.labelled()

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
                pretraining_folders(run.set, self.root, self.cache, run.size),
                batch_size=run.batch,
                size=run.size, backend="memory", channels_last=True, workers=self.workers,
                cache_size=stored(run.size), augmentation=Augmentation(**json.loads(run.views)),
            )  # fmt: skip

        name = "-".join(map(str, run.images))
        return self._made(f"images-{''.join(c if c.isalnum() else '_' for c in name)}", make)

    def batches(self, run: Run, device: torch.device) -> Iterator[TwoViews]:
        """The batches of the run; those of a seed are the same for every arm."""
        key = run.images
        if key not in self._loaders:
            loader = self.images(run)
            self._loaders[key] = (
                loader.to(device, torch.bfloat16) if device.type == "cuda" else loader
            )
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
    def boxes(self) -> tuple[DetectionOptions, tuple[BoxedImages, BoxedImages]]:
        """The raccoons."""
        options = DetectionOptions(
            data=str(self.root / "detect"), train_split="raccoon_train", val_split="raccoon_val"
        )
        return options, self._made("boxes", lambda: load_detection(options))

    @functools.cache  # noqa: B019
    def labelled(self) -> tuple[KnnOptions, ClassifiedImages]:
        """Caltech-101, leave-one-out."""
        options = KnnOptions(data=str(self.root / "caltech101"), recalibrate=184)
        return options, self._made("labelled", lambda: ClassifiedImages.load(options))

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
        run.backbone, output_stride=run.output_stride, truncate=run.truncate, padding=padding
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
        eager = telling and step > 0
        take = self.captured if self.captured and not eager else self.one
        return take(views.view_q, views.view_k, views.crop_q, views.crop_k).loss


def pretrain(
    run: Run, materials: Materials, device: torch.device, *, graph: bool = True
) -> tuple[nn.Module, nn.Module | None, dict[str, Any]]:
    """The backbone, the dense head where there is one, and what the training said."""
    torch.manual_seed(run.seed)
    backbone = network(run)
    if run.start:
        path = materials.cache / run.start_weights
        if not path.is_file():
            raise FileNotFoundError(
                f"experiments: start needs {path}, which a run of that study leaves in --cache; "
                "take its line out of the results to run it again"
            )
        backbone.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    if run.arm == "random":
        return backbone.to(device), None, {}
    method, options, _ = ARMS[run.arm]
    arm = method(backbone, run.steps, **{**options, **json.loads(run.options)})
    arm.to(device=device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
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


def finetuned(
    backbone: nn.Module, materials: Materials, split: str, labelled: int
) -> dict[str, float]:
    """An FCN head and the whole network trained on so many of CamVid's images; 0 takes all."""
    options = FinetuneOptions(
        data=str(materials.root / "camvid"), val_split=split, size=STREET, labelled=labelled
    )
    report = finetune(backbone, options, data=materials.street(split)[0])
    return {f"finetune{labelled or ''}": 100 * report.value}


def detected(backbone: nn.Module, materials: Materials, split: str) -> dict[str, float]:
    """Faster R-CNN trained and measured on the raccoons."""
    options, data = materials.boxes()
    numbers = detection(backbone, options, data=data).numbers
    return {name: 100 * numbers[name] for name in ("ap", "ap50")}


def neighbours(backbone: nn.Module, materials: Materials, split: str) -> dict[str, float]:
    """Nearest neighbours on Caltech-101, mean over the classes."""
    options, data = materials.labelled()
    return {"knn": 100 * knn(backbone, options, data=data).numbers["mean_class_accuracy"]}


ALSO: dict[str, Callable[[nn.Module, Materials, str], dict[str, float]]] = {
    "finetune": functools.partial(finetuned, labelled=0),
    "finetune46": functools.partial(finetuned, labelled=46),
    "detection": detected,
    "knn": neighbours,
}


def measure(
    backbone: nn.Module, dense_head: nn.Module | None, materials: Materials, run: Run
) -> dict[str, Any]:
    """Linear and in-context segmentation, correspondence, and what the run asks for."""
    data, protocols = materials.street(run.split)
    options, views = materials.pairs()
    backbone.eval()
    numbers: dict[str, Any] = {}
    for name, report in evaluate_dense(backbone, data, protocols).items():
        numbers[name] = round(100 * report.value, 3)
    report = correspondence(backbone, options, dense_head=dense_head, views=views)
    numbers |= {name: round(value, 4) for name, value in report.numbers.items()}
    for name in run.also.split():
        try:
            found = ALSO[name](backbone, materials, run.split)
        except ValueError as error:  # the protocol's own training diverged
            print(f"{run.key}: {error}", flush=True)
        else:
            numbers |= {metric: round(value, 3) for metric, value in found.items()}
    return numbers


def perform(
    run: Run, materials: Materials, device: torch.device, *, graph: bool = True
) -> dict[str, Any]:
    """Train and measure; the line of results."""
    begun = time.perf_counter()
    backbone, dense_head, said = pretrain(run, materials, device, graph=graph)
    if run.steps:
        torch.save(backbone.state_dict(), materials.cache / run.weights)
    gc.collect()  # a captured step and its memory, held in cycles
    numbers = measure(backbone, dense_head, materials, run)
    said["seconds"] = round(time.perf_counter() - begun, 1)
    said["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"run": dataclasses.asdict(run), "numbers": numbers, "training": said}
