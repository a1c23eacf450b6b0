"""A run that became NaN or infinite, once more: which step, which images, which weights.

A run's steps follow from its last checkpoint to the bit on a CPU, so no step has to be recorded:
the replay file names that checkpoint, which is kept, and where to go from there.
"""

from __future__ import annotations

import dataclasses
import json
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from densecl_ext.checkpoints import load_checkpoint
from densecl_ext.checkpoints.run_folder import RunFolder
from densecl_ext.checkpoints.storage import atomic_file
from densecl_ext.data import ViewLoader
from densecl_ext.train.agreement import Agreement
from densecl_ext.train.batches import batches
from densecl_ext.train.config import PretrainConfig, merge_resumed
from densecl_ext.train.launch import join
from densecl_ext.train.machine import set_up
from densecl_ext.train.progress import Progress
from densecl_ext.train.run import Run, build_run
from densecl_ext.train.signals import StopRequest

FILE = "replay.json"
CHECKPOINT = "replay.pt"


@dataclasses.dataclass(frozen=True)
class Replayed:
    """What a replay found.

    Attributes:
        step: the first step after which a loss or a weight is not finite, or the last one taken.
        finite: whether all were, up to there.
        losses: of that step, by name.
        weights: names of the weights that are not finite after it.
        images: the files of its batch.
        first: whether this is the only process, or rank 0.
    """

    step: int
    finite: bool
    losses: dict[str, float]
    weights: list[str]
    images: list[str]
    first: bool = True


class Seen:
    """Which images the last steps took: those between two checks of the losses.

    Args:
        steps: how many steps to remember.
    """

    def __init__(self, steps: int) -> None:
        self._steps: deque[tuple[int, torch.Tensor]] = deque(maxlen=steps)

    def add(self, step: int, index: torch.Tensor) -> None:
        """Remembers the batch of a step, 1-based."""
        self._steps.append((step, index))

    def names(self, run: Run) -> dict[int, list[str]]:
        """Step -> files, of all ranks, which call it together."""
        own = {step: image_names(run.loader, index) for step, index in self._steps}
        found: dict[int, list[str]] = {}
        for part in run.ranks.gather(own):
            for step, names in part.items():
                found.setdefault(step, []).extend(names)
        return found


def write_replay(run: Run, folder: RunFolder, seen: Seen, step: int) -> Path:
    """Keeps the last checkpoint as checkpoints/replay.pt, and writes OUT/replay.json.

    Called by all ranks; rank 0 writes.

    Args:
        run: that has failed.
        folder: of the run, without a checkpoint in flight.
        seen: the images of the last steps.
        step: by which the run had failed.
    """
    names = seen.names(run)
    path = folder.path / FILE
    if run.ranks.first:
        folder.keep(CHECKPOINT)
        words = {"checkpoint": f"checkpoints/{CHECKPOINT}", "step": step, "images": names}
        with atomic_file(path) as file:
            file.write((json.dumps(words, indent=1) + "\n").encode())
    return path


def replay(
    path: str | Path,
    options: Mapping[str, Any] | None = None,
    *,
    backbone: nn.Module | None = None,
    loader: ViewLoader | None = None,
    progress: Progress | None = None,
) -> Replayed:
    """Takes the steps of a replay file again, and stops after the first that is not finite.

    Nothing is written. As many processes as in the run give the same steps.

    Args:
        path: OUT/replay.json.
        options: what to do otherwise than the run, as when it is resumed (precision, lr, device).
        backbone: the run's, where it was a network of the caller's.
        loader: the run's, where it was the caller's.
        progress: told the losses of every step.

    Raises:
        ValueError: not a replay file, or an option that must not change.
        FileNotFoundError: no such file, or its checkpoint is gone.
    """
    progress, path = progress or Progress(), Path(path)
    try:
        words = json.loads(path.read_text(encoding="utf-8"))
        where, last = path.parent / words["checkpoint"], int(words["step"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"replay: {path} is no replay file: {error}") from None
    checkpoint = load_checkpoint(where)
    stored = PretrainConfig.of_run(checkpoint["config"])
    config, _ = merge_resumed(PretrainConfig(**(stored.to_mapping() | dict(options or {}))), stored)
    ranks = join(config)
    progress = progress if ranks.first else Progress()
    set_up(ranks.device, config.threads)
    with ranks.together(), StopRequest(alone=ranks.world == 1) as stop:
        run = ranks.all_do(
            lambda: build_run(config, ranks.device, backbone=backbone, loader=loader, ranks=ranks)
        )
        try:
            ranks.all_do(lambda: run.load_state_dict(checkpoint))
            ranks.all_do(lambda: run.training_step.average(ranks.wrap))
            progress.message(f"replaying steps {run.step + 1} to {last} from {where}")
            return _replay(run, last, stop, progress)
        finally:
            if loader is None:
                run.loader.close()


def _replay(run: Run, last: int, stop: StopRequest, progress: Progress) -> Replayed:
    agreement, found = Agreement(run, run.ranks, stop), None
    for views, _ in batches(run, last, stop, agreement):
        run.training_step.schedule(
            lr=run.learning_rate(run.step), key_momentum=run.key_momentum(run.step)
        )
        agreement.before_step()
        output = run.training_step(views.view_q, views.view_k, views.crop_q, views.crop_k)
        run.step += 1
        agreement.after_step(all_arrived=True)
        losses = {name: float(value) for name, value in output.scalars().items() if "loss" in name}
        losses["gradient_norm"] = float(output.metrics["gradient_norm"])
        weights = [
            name
            for name, weight in run.model.named_parameters()
            if weight.requires_grad and not bool(weight.detach().norm().isfinite())  # as the run
        ]
        finite = not weights and bool(torch.isfinite(torch.tensor(list(losses.values()))).all())
        every = run.ranks.gather((finite, image_names(run.loader, views.index)))
        images = [name for _, names in every for name in names]
        found = Replayed(
            run.step, all(fine for fine, _ in every), losses, weights, images, run.ranks.first
        )
        told = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
        progress.message(f"step {run.step}: {told}")
        if not found.finite:
            break
    if found is None:
        raise ValueError(f"replay: the checkpoint is of step {run.step}, and no step is left")
    return found


def image_names(loader: ViewLoader, index: torch.Tensor) -> list[str]:
    """The files of a batch; their numbers where the loader has no files."""
    files = getattr(loader, "files", None)
    return [str(i if files is None else files[i]) for i in index.tolist()]
