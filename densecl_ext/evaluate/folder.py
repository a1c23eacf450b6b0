"""Labelled images in a folder: DIR/images, DIR/masks, DIR/splits."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from densecl_ext.data.folder import EXTENSIONS
from densecl_ext.data.images import read_rgb


class SegmentationFolder:
    """Images with pixel labels, in memory order of a split file.

    ``DIR/splits/SPLIT.txt`` names one image a line, without folder, with or without extension;
    ``DIR/images/NAME.*`` holds the pixels and ``DIR/masks/NAME.png`` the labels: gray or palette
    PNG whose values are class ids, 255 where a pixel does not count. ``DIR/classes.txt`` may give
    one class name a line.

    Args:
        root: DIR.
        split: SPLIT.
        limit: keep so many images, evenly spread over the split; None keeps all.

    Attributes:
        names: the images' names, without extension.
        class_names: lines of classes.txt, or () where there is no such file.

    Raises:
        ValueError: a folder, file or image that the split names is missing; the split is empty.
    """

    def __init__(
        self, root: str | os.PathLike[str], split: str = "train", *, limit: int | None = None
    ) -> None:
        self.root = Path(root)
        listing = self.root / "splits" / f"{split}.txt"
        for needed in (self.root / "images", self.root / "masks"):
            if not needed.is_dir():
                raise ValueError(f"SegmentationFolder: {needed} must be a folder, there is none")
        if not listing.is_file():
            known = sorted(path.stem for path in (self.root / "splits").glob("*.txt"))
            raise ValueError(
                f"SegmentationFolder: no split {split!r}: {listing} is not a file; splits there: "
                f"{', '.join(known) or 'none'}"
            )
        lines = [line.strip() for line in listing.read_text(encoding="utf-8").splitlines()]
        stems = [_stem(line) for line in lines if line]
        if not stems:
            raise ValueError(f"SegmentationFolder: {listing} names no image")
        if limit is not None and limit < len(stems):
            stems = [stems[i * len(stems) // limit] for i in range(limit)]
        files = {_stem(path.name): path for path in sorted((self.root / "images").iterdir())}
        missing = [stem for stem in stems if stem not in files]
        if missing:
            raise ValueError(
                f"SegmentationFolder: {listing} names {missing[0]!r}, which is not in "
                f"{self.root / 'images'} ({len(missing)} missing)"
            )
        self.names = stems
        self._images = [files[stem] for stem in stems]
        classes = self.root / "classes.txt"
        self.class_names: tuple[str, ...] = ()
        if classes.is_file():
            listed = classes.read_text(encoding="utf-8").splitlines()
            self.class_names = tuple(line.strip() for line in listed if line.strip())

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Image (3, H, W) and label (H, W), both uint8.

        Raises:
            ValueError: the mask is missing, has several channels, or another size than the image.
        """
        import numpy as np
        from PIL import Image

        image = torch.from_numpy(np.array(read_rgb(self._images[index])))
        path = self.root / "masks" / f"{self.names[index]}.png"
        if not path.is_file():
            raise ValueError(f"SegmentationFolder: the mask {path} is missing")
        with Image.open(path) as opened:
            label = torch.from_numpy(np.array(opened))  # a palette image yields its indices
        if label.shape != image.shape[:2] or label.dtype != torch.uint8:
            raise ValueError(
                f"SegmentationFolder: the mask {path} must be 8-bit with one channel of "
                f"{tuple(image.shape[:2])}, got {tuple(label.shape)} {label.dtype}"
            )
        return image.permute(2, 0, 1).contiguous(), label


def _stem(name: str) -> str:
    """The name without folder and without an image file's extension; other dots belong to it."""
    base = name.replace("\\", "/").rsplit("/", 1)[-1]
    stem, extension = os.path.splitext(base)
    return stem if extension.lower() in EXTENSIONS else base
