"""Files that are either whole or not there."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

TEMPORARY_PREFIX = ".unfinished-"


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Opens a file that replaces `path` only once it is complete and on the disk.

    The bytes go to a temporary file in the same folder, are flushed to the device, and take the
    name in one step (rename within a file system is atomic). A crash, a full disk or an exception
    leaves the old file.

    Args:
        path: the file to write.

    Yields:
        The open binary file.

    Raises:
        OSError: the folder does not exist, is not writable, or the disk is full.
    """
    path = Path(path)
    descriptor, temporary = tempfile.mkstemp(
        dir=path.parent, prefix=f"{TEMPORARY_PREFIX}{path.name}-"
    )
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files that only the owner can read
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    # The new name itself reaches the disk with the folder.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save_checkpoint(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Writes a checkpoint atomically.

    Args:
        path: the file; an older one stays in place until the new one is complete.
        state: tensors and plain containers, so that `load_checkpoint` reads it without running
            code.

    Raises:
        OSError: it could not be written; the message says that the older file is intact.
    """
    path = Path(path)
    try:
        with atomic_file(path) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:
        kept = "the previous one is intact" if path.exists() else "nothing was written"
        raise OSError(f"save_checkpoint: could not write {path} ({error}); {kept}") from error


def load_checkpoint(path: str | os.PathLike[str], *, trusted: bool = False) -> Any:
    """Reads a checkpoint onto the CPU.

    Args:
        path: a file written by `torch.save`, or one of tensors alone that ends in .safetensors.
        trusted: also accept pickled Python objects, which can run any code when they are read.
            Only for files whose origin you trust.

    Returns:
        What the file holds, usually a dict.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a checkpoint, damaged, or it holds Python objects and `trusted` is False.
        ImportError: it is a .safetensors file, and safetensors is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load_checkpoint: no such file: {path}")
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=not trusted)
    except pickle.UnpicklingError as error:
        if not trusted and "weights_only" in str(error).lower():
            raise ValueError(
                f"load_checkpoint: {path} is damaged, or holds Python objects beyond tensors, "
                "which could run code when read; if you trust its origin, allow that "
                "(trusted=True, on the command line --trusted)"
            ) from error
        raise ValueError(
            f"load_checkpoint: {path} is not a readable checkpoint: {error}"
        ) from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # what torch's reader makes of a file that was cut short
            raise
        raise ValueError(f"load_checkpoint: {path} is damaged or cut short: {error}") from error
    except (RuntimeError, EOFError, KeyError, AttributeError, ImportError) as error:
        raise ValueError(
            f"load_checkpoint: {path} is not a readable checkpoint: {error}"
        ) from error


def _load_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        import safetensors
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(
            f"load_checkpoint: {path} needs safetensors, which cannot be imported ({error}); "
            "pip install 'densecl_ext[timm]'"
        ) from error
    try:
        return load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"load_checkpoint: {path} is damaged or cut short: {error}") from error
