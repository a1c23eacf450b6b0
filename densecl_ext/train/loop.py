"""Pre-training, from the folder of images to the last checkpoint, on one page."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.loggers.logger import Logger
from torch import nn

from densecl_ext import _version
from densecl_ext.data import TwoViews, ViewLoader, build_loader
from densecl_ext.model import DenseCL
from densecl_ext.train.config import PretrainConfig, merge_resumed
from densecl_ext.train.machine import build_fabric, has_native_bf16, pick_device
from densecl_ext.train.metrics import CsvLog, Window
from densecl_ext.train.options import duration_in_steps
from densecl_ext.train.progress import Progress, format_seconds
from densecl_ext.train.run_folder import RunFolder
from densecl_ext.train.schedule import cosine_lr
from densecl_ext.train.signals import StopRequest


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

    Writes OUT/config.yaml, OUT/metrics.csv, OUT/tensorboard/ and OUT/checkpoints/last.pt. A resumed run goes
    on with the very next batch, and on the CPU ends with the same bits as one that was never interrupted.

    Ctrl-C and SIGTERM end the run after the current step with a checkpoint (in the main thread). Sets torch's
    thread count if `config.threads` is a number, and seeds the global generators.

    Args:
        config: what to do.
        resume: go on with the run in `config.output`.
        overwrite: replace the run in `config.output`.
        backbone: a network of your own, (N, 3, H, W) -> (N, C, h, w), instead of `config.backbone`. To
            resume, pass the same network.
        progress: told about every step; None is silent.

    Returns:
        How it ended.

    Raises:
        ValueError: an option does not fit the data or the interrupted run.
        FileExistsError, FileNotFoundError: a run is in the way, or there is none to resume.
        OSError: the output cannot be written.
        TrainingDiverged: the loss is no longer finite.
        RuntimeError: the device is not there.
    """
    progress = progress or Progress()
    if not config.data:
        raise ValueError("pretrain: data must name a folder of images, got nothing (--data DIR)")
    folder = RunFolder(config.output)
    checkpoint = folder.prepare(resume=resume, overwrite=overwrite)
    if checkpoint is not None:
        config, changed = merge_resumed(config, PretrainConfig(**checkpoint["config"]))
        if changed:
            progress.message(f"resuming with another {', '.join(changed)}")

    device = pick_device(config.device)
    if isinstance(config.threads, int):
        torch.set_num_threads(config.threads)
    with contextlib.ExitStack() as cleanup:
        stop = cleanup.enter_context(
            StopRequest(lambda: progress.message("stopping after this step; again to stop at once"))
        )
        cleanup.callback(progress.close)

        # Data first: the number of images decides what "auto" means.
        loader = open_loader(config, device)
        cleanup.callback(loader.close)
        config = config.resolved(
            images=len(loader.files), native_bf16=has_native_bf16(device)
        )
        steps_per_epoch = len(loader)
        total = config.epochs * steps_per_epoch
        data = data_identity(loader)
        if checkpoint is not None and checkpoint["data"] != data:
            raise ValueError(
                f"pretrain: cannot resume: {config.data} now holds {data['images']} images, and the run was started "
                f"with {checkpoint['data']['images']} (or others of the same number)"
            )

        # Model, optimiser, and everything else a run consists of.
        loggers = build_loggers(config, folder, checkpoint["step"] if checkpoint else None)
        fabric = build_fabric(config, device, loggers)
        seed_everything(config.seed)
        model = build_model(config, backbone, steps_per_epoch)
        if config.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.SGD(
            [p for p in model.parameters() if p.requires_grad],
            lr=float(config.lr),
            momentum=config.sgd_momentum,
            weight_decay=config.weight_decay,
        )
        wrapped, fabric_optimizer = fabric.setup(model, optimizer)
        window = Window()
        state: dict[str, Any] = {
            "densecl_ext": _version.__version__,
            "config": config.to_mapping(),
            "data": data,
            "epoch": 0,
            "step": 0,
            "metrics": {},
        }
        parts = {"model": model, "optimizer": optimizer, "loader": loader, "window": window}
        if checkpoint is not None:
            restore(state, parts, checkpoint, fabric.device)
        folder.write_config(config)
        # The first checkpoint, before the first step, shows that the disk takes one.
        save(folder, state, parts)
        folder.require_space()

        last = total if config.max_steps == "none" else min(total, int(config.max_steps))
        save_every = duration_in_steps(config.checkpoint_every, steps_per_epoch) or total
        lr_every = steps_per_epoch if config.schedule == "epoch" else 1
        progress.message(describe(config, loader, model, device, state["step"], total))
        progress.start(step=state["step"], total=last, batch_size=config.batch_size)
        wrapped.train()
        if state["step"] < last:
            for views in epochs(loader, state, config.epochs, stop):
                lr = cosine_lr(float(config.lr), state["step"], total, every=lr_every)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                view_q, view_k = views.view_q, views.view_k
                if config.channels_last:
                    view_q = view_q.contiguous(memory_format=torch.channels_last)
                    view_k = view_k.contiguous(memory_format=torch.channels_last)
                output = wrapped(view_q, view_k, crop_q=views.crop_q, crop_k=views.crop_k)
                fabric.backward(output.loss)
                fabric_optimizer.step()
                fabric_optimizer.zero_grad(set_to_none=True)

                state["step"] += 1
                step = state["step"]
                losses = {name: getattr(output, name) for name in LOSSES}
                window.add(losses | output.metrics, config.batch_size)
                if step % config.log_every == 0 or step == last:
                    require_finite(window, model, state, folder)
                    row = {"epoch": step / steps_per_epoch, "lr": lr, **window.take()}
                    state["metrics"] = row
                    fabric.log_dict(row, step)
                    progress.log(row)
                progress.update(step)
                if stop.requested or step == last:
                    break
                if step % save_every == 0:
                    require_finite(window, model, state, folder)
                    save(folder, state, parts)
                if config.keep_every and step % (config.keep_every * steps_per_epoch) == 0:
                    require_finite(window, model, state, folder)
                    save(folder, state, parts)
                    folder.keep(f"epoch_{step // steps_per_epoch:04d}.pt")
            require_finite(window, model, state, folder)
            save(folder, state, parts)
        for logger in loggers:
            logger.finalize("success")
        return PretrainResult(
            output=folder.path,
            checkpoint=folder.last,
            step=state["step"],
            total_steps=total,
            interrupted=stop.requested and state["step"] < last,
            metrics=state["metrics"],
            skipped=loader.skipped,
        )


