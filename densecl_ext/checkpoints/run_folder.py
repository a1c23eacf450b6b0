"""A run's folder: what lies where, and whether a run may start in it."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from densecl_ext.checkpoints.runs import previous_of, read_newest
from densecl_ext.checkpoints.schema import FORMAT, VERSION
from densecl_ext.checkpoints.storage import (
    TEMPORARY_PREFIX,
    atomic_file,
    remove_leftovers,
    save_checkpoint,
)

if TYPE_CHECKING:
    from filelock import BaseFileLock


class RunFolder:
    """OUT/config.yaml, OUT/metrics.csv, OUT/tensorboard/, OUT/checkpoints/last.pt and previous.pt.

    Attributes:
        path, config, metrics, tensorboard, checkpoints, last, previous: the paths of these.
        backbone: OUT/backbone.pth, of a finished run.
        profile: OUT/profile, of `densecl pretrain --profile`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.csv"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.last = self.checkpoints / "last.pt"
        self.previous = previous_of(self.last)
        self.backbone = self.path / "backbone.pth"
        self.profile = self.path / "profile"
        self._lock: BaseFileLock | None = None
        self._step: int | None = None  # of the newest checkpoint

    def exists(self) -> bool:
        """Whether a run has begun here."""
        return any(p.exists() for p in (self.config, self.metrics, self.last, self.previous))

    def prepare(self, *, resume: bool | str, overwrite: bool) -> dict[str, Any] | None:
        """Makes the folder ready and proves that it can be written.

        Args:
            resume: go on with the run that is here; "auto" if there is a checkpoint of one, and
                else start, whatever a run that was killed before its first one has left.
            overwrite: a run may be here; `clear` removes it.

        Returns:
            The checkpoint to go on from, or None for a new run.

        Raises:
            ValueError: `resume` together with `overwrite`, or the checkpoint is not of a run.
            FileExistsError: a run is here, and neither was asked for.
            FileNotFoundError: nothing to resume.
            OSError: the folder cannot be written.
            RuntimeError: another process is training in the folder.
        """
        if resume and overwrite:
            raise ValueError("pretrain: resume and overwrite exclude each other")
        if resume == "auto" and not self.resumable():
            resume, overwrite = False, True
        if resume:
            self._require_last()
            self._take_lock()
            checkpoint, used = read_newest(self.last, complete=True)
            self._step = checkpoint["step"]
            if used == self.previous:
                # Out of the way of the next save, which would move it over the whole one.
                with contextlib.suppress(FileNotFoundError):
                    os.replace(self.last, self.last.with_name("damaged.pt"))
            remove_leftovers((self.config, self.metrics, self.backbone, self.last, self.previous))
            return checkpoint
        if self.exists() and not overwrite:
            raise FileExistsError(
                f"pretrain: {self.path} already holds a run; go on with it (--resume), replace it "
                "(--overwrite), or choose another --output"
            )
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        return None

    def clear(self) -> None:
        """Removes what a run writes, and nothing else that may lie here."""
        for file in (
            self.config,
            self.metrics,
            self.backbone,
            self.backbone.with_name("backbone.pth.md"),
            self.path / "replay.json",
            *self.checkpoints.glob("*.pt"),
        ):
            file.unlink(missing_ok=True)
        for leftover in self.path.glob(f"**/{TEMPORARY_PREFIX}*"):
            leftover.unlink()
        shutil.rmtree(self.tensorboard, ignore_errors=True)

    def release(self) -> None:
        """Lets other processes have the folder."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def read(self) -> dict[str, Any]:
        """Reads checkpoints/last.pt, or with a warning the one before it if that is damaged.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is not the checkpoint of a run.
        """
        self._require_last()
        return read_newest(self.last, complete=True)[0]

    def write_config(self, recipe: str) -> None:
        """Writes config.yaml: a recipe that repeats this run."""
        with atomic_file(self.config) as file:
            file.write(recipe.encode())

    def save(self, state: dict[str, Any]) -> Path:
        """Writes checkpoints/last.pt atomically; the one before it stays as previous.pt.

        Raises OSError as `save_checkpoint`.
        """
        content = {"format": FORMAT, "version": VERSION, **state}
        # The same step again, as at the end of a run, must not cost the one before it.
        again = self._step is not None and state.get("step") == self._step
        save_checkpoint(self.last, content, previous=None if again else self.previous)
        self._step = state.get("step")
        return self.last

    def keep(self, name: str) -> None:
        """Keeps the newest checkpoint under another name too, by a link where possible."""
        kept = self.checkpoints / name
        kept.unlink(missing_ok=True)
        try:
            os.link(self.last, kept)
        except OSError:  # a file system without hard links
            shutil.copyfile(self.last, kept)

    def require_space(self) -> None:
        """Raises OSError unless the next checkpoints fit beside the newest.

        The last two are kept, and a third is complete before it replaces the older of them.
        """
        size, free = self.last.stat().st_size, shutil.disk_usage(self.path).free
        needed = size if self.previous.exists() else 2 * size
        if free < needed:
            raise OSError(
                f"pretrain: {self.path} has {free / 1e6:.0f} MB free, and the next checkpoints "
                f"need {needed / 1e6:.0f} MB beside the newest"
            )

    def resumable(self) -> bool:
        """Whether there is a checkpoint to go on from, whole or not."""
        return self.last.is_file() or self.previous.is_file()

    def _require_last(self) -> None:
        if not self.resumable():
            raise FileNotFoundError(
                f"pretrain: nothing to resume in {self.path}: {self.last} does not exist; start "
                "without --resume"
            )

    def _take_lock(self) -> None:
        """Keeps other processes out: two runs in one folder would overwrite each other.

        The system lets go of it when the process ends, however it ends; the loader's workers, which
        may live a little longer, close their copies.
        """
        from filelock import FileLock, Timeout

        if self._lock is not None:
            return
        lock = FileLock(self.path / ".lock", timeout=0, fallback_to_soft=False)
        try:
            lock.acquire()
        except Timeout:
            raise RuntimeError(
                f"pretrain: another process is training in {self.path}; end it first, or "
                "choose another --output"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise
            return  # a file system without locks: nothing to keep, and no reason not to train
        self._lock = lock
