"""What all loaders share: a batch, the interface, the order of an epoch, resuming, skipping."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from densecl_ext.data.augmentation import Augmentation, epoch_order, substitute_order
from densecl_ext.data.images import (
    DEFAULT,
    Encoded,
    NarrowRangeWarning,
    Reading,
    UnreadableImageWarning,
    printable,
    reason_of,
)
from densecl_ext.data.source import ImageSource

_Read = TypeVar("_Read")


class TwoViews(NamedTuple):
    """A batch: two views of the same N images.

    Attributes:
        view_q: Query view (N, C, size, size), C = 3 for RGB, normalised, in the
            loader's dtype and layout.
        view_k: Key view, the same.
        crop_q: float32 (N, 5): x0, y0, x1, y1 of the query crop in pixels of the decoded image (x
            right, y down, upright after EXIF orientation), and 1.0 where the view was mirrored left
            to right, else 0.0.
        crop_k: The same for the key view.
        index: int64 (N,), which of the loader's images each is, from 0 to num_images - 1. Always on
            the CPU.
    """

    view_q: Tensor
    view_k: Tensor
    crop_q: Tensor
    crop_k: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody needs here


class ViewLoader(Protocol):
    """What the trainer sees of a loader; anything that has this will do.

    Attributes:
        num_images: Number of images.
        identity: A hash that tells these images, in their order, from others. An index means the
            same image wherever the identity is the same.
        skipped: Images that turned out unreadable so far (a path or another name), and why.
        backend: Who does the work: "torchvision", "dali", "memory", or a name of your own.
    """

    backend: str

    @property
    def num_images(self) -> int: ...  # noqa: D102
    @property
    def identity(self) -> str: ...  # noqa: D102
    @property
    def skipped(self) -> Mapping[Path, str]: ...  # noqa: D102

    def __len__(self) -> int:
        """Batches in an epoch, always the same."""
        ...

    def __iter__(self) -> Iterator[TwoViews]:
        """The epoch's batches, from where a loaded state left off, otherwise from the first."""
        ...

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, which changes order and views."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands: next is the batch after the last one handed out."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken: the next iteration gives the same remaining batches."""
        ...

    def close(self) -> None:
        """End worker processes and pipelines; may be called twice."""
        ...


class EpochLoader(ABC):
    """Order, position and skipped files; a backend only turns requests into batches.

    Attributes:
        files: The images; a `TwoViews.index` counts in them.
        skipped: Files that turned out unreadable so far, and why.
        batch_size: Images in a batch of all ranks together; `own_size` of them are this rank's.
    """

    backend: str

    def __init__(
        self,
        files: ImageSource,
        *,
        batch_size: int,
        size: int,
        device: torch.device,
        seed: int,
        augmentation: Augmentation,
        drop_last: bool,
        channels_last: bool = False,
        dtype: torch.dtype = torch.float32,
        reading: Reading = DEFAULT,
        rank: int = 0,
        ranks: int = 1,
        parts: int = 1,
    ) -> None:
        if batch_size % (ranks * parts) or (ranks * parts > 1 and not drop_last):
            raise ValueError(
                f"build_loader: {ranks} ranks and {parts} parts need whole batches that they can "
                f"share equally, got batch_size {batch_size} and drop_last={drop_last}"
            )
        self.files = files
        self.rank, self.ranks, self.parts = rank, ranks, parts
        self.skipped: dict[Path, str] = {}
        self.reading = reading
        self._narrow = False
        self.batch_size = batch_size
        self.size = size
        self.device = device
        self.seed = seed
        self.augmentation = augmentation
        self.drop_last = drop_last
        self.channels_last = channels_last
        self.dtype = dtype
        self.epoch = 0
        self._position = 0
        self._first = 0

    @property
    def own_size(self) -> int:
        """This rank's images of a batch."""
        return self.batch_size // self.ranks

    @property
    def num_images(self) -> int:
        """Number of image files."""
        return len(self.files)

    @property
    def identity(self) -> str:
        """Hash of the files' ordered relative paths and sizes."""
        return self.files.identity

    def __len__(self) -> int:
        """Batches in an epoch."""
        batches = len(self.files) / self.batch_size
        return math.floor(batches) if self.drop_last else math.ceil(batches)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch.

        Naming the current epoch keeps a loaded position, so that a resumed training loop may call
        this first thing.

        Args:
            epoch: The epoch, at least 0.

        Raises:
            ValueError: `epoch` is negative.
        """
        if epoch < 0:
            raise ValueError(f"set_epoch: epoch must be at least 0, got {epoch}")
        if epoch != self.epoch:
            self.epoch = epoch
            self._position = self._first = 0

    def state_dict(self) -> dict[str, Any]:
        """Epoch and position, and what they depend on, for :meth:`load_state_dict` to check."""
        return {"epoch": self.epoch, "position": self._position, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over an epoch and a position.

        Args:
            state: What :meth:`state_dict` gave, from either backend.

        Raises:
            ValueError: The state belongs to other data or settings, under which the same position
                means other views.
        """
        for key, value in self._identity().items():
            had = state.get(key, _BEFORE.get(key))
            if had != value:
                raise ValueError(
                    f"load_state_dict: the state was taken with {key}={had!r}, this "
                    f"loader has {value!r}; the remaining batches would not be the same"
                )
        self.epoch = int(state["epoch"])
        self._position = self._first = int(state["position"])

    def _identity(self) -> dict[str, Any]:
        stated = self.reading.value_range
        return {
            "seed": self.seed,
            "files": len(self.files),
            "batch_size": self.batch_size,
            "size": self.size,
            "drop_last": self.drop_last,
            "augmentation": {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in asdict(self.augmentation).items()
            },
            "value_range": None if stated is None else list(stated),
            "channels": self.reading.channels,
            "reduced_jpeg": self.reading.reduced_jpeg,
        }

    def __iter__(self) -> Iterator[TwoViews]:
        """The epoch's batches; the position advances as each is handed out."""
        first, self._first = self._first, 0
        epoch = self.epoch
        self._position = first
        batches = self._batches(epoch, self._requests(epoch, first))
        for batch in batches:
            self._position += 1
            yield batch

    def _requests(self, epoch: int, first: int) -> Iterator[list[int]]:
        """File indices of each remaining batch, made when asked for: there may be millions."""
        order = epoch_order(self.seed, epoch, len(self.files))
        starts = range(first * self.batch_size, len(self) * self.batch_size, self.batch_size)
        return (self._own(order[start : start + self.batch_size]).tolist() for start in starts)

    def _own(self, batch: np.ndarray) -> np.ndarray:
        """This rank's images of a batch: of each of its parts the rank's share."""
        if self.ranks * self.parts == 1:
            return batch
        return batch.reshape(self.parts, self.ranks, -1)[:, self.rank].reshape(-1)

    def _skip(self, index: int, reason: str) -> None:
        """Count a file out, and say so once."""
        path = self.files[index]
        if path not in self.skipped:
            self.skipped[path] = reason
            text = f"skipped {printable(path)}: {reason}"
            warnings.warn(text, UnreadableImageWarning, stacklevel=3)

    def _tell_narrow(self, index: int, narrow: str) -> None:
        """Warn of the first image that uses almost none of its range; others will be like it."""
        if narrow and not self._narrow:
            self._narrow = True
            text = f"{printable(self.files[index])}: {narrow}"
            warnings.warn(text, NarrowRangeWarning, stacklevel=3)

    @abstractmethod
    def _batches(self, epoch: int, requests: Iterator[list[int]]) -> Iterator[TwoViews]:
        """Turn the requests into batches, in order."""

    @abstractmethod
    def close(self) -> None:
        """End worker processes and pipelines; may be called twice."""

    def __enter__(self) -> EpochLoader:
        """The loader itself, closed on leaving."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()


# What states that do not name a setting were taken with.
_BEFORE = {"value_range": None, "channels": None, "reduced_jpeg": False}


class FileReader:
    """Reads one slot of a batch: its own file, or where that does not read, another.

    Holds no state that could change what comes out: what is remembered of unreadable files only
    spares this process a second attempt.

    Args:
        files: The images.
        seed: The loader's seed.
        reading: Limits and range.
    """

    def __init__(self, files: ImageSource, seed: int, reading: Reading) -> None:
        self.files = files
        self.seed = seed
        self.reading = reading
        self.unreadable: dict[int, str] = {}

    def read(
        self, epoch: int, sample: int, use: Callable[[int, Encoded], _Read]
    ) -> tuple[_Read, int, list[tuple[int, str]]]:
        """Read a slot.

        Args:
            epoch: The epoch.
            sample: File index of the slot.
            use: What makes an image, or what the backend needs of it, of a file's content.

        Returns:
            What `use` made of the file, the file's index, and the unreadable files met before it.

        Raises:
            ValueError: No file can be read any more.
        """
        unreadable: list[tuple[int, str]] = []
        for index in candidates(self.seed, epoch, sample, len(self.files)):
            if index not in self.unreadable:
                try:
                    file = self.files.encoded(index, self.reading)
                    return use(index, file), index, unreadable
                except (MemoryError, ImportError):
                    raise
                except Exception as error:
                    self.unreadable[index] = reason_of(error)
            unreadable.append((index, self.unreadable[index]))
        raise ValueError(f"none of the {len(self.files)} image files can be read any more")


def candidates(seed: int, epoch: int, sample: int, count: int) -> Iterator[int]:
    """The files to try for one slot of a batch: its own, then substitutes until all were tried.

    The order depends on the arguments alone, and the first readable file wins: so what fills a slot
    depends on the files on disk and never on which unreadable ones have been met before.

    Args:
        seed: The loader's seed.
        epoch: The epoch.
        sample: File index of the slot.
        count: The number of files.

    Yields:
        File indices.
    """
    yield sample
    yield from substitute_order(seed, epoch, sample, count)
    for step in range(1, count):
        yield (sample + step) % count


def normalisation(
    augmentation: Augmentation, device: torch.device, white: float = 255.0
) -> tuple[Tensor, Tensor]:
    """Scale and offset (1, C, 1, 1): pixels * scale + offset = (pixels / white - mean) / std."""
    mean = np.asarray(augmentation.mean, dtype=np.float64)
    std = np.asarray(augmentation.std, dtype=np.float64)
    scale = torch.tensor(1 / (white * std), dtype=torch.float32, device=device).reshape(1, -1, 1, 1)
    offset = torch.tensor(-mean / std, dtype=torch.float32, device=device).reshape(1, -1, 1, 1)
    return scale, offset
