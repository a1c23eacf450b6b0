"""The loader for images that fit into memory: decoded once, a batch augmented at once in torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from densecl_ext.data.augmentation import draw_batch
from densecl_ext.data.base import EpochLoader, TwoViews, candidates, normalisation
from densecl_ext.data.batch_augmentation import augment, resample
from densecl_ext.data.images import decode, reason_of
from densecl_ext.data.source import ImageSource

# Views that a GPU resamples at once: the rows in between take up to 4 MB each at 224 pixels.
_RESAMPLED = 128

# Of the views that a GPU changes at once, as float32: several batches of small views.
_CHANGED_BYTES = 256 << 20


class MemoryLoader(EpochLoader):
    """Views of images in memory; see :func:`densecl_ext.data.build_loader`.

    Every file is read once, when the loader is built. An image whose shorter side has more than
    `cache_size` pixels is reduced to that, keeping its shape, so that crops are told in pixels of
    the file and cut out at fractions of the reduced pixels. Without a GPU Pillow cuts and resizes,
    everything else is torch's; on a GPU the images lie there and nothing comes back.

    Args:
        files: The images.
        workers: Threads that decode at the beginning; at least one.
        cache_size: Pixels of the shorter side; None takes 1.25 times the views' size.
        settings: See :class:`EpochLoader`.

    Raises:
        ValueError: The images do not fit into memory, or none can be read.
    """

    backend = "memory"

    def __init__(
        self, files: ImageSource, *, workers: int, cache_size: int | None = None, **settings: Any
    ) -> None:
        super().__init__(files, **settings)
        self.cache_size = math.ceil(1.25 * self.size) if cache_size is None else cache_size
        self._unreadable: dict[int, str] = {}
        self._images: list[np.ndarray | None] = []  # uint8 (h, w, 3)
        self._source = np.zeros((len(files), 2), dtype=np.int64)  # width, height of the file's
        self._stored = np.zeros((len(files), 2), dtype=np.int64)  # and of what is kept
        with ThreadPoolExecutor(max(1, workers)) as pool:
            for index, (image, narrow) in enumerate(pool.map(self._load, range(len(files)))):
                self._images.append(image)
                self._tell_narrow(index, narrow)
                if index + 1 in (64, 1024):
                    self._require_space(sum(one.nbytes for one in self._images if one is not None))
        if len(self._unreadable) == len(files):
            raise ValueError(
                f"build_loader: none of the {len(files)} image files can be read; "
                f"the first: {self._unreadable[0]}"
            )
        self._store: Tensor | None = None
        self._starts = np.zeros(0, dtype=np.int64)
        self.to(self.device, self.dtype)

    def to(self, device: torch.device, dtype: torch.dtype) -> MemoryLoader:
        """Itself: the views' device and dtype from now on; the images do not come back to a CPU."""
        self.device, self.dtype = device, dtype
        self._scale, self._offset = normalisation(self.augmentation, device)
        if device.type != "cpu":
            self._move()
        return self

    def _load(self, index: int) -> tuple[np.ndarray | None, str]:
        from PIL import Image

        try:
            image, narrow = decode(self.files.encoded(index, self.reading), self.reading)
        except (MemoryError, ImportError):
            raise
        except Exception as error:
            self._unreadable[index] = reason_of(error)
            return None, ""
        self._source[index] = image.size
        short = min(image.size)
        if short > self.cache_size:
            width, height = (max(1, round(side * self.cache_size / short)) for side in image.size)
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        self._stored[index] = image.size
        return np.array(image), narrow

    def _require_space(self, taken: int) -> None:
        """Raise early if the images read so far let expect that all will not fit."""
        count = len(self.files)
        expected = taken * count // len(self._images)
        free = _free_bytes(self.device)
        if free is not None and expected - taken > free:
            raise ValueError(
                f"build_loader: {count:,} images of about {self.cache_size} pixels take about "
                f"{expected / 2**30:.1f} GiB of {self.device}'s memory, where {free / 2**30:.1f} "
                "GiB are free; lower cache_size or use another backend"
            )

    def _move(self) -> None:
        """Put the images on the device, one behind the other."""
        sizes = np.array([0 if image is None else image.nbytes for image in self._images])
        self._starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        self._store = torch.empty(int(sizes.sum()), dtype=torch.uint8, device=self.device)
        for index, image in enumerate(self._images):
            if image is not None:
                start = int(self._starts[index])
                self._store[start : start + image.size].copy_(torch.from_numpy(image).flatten())
                self._images[index] = None

    def _batches(self, epoch: int, requests: Iterator[list[int]]) -> Iterator[TwoViews]:
        together = 1
        if self._store is not None:  # a GPU waits for its launches: few for much
            together = max(1, _CHANGED_BYTES // (24 * self.size**2 * self.own_size))
        while batches := list(islice(requests, together)):
            yield from self._made(epoch, batches)

    def _made(self, epoch: int, batches: list[list[int]]) -> Iterator[TwoViews]:
        """Some batches, whose views are made together; each view is what it is alone."""
        samples = [sample for batch in batches for sample in batch]
        files = [self._file_for(epoch, sample) for sample in samples]
        drawn = draw_batch(
            self.augmentation,
            seed=self.seed,
            epoch=epoch,
            samples=samples,
            sizes=self._source[files],
        )
        crops = torch.from_numpy(np.column_stack([drawn.box, drawn.flip]).astype(np.float32))
        if self.device.type == "cuda":
            crops = crops.pin_memory()
        crops = crops.to(self.device, non_blocking=True)
        pixels = augment(self._cropped(files + files, drawn.box), drawn)
        views = torch.addcmul(self._offset, pixels.float(), self._scale).to(self.dtype)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        views = views.contiguous(memory_format=layout)
        sizes = [len(batch) for batch in batches]
        views_q, views_k = (half.split(sizes) for half in views.chunk(2))
        crops_q, crops_k = (half.split(sizes) for half in crops.chunk(2))
        index = torch.tensor(files).split(sizes)
        yield from map(TwoViews, views_q, views_k, crops_q, crops_k, index)

    def _file_for(self, epoch: int, sample: int) -> int:
        for index in candidates(self.seed, epoch, sample, len(self.files)):
            if index not in self._unreadable:
                return index
            self._skip(index, self._unreadable[index])
        raise AssertionError("one file reads")

    def _cropped(self, files: list[int], boxes: np.ndarray) -> Tensor:
        """Cut out and resized, uint8 (views, 3, size, size)."""
        shrunk = self._stored[files] / self._source[files]
        boxes = boxes * np.concatenate([shrunk, shrunk], axis=1)
        if self._store is None:
            made = np.stack(
                [self._cut(file, box) for file, box in zip(files, boxes.tolist(), strict=True)]
            )
            return torch.from_numpy(made).permute(0, 3, 1, 2).contiguous()
        starts, widths = self._starts[files], self._stored[files, 0]
        parts = (slice(first, first + _RESAMPLED) for first in range(0, len(files), _RESAMPLED))
        return torch.cat(
            [
                resample(self._store, starts[part], widths[part], boxes[part], self.size)
                for part in parts
            ]
        )

    def _cut(self, file: int, box: list[float]) -> np.ndarray:
        from PIL import Image

        x0, y0, x1, y1 = box
        left, top = math.floor(x0), math.floor(y0)
        image = self._images[file]
        assert image is not None
        part = Image.fromarray(image[top : math.ceil(y1), left : math.ceil(x1)])
        inner = (x0 - left, y0 - top, x1 - left, y1 - top)
        size = (self.size, self.size)
        return np.asarray(part.resize(size, Image.Resampling.BILINEAR, box=inner))

    def close(self) -> None:
        """Nothing runs between batches; the images stay, for further epochs."""


def _free_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if "MemAvailable" in line), None)
