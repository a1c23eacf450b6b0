"""The portable loader: Pillow decodes and torchvision augments, in worker processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
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
from densecl_ext.data.base import EpochLoader, FileReader, TwoViews, normalisation
from densecl_ext.data.folder import ImageFiles
from densecl_ext.data.images import Decoded, Encoded, Reading, decode

if TYPE_CHECKING:
    from PIL import Image

# Above this Pillow's crop warns of, or refuses, what it takes for a bomb.
_CROP_PIXELS = 80_000_000


class _Sample(NamedTuple):
    views: np.ndarray  # uint8 (2, size, size, 3)
    crops: np.ndarray  # float32 (2, 5)
    file: int
    unreadable: list[tuple[int, str]]
    narrow: str


class _Batch(NamedTuple):
    views: Tensor  # uint8 (2, N, size, size, 3)
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


def render_view(image: Image.Image, parameters: ViewParameters, size: int) -> np.ndarray:
    """Turn a decoded image into one view, in Pillow's 8-bit arithmetic as MoCo v2 does.

    Args:
        image: Decoded image, mode RGB.
        parameters: What to do.
        size: Height and width of the view in pixels.

    Returns:
        uint8 (size, size, 3).
    """
    from PIL import ImageFilter
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as F

    view = F.resize(cropped(image, parameters.box), [size, size], InterpolationMode.BILINEAR)
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
        self, files: ImageFiles, size: int, seed: int, augmentation: Augmentation, reading: Reading
    ) -> None:
        self.size = size
        self.seed = seed
        self.augmentation = augmentation
        self._reader = FileReader(files, seed, reading, self._decode)

    def _decode(self, _: int, file: Encoded) -> Decoded:
        return decode(file, self._reader.reading)

    def __getitem__(self, request: tuple[int, int]) -> _Sample:
        epoch, sample = request
        (image, narrow), index, unreadable = self._reader.read(epoch, sample)
        parameters = [
            draw_parameters(
                self.augmentation,
                seed=self.seed,
                epoch=epoch,
                sample=sample,
                view=view,
                width=image.width,
                height=image.height,
            )
            for view in (QUERY_VIEW, KEY_VIEW)
        ]
        views = np.stack([render_view(image, drawn, self.size) for drawn in parameters])
        crops = np.array([(*drawn.box, drawn.flip) for drawn in parameters], dtype=np.float32)
        return _Sample(views, crops, index, unreadable, narrow)


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

    def __init__(self, files: ImageFiles, *, workers: int, **settings: Any) -> None:
        super().__init__(files, **settings)
        self._requested = _Requests()
        self._loader: DataLoader[_Sample] | None = None
        self._workers = workers
        self._scale, self._offset = normalisation(self.augmentation, self.device)

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
        pixels = pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2)  # (N, 3, H, W)
        if not self.channels_last:
            pixels = pixels.contiguous()  # here they are bytes
        return torch.addcmul(self._offset, pixels.float(), self._scale).to(self.dtype)

    def close(self) -> None:
        """End the worker processes."""
        self._loader = None
