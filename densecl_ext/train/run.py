"""A run that has been built: its parts, where it stands, and how it is saved and restored."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from densecl_ext import _version
from densecl_ext.data import ViewLoader
from densecl_ext.nn.model import DenseCL
from densecl_ext.train.build import (
    build_model,
    build_optimizer,
    check_batch,
    measured_options,
    open_loader,
    starting_backbone,
)
from densecl_ext.train.config import PretrainConfig
from densecl_ext.train.launch import Ranks
from densecl_ext.train.machine import has_native_bf16
from densecl_ext.train.schedule import cosine_lr, cosine_momentum, duration_in_steps
from densecl_ext.train.step import TrainingStep
from densecl_ext.train.window import Window

# What of an optimizer's groups belongs to the machine and to the schedule, not to the checkpoint.
OWN = ("lr", "foreach", "fused", "capturable")


@dataclasses.dataclass
class Run:
    """Everything that the next step depends on.

    Attributes:
        config: resolved: no "auto" is left that changes the result.
        device: where it computes.
        loader: the two-view loader.
        model: on the device, in training mode.
        optimizer: over its trainable parameters.
        training_step: takes one step with these.
        window: means since the last log row.
        epoch: the current one, 0-based.
        step: steps done.
        metrics: the last log row.
        ranks: the processes that share it; all of them call `state_dict` together.
        told_of_position: whether the warning of the position shortcut was given; no part of a
            checkpoint, so that a resumed run may give it again.
    """

    config: PretrainConfig
    device: torch.device
    loader: ViewLoader
    model: DenseCL
    optimizer: torch.optim.Optimizer
    training_step: TrainingStep
    window: Window
    ranks: Ranks
    epoch: int = 0
    step: int = 0
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    told_of_position: bool = False

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch."""
        return len(self.loader)

    @property
    def total_steps(self) -> int:
        """Steps of the whole schedule."""
        return self.config.epochs * self.steps_per_epoch

    def learning_rate(self, step: int) -> float:
        """Learning rate of the step with this 0-based index."""
        every = self.steps_per_epoch if self.config.schedule == "epoch" else 1
        warmup = duration_in_steps(self.config.lr_warmup, self.steps_per_epoch)
        return cosine_lr(float(self.config.lr), step, self.total_steps, every=every, warmup=warmup)

    def key_momentum(self, step: int) -> float:
        """Momentum of the key encoder in the step with this 0-based index."""
        base = float(self.config.key_momentum)
        if self.config.key_momentum_schedule == "constant":
            return base
        return cosine_momentum(base, step, self.total_steps)

    def new_step(self, *, cuda_graph: bool) -> TrainingStep:
        """Another `TrainingStep` of the same parts; encoders that are compiled stay so."""
        return TrainingStep(
            self.model,
            self.optimizer,
            precision=self.config.precision,
            cuda_graph=cuda_graph,
            accumulate=self.config.accumulate,
        )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds: tensors and plain containers."""
        optimizer = self.optimizer.state_dict()
        for group in optimizer["param_groups"]:
            group["lr"] = float(group["lr"])  # on a GPU a tensor there
        return {
            "densecl_ext": _version.__version__,
            "config": self.config.to_mapping(),
            "data": data_identity(self.loader),
            "epoch": self.epoch,
            "step": self.step,
            "metrics": self.metrics,
            "model": self.model.state_dict(),
            "optimizer": optimizer,
            "loader": self.loader.state_dict(),
            "window": self.window.state_dict(),
            "rng": rng_state(self.device),
        }

    def load_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Puts the run, and the global generators, back to where `state_dict` found them.

        Raises:
            ValueError: the images are not those of the interrupted run.
            RuntimeError: the model does not fit.
        """
        if not same_images(checkpoint["data"], self.loader):
            raise ValueError(
                f"pretrain: cannot resume: {self.config.data} holds {self.loader.num_images} "
                f"images, and the run was started with {checkpoint['data']['images']} or with "
                "others"
            )
        self.epoch, self.step = checkpoint["epoch"], checkpoint["step"]
        self.metrics = dict(checkpoint["metrics"])
        groups = self.optimizer.param_groups
        own = [{key: group[key] for key in OWN if key in group} for group in groups]
        for part in ("model", "optimizer", "loader", "window"):
            getattr(self, part).load_state_dict(checkpoint[part])
        for group, values in zip(self.optimizer.param_groups, own, strict=True):
            group.update(values)
        set_rng_state(checkpoint["rng"], self.device)


