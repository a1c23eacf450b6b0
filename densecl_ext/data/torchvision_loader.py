"""The portable loader: Pillow decodes and torchvision augments, in worker processes."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from threading import Thread
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from densecl_ext.data.augmentation import (
    BRIGHTNESS,
    CONTRAST,
    KEY_VIEW,
    QUERY_VIEW,
    SATURATION,
    Augmentation,
    ViewParameters,
    draw_parameters,
)
from densecl_ext.data.band_views import render_bands
from densecl_ext.data.bands import decode_bands
from densecl_ext.data.base import EpochLoader, FileReader, TwoViews, normalisation
from densecl_ext.data.images import Encoded, Reading, decode, header_size
from densecl_ext.data.source import ImageSource

if TYPE_CHECKING:
    from PIL import Image

# Above this Pillow's crop warns of, or refuses, what it takes for a bomb.
_CROP_PIXELS = 80_000_000


class _Picture(NamedTuple):
    """A decoded image, what was drawn for its two views, and what makes a view of it."""

    drawn: list[ViewParameters]
    render: Callable[[ViewParameters], np.ndarray]
    narrow: str


class _Sample(NamedTuple):
    views: np.ndarray  # uint8 (2, size, size, 3), or of N channels float32 (2, C, size, size)
    crops: np.ndarray  # float32 (2, 5)
    file: int
    unreadable: list[tuple[int, str]]
    narrow: str


class _Batch(NamedTuple):
    views: Tensor  # uint8 (2, N, size, size, 3), or float32 (2, N, C, size, size)
    crops: Tensor  # float32 (2, N, 5)
    files: Tensor  # int64 (N,)
    unreadable: list[tuple[int, str]]
    narrow: list[tuple[int, str]]


def cropped(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    """`image.crop(box)`, of images beyond Pillow's limit too, which the gate has already kept."""
    from PIL import Image

    width, height = box[2] - box[0], box[3] - box[1]
    if width * height <= _CROP_PIXELS:
        return image.crop(box)
    return image.transform((width, height), Image.Transform.EXTENT, box)


def shrink_for(drawn: Sequence[ViewParameters], size: int) -> int:
    """How far an image may be reduced, 1, 2, 4 or 8, so that no crop of it must be enlarged."""
    sides = [min(one.box[2] - one.box[0], one.box[3] - one.box[1]) for one in drawn]
    return next((by for by in (8, 4, 2) if min(sides) >= by * size), 1)


def reduced_crop(
    image: Image.Image, box: tuple[int, int, int, int], shrunk: tuple[float, float], size: int
) -> Image.Image:
    """Cut out and resized: a box in pixels of the whole image, of one that was decoded smaller."""
    from PIL import Image

    x0, y0, x1, y1 = (edge * shrunk[place % 2] for place, edge in enumerate(box))
    left, top = math.floor(x0), math.floor(y0)
    part = image.crop(
        (left, top, min(image.width, math.ceil(x1)), min(image.height, math.ceil(y1)))
    )
    inner = (x0 - left, y0 - top, min(x1 - left, part.width), min(y1 - top, part.height))
    return part.resize((size, size), Image.Resampling.BILINEAR, box=inner)


def render_view(
    image: Image.Image,
    parameters: ViewParameters,
    size: int,
    shrunk: tuple[float, float] = (1.0, 1.0),
) -> np.ndarray:
    """Turn a decoded image into one view, in Pillow's 8-bit arithmetic as MoCo v2 does.

    Args:
        image: Decoded image, mode RGB.
        parameters: What to do.
        size: Height and width of the view in pixels.
        shrunk: Width and height of `image` as shares of those that the box is told in.

    Returns:
        uint8 (size, size, 3).
    """
    from PIL import ImageFilter
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as F

    if shrunk == (1.0, 1.0):
        view = F.resize(cropped(image, parameters.box), [size, size], InterpolationMode.BILINEAR)
    else:
        view = reduced_crop(image, parameters.box, shrunk, size)
    for operation in parameters.order:
        if operation == BRIGHTNESS:
            view = F.adjust_brightness(view, parameters.brightness)
        elif operation == CONTRAST:
            view = F.adjust_contrast(view, parameters.contrast)
        elif operation == SATURATION:
            view = F.adjust_saturation(view, parameters.saturation)
        else:
            view = F.adjust_hue(view, parameters.hue)
    if parameters.gray:
        view = F.rgb_to_grayscale(view, num_output_channels=3)
    if parameters.blur_sigma > 0:
        view = view.filter(ImageFilter.GaussianBlur(parameters.blur_sigma))
    if parameters.flip:
        view = F.hflip(view)
    return np.asarray(view)


