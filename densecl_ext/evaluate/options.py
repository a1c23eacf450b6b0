"""Options of the protocols: plain dataclasses, whose docstrings are the help texts."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

PRECISIONS = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """What every protocol on a frozen network asks.

    Attributes:
        layers: names of the layers whose outputs are the features; the last one where empty.
        recalibrate: number of training images that give every batch norm new statistics first; 0
            keeps the network's own. The network itself stays as it was.
        precision: float32, or bfloat16 for the network's products (autocast).
        batch_size: images at a time.
        seed: of everything that is drawn.
    """

    layers: tuple[str, ...] = ()
    recalibrate: int = 0
    precision: str = "float32"
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"{name}: precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}"
            )
        require_at_least(self, 1, "batch_size")
        require_at_least(self, 0, "recalibrate", "seed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PixelOptions(NetworkOptions):
    """What the protocols on images with pixel labels share.

    Attributes:
        data: folder of labelled images: images/, masks/, splits/, perhaps classes.txt.
        train_split: name of the split that labels are learned from.
        val_split: name of the split that is measured.
        size: height and width to which images (bilinear, antialiased) and masks (nearest) are
            resized; empty keeps the files' size. What is resized is also what is scored.
        scale: images, not masks, are resized by this factor before the network.
        num_classes: number of classes; 0 takes the lines of classes.txt.
        limit: use at most this many images of each split, evenly spread; 0 uses all.
    """

    data: str = ""
    train_split: str = "train"
    val_split: str = "val"
    size: tuple[int, ...] = ()
    scale: float = 1.0
    num_classes: int = 0
    limit: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.size) not in (0, 2) or min(self.size, default=1) < 1:
            raise ValueError(
                f"{type(self).__name__}: size must be a height and a width, got {self.size}"
            )
        require_positive(self, "scale")
        require_at_least(self, 0, "num_classes", "limit")


def require_at_least(options: Any, minimum: int, *names: str) -> None:
    """Raise ValueError unless each of the named options is at least so large."""
    for name in names:
        if getattr(options, name) < minimum:
            raise ValueError(
                f"{type(options).__name__}: {name} must be at least {minimum}, "
                f"got {getattr(options, name)}"
            )


def require_positive(options: Any, *names: str) -> None:
    """Raise ValueError unless each of the named options is above 0."""
    for name in names:
        if not getattr(options, name) > 0:
            raise ValueError(
                f"{type(options).__name__}: {name} must be positive, got {getattr(options, name)}"
            )


def help_texts(options: type) -> dict[str, str]:
    """The option's help of each field of a dataclass, from the 'Attributes:' of its docstrings.

    Args:
        options: the dataclass; those that it inherits from are read too.
    """
    texts: dict[str, str] = {}
    for cls in reversed(options.__mro__):
        section = inspect.cleandoc(cls.__doc__ or "").partition("\nAttributes:\n")[2]
        for name, text in re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", section, re.MULTILINE):
            texts[name] = " ".join(text.split()).removesuffix(".")
    return texts
