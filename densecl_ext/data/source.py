"""Where images come from: what a loader sees of a folder, a list, shards or a table."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np

from densecl_ext.data.images import DEFAULT, Encoded, Reading

# Kinds of names that are left out, as (one, several) of them.
OTHER_ENDING = ("file of another ending", "files of other endings")


class ImageSource(Sequence[Path]):
    """Images in a fixed order, each read by its number alone.

    An item is the image's name as a path: a file, or the place inside a shard or a table. What a
    loader promises (order, resuming, skipping) rests on the number alone.

    Attributes:
        roots: What was named: folders, lists, shards.
        left_out: How many names of which kind were not taken, as (one, several) of them.
        endings: How many files there are of each ending that is not an image's.
    """

    roots: tuple[str, ...]
    left_out: Counter[tuple[str, str]]
    endings: Counter[str]

    @property
    @abstractmethod
    def identity(self) -> str:
        """A hash of the ordered images' names and sizes: the same wherever they lie."""

    @abstractmethod
    def name(self, index: int) -> Path:
        """The image's name; `index` is within the range."""

    @abstractmethod
    def encoded(self, index: int, reading: Reading = DEFAULT) -> Encoded:
        """Read an image's content through the gate.

        Raises:
            Exception: As :func:`densecl_ext.data.images.read_encoded`.
        """

    @abstractmethod
    def sizes(self) -> np.ndarray:
        """Bytes of every image, int64 (len,); -1 where they are not known without reading."""

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> list[Path]: ...
    def __getitem__(self, index: int | slice) -> Path | list[Path]:
        if isinstance(index, slice):
            return [self.name(number) for number in range(*index.indices(len(self)))]
        return self.name(range(len(self))[index])

    def __eq__(self, other: object) -> bool:
        if isinstance(other, (ImageSource, list, tuple)):
            return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def summary(self) -> str:
        """One line: what was left out, "" for nothing."""
        told = []
        for kind, count in self.left_out.most_common():
            line = f"{count:,} {kind[count > 1]}"
            if kind == OTHER_ENDING:
                common = self.endings.most_common(5)
                line += " (" + ", ".join(f"{ending} {number:,}" for ending, number in common)
                line += ", ...)" if len(self.endings) > len(common) else ")"
            told.append(line)
        return ", ".join(told)


class Several(ImageSource):
    """Sources one behind the other.

    Args:
        parts: The sources; at least one.
    """

    def __init__(self, parts: Sequence[ImageSource]) -> None:
        self.parts = tuple(parts)
        self.roots = tuple(root for part in parts for root in part.roots)
        self.left_out = sum((part.left_out for part in parts), Counter())
        self.endings = sum((part.endings for part in parts), Counter())
        self._starts = np.cumsum([0, *map(len, parts)]).tolist()

    def __len__(self) -> int:
        return self._starts[-1]

    def _place(self, index: int) -> tuple[ImageSource, int]:
        part = bisect_right(self._starts, index) - 1
        return self.parts[part], index - self._starts[part]

    @property
    def identity(self) -> str:
        """Hash of the parts' identities."""
        told = "\n".join(f"{len(part)} {part.identity}" for part in self.parts)
        return hashlib.sha256(told.encode()).hexdigest()

    def name(self, index: int) -> Path:
        """The image's name in its part."""
        part, within = self._place(index)
        return part.name(within)

    def encoded(self, index: int, reading: Reading = DEFAULT) -> Encoded:
        """Read from its part."""
        part, within = self._place(index)
        return part.encoded(within, reading)

    def sizes(self) -> np.ndarray:
        """Of all parts."""
        return np.concatenate([part.sizes() for part in self.parts])


class Chosen(ImageSource):
    """Some of a source's images: every n-th frame of a video, say.

    Args:
        source: All images.
        numbers: Which, in order.
    """

    def __init__(self, source: ImageSource, numbers: Sequence[int]) -> None:
        self.source, self.numbers = source, numbers
        self.roots, self.left_out, self.endings = source.roots, source.left_out, source.endings

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def identity(self) -> str:
        """Hash of the source's identity and the numbers."""
        digest = hashlib.sha256(self.source.identity.encode())
        digest.update(np.asarray(self.numbers, dtype="<i8").tobytes())
        return digest.hexdigest()

    def name(self, index: int) -> Path:
        """The image's name."""
        return self.source.name(self.numbers[index])

    def encoded(self, index: int, reading: Reading = DEFAULT) -> Encoded:
        """Read from the source."""
        return self.source.encoded(self.numbers[index], reading)

    def sizes(self) -> np.ndarray:
        """Of those chosen."""
        return self.source.sizes()[np.asarray(self.numbers, dtype=np.int64)]
