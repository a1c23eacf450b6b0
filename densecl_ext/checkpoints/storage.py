"""Files that are either whole or not there, and the one gate through which checkpoints come in."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import torch

from densecl_ext.checkpoints.archive import MAGIC, read_records, verify_records
from densecl_ext.checkpoints.digest import CHECKSUM, content_checksum
from densecl_ext.checkpoints.interrupts import interrupts_held
from densecl_ext.checkpoints.provenance import check_stamp, from_text
from densecl_ext.checkpoints.schema import check_run, is_run
from densecl_ext.checkpoints.unpickle import LEGACY_MAGIC, UnknownGlobal, read_archive, read_stream

TEMPORARY_PREFIX = ".unfinished-"
_LEGACY_BEGIN = pickle.dumps(LEGACY_MAGIC, protocol=2)[:6]


@contextlib.contextmanager
def atomic_file(
    path: str | os.PathLike[str], *, verify: Callable[[Path], None] | None = None
) -> Iterator[IO[bytes]]:
    """Opens a file that replaces `path` only once it is complete, on the disk and verified.

    The bytes go to a temporary file in the same folder, are flushed to the device, and take the
    name in one step (rename within a file system is atomic). A crash, a full disk or an exception
    leaves the old file. A first Ctrl-C waits until the block ends, see `interrupts_held`.

    Args:
        path: the file to write; a link is followed.
        verify: called with the complete temporary file; what it raises keeps the old file.

    Yields:
        The open binary file.

    Raises:
        OSError: the folder does not exist, is not writable, or the disk is full. Of several
            exceptions the first, since a writer that fails often fails again while it closes.
        ValueError: there is something other than a regular file.
    """
    with interrupts_held():
        final = require_regular(path)
        outer = sys.exc_info()[1]
        with _naming(path):
            descriptor, name = tempfile.mkstemp(dir=final.parent, prefix=_temporary_prefix(final))
        temporary = Path(name)
        try:
            file = os.fdopen(descriptor, "wb")
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
            except BaseException:
                with contextlib.suppress(OSError):  # closing writes what is left, and fails again
                    file.close()
                raise
            file.close()
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files that only the owner can read
            if verify is not None:
                verify(temporary)
            with _naming(path):
                os.replace(temporary, final)
        except BaseException as error:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            first = _first(error, outer)
            if isinstance(first, OSError) and first.errno is not None and first.filename is None:
                first = OSError(first.errno, first.strerror, os.fspath(path))
            if first is not error:
                raise first from None
            raise
        # The new name itself reaches the disk with the folder.
        folder = os.open(final.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def torch_save(content: Any, file: IO[bytes]) -> None:
    """`torch.save` into an open file, safe against writes that fail.

    torch's writer goes on writing from its destructor, when the file may be closed already: an
    exception there ends the process (std::terminate).

    Raises:
        BaseException: the first that a write raised.
    """
    sink = _Sink(file)
    try:
        torch.save(content, sink)  # type: ignore[arg-type]  # it writes and flushes alone
    finally:
        sink.close()
    if sink.error is not None:
        raise sink.error


class _Sink:
    """A file to which a write never raises: after the first error, and once closed, bytes go."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file: IO[bytes] | None = file
        self.error: BaseException | None = None

    def write(self, data: Any) -> int:
        try:
            if self._file is not None and self.error is None:
                self._file.write(data)
        except BaseException as error:
            self.error = error
        return len(data)

    def flush(self) -> None:
        """atomic_file does that."""

    def close(self) -> None:
        """From here on nothing reaches the file."""
        self._file = None


def require_regular(path: str | os.PathLike[str]) -> Path:
    """The file that `path` means, links followed.

    Raises:
        ValueError: it is empty, a folder, a device, a pipe or a socket.
    """
    if not os.fspath(path):
        raise ValueError("the output must be a file, got an empty name")
    final = Path(os.path.realpath(path))
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "a device, a pipe or a socket"
            raise ValueError(f"the output must be a regular file, {path} is {kind}")
    return final


def remove_leftovers(paths: Iterable[Path]) -> None:
    """Removes what a process that was killed left unfinished of these files."""
    for path in paths:
        for leftover in path.parent.glob(f"{_temporary_prefix(path)}*"):
            leftover.unlink(missing_ok=True)


def save_checkpoint(
    path: str | os.PathLike[str], state: dict[str, Any], *, previous: Path | None = None
) -> None:
    """Writes a checkpoint with a checksum of its content, atomically, and checks what was written.

    Args:
        path: the file; an older one stays in place until the new one is complete.
        state: tensors and plain containers, so that `load_checkpoint` reads it without running
            code.
        previous: where the older file goes when the new one takes its place; None drops it.

    Raises:
        OSError: it could not be written; the message says that the older file is intact.
        TypeError: `state` holds something else.
        KeyboardInterrupt: Ctrl-C; the first waits until the new file is there, a second one leaves
            the older.
    """
    path = Path(path)

    def verify(temporary: Path) -> None:
        with temporary.open("rb") as file:
            verify_records(file)
        if previous is not None and path.exists():
            _second_name(path, previous)

    try:
        signed = {**state, CHECKSUM: content_checksum(state)}
    except TypeError as error:
        raise TypeError(f"save_checkpoint: {path}: {error}") from None
    try:
        with atomic_file(path, verify=verify) as file:
            torch_save(signed, file)
    except Exception as error:
        kept = "the previous one is intact" if path.exists() else "nothing was written"
        raise OSError(f"save_checkpoint: could not write {path} ({error}); {kept}") from error


