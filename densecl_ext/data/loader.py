"""Chooses a loader of two augmented views of every image of a folder."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Literal

import torch

from densecl_ext.data.augmentation import Augmentation
from densecl_ext.data.band_views import without_colour
from densecl_ext.data.bands import decode_bands
from densecl_ext.data.base import ViewLoader
from densecl_ext.data.folder import LeftOutWarning
from densecl_ext.data.images import (
    MAX_PIXELS,
    Reading,
    decode,
    printable,
    reason_of,
)
from densecl_ext.data.measuring import measure_channels, measure_range
from densecl_ext.data.opening import open_images
from densecl_ext.data.source import ImageSource

BACKENDS = ("auto", "dali", "torchvision", "memory")


def build_loader(
    root: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | ImageSource,
    *,
    batch_size: int,
    size: int = 224,
    backend: str = "auto",
    device: str | torch.device = "cpu",
    workers: int | None = None,
    seed: int = 0,
    augmentation: Augmentation = Augmentation(),  # noqa: B008  (frozen)
    crop_scale: tuple[float, float] | None = None,
    drop_last: bool = True,
    channels_last: bool = False,
    dtype: torch.dtype = torch.float32,
    max_pixels: int = MAX_PIXELS,
    value_range: tuple[float, float] | Literal["auto"] | None = None,
    cache_size: int | None = None,
    every_nth: int = 1,
    reduced_jpeg: bool = False,
    channels: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    rank: int = 0,
    ranks: int = 1,
    parts: int = 1,
) -> ViewLoader:
    """Two augmented views of every image under a folder, shuffled anew in every epoch.

    The same seed and epoch give the same views, bit for bit within a backend, whatever the number
    of workers and wherever a run was resumed. Between the backends crops, flips and all drawn
    factors are equal and the pixels nearly so.

    A file that does not read is skipped: it is named in an :class:`UnreadableImageWarning`, listed
    in `loader.skipped`, and its place in the batch goes to another file, chosen by (seed, epoch,
    its own index). Batches keep their size.

    What the scan of the folders left out is said in one :class:`LeftOutWarning`. The first image
    that uses almost none of its values' range is named in a :class:`NarrowRangeWarning`.

    Args:
        root: A folder of images, any directory tree; a list of files; tar shards; Arrow or Parquet
            tables; or several of these: see :func:`open_images`. Or an `ImageSource` that is open
            already.
        batch_size: Images in a batch.
        size: Height and width of the views in pixels.
        backend: "dali", "torchvision", "memory" for images that fit into the device's memory, which
            are decoded once, or "auto": torchvision on a CPU, where it is faster than DALI, and
            DALI on a GPU where it is installed and works.
        device: Where the views end up. With a CUDA device DALI decodes and augments there.
        workers: Worker processes (torchvision; 0 for none) or threads (DALI, and memory at the
            beginning; at least one). None takes the cores that this process may use, at most 8.
        seed: Seed of order and views, at least 0.
        augmentation: The distribution of the views.
        crop_scale: Range of the crop's area as a fraction of the image's; None takes
            `augmentation.scale`, by default (0.2, 1.0).
        drop_last: Leave out an incomplete last batch.
        channels_last: Views in torch's channels-last memory format, as they come out of DALI,
            rather than contiguous.
        dtype: Of the views: float32, bfloat16 or float16, for an encoder that computes in it.
            What is rounded is the normalised pixel; values and order of the draws stay.
        max_pixels: Width times height above which a file is skipped.
        value_range: The values that become black and white in files of more than 8 bits; None takes
            0 to 65535, or with `channels` the whole range of their integers. "auto" measures it
            over some images; `loader.reading` then has it.
        cache_size: With "memory", pixels of the shorter side to which larger images are reduced;
            None takes 1.25 times `size`.
        every_nth: Take every n-th image alone, as of the frames of a video.
        reduced_jpeg: Decode JPEG files at 1/2, 1/4 or 1/8 of their size where no crop must then be
            enlarged, which takes a fraction of the time for photographs of many pixels and changes
            these by little. The torchvision loader alone does this.
        channels: Read images with this many channels as they are stored, at their full depth, of
            .npy and .npz files too; views are (N, channels, size, size). Brightness scales all
            channels alike, contrast turns each about its own mean; saturation, hue and grayscale
            need red, green and blue and are left out. The torchvision loader alone does this. None
            makes 8-bit RGB of every image.
        mean: Mean of each channel after scaling to [0, 1], in place of `augmentation`'s. None, with
            `channels`, measures it over some images; `loader.augmentation` then has it.
        std: Deviation of each channel, likewise.
        rank: Which of the processes that share every batch this is, from 0 on. Order, views and
            batches do not depend on it, nor on how many there are.
        ranks: How many share a batch, equally. The views of all ranks, in order, are the batch.
        parts: Parts that the batch is taken in (gradient accumulation): the ranks share each.

    Returns:
        The loader; `batch_size` counts the images of all ranks.

    Raises:
        ValueError: A value is out of range, the folder holds no readable image, or fewer images
            than one batch with `drop_last`.
        TypeError: `dtype` is none of the three.
        ImportError: The backend that was asked for is not installed.
    """
    if backend not in BACKENDS:
        raise ValueError(f"build_loader: backend must be one of {BACKENDS}, got {backend!r}")
    _require_installed(backend)
    for name, value, least in (("batch_size", batch_size, 1), ("size", size, 1), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"build_loader: {name} must be at least {least}, got {value}")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(
            f"build_loader: dtype must be torch.float32, bfloat16 or float16, got {dtype}"
        )
    if workers is None:
        workers = min(8, available_cores())
    if workers < 0:
        raise ValueError(f"build_loader: workers must be at least 0, got {workers}")
    if cache_size is not None and cache_size < 1:
        raise ValueError(f"build_loader: cache_size must be at least 1, got {cache_size}")
    try:
        stated = None if value_range == "auto" else value_range
        reading = Reading(max_pixels, stated, channels, reduced_jpeg)
    except ValueError as error:
        raise ValueError(f"build_loader: {error}") from None
    if crop_scale is not None:
        augmentation = dataclasses.replace(augmentation, scale=crop_scale)
    files = (
        root
        if isinstance(root, ImageSource)
        else open_images(root, arrays=channels is not None, every_nth=every_nth)
    )
    where = " and ".join(printable(repr(one)) for one in files.roots)
    if files.summary():
        warnings.warn(
            f"{len(files):,} images under {where}; left out {files.summary()}",
            LeftOutWarning,
            stacklevel=2,
        )
    if drop_last and len(files) < batch_size:
        raise ValueError(
            f"build_loader: {len(files)} images under {where} do not fill one batch of "
            f"{batch_size}; lower batch_size, or pass drop_last=False"
        )
    if value_range == "auto":
        reading = dataclasses.replace(reading, value_range=measure_range(files, reading))
    _require_readable(files, where, reading)
    if (mean is None) != (std is None):
        raise ValueError("build_loader: mean and std go together, got one of them alone")
    if reduced_jpeg:
        if backend not in ("auto", "torchvision"):
            raise ValueError(
                "build_loader: backend must be torchvision (or auto) with reduced_jpeg, got "
                f"{backend!r}"
            )
        backend = "torchvision"
    if channels is not None:
        if backend not in ("auto", "torchvision"):
            raise ValueError(
                f"build_loader: backend must be torchvision (or auto) with channels {channels}, "
                f"got {backend!r}, which reads RGB alone"
            )
        backend = "torchvision"
        augmentation = without_colour(augmentation)
        if mean is None:
            mean, std, _ = measure_channels(files, reading)
    if mean is not None and std is not None:
        if not len(mean) == len(std) == (channels or 3):
            raise ValueError(
                f"build_loader: mean and std must have {channels or 3} numbers, got {len(mean)} "
                f"and {len(std)}"
            )
        augmentation = dataclasses.replace(augmentation, mean=tuple(mean), std=tuple(std))
    settings: dict[str, Any] = {
        "batch_size": batch_size,
        "size": size,
        "device": torch.device(device),
        "seed": seed,
        "augmentation": augmentation,
        "drop_last": drop_last,
        "channels_last": channels_last,
        "dtype": dtype,
        "reading": reading,
        "rank": rank,
        "ranks": ranks,
        "parts": parts,
    }
    if backend == "memory":
        from densecl_ext.data.memory_loader import MemoryLoader

        return MemoryLoader(files, workers=workers, cache_size=cache_size, **settings)
    on_gpu = torch.device(device).type == "cuda"
    if backend == "dali" or (backend == "auto" and on_gpu and _has("nvidia.dali")):
        try:
            from densecl_ext.data.dali_loader import DaliLoader

            return DaliLoader(files, workers=workers, **settings)
        except (ImportError, OSError, RuntimeError) as error:
            if backend == "dali":
                raise
            reason = " ".join(str(error).split())[:200]
            warnings.warn(f"DALI does not work here, using torchvision: {reason}", stacklevel=2)
    from densecl_ext.data.torchvision_loader import TorchvisionLoader

    return TorchvisionLoader(files, workers=workers, **settings)


def _has(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


def _require_installed(backend: str) -> None:
    """Name the missing package before anything else trips over it."""
    needed = {"PIL": "pillow", "torchvision": "torchvision"}
    if backend == "dali":
        needed = {"PIL": "pillow", "nvidia.dali": "nvidia-dali"}
    for module, package in needed.items():
        if not _has(module):
            raise ImportError(
                f"build_loader: backend {backend!r} needs {package}, which is not installed; "
                "pip install 'densecl_ext[train]' brings it"
            )


def available_cores() -> int:
    """Cores that this process may use, often fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _require_readable(files: ImageSource, where: str, reading: Reading) -> None:
    """One readable image is enough; reading all of a large folder at the start would take hours."""
    reason = ""
    for index in range(len(files)):
        try:
            file = files.encoded(index, reading)
            _ = decode(file, reading) if reading.channels is None else decode_bands(file, reading)
        except (MemoryError, ImportError):
            raise
        except Exception as error:
            reason = reason or f"{printable(files[index])}: {reason_of(error)}"
        else:
            return
    raise ValueError(
        f"build_loader: none of the {len(files)} image files under {where} can be read; "
        f"the first is {reason}"
    )
