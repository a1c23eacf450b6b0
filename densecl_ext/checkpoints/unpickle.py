"""Reads what `torch.save` and `pickle` wrote without running any code from the file.

A pickle is a program that may call anything. This reader knows the handful of names that weights
need, gives each a function of its own that checks what it is told, and refuses every other name.
torch's own restricted reader (`weights_only=True`) does the first, but takes a tensor's size on
trust, so that a file can make it read beyond its memory.

Three containers: the zip archive (torch from 1.6 on), the older format of several pickles followed
by raw storages, and one plain pickle of numpy arrays (detectron2).
"""

from __future__ import annotations

import argparse
import collections
import io
import os
import pickle
import struct
from collections.abc import Callable, Mapping
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from densecl_ext.checkpoints.rebuild import (
    GLOBALS,
    NumpyArray,
    NumpyDType,
    Storage,
    StorageKind,
    is_count,
    require,
    require_keys,
)

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


class UnknownGlobal(ValueError):
    """The file holds a Python object beyond tensors and plain values."""


def read_archive(records: Mapping[str, Tensor]) -> Any:
    """What the records of a zip archive hold.

    Args:
        records: name -> bytes (n,) uint8, from `read_records`.

    Raises:
        UnknownGlobal: it holds Python objects beyond tensors and plain values.
        Exception: of any kind, as a damaged pickle makes them.
    """
    pickled = _Bytes(records["data.pkl"].numpy().tobytes())
    storages: dict[str, Storage] = {}

    def storage(kind: StorageKind, key: str, numel: int) -> Storage:
        if key not in storages:
            storages[key] = Storage(kind.dtype, _plain_record(records, key))
        require(storages[key].flat.numel() == numel, f"storage {key} has another size")
        return storages[key]

    return _Unpickler(pickled, storage).load()


def read_stream(file: IO[bytes]) -> Any:
    """What torch's older format, or a plain pickle, holds; raises as `read_archive`."""
    reader = _File(file)
    first = _Unpickler(reader, None).load()
    if first != LEGACY_MAGIC or isinstance(first, bool):
        require(reader.rest() == 0, "there is more behind the pickle")
        return first
    require(_Unpickler(reader, None).load() == _LEGACY_PROTOCOL, "of an unknown version")
    require(_Unpickler(reader, None).load()["little_endian"], "not in little-endian byte order")
    storages: dict[str, Storage] = {}
    budget = reader.rest()

    def storage(kind: StorageKind, key: str, numel: int) -> Storage:
        nonlocal budget
        if key not in storages:
            budget -= numel * kind.dtype.itemsize
            require(budget >= 0, "its storages are larger than the file")
            storages[key] = Storage(
                kind.dtype, torch.empty(numel * kind.dtype.itemsize, dtype=torch.uint8)
            )
        require(storages[key].flat.numel() == numel, f"storage {key} has another size")
        return storages[key]

    content = _Unpickler(reader, storage).load()
    keys = _Unpickler(reader, None).load()
    require(sorted(keys) == sorted(storages), "it lists other storages than it uses")
    for key in keys:
        raw = storages[key].flat.view(torch.uint8)
        (numel,) = struct.unpack("<q", reader.read(8))
        require(numel == storages[key].flat.numel(), f"storage {key} has another size")
        raw.numpy()[:] = np.frombuffer(reader.read(raw.numel()), np.uint8)
    require(reader.rest() == 0, "there is more behind the last storage")
    return content


def _plain_record(records: Mapping[str, Tensor], key: str) -> Tensor:
    require(isinstance(key, str) and f"data/{key}" in records, f"it lacks the storage {key!r}")
    return records[f"data/{key}"]