LOSSES = ("loss", "loss_global", "loss_dense")


def epochs(
    loader: ViewLoader, state: dict[str, Any], count: int, stop: StopRequest
) -> Iterator[TwoViews]:
    """The batches of the remaining epochs, counting `state["epoch"]`."""
    while state["epoch"] < count:
        loader.set_epoch(state["epoch"])  # the current epoch's number keeps a loaded position
        try:
            yield from loader
        except RuntimeError:
            if not stop.requested:
                raise
            return  # the signal that asks us to stop has also ended the loader's processes
        state["epoch"] += 1


def open_loader(config: PretrainConfig, device: torch.device) -> ViewLoader:
    """The two-view loader of a configuration."""
    return build_loader(
        config.data,
        batch_size=config.batch_size,
        size=config.image_size,
        backend=config.loader,
        device=device,
        workers=None if config.workers == "auto" else int(config.workers),
        seed=config.seed,
        drop_last=True,
    )


def build_model(
    config: PretrainConfig, backbone: nn.Module | None, steps_per_epoch: int
) -> DenseCL:
    """The model of a resolved configuration, on the CPU.

    Raises:
        ValueError: unknown backbone, or weights that do not fit it.
        FileNotFoundError: the weights file is not there.
    """
    from densecl_ext.backbones import build_backbone
    from densecl_ext.checkpoints import read_backbone

    weights = None if config.weights == "none" else config.weights
    if backbone is None:
        path = weights is not None and ("/" in weights or Path(weights).is_file())
        backbone = build_backbone(config.backbone, weights=None if path else weights)
        if path:
            read = read_backbone(config.weights)
            if read.architecture != config.backbone:
                raise ValueError(
                    f"pretrain: weights: {config.weights} holds a {read.architecture}, backbone is {config.backbone}"
                )
            backbone.load_state_dict(read.tensors, strict=True)
    elif weights is not None:
        raise ValueError("pretrain: weights and a backbone of your own exclude each other")
    return DenseCL(
        backbone,
        dim=config.dim,
        hidden_dim=config.hidden_dim,
        queue_length=int(config.queue_length),
        momentum=float(config.key_momentum),
        temperature=config.temperature,
        loss_lambda=config.loss_lambda,
        grid_size=None if config.grid_size == "none" else int(config.grid_size),
        matching=config.matching,
        lambda_warmup_steps=duration_in_steps(config.lambda_warmup, steps_per_epoch),
        queue_dtype=torch.bfloat16 if config.queue_dtype == "bf16" else torch.float32,
        queue_init=config.queue_init,
        key_bn_groups=config.key_bn_groups,
    )


