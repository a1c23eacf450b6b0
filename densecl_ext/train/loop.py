"""Pre-training, from the folder of images to the last checkpoint, on one page."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from lightning.fabric.loggers.logger import Logger
from torch import nn

from densecl_ext.backbones.timm import TIMM
from densecl_ext.checkpoints import export_backbone
from densecl_ext.checkpoints.run_folder import RunFolder
from densecl_ext.checkpoints.writer import CheckpointWriter
from densecl_ext.data import ViewLoader
from densecl_ext.train.agreement import Agreement
from densecl_ext.train.batches import batches
from densecl_ext.train.config import PretrainConfig, merge_resumed
from densecl_ext.train.launch import join
from densecl_ext.train.machine import set_up
from densecl_ext.train.metrics import build_loggers
from densecl_ext.train.probing import Probing, probe_due
from densecl_ext.train.progress import Progress
from densecl_ext.train.recipes import dump_recipe
from densecl_ext.train.replaying import Seen, write_replay
from densecl_ext.train.run import Run, build_run
from densecl_ext.train.schedule import duration_in_steps
from densecl_ext.train.signals import StopRequest
from densecl_ext.train.window import Row, weights_finite

OWN_BACKBONE = "custom"


class TrainingDiverged(RuntimeError):
    """The loss or a weight became NaN or infinite; the last checkpoint is from before.

    Attributes:
        told: whether another process of the run says so, and this one need not.
    """

    told = False


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
        backbone: OUT/backbone.pth, the finished run's backbone as its library loads it; None where
            the run has not finished, or that library has no such network.
        first: whether this is the only process of the run, or its rank 0, which tells of it.
    """

    output: Path
    checkpoint: Path
    step: int
    total_steps: int
    interrupted: bool
    metrics: dict[str, float]
    skipped: dict[Path, str]
    backbone: Path | None = None
    first: bool = True


def require_data(config: PretrainConfig, loader: ViewLoader | None) -> None:
    """Raises ValueError where there are no images to train on."""
    if loader is None and not config.data:
        raise ValueError("pretrain: data must name a folder of images, got nothing (--data DIR)")


def save(
    run: Run, writer: CheckpointWriter, *, keep: str | None = None, wait: bool = False
) -> None:
    """Rank 0 writes a checkpoint, behind the steps; with `wait`, all go on when it is there."""
    state = run.state_dict()  # all ranks give their part
    if run.ranks.first:
        writer.save(state, keep=keep)
    if wait:
        run.ranks.first_does(writer.wait)