def load_checkpoint(path: str | os.PathLike[str], *, trusted: bool = False) -> Any:
    """Reads a checkpoint onto the CPU, after checking all of it.

    The CRC of every record of a zip archive is compared; no record may be compressed; no more
    memory is taken than the file has bytes. A file that this project wrote also carries a checksum
    of its content, and a run's checkpoint must have the types and ranges of one. Python code in the
    file is not run.

    Args:
        path: a file written by `torch.save`, in its zip or its older format; a pickle of numpy
            arrays; or a .safetensors file.
        trusted: also accept pickled Python objects, which can run any code when they are read.
            Only for files whose origin you trust.

    Returns:
        What the file holds, usually a dict.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a checkpoint, damaged, or it holds Python objects and `trusted` is False.
        ImportError: it is a .safetensors file, and safetensors is not installed.
    """
    return load_file(Path(path), path, trusted)


def load_file(path: Path, called: str | os.PathLike[str], trusted: bool = False) -> Any:
    """`load_checkpoint` of a file, temporary perhaps, that has another name in messages."""
    name = os.fspath(called)
    if not path.exists():
        raise FileNotFoundError(f"load_checkpoint: no such file: {name}")
    if not path.is_file():
        raise ValueError(f"load_checkpoint: {name} is not a regular file")
    try:
        with path.open("rb") as file:
            content = _read(file, Path(name).suffix, trusted)
        content = _verified(content)
    except UnknownGlobal as error:
        raise ValueError(
            f"load_checkpoint: {name} holds Python objects beyond tensors ({error}), which could "
            "run code when read; if you trust its origin, allow that (trusted=True; densecl import "
            "--trusted)"
        ) from error
    except (OSError, ImportError) as error:
        # A wrong offset in a file makes the system refuse to go there.
        if isinstance(error, OSError) and error.errno in (None, errno.EINVAL):
            raise ValueError(f"load_checkpoint: {name} is damaged: {error}") from error
        raise
    except Exception as error:  # a damaged file makes parsers raise anything
        told = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"load_checkpoint: {name} is damaged or cut short, or no checkpoint: {told}"
        ) from error
    return content


def _read(file: IO[bytes], suffix: str, trusted: bool) -> Any:
    begin = file.read(8)
    file.seek(0)
    if not begin:
        raise ValueError("it is empty")
    zipped = begin.startswith(MAGIC)
    if suffix == ".safetensors" and not zipped:
        return _read_safetensors(file)
    try:
        return read_archive(read_records(file)) if zipped else read_stream(file)
    except UnknownGlobal:
        if not trusted:
            raise
    file.seek(0)
    if zipped or begin.startswith(_LEGACY_BEGIN):
        return torch.load(file, map_location="cpu", weights_only=False)
    return pickle.load(file, encoding="latin1")


def _read_safetensors(file: IO[bytes]) -> Any:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ImportError(
            f"load_checkpoint: {file.name} needs safetensors, which cannot be imported ({error}); "
            "pip install 'densecl_ext[timm]'"
        ) from error
    with safe_open(file.name, "pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        return from_text(tensors, opened.metadata() or {})


def _verified(content: Any) -> Any:
    """Compares checksums of this project's own, and a run with its schema."""
    if isinstance(content, dict) and CHECKSUM in content:
        expected = content.pop(CHECKSUM)
        if content_checksum(content) != expected:
            raise ValueError("its content does not match the checksum that was written with it")
    check_stamp(content)
    if is_run(content):
        check_run(content)
    return content


def _temporary_prefix(path: Path) -> str:
    return f"{TEMPORARY_PREFIX}{path.name[:40]}-"


def _first(error: BaseException, outer: BaseException | None) -> BaseException:
    """Of an exception and those it came up behind, the one to tell.

    torch's writer answers an exception in the middle of a file with another while it closes.
    """
    first, earlier = error, error.__context__
    while earlier is not None and earlier is not outer:
        if isinstance(earlier, KeyboardInterrupt):
            return earlier
        if isinstance(earlier, OSError) and isinstance(error, (OSError, RuntimeError)):
            first = earlier
        earlier = earlier.__context__
    return first


@contextlib.contextmanager
def _naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Errors of the file system name the file that a person asked for, not a temporary one."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from None


def _second_name(path: Path, other: Path) -> None:
    """Lets `other` name the file `path` too; where there are no hard links, instead."""
    link = other.with_name(f"{_temporary_prefix(other)}link")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:
        os.replace(path, other)
        return
    os.replace(link, other)
    link.unlink(missing_ok=True)  # it is still there if both already were one file