def build_loggers(
    config: PretrainConfig, folder: RunFolder, resume_step: int | None
) -> list[Logger]:
    """metrics.csv, and TensorBoard if wanted; both drop what lies after `resume_step`."""
    loggers: list[Logger] = [CsvLog(folder.metrics, resume_step=resume_step)]
    if config.tensorboard:
        from lightning.fabric.loggers import TensorBoardLogger

        purge = {} if resume_step is None else {"purge_step": resume_step + 1}
        loggers.append(
            TensorBoardLogger(folder.path, name=folder.tensorboard.name, version="", **purge)
        )
    return loggers


def data_identity(loader: ViewLoader) -> dict[str, Any]:
    """Number and names of the images, to tell whether a resumed run sees the same ones."""
    names = hashlib.sha256("\n".join(path.name for path in loader.files).encode())
    return {"images": len(loader.files), "names": names.hexdigest()}


def save(folder: RunFolder, state: dict[str, Any], parts: dict[str, Any]) -> None:
    """Writes everything that the next step depends on."""
    states = {name: part.state_dict() for name, part in parts.items()}
    folder.save({**state, **states, "rng": rng_state()})


def restore(
    state: dict[str, Any], parts: dict[str, Any], checkpoint: dict[str, Any], device: torch.device
) -> None:
    """Puts a run back to where `save` found it."""
    for name in ("epoch", "step", "metrics"):
        state[name] = checkpoint[name]
    for name, part in parts.items():
        if name == "window":
            part.load_state_dict(checkpoint[name], device)
        else:
            part.load_state_dict(checkpoint[name])
    set_rng_state(checkpoint["rng"])


def seed_everything(seed: int) -> None:
    """Seeds Python's, NumPy's and torch's global generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """State of all global generators, as tensors and plain values."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # type: ignore[misc]
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Puts all global generators back; GPUs only where their number is the same."""
    kind, keys, position, has_gauss, gauss = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def require_finite(
    window: Window, model: nn.Module, state: dict[str, Any], folder: RunFolder
) -> None:
    """Raises TrainingDiverged if a loss since the last log row, or a weight, is not finite."""
    norms = torch._foreach_norm([p.detach() for p in model.parameters() if p.requires_grad])
    if window.finite() and bool(torch.isfinite(torch.stack(norms)).all()):
        return
    raise TrainingDiverged(
        f"pretrain: the loss or a weight became NaN or infinite at or before step {state['step']}; "
        f"{folder.last} is from before that. Go on from it with a lower rate (--resume --lr X, it was "
        f"{state['config']['lr']:g}) or with --precision fp32"
    )


def describe(
    config: PretrainConfig,
    loader: ViewLoader,
    model: DenseCL,
    device: torch.device,
    step: int,
    total: int,
) -> str:
    """One paragraph that says what is about to happen, with all automatic choices."""
    parameters = sum(p.numel() for p in model.backbone.parameters()) / 1e6
    begin = f"resuming at step {step} of" if step else "training for"
    return (
        f"{begin} {total} steps ({config.epochs} epochs of {len(loader)}) on {device}, {config.precision}, "
        f"{torch.get_num_threads()} threads\n"
        f"  {len(loader.files)} images ({loader.backend}), views of {config.image_size} px, batch {config.batch_size}\n"
        f"  {config.backbone} ({parameters:.1f} million weights), queue {config.queue_length} ({config.queue_dtype}), "
        f"key momentum {config.key_momentum:g}, lambda {config.loss_lambda:g}, matching {config.matching}\n"
        f"  learning rate {config.lr:g}, output {config.output}"
    )
