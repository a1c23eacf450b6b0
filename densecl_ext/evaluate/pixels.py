"""Images with pixel labels in memory: both splits, checked, at one size."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from densecl_ext.evaluate.checks import (
    check_labels,
    check_num_classes,
    check_splits,
    check_turned,
)
from densecl_ext.evaluate.folder import SegmentationFolder
from densecl_ext.evaluate.options import PixelOptions


@dataclasses.dataclass(frozen=True)
class LabelledImages:
    """Images with pixel labels, in memory.

    Attributes:
        images: uint8 (N, 3, H, W).
        labels: uint8 (N, H, W), 255 where a pixel does not count.
        names: of the images.
    """

    images: Tensor
    labels: Tensor
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]


@dataclasses.dataclass(frozen=True)
class DenseData:
    """Two splits in memory at one size: load them once, measure many networks.

    Attributes:
        train: what is learned from.
        val: what is measured.
        class_names: one name a class.
        settings: what the protocol line says of the data.
    """

    train: LabelledImages
    val: LabelledImages
    class_names: tuple[str, ...]
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def load(cls, options: PixelOptions) -> DenseData:
        """Read, check and resize both splits of ``options.data``.

        Raises:
            ValueError: the folder does not hold what :class:`SegmentationFolder` expects, the
                splits share an image, no number of classes is known or a label does not fit it, a
                split has no label at all, or images differ in size and ``size`` is empty.
        """
        limit = options.limit or None
        train = SegmentationFolder(options.data, options.train_split, limit=limit)
        val = SegmentationFolder(options.data, options.val_split, limit=limit)
        names = class_names(train, options)
        check_num_classes(len(names))
        check_splits(train, val)
        splits = [read_all(folder, options.size) for folder in (train, val)]
        for name, folder, part in zip(
            (options.train_split, options.val_split), (train, val), splits, strict=True
        ):
            check_labels(name, part.labels, folder.names, len(names))
            check_turned(folder)
        height, width = splits[1].labels.shape[1:]
        settings = {
            "data": Path(options.data).resolve().name,
            "train": f"{options.train_split}({len(train)})",
            "val": f"{options.val_split}({len(val)})",
            "scored_at": (height, width),
            "resized": "images bilinear, masks nearest" if options.size else "no",
            "classes": len(names),
        }
        return cls(splits[0], splits[1], names, settings)


def class_names(folder: SegmentationFolder, options: PixelOptions) -> tuple[str, ...]:
    """One name a class: those of classes.txt, or numbers where it does not fit ``num_classes``."""
    count = options.num_classes or len(folder.class_names)
    if not count:
        raise ValueError(f"{options.data} has no classes.txt: give --num-classes")
    return folder.class_names if len(folder.class_names) == count else numbered(count)


def numbered(count: int) -> tuple[str, ...]:
    """Names of classes that have none."""
    return tuple(str(index) for index in range(count))


def read_all(folder: Any, size: Sequence[int] = ()) -> LabelledImages:
    """Read a sequence of (image, label) into memory, resized where a size is given.

    Raises:
        ValueError: no image, or images of several sizes and no ``size``.
    """
    if not len(folder):
        raise ValueError("evaluate: a split must hold images, got none")
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for index in range(len(folder)):
        image, label = folder[index]
        if size:
            image, label = resize(image, label, (size[0], size[1]))
        if images and image.shape != images[0].shape:
            raise ValueError(
                f"evaluate: images must be of one size, got {tuple(images[0].shape[1:])} and "
                f"{tuple(image.shape[1:])}; give --size H W"
            )
        images.append(image)
        labels.append(label)
    names = tuple(getattr(folder, "names", ()))
    return LabelledImages(torch.stack(images), torch.stack(labels), names)


def resize(image: Tensor, label: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Resize an image (3, H, W), bilinear and antialiased, and its label (H, W), nearest."""
    if tuple(image.shape[1:]) == size:
        return image, label
    resized = F.interpolate(
        image[None].float(), size=size, mode="bilinear", align_corners=False, antialias=True
    )
    nearest = F.interpolate(label[None, None].float(), size=size, mode="nearest-exact")
    return resized[0].round().clamp(0, 255).byte(), nearest[0, 0].byte()
