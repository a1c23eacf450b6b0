"""Pre-training, from the folder of images to the last checkpoint, on one page."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import nn

from densecl_ext.data import TwoViews
from densecl_ext.nn.model import DenseCL
from densecl_ext.train.build import (
    build_model,
    build_optimizer,
    open_loader,
    starting_backbone,
)
from densecl_ext.train.config import PretrainConfig, merge_resumed
from densecl_ext.train.machine import has_native_bf16, pick_device, set_up
from densecl_ext.train.metrics import build_fabric, build_loggers
from densecl_ext.train.progress import Progress
from densecl_ext.train.run_folder import RunFolder
from densecl_ext.train.schedule import cosine_lr, cosine_momentum, duration_in_steps
from densecl_ext.train.signals import StopRequest
from densecl_ext.train.state import initial_state, restore, seed_everything, snapshot
from densecl_ext.train.step import TrainingStep
from densecl_ext.train.window import Row, Window, weights_finite

OWN_BACKBONE = "custom"


class TrainingDiverged(RuntimeError):
    """The loss or a weight became NaN or infinite; the last checkpoint is from before."""


@dataclasses.dataclass(frozen=True)
class PretrainResult:
    """How a run ended.

    Attributes:
        output: the run folder.
        checkpoint: its newest checkpoint.
        step: steps done, of `total_steps`.
        total_steps: steps of the whole schedule.
        interrupted: whether Ctrl-C or SIGTERM ended it early; resume goes on.
        metrics: the last row of metrics.csv.
        skipped: files that did not decode, and why.
    """

    output: Path
    checkpoint: Path
    step: int
    total_steps: int
    interrupted: bool
    metrics: dict[str, float]
    skipped: dict[Path, str]


def pretrain(
    config: PretrainConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    backbone: nn.Module | None = None,
    progress: Progress | None = None,
) -> PretrainResult:
    """Pre-trains a backbone with DenseCL on a folder of unlabelled images.

    Writes OUT/config.yaml, OUT/metrics.csv, OUT/tensorboard/ and OUT/checkpoints/last.pt. A
    resumed run goes on with the very next batch, and on the CPU ends with the same bits as one
    that was never interrupted.

    Ctrl-C and SIGTERM end the run after the current step with a checkpoint (in the main thread).
    Sets torch's thread count if `config.threads` is a number and seeds the global generators. On a
    GPU it makes that the current one and lets cuDNN measure which of its kernels are fastest.

    Args:
        config: what to do.
        resume: go on with the run in `config.output`.
        overwrite: replace the run in `config.output`.
        backbone: a network of your own, (N, 3, H, W) -> (N, C, h, w), instead of
            `config.backbone` and `config.weights`. To resume, pass the same network.
        progress: told about every step; None is silent.

    Returns:
        How it ended.

    Raises:
        ValueError: an option does not fit the data or the interrupted run.
        FileExistsError: a run is in the way.
        FileNotFoundError: there is no run to resume, or no such weights file.
        OSError: the output cannot be written.
        TrainingDiverged: the loss is no longer finite.
        RuntimeError: the device is not there, or another process trains in the folder.
    """
    progress = progress or Progress()
    if not config.data:
        raise ValueError("pretrain: data must name a folder of images, got nothing (--data DIR)")
    if backbone is not None:
        config = dataclasses.replace(config, backbone=OWN_BACKBONE, weights="none")
    device = pick_device(config.device)
    set_up(device, config.threads)
    folder = RunFolder(config.output)
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(folder.release)
        checkpoint = folder.prepare(resume=resume, overwrite=overwrite)
        if checkpoint is not None:
            config, changed = merge_resumed(config, PretrainConfig.of_run(checkpoint["config"]))
            if changed:
                progress.message(f"resuming with another {', '.join(changed)}")
        if config.cuda_graph and device.type != "cuda":
            raise ValueError(f"pretrain: cuda_graph needs a GPU, the run's device is {device}")
        stop = cleanup.enter_context(StopRequest(lambda: progress.message(STOPPING)))
        cleanup.callback(progress.close)

        # Data first: the number of images decides what "auto" means.
        loader = open_loader(config, device)
        cleanup.callback(loader.close)
        steps_per_epoch = len(loader)
        total = config.epochs * steps_per_epoch
        config = config.resolved(
            images=loader.num_images, native_bf16=has_native_bf16(device), loader=loader.backend
        )

        # The model, and everything else that a run consists of, in one dict.
        seed_everything(config.seed)
        if backbone is None:
            backbone = starting_backbone(config)
        model = build_model(config, backbone, steps_per_epoch).to(device).train()
        optimizer = build_optimizer(config, model)
        if checkpoint is None:
            folder.clear()  # not earlier: an error above would have cost the run that is replaced
        loggers = build_loggers(config, folder, checkpoint["step"] if checkpoint else None)
        fabric = build_fabric(device, loggers)
        train_step = TrainingStep(
            model,
            optimizer,
            precision=config.precision,
            cuda_graph=config.cuda_graph,
            compile=config.compile,
        )
        window = Window(device)
        state = initial_state(
            config, model=model, optimizer=optimizer, loader=loader, window=window
        )
        if checkpoint is not None:
            restore(state, checkpoint)

        # The first checkpoint, before the first step, shows that the disk takes one.
        folder.write_config(config)
        folder.save(snapshot(state))
        folder.require_space()

        last = total if config.max_steps == "none" else min(total, int(config.max_steps))
        save_every = duration_in_steps(config.checkpoint_every, steps_per_epoch) or total
        keep_every = config.keep_every * steps_per_epoch or total + 1
        memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        progress.message(describe(state, total))
        progress.start(step=state["step"], total=last, batch_size=config.batch_size)
        rows: deque[Row] = deque()
        in_flight = 1 if device.type == "cuda" else 0  # rows are read one log step later
        for views in batches(state, config.epochs, last, stop):
            train_step.schedule(
                lr=learning_rate(config, state["step"], steps_per_epoch),
                key_momentum=key_momentum(config, state["step"], steps_per_epoch),
            )
            output = train_step(
                views.view_q.contiguous(memory_format=memory_format),
                views.view_k.contiguous(memory_format=memory_format),
                views.crop_q,
                views.crop_k,
            )
            state["step"] += 1
            step = state["step"]
            window.add(output.scalars(), config.batch_size)
            keep = step % keep_every == 0
            save = keep or step % save_every == 0
            if step % config.log_every == 0 or step == last:
                rows.append(window.send(step, weights_finite(model)))
            while len(rows) > (0 if save else in_flight):
                log(rows.popleft(), state, folder, fabric, progress)
            if save:
                require_finite(state, folder)
                folder.save(snapshot(state))
            if keep:
                folder.keep(f"epoch_{step // steps_per_epoch:04d}.pt")
            progress.update(step)
        while rows:
            log(rows.popleft(), state, folder, fabric, progress)
        require_finite(state, folder)
        folder.save(snapshot(state))
        for logger in loggers:
            logger.finalize("success")
        return PretrainResult(
            output=folder.path,
            checkpoint=folder.last,
            step=state["step"],
            total_steps=total,
            interrupted=stop.requested and state["step"] < last,
            metrics=state["metrics"],
            skipped=dict(loader.skipped),
        )


POSITION = (
    "grid position explains more than half of the dense features: the run is learning where things "
    "are instead of what they are. Use --matching geometric --dense-negatives position, or "
    "--padding reflect (docs/training.md)"
)
STOPPING = "stopping after this step with a checkpoint; again to stop at once"


def batches(state: dict[str, Any], epochs: int, last: int, stop: StopRequest) -> Iterator[TwoViews]:
    """The batches that remain of all epochs, up to step `last` or a request to stop.

    Counts `state["epoch"]`; the consumer counts `state["step"]`.
    """
    loader = state["loader"]
    while state["epoch"] < epochs:
        loader.set_epoch(state["epoch"])  # the current epoch's number keeps a loaded position
        remaining = iter(loader)
        while state["step"] < last and not stop.requested:
            try:
                # torch's DataLoader draws from the global generator whenever an iteration begins,
                # which in a resumed run is not where it was in the interrupted one.
                with torch.random.fork_rng(devices=[]):
                    views = next(remaining, None)
            except RuntimeError:
                if not stop.requested:
                    raise
                return  # the signal that asks us to stop has also ended the loader's workers
            if views is None:
                break
            yield views
        else:
            return
        state["epoch"] += 1


def learning_rate(config: PretrainConfig, step: int, steps_per_epoch: int) -> float:
    """Learning rate of the step with this 0-based index."""
    every = steps_per_epoch if config.schedule == "epoch" else 1
    warmup = duration_in_steps(config.lr_warmup, steps_per_epoch)
    total = config.epochs * steps_per_epoch
    return cosine_lr(float(config.lr), step, total, every=every, warmup=warmup)


def key_momentum(config: PretrainConfig, step: int, steps_per_epoch: int) -> float:
    """Momentum of the key encoder in the step with this 0-based index."""
    base = float(config.key_momentum)
    if config.key_momentum_schedule == "constant":
        return base
    return cosine_momentum(base, step, config.epochs * steps_per_epoch)


def log(
    row: Row, state: dict[str, Any], folder: RunFolder, fabric: Fabric, progress: Progress
) -> None:
    """Writes a row that has arrived; raises as `require_finite`."""
    if not row.finite():
        raise diverged(row.step, state, folder)
    config, steps_per_epoch = PretrainConfig(**state["config"]), len(state["loader"])
    state["metrics"] = {
        "epoch": row.step / steps_per_epoch,
        **row.means(),
        "lr": learning_rate(config, row.step - 1, steps_per_epoch),
    }
    fabric.log_dict(state["metrics"], row.step)
    progress.log(state["metrics"])
    if state["metrics"].get("position_share", 0.0) > 0.5 and not state.get("told_of_position"):
        state["told_of_position"] = True  # not part of a checkpoint: a resumed run may say it again
        progress.message(POSITION)


def require_finite(state: dict[str, Any], folder: RunFolder) -> None:
    """Raises TrainingDiverged if a loss since the last log row, or a weight, is not finite."""
    if not (state["window"].finite() and bool(weights_finite(state["model"]))):
        raise diverged(state["step"], state, folder)


def diverged(step: int, state: dict[str, Any], folder: RunFolder) -> TrainingDiverged:
    """The error, with what to do about it."""
    return TrainingDiverged(
        "pretrain: the loss or a weight became NaN or infinite at or before step "
        f"{step}; {folder.last} is from before that. Go on from it with a lower rate "
        f"(--resume --lr X, it was {state['config']['lr']:g}) or with --precision fp32"
    )


def describe(state: dict[str, Any], total: int) -> str:
    """What is about to happen, with all automatic choices, in a few lines."""
    config, loader, model = PretrainConfig(**state["config"]), state["loader"], state["model"]
    assert isinstance(model, DenseCL)
    weights = sum(p.numel() for p in model.backbone.parameters()) / 1e6
    device = next(model.parameters()).device
    begin = f"resuming at step {state['step']} of" if state["step"] else "training for"
    return "\n".join(
        [
            f"{begin} {total} steps ({config.epochs} epochs of {len(loader)}) on {device}, "
            f"{config.precision}, {torch.get_num_threads()} threads",
            f"  data: {loader.num_images} images through {loader.backend}, views of "
            f"{config.image_size} px, batch {config.batch_size}",
            f"  model: {config.backbone} ({weights:.1f} million weights), matching "
            f"{config.matching}, lambda {config.loss_lambda:g}, queue {config.queue_length} "
            f"({config.queue_dtype}), key momentum {config.key_momentum:g}",
            f"  learning rate {config.lr:g}, output {config.output}",
        ]
    )
