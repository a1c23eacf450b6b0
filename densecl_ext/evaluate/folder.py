"""Labelled images in a folder: DIR/images, DIR/masks, DIR/splits."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from densecl_ext.data.folder import EXTENSIONS
from densecl_ext.data.images import decode, read_encoded, reason_of

_MARKS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))


class SegmentationFolder:
    """Images with pixel labels, in memory order of a split file.

    ``DIR/splits/SPLIT.txt`` names one image a line (UTF-8, or UTF-16 with a byte order mark), with
    or without extension; ``DIR/images/NAME.*`` holds the pixels and ``DIR/masks/NAME.png`` the
    labels: gray or palette PNG whose values are class ids, 255 where a pixel does not count. Names
    may have folders (``a/im0``); leading ones that are not in DIR/images are dropped.
    ``DIR/classes.txt`` may give one class name a line.

    Args:
        root: DIR.
        split: SPLIT.
        limit: keep at most this many images, evenly spread over the split; None keeps all.

    Attributes:
        names: the images' names inside DIR/images, without extension.
        class_names: lines of classes.txt, or () where there is no such file.

    Raises:
        ValueError: a folder or file is missing, the split is empty or no text, it names an image
            that is not there, one that several files could be, or one image twice.
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
        lines = read_lines(listing)
        if not lines:
            raise ValueError(f"SegmentationFolder: {listing} names no image")
        images = _Index(self.root / "images")
        found = [images.find(line) for line in lines]
        missing = [line for line, path in zip(lines, found, strict=True) if path is None]
        if missing:
            raise ValueError(
                f"SegmentationFolder: {listing} names {missing[0]!r}, which is not in "
                f"{self.root / 'images'} ({len(missing)} missing)"
            )
        seen: dict[Path, str] = {}
        for line, path in zip(lines, found, strict=True):
            assert path is not None
            if path in seen:
                raise ValueError(
                    f"SegmentationFolder: {listing} names {path} twice, by {seen[path]!r} and "
                    f"{line!r}"
                )
            seen[path] = line
        self._images = [path for path in found if path is not None]
        if limit is not None and limit < len(self._images):
            count = len(self._images)
            self._images = [self._images[i * count // limit] for i in range(limit)]
        self.names = [_stem(path.relative_to(self.root / "images")) for path in self._images]
        self._masks = _Index(self.root / "masks")
        classes = self.root / "classes.txt"
        self.class_names = tuple(read_lines(classes)) if classes.is_file() else ()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Image (3, H, W) and label (H, W), both uint8.

        Raises:
            ValueError: a file is missing or does not decode; the mask has several channels, more
                than 8 bits, or another size than the upright image.
        """
        import numpy as np
        from PIL import Image, ImageOps

        path = self._images[index]
        try:
            file = read_encoded(path)
            image = torch.from_numpy(np.array(decode(file).image))
        except Exception as error:
            raise ValueError(f"SegmentationFolder: the image {path}: {reason_of(error)}") from None
        mask = self._masks.exactly(self.names[index], ".png")
        if mask is None:
            wanted = self.root / "masks" / f"{self.names[index]}.png"
            raise ValueError(f"SegmentationFolder: the mask {wanted} is missing")
        try:
            with Image.open(mask) as opened:
                opened.load()
                turned = ImageOps.exif_transpose(opened)  # only where the mask itself says so
                label = torch.from_numpy(np.array(turned))  # a palette image yields its indices
        except Exception as error:
            raise ValueError(f"SegmentationFolder: the mask {mask}: {reason_of(error)}") from None
        size = tuple(image.shape[:2])
        if label.dim() != 2 or label.dtype != torch.uint8:
            raise ValueError(
                f"SegmentationFolder: the mask {mask} must be 8-bit with one channel (at most 255 "
                f"classes), got {tuple(label.shape)} {label.dtype}"
            )
        if tuple(label.shape) != size:
            turn = file.orientation
            hint = (
                f"; the image's EXIF orientation {turn} turns its pixels, and the mask shows them "
                "as stored: store the image upright"
                if turn >= 5 and tuple(label.shape) == size[::-1]
                else ""
            )
            raise ValueError(
                f"SegmentationFolder: the mask {mask} must have the upright image's size "
                f"{size[0]} x {size[1]}, got {label.shape[0]} x {label.shape[1]}{hint}"
            )
        return image.permute(2, 0, 1).contiguous(), label

    def orientation(self, index: int) -> int:
        """EXIF orientation of an image; 1 is upright."""
        return read_encoded(self._images[index]).orientation

    def path(self, index: int) -> Path:
        """The image's file."""
        return self._images[index]


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank, stripped.

    Raises:
        ValueError: neither UTF-8 nor, by its byte order mark, UTF-16.
    """
    data = path.read_bytes()
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # UTF-16 without a mark decodes as UTF-8 with a zero beside every letter
        raise ValueError(f"evaluate: {path} must be a text file in UTF-8")
    return [line.strip() for line in text.splitlines() if line.strip()]


def _only(paths: Iterable[Path], name: str) -> Path:
    listed = list(paths)
    if len(listed) > 1:
        raise ValueError(
            f"SegmentationFolder: {name!r} could be {listed[0]} or {listed[1]}; keep one of them"
        )
    return listed[0]


def _stem(name: str | Path) -> str:
    """The name without an image file's extension; other dots belong to it."""
    text = name.as_posix() if isinstance(name, Path) else name
    stem, extension = os.path.splitext(text)
    return stem if extension.lower() in EXTENSIONS else text


class _Index:
    """Image files under a folder by their path without extension."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files: dict[str, list[Path]] = {}
        for folder, subfolders, names in os.walk(root, followlinks=True):
            subfolders.sort()
            for name in sorted(names):
                if os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith("."):
                    path = Path(folder, name)
                    self.files.setdefault(_stem(path.relative_to(root)), []).append(path)

    def exactly(self, stem: str, extension: str) -> Path | None:
        """The file of that name and extension (any case)."""
        of_kind = [p for p in self.files.get(stem, ()) if p.suffix.lower() == extension]
        return _only(of_kind, stem) if of_kind else None

    def find(self, line: str) -> Path | None:
        """The file that a line of a split names; leading folders that are not here do not count.

        Raises:
            ValueError: several files could be meant.
        """
        name = line.replace("\\", "/")
        parts = [part for part in name.split("/") if part not in ("", ".")]
        for first in range(len(parts)):
            stem = _stem("/".join(parts[first:]))
            if stem in self.files:
                exact = [p for p in self.files[stem] if p.name == parts[-1]]
                return _only(exact or self.files[stem], line)
        return None
