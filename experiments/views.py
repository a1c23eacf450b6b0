"""The views of `build_loader(..., backend="memory")`, many batches at once.

A small network on a GPU waits for the host, and drawing and launching for 128 views at a time is
most of what the host does. Crops, flips, factors and their order are the loader's own, bit for bit;
a blur's weights may differ in the last digits, since its kernels are as long as the widest at hand.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from densecl_ext.data import Augmentation, TwoViews
from densecl_ext.data.augmentation import (
    _CROP_ATTEMPTS,
    _UNIFORMS,
    KEY_VIEW,
    QUERY_VIEW,
    ViewParameters,
)
from densecl_ext.data.base import normalisation
from densecl_ext.data.batch_augmentation import augment
from densecl_ext.data.memory_loader import MemoryLoader

VIEWS_AT_ONCE = 1024
KEPT_BYTES = 1_500_000_000  # of one stream: 400 steps of 64 images at 64 pixels, in bfloat16


def moved(loader: MemoryLoader, device: torch.device) -> MemoryLoader:
    """A loader that was built on the CPU, with its images on the device and views in bfloat16."""
    loader.device, loader.dtype = device, torch.bfloat16
    loader._scale, loader._offset = normalisation(loader.augmentation, device)
    loader._move()
    return loader


class Stream:
    """The batches of a seed, epoch after epoch; the first ones are kept for the next run."""

    def __init__(self, loader: MemoryLoader, seed: int) -> None:
        self.loader, self.seed = loader, seed
        self.kept: list[TwoViews] = []

    def __call__(self, steps: int) -> Iterator[TwoViews]:
        """The first `steps` batches."""
        yield from self.kept[:steps]
        for index, batch in enumerate(self._made(len(self.kept)), len(self.kept)):
            if index >= steps:
                return
            if index == len(self.kept) and (index + 1) * size_of(batch) <= KEPT_BYTES:
                self.kept.append(batch)
            yield batch

    def _made(self, first: int) -> Iterator[TwoViews]:
        """The batches from number `first` on."""
        begun, within = divmod(first, len(self.loader))
        for epoch in itertools.count(begun):
            yield from epoch_batches(self.loader, self.seed, epoch, within)
            within = 0


def size_of(batch: TwoViews) -> int:
    """Bytes of both views."""
    return 2 * batch.view_q.numel() * batch.view_q.element_size()


def epoch_batches(
    loader: MemoryLoader, seed: int, epoch: int, first: int = 0
) -> Iterator[TwoViews]:
    """An epoch of a loader on a GPU from batch `first` on, as the loader with this seed gives it.

    Batches are made together that were so in every run, wherever a run begins.
    """
    loader.seed = seed
    together = max(1, VIEWS_AT_ONCE // (2 * loader.batch_size))
    start = first // together * together
    requests = loader._requests(epoch, start)
    while part := list(itertools.islice(requests, together)):
        samples = [sample for request in part for sample in request]
        files = [loader._file_for(epoch, sample) for sample in samples]
        sizes = loader._source[files]
        drawn = [
            one
            for view in (QUERY_VIEW, KEY_VIEW)
            for one in draw_many(loader.augmentation, seed, epoch, samples, view, sizes)
        ]
        crops = torch.tensor([(*one.box, one.flip) for one in drawn], dtype=torch.float32)
        pixels = augment(loader._cropped(files + files, drawn), drawn)
        views = torch.addcmul(loader._offset, pixels.float(), loader._scale).to(loader.dtype)
        views = views.contiguous(memory_format=torch.channels_last)
        view = views.split(loader.batch_size)
        crop = crops.to(loader.device).split(loader.batch_size)
        index = torch.tensor(files).split(loader.batch_size)
        for q in range(max(0, first - start), len(part)):
            k = q + len(part)  # the key views come behind all query views
            yield TwoViews(view[q], view[k], crop[q], crop[k], index[q])
        start += len(part)


def draw_many(
    augmentation: Augmentation,
    seed: int,
    epoch: int,
    samples: Sequence[int],
    view: int,
    sizes: np.ndarray,
) -> list[ViewParameters]:
    """`draw_parameters` for many samples; sizes (n, 2) are widths and heights."""
    bits = np.random.Philox(key=(seed, epoch))
    generator, state = np.random.Generator(bits), bits.state
    uniforms = np.empty((len(samples), _UNIFORMS))
    for row, sample in enumerate(samples):
        state["state"]["counter"] = np.array((0, view, sample, 0), dtype=np.uint64)
        bits.state = state
        generator.random(out=uniforms[row])
    boxes = _boxes(augmentation, uniforms[:, : 2 * _CROP_ATTEMPTS + 2], sizes)
    rest = uniforms[:, 2 * _CROP_ATTEMPTS + 2 :]
    strengths = (
        augmentation.brightness,
        augmentation.contrast,
        augmentation.saturation,
        augmentation.hue,
    )
    low = np.maximum(0.0, 1.0 - np.array(strengths[:3]))
    jitter = rest[:, 0] < augmentation.jitter_probability
    factors = low + (1.0 + np.array(strengths[:3]) - low) * rest[:, 5:8]
    factors[~jitter] = 1.0
    hue = np.where(jitter, augmentation.hue * (2.0 * rest[:, 8] - 1.0), 0.0)
    orders = np.argsort(rest[:, 1:5], axis=1, kind="stable").tolist()
    sigma_low, sigma_high = augmentation.blur_sigma
    sigma = sigma_low + (sigma_high - sigma_low) * rest[:, 11]
    sigma = np.where(rest[:, 10] < augmentation.blur_probability, sigma, 0.0)
    flip = (rest[:, 12] < augmentation.flip_probability).tolist()
    gray = (rest[:, 9] < augmentation.gray_probability).tolist()
    none: tuple[int, ...] = ()
    return [
        ViewParameters(
            tuple(box), flipped, tuple(o for o in order if strengths[o] > 0) if changed else none,
            *three, turn, grayed, blurred,
        )
        for box, flipped, order, changed, three, turn, grayed, blurred in zip(
            boxes.tolist(), flip, orders, jitter.tolist(), factors.tolist(), hue.tolist(), gray,
            sigma.tolist(), strict=True,
        )
    ]  # fmt: skip


def _boxes(augmentation: Augmentation, uniforms: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """int64 (n, 4): the first attempt's box that fits, else the largest central one."""
    log_low, log_high = np.log(augmentation.ratio[0]), np.log(augmentation.ratio[1])
    scale_low, scale_high = augmentation.scale
    width, height = sizes[:, :1], sizes[:, 1:]
    tries = uniforms[:, : 2 * _CROP_ATTEMPTS].reshape(-1, _CROP_ATTEMPTS, 2)
    area = width * height * (scale_low + (scale_high - scale_low) * tries[..., 0])
    ratio = np.exp(log_low + (log_high - log_low) * tries[..., 1])
    wide, high = np.round(np.sqrt(area * ratio)), np.round(np.sqrt(area / ratio))
    fits = (wide > 0) & (wide <= width) & (high > 0) & (high <= height)  # (n, attempts)
    first = fits.argmax(axis=1)[:, None]
    wide = np.take_along_axis(wide, first, 1)
    high = np.take_along_axis(high, first, 1)
    x0 = np.floor(uniforms[:, -2:-1] * (width - wide + 1))
    y0 = np.floor(uniforms[:, -1:] * (height - high + 1))
    none = ~fits.any(axis=1, keepdims=True)
    nearest = np.clip(width / height, *augmentation.ratio)
    widest = np.maximum(1, np.minimum(width, np.round(height * nearest)))
    highest = np.maximum(1, np.minimum(height, np.round(width / nearest)))
    wide, high = np.where(none, widest, wide), np.where(none, highest, high)
    x0 = np.where(none, (width - wide) // 2, x0)
    y0 = np.where(none, (height - high) // 2, y0)
    return np.concatenate([x0, y0, x0 + wide, y0 + high], axis=1).astype(np.int64)
