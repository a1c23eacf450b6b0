"""The loader for images that fit into memory: decoded once, a batch augmented at once in torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from densecl_ext.data.augmentation import KEY_VIEW, QUERY_VIEW, ViewParameters, draw_parameters
from densecl_ext.data.base import EpochLoader, TwoViews, candidates, normalisation
from densecl_ext.data.batch_augmentation import augment, resample
from densecl_ext.data.images import decode, reason_of
from densecl_ext.data.source import ImageSource

# Views that a GPU resamples at once: the rows in between take up to 4 MB each at 224 pixels.
_RESAMPLED = 128


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
        self._scale, self._offset = normalisation(self.augmentation, self.device)
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
        if self.device.type != "cpu":
            self._move()

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
        for samples in requests:
            files = [self._file_for(epoch, sample) for sample in samples]
            drawn = [
                draw_parameters(
                    self.augmentation,
                    seed=self.seed,
                    epoch=epoch,
                    sample=sample,
                    view=view,
                    width=int(self._source[file, 0]),
                    height=int(self._source[file, 1]),
                )
                for view in (QUERY_VIEW, KEY_VIEW)
                for sample, file in zip(samples, files, strict=True)
            ]
            crops = torch.tensor(
                [(*one.box, one.flip) for one in drawn],
                dtype=torch.float32,
                pin_memory=self.device.type == "cuda",
            ).to(self.device, non_blocking=True)
            pixels = augment(self._cropped(files + files, drawn), drawn)
            views = torch.addcmul(self._offset, pixels.float(), self._scale).to(self.dtype)
            layout = torch.channels_last if self.channels_last else torch.contiguous_format
            views = views.contiguous(memory_format=layout)
            count = len(samples)
            yield TwoViews(
                views[:count], views[count:], crops[:count], crops[count:], torch.tensor(files)
            )

    def _file_for(self, epoch: int, sample: int) -> int:
        for index in candidates(self.seed, epoch, sample, len(self.files)):
            if index not in self._unreadable:
                return index
            self._skip(index, self._unreadable[index])
        raise AssertionError("one file reads")

    def _cropped(self, files: list[int], drawn: list[ViewParameters]) -> Tensor:
        """Cut out and resized, uint8 (views, 3, size, size)."""
        shrunk = self._stored[files] / self._source[files]
        boxes = np.array([one.box for one in drawn]) * np.concatenate([shrunk, shrunk], axis=1)
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