class _File:
    """What an unpickler reads from; a length that the file says is never trusted."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._end = os.fstat(file.fileno()).st_size

    def rest(self) -> int:
        return self._end - self._file.tell()

    def read(self, count: int) -> bytes:
        if not 0 <= count <= self.rest():
            raise EOFError("it ends too early")
        return self._file.read(count)

    def readline(self) -> bytes:
        return self._file.readline(1 << 16)


class _Bytes(_File):
    """The same for bytes in memory."""

    def __init__(self, data: bytes) -> None:
        self._file, self._end = io.BytesIO(data), len(data)


_Python: Any = pickle._Unpickler


class _Unpickler(_Python):
    """Python's own unpickler (the one in C trusts lengths and memo numbers) with a short list."""

    def __init__(
        self, file: _File, storage: Callable[[StorageKind, str, int], Storage] | None
    ) -> None:
        super().__init__(file, encoding="latin1")  # Python 2 wrote arrays as strings
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        try:
            return GLOBALS[module, name]
        except KeyError:
            raise UnknownGlobal(f"{module}.{name}") from None

    def persistent_load(self, saved: Any) -> Storage:
        require(self._storage is not None, "it refers to storages that it cannot have")
        kind, storage_kind, key, _location, numel, *view = saved
        require(kind == "storage" and isinstance(storage_kind, StorageKind), "no storage")
        require(isinstance(key, str) and is_count(numel), "a storage without key or size")
        require(view in ([], [None]), "a view of a storage, from before torch 0.4")
        return self._storage(storage_kind, key, numel)  # type: ignore[misc]

    # Hashing nested tuples takes time without bound, so keys are scalars or tuples of scalars; and
    # what a container's opcode fills must be that container.
    def load_setitem(self) -> None:
        self._require_filled(dict, self.stack[-3])
        require_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        self._require_filled(dict, self.metastack[-1][-1])
        require_keys(self.stack[::2])
        super().load_setitems()

    def load_additems(self) -> None:
        self._require_filled(set, self.metastack[-1][-1])
        require_keys(self.stack)
        super().load_additems()

    def load_append(self) -> None:
        self._require_filled(list, self.stack[-2])
        super().load_append()

    def load_appends(self) -> None:
        self._require_filled(list, self.metastack[-1][-1])
        super().load_appends()

    def load_frozenset(self) -> None:
        require_keys(self.stack)
        super().load_frozenset()

    def load_dict(self) -> None:
        require_keys(self.stack[::2])
        super().load_dict()

    def load_bytearray8(self) -> None:
        (count,) = struct.unpack("<Q", self.read(8))
        self.append(self.read(count))  # Python's own allocates what the file says

    def load_build(self) -> None:
        target, state = self.stack[-2:]
        if isinstance(target, (collections.OrderedDict, argparse.Namespace)):
            require(
                isinstance(state, dict) and all(isinstance(key, str) for key in state),
                "attributes that are no dict",
            )
        else:
            require(isinstance(target, (NumpyDType, NumpyArray)), "a state for what has none")
        super().load_build()

    def _require_filled(self, kind: type, target: Any) -> None:
        require(isinstance(target, kind), f"items for a {type(target).__name__}")


_OVERRIDDEN = {
    pickle.SETITEM: _Unpickler.load_setitem,
    pickle.SETITEMS: _Unpickler.load_setitems,
    pickle.ADDITEMS: _Unpickler.load_additems,
    pickle.APPEND: _Unpickler.load_append,
    pickle.APPENDS: _Unpickler.load_appends,
    pickle.FROZENSET: _Unpickler.load_frozenset,
    pickle.DICT: _Unpickler.load_dict,
    pickle.BYTEARRAY8: _Unpickler.load_bytearray8,
    pickle.BUILD: _Unpickler.load_build,
}
# Nothing that is written for torch has these.
_REFUSED = (
    pickle.EXT1,
    pickle.EXT2,
    pickle.EXT4,
    pickle.INST,
    pickle.OBJ,
    pickle.NEXT_BUFFER,
    pickle.READONLY_BUFFER,
)
_Unpickler.dispatch = {
    **{code: load for code, load in _Unpickler.dispatch.items() if bytes([code]) not in _REFUSED},
    **{code[0]: load for code, load in _OVERRIDDEN.items()},
}