class TwoViewDataset(Dataset[_Sample]):
    """Maps a request (epoch, file index) to two views; holds no state that could change them."""

    def __init__(
        self, files: ImageSource, size: int, seed: int, augmentation: Augmentation, reading: Reading
    ) -> None:
        self.size = size
        self.seed = seed
        self.augmentation = augmentation
        self._reader = FileReader(files, seed, reading)

    def _draw(self, epoch: int, sample: int, width: int, height: int) -> list[ViewParameters]:
        return [
            draw_parameters(
                self.augmentation,
                seed=self.seed,
                epoch=epoch,
                sample=sample,
                view=view,
                width=width,
                height=height,
            )
            for view in (QUERY_VIEW, KEY_VIEW)
        ]

    def _decode(self, epoch: int, sample: int, _: int, file: Encoded) -> _Picture:
        reading, size = self._reader.reading, self.size
        if reading.channels is not None:
            values, stated = decode_bands(file, reading)
            drawn = self._draw(epoch, sample, values.shape[1], values.shape[0])
            return _Picture(drawn, lambda one: render_bands(values, stated, one, size), "")
        if reading.reduced_jpeg and file.kind == "JPEG":
            width, height, _mode = header_size(file)
            drawn = self._draw(epoch, sample, width, height)
            image, narrow = decode(file, reading, shrink_for(drawn, size))
            shrunk = image.width / width, image.height / height
            return _Picture(drawn, lambda one: render_view(image, one, size, shrunk), narrow)
        image, narrow = decode(file, reading)
        drawn = self._draw(epoch, sample, image.width, image.height)
        return _Picture(drawn, lambda one: render_view(image, one, size), narrow)

    def __getitem__(self, request: tuple[int, int]) -> _Sample:
        picture, index, unreadable = self._reader.read(*request, partial(self._decode, *request))
        views = np.stack([picture.render(drawn) for drawn in picture.drawn])
        crops = np.array([(*drawn.box, drawn.flip) for drawn in picture.drawn], dtype=np.float32)
        return _Sample(views, crops, index, unreadable, picture.narrow)


def _collate(samples: list[_Sample]) -> _Batch:
    return _Batch(
        torch.from_numpy(np.stack([sample.views for sample in samples], axis=1)),
        torch.from_numpy(np.stack([sample.crops for sample in samples], axis=1)),
        torch.tensor([sample.file for sample in samples], dtype=torch.int64),
        [entry for sample in samples for entry in sample.unreadable],
        [(sample.file, sample.narrow) for sample in samples if sample.narrow],
    )


def _leave_interrupts_to_the_main_process(_: int) -> None:
    # Ctrl-C reaches every process of the terminal, and a scheduler's signal every process of the
    # job; the trainer still wants its last batch.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        Thread(target=_end_when_the_parent_asks, args=(os.getppid(),), daemon=True).start()


def _end_when_the_parent_asks(parent: int) -> None:
    """SIGTERM of the main process, which then waits, ends a worker; that of others does not."""
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)


class _Requests:
    """The DataLoader's batch sampler: whatever the loader put into it last."""

    def __init__(self) -> None:
        self.batches: Iterator[list[tuple[int, int]]] = iter(())

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.batches


class TorchvisionLoader(EpochLoader):
    """Views from Pillow and torchvision; see :func:`densecl_ext.data.build_loader`.

    The workers hand over 8-bit pixels and the main process normalises them on the target device: a
    quarter of the bytes to move between processes and to the GPU.
    """

    backend = "torchvision"

    def __init__(self, files: ImageSource, *, workers: int, **settings: Any) -> None:
        super().__init__(files, **settings)
        self._requested = _Requests()
        self._loader: DataLoader[_Sample] | None = None
        self._workers = workers
        white = 255.0 if self.reading.channels is None else 1.0
        self._scale, self._offset = normalisation(self.augmentation, self.device, white)

    def _data_loader(self) -> DataLoader[_Sample]:
        if self._loader is None:
            self._loader = DataLoader(
                TwoViewDataset(self.files, self.size, self.seed, self.augmentation, self.reading),
                batch_sampler=self._requested,
                num_workers=self._workers,
                collate_fn=_collate,
                worker_init_fn=_leave_interrupts_to_the_main_process,
                pin_memory=self.device.type == "cuda",
                persistent_workers=self._workers > 0,
            )
        return self._loader

    def _batches(self, epoch: int, requests: Iterator[list[int]]) -> Iterator[TwoViews]:
        self._requested.batches = ([(epoch, index) for index in batch] for batch in requests)
        for batch in self._data_loader():
            for index, reason in batch.unreadable:
                self._skip(index, reason)
            for index, narrow in batch.narrow:
                self._tell_narrow(index, narrow)
            crops = batch.crops.to(self.device, non_blocking=True)
            yield TwoViews(
                self._normalised(batch.views[QUERY_VIEW]),
                self._normalised(batch.views[KEY_VIEW]),
                crops[QUERY_VIEW],
                crops[KEY_VIEW],
                batch.files,
            )

    def _normalised(self, pixels: Tensor) -> Tensor:
        pixels = pixels.to(self.device, non_blocking=True)
        if self.reading.channels is None:
            pixels = pixels.permute(0, 3, 1, 2)  # (N, 3, H, W)
            if not self.channels_last:
                pixels = pixels.contiguous()  # here they are bytes
        elif self.channels_last:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        return torch.addcmul(self._offset, pixels.float(), self._scale).to(self.dtype)

    def close(self) -> None:
        """End the worker processes."""
        self._loader = None
