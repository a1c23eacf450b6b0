"""The image files under folders: finding them, and holding a million of their names."""

from __future__ import annotations

import hashlib
import os
import stat
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from densecl_ext.data.images import (
    DEFAULT,
    Encoded,
    Reading,
    UnreadableImageWarning,
    decode_rgb,
    printable,
    read_encoded,
    read_rgb,
)
from densecl_ext.data.source import OTHER_ENDING, ImageSource

__all__ = [
    "EXTENSIONS",
    "ImageFiles",
    "LeftOutWarning",
    "UnreadableImageWarning",
    "decode_rgb",
    "find_images",
    "read_rgb",
]

EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
)
ARRAYS = frozenset((".npy", ".npz"))

# Kinds of names that a scan leaves out, as (one, several) of them.
_HIDDEN = ("hidden name", "hidden names")
_JUNK = ("macOS archive's leftover", "macOS archives' leftovers")
_BROKEN = ("broken link", "broken links")
_CLOSED = ("unreadable folder", "unreadable folders")
_SECOND = ("second link to one file or folder", "second links to one file or folder")
_MISSING = ("name of a missing file", "names of missing files")
_SPECIAL = ("name of no regular file", "names of no regular files")


class LeftOutWarning(UserWarning):
    """A scan left out names, and says how many of what kind."""


class ImageFiles(ImageSource):
    """Paths in one packed array, which forked workers share.

    A list of a million `Path` would take hundreds of megabytes, and since Python counts references
    inside each object, every worker process would soon hold a copy of its own.

    Args:
        roots: The folders that were scanned.
        starts: Index of the first file of each root.
        names: Paths relative to their root, one behind the other.
        ends: int64 (num_images,), where each name ends.
        sizes: int64 (num_images,), bytes of each file.
        left_out: How many names of which kind the scan did not take.
        endings: How many files there are of each ending that is not an image's.

    """

    def __init__(
        self,
        roots: Sequence[str],
        starts: Sequence[int],
        names: np.ndarray,
        ends: np.ndarray,
        sizes: np.ndarray,
        left_out: Counter[tuple[str, str]] | None = None,
        endings: Counter[str] | None = None,
    ) -> None:
        self.roots = tuple(roots)
        self.left_out = left_out or Counter()
        self.endings = endings or Counter()
        self._starts = tuple(starts)
        self._names, self._ends, self._sizes = names, ends, sizes
        self._identity: str | None = None

    def __len__(self) -> int:
        return len(self._ends)

    def relative(self, index: int) -> bytes:
        """The path below its root, as the file system spells it."""
        start = int(self._ends[index - 1]) if index else 0
        return self._names[start : int(self._ends[index])].tobytes()

    def name(self, index: int) -> Path:
        """The file's path, its root included."""
        root = self.roots[bisect_right(self._starts, index) - 1]
        return Path(root, os.fsdecode(self.relative(index)))

    def encoded(self, index: int, reading: Reading = DEFAULT) -> Encoded:
        """Read the file through the gate."""
        return read_encoded(self.name(index), reading)

    def sizes(self) -> np.ndarray:
        """Bytes of every file, int64 (len,)."""
        return self._sizes

    @property
    def identity(self) -> str:
        """SHA-256 of the ordered relative paths and sizes: the same wherever the folders lie."""
        if self._identity is None:
            digest = hashlib.sha256()
            for part in (np.array(self._starts, dtype="<i8"), self._ends, self._sizes, self._names):
                digest.update(np.ascontiguousarray(part).data)
            self._identity = digest.hexdigest()
        return self._identity


def find_images(
    root: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], *, arrays: bool = False
) -> ImageFiles:
    """List the image files under a folder or several, in any directory tree.

    Files count by extension (JPEG, PNG, WebP, BMP, TIFF, GIF; any case). Symbolic links are
    followed, each folder and file once. Left out and counted are names that begin with a dot, what
    macOS adds to archives (`__MACOSX`, `._*`), broken links, folders that cannot be listed, further
    links to one file, and what is no regular file. No file is opened.

    Args:
        root: The folder, or a sequence of folders.
        arrays: Take .npy and .npz files too.

    Returns:
        The paths, `root` included: root by root, each sorted by the parts of its paths, so that the
        list is the same on every file system. `left_out` and `summary()` tell what is missing.

    Raises:
        ValueError: A root is no folder, or none holds an image file.
    """
    several = not isinstance(root, (str, os.PathLike))
    roots = [os.fspath(one) for one in root] if several else [os.fspath(root)]  # type: ignore[union-attr, arg-type]
    endings = EXTENSIONS | ARRAYS if arrays else EXTENSIONS
    scan = Scan(endings)
    starts = []
    for one in roots:
        if not os.path.isdir(one):
            raise ValueError(f"find_images: root must be a folder, got {one!r}, which is none")
        starts.append(len(scan.ends))
        scan.walk(os.fsencode(one))
    files = scan.packed(roots, starts)
    if not len(files):
        told = files.summary()
        raise ValueError(
            f"find_images: no image under {', '.join(map(repr, roots))}; looked in every subfolder "
            f"for {', '.join(sorted(endings))}" + (f"; left out {told}" if told else "")
        )
    return files


