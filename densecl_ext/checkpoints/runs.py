"""The checkpoints of a run: the newest, and the one before it for when the newest is damaged."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from densecl_ext.checkpoints.schema import FORMAT, VERSION, check_complete, is_run
from densecl_ext.checkpoints.storage import load_checkpoint

PREVIOUS = "previous.pt"


def previous_of(last: Path) -> Path:
    """Where the checkpoint before the newest lies."""
    return last.with_name(PREVIOUS)


def read_newest(last: Path, *, complete: bool = False) -> tuple[dict[str, Any], Path]:
    """Reads a run's newest checkpoint that is whole.

    Args:
        last: the newest one; the one before it lies beside it (`previous_of`).
        complete: also require everything that a run goes on from.

    Returns:
        The checkpoint, and its file. Where that is not `last`, a warning says why.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: neither is whole; the message is about the newest.
    """
    previous, damage = previous_of(last), None
    for path in (last, previous):
        if not path.is_file():
            continue
        try:
            content = _read(path, complete)
        except ValueError as error:
            damage = damage or error
            continue
        if path is previous:
            told = f"{damage}" if damage else f"{last} is missing"
            warnings.warn(f"{told}; using the one before it, {path}", stacklevel=2)
        return content, path
    if damage is not None:
        raise damage
    raise FileNotFoundError(f"load_checkpoint: no such file: {last}")


def resolve_checkpoint(path: str | os.PathLike[str]) -> Path:
    """Accepts a run folder for its newest whole checkpoint, a model hub's for its weights."""
    path = Path(path)
    if not path.is_dir():
        return path
    for weights in (path / "model.safetensors", path / "transformers.safetensors"):
        if weights.is_file():  # a folder for a model hub
            return weights
    last = path / "checkpoints" / "last.pt"
    if not previous_of(last).is_file():
        return last
    return read_newest(last)[1]


def _read(path: Path, complete: bool) -> dict[str, Any]:
    content = load_checkpoint(path)
    if not is_run(content):
        raise ValueError(f"load_checkpoint: {path} is not the checkpoint of a run")
    if content.get("version") != VERSION:
        raise ValueError(
            f"load_checkpoint: {path} has version {content.get('version')} of {FORMAT}'s "
            f"checkpoints, this one reads {VERSION}"
        )
    if complete:
        try:
            check_complete(content)
        except ValueError as error:
            raise ValueError(f"load_checkpoint: {path} is not whole: {error}") from None
    return content