def build_run(
    config: PretrainConfig,
    device: torch.device,
    *,
    backbone: nn.Module | None = None,
    loader: ViewLoader | None = None,
    ranks: Ranks | None = None,
) -> Run:
    """Builds a run before its first step. Seeds the global generators.

    Args:
        config: what to do; "auto" is resolved here, once the number of images is known.
        device: of `densecl_ext.train.machine.pick_device`.
        backbone: a network of your own, see `pretrain`.
        loader: a loader of your own, see `pretrain`. One that is opened here is closed when
            building fails, else by the caller.
        ranks: the processes that share the run; None for this one alone.

    Raises:
        ValueError: an option does not fit the data or the device.
        FileNotFoundError: no such weights file.
    """
    if config.cuda_graph and device.type != "cuda":
        raise ValueError(f"pretrain: cuda_graph needs a GPU, the run's device is {device}")
    if config.channels != "rgb" and config.probe != "none":
        raise ValueError(
            f"pretrain: probe needs channels rgb, got channels {config.channels}: evaluation reads "
            "RGB images alone"
        )
    ranks = Ranks(device) if ranks is None else ranks
    if config.cuda_graph and ranks.world > 1:
        raise ValueError(
            f"pretrain: cuda_graph is for one GPU, the run has {ranks.world}; leave it out"
        )
    own = loader is None
    if getattr(loader, "ranks", 1) != ranks.world and not own:
        raise ValueError(
            f"pretrain: the run has {ranks.world} processes, and the loader hands every batch out "
            "whole; build it with build_loader(rank=, ranks=), or give it an attribute `ranks`"
        )
    batch = getattr(loader, "batch_size", config.batch_size)
    if batch != config.batch_size:
        raise ValueError(f"pretrain: batch_size is {config.batch_size}, the loader's is {batch}")
    # Data first: the number of images decides what "auto" means.
    loader = open_loader(config, ranks) if loader is None else loader
    try:
        config = config.resolved(
            images=loader.num_images,
            native_bf16=has_native_bf16(device),
            loader=loader.backend,
            measured=measured_options(config, loader),
        )
        seed_everything(config.seed)
        backbone = starting_backbone(config) if backbone is None else backbone
        check_batch(config, backbone, ranks.world)
        model = build_model(config, backbone, len(loader), ranks.world).to(device).train()
        optimizer = build_optimizer(config, model)
        training_step = TrainingStep(
            model,
            optimizer,
            precision=config.precision,
            cuda_graph=config.cuda_graph,
            compile=config.compile,
            accumulate=config.accumulate,
        )
    except BaseException:
        if own:
            loader.close()
        raise
    return Run(config, device, loader, model, optimizer, training_step, Window(device), ranks)


def data_identity(loader: ViewLoader) -> dict[str, Any]:
    """Number and identity of the images, to tell whether a resumed run sees the same ones."""
    return {"images": loader.num_images, "identity": loader.identity}


def same_images(stored: Mapping[str, Any], loader: ViewLoader) -> bool:
    """Whether a checkpoint's `data_identity` is that of these images.

    Older checkpoints hold a hash of the files' names without folders instead, and are compared by
    that.
    """
    if "names" not in stored:
        return dict(stored) == data_identity(loader)
    digest = hashlib.sha256()
    for number, path in enumerate(getattr(loader, "files", ())):
        digest.update(b"\n" * (number > 0) + os.fsencode(path.name))
    return dict(stored) == {"images": loader.num_images, "names": digest.hexdigest()}


def seed_everything(seed: int) -> None:
    """Seeds Python's, NumPy's and torch's global generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def rng_state(device: torch.device) -> dict[str, Any]:
    """State of all global generators, of GPUs the run's own, as tensors and plain values."""
    numpy_state: Any = np.random.get_state()
    kind, keys, position, has_gauss, gauss = numpy_state
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(device)] if device.type == "cuda" else [],
    }


def set_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Puts all global generators back; that of a GPU where the run was on one."""
    kind, keys, position, has_gauss, gauss = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"]:
        of_gpus = state["cuda"]  # one, or as versions before had it all that were there
        index = min(device.index or 0, len(of_gpus) - 1)
        torch.cuda.set_rng_state(of_gpus[index], device)
