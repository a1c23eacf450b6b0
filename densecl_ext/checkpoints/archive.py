"""The zip archives of `torch.save`: every record checked before a byte of it is used.

torch writes a CRC beside every record and does not look at it when it reads, so that a flipped bit
loads as another weight; it also inflates compressed records, of which a few megabytes can hold
gigabytes. Here every record must be stored as it is and match its CRC, so no more memory is needed
than the file has bytes.
"""

from __future__ import annotations

import os
import zipfile
from typing import IO

import numpy as np
import torch
from torch import Tensor

MAGIC = b"PK\x03\x04"
_PICKLE = "data.pkl"
_CHUNK = 1 << 22


def read_records(file: IO[bytes]) -> dict[str, Tensor]:
    """Reads and checks all records of an archive that `torch.save` wrote.

    Args:
        file: the open file.

    Returns:
        Name inside the archive, without its top folder -> bytes (n,) uint8, for every record.

    Raises:
        ValueError: damaged, compressed, ambiguous, or not torch's.
    """
    with open_archive(file) as archive:
        root = _root(archive)
        return {
            item.filename.removeprefix(root): _read(archive, item) for item in archive.infolist()
        }


def verify_records(file: IO[bytes]) -> None:
    """Checks all records as `read_records` does, and keeps none of them."""
    with open_archive(file) as archive:
        _root(archive)
        for item in archive.infolist():
            with archive.open(item) as record:
                while record.read(_CHUNK):
                    pass


def open_archive(file: IO[bytes]) -> zipfile.ZipFile:
    """Opens an archive whose records are all stored, named once, and no larger than the file."""
    size = os.fstat(file.fileno()).st_size
    archive = zipfile.ZipFile(file)
    items = archive.infolist()
    if any(item.filename.endswith("/constants.pkl") for item in items):
        raise ValueError("a TorchScript program; save the module's state_dict() instead")
    for item in items:
        if item.compress_type != zipfile.ZIP_STORED or item.file_size != item.compress_size:
            raise ValueError(
                f"its record {item.filename!r} is compressed, which torch.save never does"
            )
        if item.flag_bits & 1:
            raise ValueError(f"its record {item.filename!r} is encrypted")
    if len({item.filename for item in items}) != len(items):
        raise ValueError("two of its records have one name")
    if sum(item.file_size for item in items) > size:
        raise ValueError("its records say that they hold more than the whole file does")
    return archive


def _root(archive: zipfile.ZipFile) -> str:
    """The archive's top folder with its slash; raises ValueError unless torch.save wrote it."""
    names = archive.namelist()
    pickles = [name for name in names if name.count("/") == 1 and name.endswith(f"/{_PICKLE}")]
    if len(pickles) != 1:
        raise ValueError("a zip archive, but not one that torch.save wrote")
    root = pickles[0].removesuffix(_PICKLE)
    if not all(name.startswith(root) for name in names):
        raise ValueError("a zip archive with more in it than torch.save writes")
    byteorder = f"{root}byteorder"
    if byteorder in names and archive.read(byteorder) != b"little":
        raise ValueError("not in little-endian byte order")
    return root


def _read(archive: zipfile.ZipFile, item: zipfile.ZipInfo) -> Tensor:
    """One record's bytes (n,) uint8; the zip reader compares the CRC at the end."""
    data = torch.empty(item.file_size, dtype=torch.uint8)
    view, done = data.numpy(), 0
    with archive.open(item) as record:
        while chunk := record.read(_CHUNK):
            view[done : done + len(chunk)] = np.frombuffer(chunk, np.uint8)
            done += len(chunk)
    if done != item.file_size:
        raise ValueError(f"its record {item.filename!r} is cut short")
    return data