def pretrain(
    config: PretrainConfig,
    *,
    resume: bool | str = False,
    overwrite: bool = False,
    backbone: nn.Module | None = None,
    loader: ViewLoader | None = None,
    progress: Progress | None = None,
) -> PretrainResult:
    """Pre-trains a backbone with DenseCL on a folder of unlabelled images.

    Writes OUT/config.yaml, OUT/metrics.csv, OUT/tensorboard/, OUT/checkpoints/last.pt and, at the
    end, OUT/backbone.pth. A
    resumed run goes on with the very next batch, and on the CPU ends with the same bits as one
    that was never interrupted.

    Ctrl-C and SIGTERM end the run after the current step with a checkpoint (in the main thread).
    Sets torch's thread count if `config.threads` is a number and seeds the global generators. On a
    GPU it makes that the current one and lets cuDNN measure which of its kernels are fastest.

    Args:
        config: what to do.
        resume: go on with the run in `config.output`; "auto" does so if there is one, and else
            starts it.
        overwrite: replace the run in `config.output`.
        backbone: a network of your own, (N, 3, H, W) -> (N, C, h, w), instead of
            `config.backbone` and `config.weights`. To resume, pass the same network.
        loader: a loader of your own, on the run's device, instead of `config.data` and all that
            decides how images are read; `config.batch_size` must be its own. It stays open.
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
    if backbone is not None:
        config = dataclasses.replace(config, backbone=OWN_BACKBONE, weights="none")
    ranks = join(config)
    device = ranks.device
    progress = progress if ranks.first else Progress()
    set_up(device, config.threads)
    folder = RunFolder(config.output)
    with contextlib.ExitStack() as cleanup:
        cleanup.enter_context(ranks.together())
        ranks.all_do(lambda: require_data(config, loader))
        cleanup.callback(folder.release)
        checkpoint = ranks.first_does(lambda: folder.prepare(resume=resume, overwrite=overwrite))
        if checkpoint is not None:
            asked, stored = config, PretrainConfig.of_run(checkpoint["config"])
            config, changed = ranks.all_do(lambda: merge_resumed(asked, stored))
            if changed:
                progress.message(f"resuming with another {', '.join(changed)}")
        stop = StopRequest(lambda: progress.message(STOPPING), alone=ranks.world == 1)
        cleanup.enter_context(stop)
        cleanup.callback(progress.close)

        run = ranks.all_do(
            lambda: build_run(config, device, backbone=backbone, loader=loader, ranks=ranks)
        )
        if loader is None:
            cleanup.callback(run.loader.close)
        config = run.config
        if checkpoint is not None:
            ranks.all_do(lambda: run.load_state_dict(checkpoint))
        ranks.all_do(lambda: run.training_step.average(ranks.wrap))
        agreement = Agreement(run, ranks, stop)

        loggers: list[Logger] = []
        probing: Probing | None = None

        def begin() -> None:
            nonlocal loggers, probing
            if checkpoint is None:
                folder.clear()  # not earlier: an error above would have cost the replaced run
            loggers = build_loggers(config, folder, checkpoint["step"] if checkpoint else None)
            if config.probe != "none":
                probing = Probing(config, folder)
            folder.write_config(dump_recipe(config))

        ranks.first_does(begin)
        # The first checkpoint, before the first step, shows that the disk takes one.
        writer = CheckpointWriter(folder)
        cleanup.callback(writer.close)
        save(run, writer, wait=True)
        ranks.first_does(folder.require_space)

        total = run.total_steps
        last = total if config.max_steps == "none" else min(total, int(config.max_steps))
        save_every = duration_in_steps(config.checkpoint_every, run.steps_per_epoch) or total
        keep_every = config.keep_every * run.steps_per_epoch or total + 1
        memory_format = torch.channels_last if config.channels_last else torch.contiguous_format

        def fails(step: int) -> TrainingDiverged:
            writer.close()
            return diverged(step, run, folder, write_replay(run, folder, seen, step))

        progress.message(describe(run))
        progress.start(step=run.step, total=last, batch_size=config.batch_size)
        rows: deque[Row] = deque()
        seen = Seen(2 * config.log_every)
        in_flight = 1 if device.type == "cuda" else 0  # rows are read one log step later
        began = time.monotonic() if config.compile and run.step < last else None
        if began is not None:
            progress.message("compiling both encoders: the first step takes a minute or more")
        for views, waited in batches(run, last, stop, agreement):
            run.training_step.schedule(
                lr=run.learning_rate(run.step), key_momentum=run.key_momentum(run.step)
            )
            agreement.before_step(writer)
            output = run.training_step(
                views.view_q.contiguous(memory_format=memory_format),
                views.view_k.contiguous(memory_format=memory_format),
                views.crop_q,
                views.crop_k,
            )
            if began is not None:
                progress.message(f"compiled after {time.monotonic() - began:.0f} s")
                began = None
            run.step += 1
            run.window.add(output.scalars(), config.batch_size, waited)
            seen.add(run.step, views.index)
            keep = run.step % keep_every == 0
            probe = probe_due(config, run.steps_per_epoch, run.step, last)
            saves = keep or probe or run.step % save_every == 0
            agreement.after_step(all_arrived=saves or run.step == last)
            if run.step % config.log_every == 0 or run.step == last:
                rows.append(run.window.send(run.step, weights_finite(run.model)))
            while len(rows) > (0 if saves else in_flight):
                log(rows.popleft(), run, fails, loggers, progress)
            if saves:
                require_finite(run, fails)
                name = f"epoch_{run.step // run.steps_per_epoch:04d}.pt" if keep else None
                save(run, writer, keep=name, wait=probe)  # the best one gets another name
            if probe:
                ranks.first_does(lambda: probing and probing(run, folder, loggers, progress))
            progress.update(run.step)
        while rows:
            log(rows.popleft(), run, fails, loggers, progress)
        require_finite(run, fails)
        save(run, writer, wait=True)
        for logger in loggers:
            logger.finalize("success")
        return PretrainResult(
            output=folder.path,
            checkpoint=folder.last,
            step=run.step,
            total_steps=total,
            interrupted=stop.agreed and run.step < last,
            metrics=run.metrics,
            skipped={
                path: why
                for part in ranks.gather(dict(run.loader.skipped))
                for path, why in part.items()
            },
            backbone=ranks.first_does(
                lambda: write_backbone(run, folder, progress) if run.step == total else None
            ),
            first=ranks.first,
        )


POSITION = (
    "grid position explains more than half of the dense features: the run is learning where things "
    "are instead of what they are. Use --matching geometric --dense-negatives position, or "
    "--padding reflect (docs/training.md)"
)
STOPPING = "stopping after this step with a checkpoint; again to stop at once"


def log(
    row: Row,
    run: Run,
    fails: Callable[[int], TrainingDiverged],
    loggers: Sequence[Logger],
    progress: Progress,
) -> None:
    """Writes a row that has arrived; raises as `require_finite`."""
    if not row.finite():
        raise fails(row.step)
    run.metrics = {
        "epoch": row.step / run.steps_per_epoch,
        **row.means(),
        "lr": run.learning_rate(row.step - 1),
    }
    for logger in loggers:
        logger.log_metrics(run.metrics, row.step)
    progress.log(run.metrics)
    if run.metrics.get("position_share", 0.0) > 0.5 and not run.told_of_position:
        run.told_of_position = True
        progress.message(POSITION)


def require_finite(run: Run, fails: Callable[[int], TrainingDiverged]) -> None:
    """Raises TrainingDiverged if a loss since the last log row, or a weight, is not finite."""
    finite = run.window.finite() and bool(weights_finite(run.model))
    if not all(run.ranks.gather(finite)):
        raise fails(run.step)


def diverged(step: int, run: Run, folder: RunFolder, replay: Path) -> TrainingDiverged:
    """The error, with what to do about it; of several ranks the first one tells it."""
    error = TrainingDiverged(
        "pretrain: the loss or a weight became NaN or infinite at or before step "
        f"{step}; {folder.last} is from before that. Go on from it with a lower rate "
        f"(--resume --lr X, it was {run.config.lr:g}) or with --precision fp32. Which step, images "
        f"and weights: densecl pretrain --replay {replay}"
    )
    error.told = not run.ranks.first
    return error


def write_backbone(run: Run, folder: RunFolder, progress: Progress) -> Path | None:
    """Exports a finished run's backbone; says why where its library has no such network."""
    name = run.config.backbone
    if name == OWN_BACKBONE:
        return None
    try:
        export_backbone(
            folder.last, folder.backbone, "timm" if name.startswith(TIMM) else "torchvision"
        )
    except (ValueError, RuntimeError, OSError) as error:
        progress.message(f"{folder.backbone} is not written: {error}")
        return None
    return folder.backbone


