"""What is derived from large files once and kept: in a folder of its own, by size and time."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def cache_folder() -> Path:
    """Where it lies: DENSECL_CACHE, else the user's cache folder."""
    stated = os.environ.get("DENSECL_CACHE")
    if stated:
        return Path(stated)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "densecl_ext"


def cached_path(file: str | os.PathLike[str], cache: Path, ending: str) -> Path:
    """Where what is derived from a file lies: another place once the file has changed."""
    path = Path(file)
    status = path.stat()
    words = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
    return cache / f"{hashlib.sha256(words.encode()).hexdigest()[:32]}{ending}"


@contextlib.contextmanager
def written_whole(target: Path) -> Iterator[str]:
    """A temporary file that takes the target's name at the end, or goes.

    Raises:
        OSError: the folder cannot be made or written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    number, temporary = tempfile.mkstemp(dir=target.parent, prefix=".unfinished-")
    os.close(number)
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)