class Scan:
    """Grows the packed arrays; see :class:`ImageFiles`."""

    def __init__(self, endings: Iterable[str] = EXTENSIONS) -> None:
        self._image_endings = frozenset(os.fsencode(ending[1:]) for ending in endings)
        self.names = bytearray()
        self.ends = array("q")
        self.sizes = array("q")
        self._devices = array("Q")
        self._inodes = array("Q")
        self._linked = False
        self._folders: set[tuple[int, int]] = set()
        self._left_out: Counter[tuple[str, str]] = Counter()
        self._endings: Counter[str] = Counter()

    def walk(self, root: bytes) -> None:
        """Take in a tree, depth first, every folder's names in order.

        That is the order of the paths by their parts. A stack of its own: a tree may be deeper than
        Python's.
        """
        stack = [self._entries(root, b"")]
        while stack:
            for name, status in stack[-1]:
                if status is None:
                    stack.append(self._entries(os.path.join(root, name), name + b"/"))
                    break
                self.names += name
                self.ends.append(len(self.names))
                self.sizes.append(status.st_size)
                self._devices.append(status.st_dev)
                self._inodes.append(status.st_ino)
            else:
                stack.pop()

    def _entries(
        self, folder: bytes, prefix: bytes
    ) -> Iterator[tuple[bytes, os.stat_result | None]]:
        """Relative names in order: images with their status, folders with None."""
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in self._folders:
                self._left_out[_SECOND] += 1
                return
            self._folders.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                # Names alone are kept until they are sorted; a folder may hold a million.
                found = sorted(entry.name for entry in entries if self._taken(entry))
        except OSError:
            self._left_out[_CLOSED] += 1
            return
        beginning = os.path.join(folder, b"")
        for name in found:
            path = beginning + name
            try:
                status = os.lstat(path)
                if stat.S_ISLNK(status.st_mode):
                    status = os.stat(path)
                    self._linked = True
            except OSError:
                self._left_out[_BROKEN] += 1
                continue
            if stat.S_ISREG(status.st_mode):
                if status.st_nlink > 1:
                    self._linked = True
                yield prefix + name, status
            elif stat.S_ISDIR(status.st_mode):
                yield prefix + name, None
            else:
                self._left_out[_SPECIAL] += 1

    def _taken(self, entry: os.DirEntry[bytes]) -> bool:
        """Whether a name may be an image or a folder; counts it out otherwise."""
        name = entry.name
        if name[0] == ord("."):
            self._left_out[_JUNK if name.startswith(b"._") else _HIDDEN] += 1
        elif name == b"__MACOSX":
            self._left_out[_JUNK] += 1
        elif (
            name.rpartition(b".")[2].lower() in self._image_endings
            and b"." in name
            or entry.is_dir()
        ):
            return True
        elif entry.is_symlink() and not os.path.exists(entry.path):
            self._left_out[_BROKEN] += 1
        else:
            ending = os.fsdecode(os.path.splitext(name)[1].lower())
            self._left_out[OTHER_ENDING] += 1
            self._endings[printable(ending) or "none"] += 1
        return False

    def take(self, path: bytes, name: bytes) -> None:
        """Take in a file by its path, whatever its ending; counts it out where it is none."""
        try:
            status = os.stat(path)
        except (OSError, ValueError):
            self._left_out[_MISSING] += 1
            return
        if not stat.S_ISREG(status.st_mode):
            self._left_out[_SPECIAL] += 1
            return
        self.names += name
        self.ends.append(len(self.names))
        self.sizes.append(status.st_size)
        self._devices.append(status.st_dev)
        self._inodes.append(status.st_ino)

    def packed(
        self, roots: Sequence[str], starts: Sequence[int], *, once: bool = False
    ) -> ImageFiles:
        """The files, each once; `once` looks for second names where no link was met, too."""
        names = np.frombuffer(self.names, dtype=np.uint8)
        ends = np.frombuffer(self.ends, dtype=np.int64)
        sizes = np.frombuffer(self.sizes, dtype=np.int64)
        if self._linked or once:
            second = self._second_links()
            if second.any():
                self._left_out[_SECOND] += int(second.sum())
                lengths = np.diff(ends, prepend=0)
                starts = [start - int(second[:start].sum()) for start in starts]
                names = names[~np.repeat(second, lengths)]
                ends, sizes = np.cumsum(lengths[~second]), sizes[~second]
        return ImageFiles(roots, starts, names, ends, sizes, self._left_out, self._endings)

    def _second_links(self) -> np.ndarray:
        """Which files came before under another name, bool (files,)."""
        devices = np.frombuffer(self._devices, dtype=np.uint64)
        inodes = np.frombuffer(self._inodes, dtype=np.uint64)
        order = np.lexsort((inodes, devices))  # stable: of equal ones the first comes first
        same = (np.diff(devices[order]) == 0) & (np.diff(inodes[order]) == 0)
        second = np.zeros(len(order), dtype=bool)
        second[order[1:][same & (inodes[order[1:]] != 0)]] = True
        return second
