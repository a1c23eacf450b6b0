"""Images in tar files, as WebDataset writes them, read where they lie."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tarfile
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from densecl_ext.data.cache import cache_folder, cached_path, written_whole
from densecl_ext.data.folder import EXTENSIONS
from densecl_ext.data.images import DEFAULT, Encoded, Reading, encoded, require_size
from densecl_ext.data.source import OTHER_ENDING, ImageSource

SHARDS = frozenset((".tar",))
_SPARSE = ("sparse member of a shard", "sparse members of shards")
_HIDDEN = ("hidden name", "hidden names")
# Indexes of shards with fewer members are made again each time.
_KEPT_FROM = 1000
_FIELDS = ("names", "ends", "offsets", "sizes")


class TarImages(ImageSource):
    """The image members of tar files, by an index of where each begins.

    Opening reads the headers alone and jumps over what lies between; of shards with a thousand
    members or more it keeps what it found in the cache folder (`DENSECL_CACHE`). Reading an image
    opens its shard, reads at its place, and closes it: nothing is shared between processes, and no
    file stays open.

    Args:
        shards: The tar files, in order.
        endings: Of the members that are images.

    Raises:
        ValueError: A shard is no plain tar file, or none holds an image.
    """

    def __init__(
        self, shards: Sequence[str | os.PathLike[str]], endings: Iterable[str] = EXTENSIONS
    ) -> None:
        self.roots = tuple(os.fspath(shard) for shard in shards)
        self.left_out: Counter[tuple[str, str]] = Counter()
        self.endings: Counter[str] = Counter()
        names, ends = bytearray(), array("q")
        offsets, sizes, starts = array("q"), array("q"), []
        taken = frozenset(endings)
        for shard in self.roots:
            starts.append(len(ends))
            for name, offset, size in _members(shard):
                base = os.path.basename(name)
                ending = os.path.splitext(base)[1].lower().decode("utf-8", "replace")
                if base.startswith(b"."):
                    self.left_out[_HIDDEN] += 1
                elif ending not in taken:
                    self.left_out[OTHER_ENDING] += 1
                    self.endings[ending or "none"] += 1
                elif size < 0:
                    self.left_out[_SPARSE] += 1
                else:
                    names += name
                    ends.append(len(names))
                    offsets.append(offset)
                    sizes.append(size)
        self._starts = tuple(starts)
        self._names = np.frombuffer(names, dtype=np.uint8)
        self._ends = np.frombuffer(ends, dtype=np.int64)
        self._offsets = np.frombuffer(offsets, dtype=np.int64)
        self._sizes = np.frombuffer(sizes, dtype=np.int64)
        if not len(self._ends):
            told = self.summary()
            raise ValueError(
                f"find_images: no image in {', '.join(map(repr, self.roots[:5]))}; looked for "
                f"{', '.join(sorted(taken))}" + (f"; left out {told}" if told else "")
            )

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def identity(self) -> str:
        """SHA-256 of the ordered members' names and sizes, wherever the shards lie."""
        digest = hashlib.sha256(b"tar")
        for part in (self._ends, self._sizes, self._names):
            digest.update(np.ascontiguousarray(part).data)
        return digest.hexdigest()

    def _shard(self, index: int) -> str:
        return self.roots[bisect_right(self._starts, index) - 1]

    def name(self, index: int) -> Path:
        """The shard's path with the member's name below it."""
        start = int(self._ends[index - 1]) if index else 0
        member = self._names[start : int(self._ends[index])].tobytes()
        return Path(self._shard(index), os.fsdecode(member))

    def encoded(self, index: int, reading: Reading = DEFAULT) -> Encoded:
        """Read the member through the gate."""
        size = int(self._sizes[index])
        require_size(size, reading)
        with open(self._shard(index), "rb", buffering=0) as file:
            data = os.pread(file.fileno(), size, int(self._offsets[index]))
        if len(data) < size:
            raise ValueError("the shard is shorter than it was when it was opened")
        return encoded(data)

    def sizes(self) -> np.ndarray:
        """Bytes of every member, int64 (len,)."""
        return self._sizes


def _members(shard: str) -> Iterator[tuple[bytes, int, int]]:
    """Name, place and size of the regular files of a shard; the size of a sparse one is -1."""
    place = None
    try:
        place = cached_path(shard, cache_folder(), ".index.npz")
        names, ends, offsets, sizes = _read_index(place)
    except Exception:  # none yet, or damaged
        names, ends, offsets, sizes = _scanned(shard)
        if place is not None and len(ends) >= _KEPT_FROM:
            _keep_index(place, names, ends, offsets, sizes)
    start = 0
    for end, offset, size in zip(ends.tolist(), offsets.tolist(), sizes.tolist(), strict=True):
        yield names[start:end], offset, size
        start = end


_Index = tuple[bytes, np.ndarray, np.ndarray, np.ndarray]  # names, their ends, places, sizes


def _scanned(shard: str) -> _Index:
    """By the headers, none of which is kept in memory."""
    names, ends, offsets, sizes = bytearray(), array("q"), array("q"), array("q")
    try:
        with tarfile.open(shard, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # it would keep them all
                if member.isreg():
                    names += os.fsencode(member.name)
                    ends.append(len(names))
                    offsets.append(member.offset_data)
                    sizes.append(-1 if member.issparse() else member.size)
    except tarfile.TarError as error:
        raise ValueError(
            f"find_images: {shard!r} is no plain tar file ({error}); compressed shards cannot be "
            "read at a place: unpack them"
        ) from None
    numbers = [np.frombuffer(values, dtype=np.int64) for values in (ends, offsets, sizes)]
    return bytes(names), numbers[0], numbers[1], numbers[2]


def _read_index(place: Path) -> _Index:
    with np.load(place, allow_pickle=False) as stored:
        names, ends, offsets, sizes = (stored[name] for name in _FIELDS)
    if not len(ends) == len(offsets) == len(sizes) or ends[-1] != len(names):
        raise ValueError("not an index")
    return names.tobytes(), ends, offsets, sizes


def _keep_index(place: Path, names: bytes, *numbers: np.ndarray) -> None:
    """Where the folder cannot be written, the shard is scanned again next time."""
    fields: Any = dict(zip(_FIELDS, (np.frombuffer(names, dtype=np.uint8), *numbers), strict=True))
    with (
        contextlib.suppress(OSError),
        written_whole(place) as temporary,
        open(temporary, "wb") as file,
    ):
        np.savez(file, **fields)