def described_values(config: PretrainConfig) -> list[str]:
    """How the images' values are read, where that is not 8-bit RGB as usual."""
    if config.channels == "rgb":
        if config.value_range == "none":
            return []
        return [f"  values: {config.value_range} of more than 8 bits become black, white"]
    stated = "their whole range" if config.value_range == "none" else config.value_range
    return [
        f"  channels: {config.channels}; values: {stated} of more than 8 bits become 0, 1; mean "
        f"{config.pixel_mean}, deviation {config.pixel_std}",
        "  views: crops, flips, brightness, contrast and blur; not saturation, hue and grayscale, "
        "which need red, green and blue",
    ]


def describe(run: Run) -> str:
    """What is about to happen, with all automatic choices, in a few lines."""
    config, loader = run.config, run.loader
    weights = sum(p.numel() for p in run.model.backbone.parameters()) / 1e6
    begin = f"resuming at step {run.step} of" if run.step else "training for"
    where = f"{run.device}" if run.ranks.world == 1 else f"{run.ranks.world} x {run.device.type}"
    shared = [f"{run.ranks.world} processes"] * (run.ranks.world > 1)
    shared += [f"{config.accumulate} parts"] * (config.accumulate > 1)
    each = f" ({' x '.join(shared)})" if shared else ""
    return "\n".join(
        [
            f"{begin} {run.total_steps} steps ({config.epochs} epochs of {len(loader)}) on "
            f"{where}, {config.precision}, {torch.get_num_threads()} threads",
            f"  data: {loader.num_images} images through {loader.backend}, views of "
            f"{config.image_size} px, batch {config.batch_size}{each}",
            *described_values(config),
            f"  model: {config.backbone} ({weights:.1f} million weights), matching "
            f"{config.matching}, lambda {config.loss_lambda:g}, queue {config.queue_length} "
            f"({config.queue_dtype}), key momentum {config.key_momentum:g}",
            f"  learning rate {config.lr:g}, output {config.output}",
        ]
    )
