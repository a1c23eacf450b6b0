"""What is wrong with two splits of labelled images, told before any network runs."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from densecl_ext.evaluate.folder import SegmentationFolder
from densecl_ext.evaluate.metrics import IGNORE_INDEX


def check_splits(train: SegmentationFolder, val: SegmentationFolder) -> None:
    """Refuse to measure on what was learned from.

    Raises:
        ValueError: both splits hold an image.
    """
    learned = {train.path(index) for index in range(len(train))}
    shared = [val.names[index] for index in range(len(val)) if val.path(index) in learned]
    if shared:
        raise ValueError(
            f"evaluate: {len(shared)} of the {len(val)} validation images are training images too, "
            f"the first is {shared[0]!r}: take splits that share none"
        )


def check_num_classes(num_classes: int) -> None:
    """Raise ValueError where ids from 0 on and 255 do not fit into 8 bits together."""
    if num_classes > IGNORE_INDEX:
        raise ValueError(
            f"evaluate: num_classes must be at most {IGNORE_INDEX}, since masks have 8 bits and "
            f"{IGNORE_INDEX} is ignored, got {num_classes}"
        )


def check_labels(
    split: str, labels: Sequence[Tensor] | Tensor, names: Sequence[str], num_classes: int
) -> None:
    """Refuse labels that are no class, and a split without any label.

    Args:
        split: its name, for messages.
        labels: uint8 (H, W) each.
        names: of the images.
        num_classes: K.

    Raises:
        ValueError: an id is neither below K nor 255, or no pixel has a label.

    Warns:
        UserWarning: the ids are 0 and 255 alone, as of a mask that means 255 as a class.
    """
    counts = torch.zeros(256, dtype=torch.int64)
    for label, name in zip(labels, names, strict=True):
        here = torch.bincount(label.flatten(), minlength=256)
        wrong = torch.nonzero(here[num_classes:IGNORE_INDEX]).flatten()
        if len(wrong):
            raise ValueError(
                f"evaluate: the mask of {name!r} has the label {int(wrong[0]) + num_classes}; "
                f"labels must be below num_classes = {num_classes}, or {IGNORE_INDEX} for pixels "
                "that do not count"
            )
        counts += here
    if not int(counts[:IGNORE_INDEX].sum()):
        raise ValueError(
            f"evaluate: no pixel of the split {split!r} has a label: all {len(names)} masks are "
            f"{IGNORE_INDEX}, which is ignored"
        )
    if int(counts[IGNORE_INDEX]) and set(torch.nonzero(counts).flatten().tolist()) == {
        0,
        IGNORE_INDEX,
    }:
        warnings.warn(
            f"evaluate: the masks of the split {split!r} hold 0 and 255 alone, and 255 is ignored: "
            "only class 0 is measured. Write 1 where 255 is meant as a class",
            stacklevel=2,
        )


def check_turned(folder: SegmentationFolder) -> None:
    """Warn where EXIF turns an image whose mask has the same size either way.

    Warns:
        UserWarning: names the first such image and their number.
    """
    turned = [name for index, name in enumerate(folder.names) if folder.orientation(index) != 1]
    if turned:
        warnings.warn(
            f"evaluate: {len(turned)} images are turned by EXIF, the first is {turned[0]!r}; masks "
            "must show them upright, which their size need not tell",
            stacklevel=2,
        )
