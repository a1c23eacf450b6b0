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
import math
import os
import pickle
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_SCALARS = (str, bytes, int, float, bool, type(None))


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
    storages: dict[str, _Storage] = {}

    def storage(kind: _StorageKind, key: str, numel: int) -> _Storage:
        if key not in storages:
            storages[key] = _Storage(kind.dtype, _plain_record(records, key))
        _require(storages[key].flat.numel() == numel, f"storage {key} has another size")
        return storages[key]

    return _Unpickler(pickled, storage).load()


def read_stream(file: IO[bytes]) -> Any:
    """What torch's older format, or a plain pickle, holds; raises as `read_archive`."""
    reader = _File(file)
    first = _Unpickler(reader, None).load()
    if first != LEGACY_MAGIC or isinstance(first, bool):
        _require(reader.rest() == 0, "there is more behind the pickle")
        return first
    _require(_Unpickler(reader, None).load() == _LEGACY_PROTOCOL, "of an unknown version")
    _require(_Unpickler(reader, None).load()["little_endian"], "not in little-endian byte order")
    storages: dict[str, _Storage] = {}
    budget = reader.rest()

    def storage(kind: _StorageKind, key: str, numel: int) -> _Storage:
        nonlocal budget
        if key not in storages:
            budget -= numel * kind.dtype.itemsize
            _require(budget >= 0, "its storages are larger than the file")
            storages[key] = _Storage(
                kind.dtype, torch.empty(numel * kind.dtype.itemsize, dtype=torch.uint8)
            )
        _require(storages[key].flat.numel() == numel, f"storage {key} has another size")
        return storages[key]

    content = _Unpickler(reader, storage).load()
    keys = _Unpickler(reader, None).load()
    _require(sorted(keys) == sorted(storages), "it lists other storages than it uses")
    for key in keys:
        raw = storages[key].flat.view(torch.uint8)
        (numel,) = struct.unpack("<q", reader.read(8))
        _require(numel == storages[key].flat.numel(), f"storage {key} has another size")
        raw.numpy()[:] = np.frombuffer(reader.read(raw.numel()), np.uint8)
    _require(reader.rest() == 0, "there is more behind the last storage")
    return content


def _require(holds: bool, told: str) -> None:
    if not holds:
        raise ValueError(told)


def _plain_record(records: Mapping[str, Tensor], key: str) -> Tensor:
    _require(isinstance(key, str) and f"data/{key}" in records, f"it lacks the storage {key!r}")
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


class _StorageKind:
    """Stands for torch.FloatStorage and the like: only its dtype matters."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


class _Storage:
    """The elements (n,) that tensors are views of."""

    def __init__(self, dtype: torch.dtype, raw: Tensor) -> None:
        _require(raw.numel() % dtype.itemsize == 0, "a storage has half an element")
        self.flat = raw.view(dtype)


_Python: Any = pickle._Unpickler


class _Unpickler(_Python):
    """Python's own unpickler (the one in C trusts lengths and memo numbers) with a short list."""

    def __init__(
        self, file: _File, storage: Callable[[_StorageKind, str, int], _Storage] | None
    ) -> None:
        super().__init__(file, encoding="latin1")  # Python 2 wrote arrays as strings
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _GLOBALS[module, name]
        except KeyError:
            raise UnknownGlobal(f"{module}.{name}") from None

    def persistent_load(self, saved: Any) -> _Storage:
        _require(self._storage is not None, "it refers to storages that it cannot have")
        kind, storage_kind, key, _location, numel, *view = saved
        _require(kind == "storage" and isinstance(storage_kind, _StorageKind), "no storage")
        _require(isinstance(key, str) and _is_count(numel), "a storage without key or size")
        _require(view in ([], [None]), "a view of a storage, from before torch 0.4")
        return self._storage(storage_kind, key, numel)  # type: ignore[misc]

    # Hashing nested tuples takes time without bound, so keys are scalars or tuples of scalars; and
    # what a container's opcode fills must be that container.
    def load_setitem(self) -> None:
        self._require_filled(dict, self.stack[-3])
        _require_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        self._require_filled(dict, self.metastack[-1][-1])
        _require_keys(self.stack[::2])
        super().load_setitems()

    def load_additems(self) -> None:
        self._require_filled(set, self.metastack[-1][-1])
        _require_keys(self.stack)
        super().load_additems()

    def load_append(self) -> None:
        self._require_filled(list, self.stack[-2])
        super().load_append()

    def load_appends(self) -> None:
        self._require_filled(list, self.metastack[-1][-1])
        super().load_appends()

    def load_frozenset(self) -> None:
        _require_keys(self.stack)
        super().load_frozenset()

    def load_dict(self) -> None:
        _require_keys(self.stack[::2])
        super().load_dict()

    def load_bytearray8(self) -> None:
        (count,) = struct.unpack("<Q", self.read(8))
        self.append(self.read(count))  # Python's own allocates what the file says

    def load_build(self) -> None:
        target, state = self.stack[-2:]
        if isinstance(target, (collections.OrderedDict, argparse.Namespace)):
            _require(
                isinstance(state, dict) and all(isinstance(key, str) for key in state),
                "attributes that are no dict",
            )
        else:
            _require(isinstance(target, (_DType, _Array)), "a state for what has none")
        super().load_build()

    def _require_filled(self, kind: type, target: Any) -> None:
        _require(isinstance(target, kind), f"items for a {type(target).__name__}")


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


def _require_keys(keys: Iterable[Any]) -> None:
    for key in keys:
        plain = isinstance(key, _SCALARS) or (
            isinstance(key, tuple) and all(isinstance(part, _SCALARS) for part in key)
        )
        _require(plain, f"a {type(key).__name__} as a key")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


# ---------------------------------------------------------------- torch


def _tensor(
    storage: _Storage,
    offset: int,
    size: Any,
    stride: Any,
    requires_grad: Any = False,
    hooks: Any = None,
    metadata: Any = None,
) -> Tensor:
    _require(isinstance(storage, _Storage) and _is_count(offset), "a tensor without storage")
    size, stride = tuple(size), tuple(stride)
    _require(
        len(size) == len(stride) <= 64 and all(map(_is_count, (*size, *stride))),
        "a tensor of impossible shape",
    )
    _require(not metadata, "a lazily negated or conjugated tensor")
    numel = math.prod(size)
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    _require(numel == 0 or last < storage.flat.numel(), "a tensor beyond its storage")
    _require(numel < 1 << 40, "a tensor of impossible shape")
    if numel == 0:
        return storage.flat.new_empty(size)
    return storage.flat.as_strided(size, stride, offset)


def _tensor_v3(
    storage: _Storage,
    offset: int,
    size: Any,
    stride: Any,
    requires_grad: Any,
    hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> Tensor:
    _require(isinstance(storage, _Storage) and isinstance(dtype, torch.dtype), "no tensor")
    typed = _Storage(dtype, storage.flat.view(torch.uint8))
    return _tensor(typed, offset, size, stride, metadata=metadata)


def _parameter(data: Any, *_: Any) -> Tensor:
    _require(isinstance(data, Tensor), "a parameter that is no tensor")
    return data


def _from_type(function: Any, kind: Any, arguments: Any, state: Any) -> Tensor:
    _require(function in (_tensor, _tensor_v3, _parameter), "no plain tensor")
    return function(*arguments)


def _size(values: Any = ()) -> torch.Size:
    return torch.Size(values)


def _layout(name: Any) -> Any:
    return name


class _Name(str):
    """Stands for a class that is only named in the file, never called."""


# ---------------------------------------------------------------- numpy


class _DType:
    """numpy.dtype: a code such as "f8", and its byte order, which arrives as a state."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code, self.order = code, "<"

    def __setstate__(self, state: Any) -> None:
        self.order = {"<": "<", ">": ">", "|": "|", "=": "<"}[state[1]]

    def numpy(self) -> np.dtype[Any]:
        _require(
            isinstance(self.code, str) and self.code[:1] in "biufcSU" and len(self.code) < 12,
            f"a numpy array of {self.code!r}",
        )
        return np.dtype(self.code).newbyteorder(self.order)


class _Array(np.ndarray[Any, Any]):
    """numpy.ndarray, whose shape and bytes arrive as a state."""

    def __setstate__(self, state: Any) -> None:
        _version, shape, dtype, fortran, data = state
        whole = _array(_raw(data), dtype, tuple(shape), "F" if fortran else "C")
        raw = whole.tobytes("F" if fortran else "C")
        state = (1, whole.shape, whole.dtype, bool(fortran), raw)
        super().__setstate__(state)


def _array(data: Any, dtype: Any, shape: Any, order: str = "C") -> np.ndarray[Any, Any]:
    _require(isinstance(dtype, _DType) and all(map(_is_count, shape)), "no numpy array")
    kind = dtype.numpy()
    _require(
        len(shape) <= 32 and math.prod(shape) * kind.itemsize == len(data),
        "a numpy array of another size than its bytes",
    )
    flat = np.frombuffer(data, np.uint8).copy().view(kind) if len(data) else np.empty(0, kind)
    return flat.reshape(shape, order="F" if order == "F" else "C")


def _reconstruct(kind: Any, *_: Any) -> _Array:
    return np.empty(0, np.uint8).view(_Array)


def _scalar(dtype: Any, data: Any = b"") -> Any:
    return _array(_raw(data), dtype, (1,))[0]


def _raw(data: Any) -> bytes:
    if isinstance(data, str):  # Python 2's strings are bytes
        return data.encode("latin1")
    _require(isinstance(data, bytes), "a numpy array without bytes")
    return data


# ---------------------------------------------------------------- Python


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    _require(isinstance(text, str) and encoding in ("latin1", "latin-1"), "no encoded bytes")
    return text.encode("latin1")


def _set(values: Any = ()) -> set[Any]:
    values = list(values)
    _require_keys(values)
    return set(values)


def _mapping(*values: Any) -> dict[Any, Any]:
    """A defaultdict or a Counter, as plain dicts."""
    return dict(values[-1]) if values and isinstance(values[-1], dict) else {}


def _path(*parts: Any) -> str:
    _require(all(isinstance(part, str) for part in parts), "a path of other things than names")
    return "/".join(parts).replace("//", "/")


def _ordered(items: Any = ()) -> collections.OrderedDict[Any, Any]:
    items = [tuple(item) for item in (items.items() if isinstance(items, dict) else items)]
    _require_keys(key for key, _ in items)
    return collections.OrderedDict(items)


_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}
_PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path", "PurePath")

_GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _ordered,
    ("collections", "defaultdict"): _mapping,
    ("collections", "Counter"): _mapping,
    ("argparse", "Namespace"): argparse.Namespace,
    ("_codecs", "encode"): _encode,
    ("torch", "Size"): _size,
    ("torch", "device"): torch.device,
    ("torch", "Tensor"): _Name("torch.Tensor"),
    ("torch.nn.parameter", "Parameter"): _Name("torch.nn.Parameter"),
    ("torch.serialization", "_get_layout"): _layout,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): _Name("numpy.ndarray"),
}
for _name, _dtype in _STORAGES.items():
    for _module in ("torch", "torch.cuda", "torch.storage"):
        _GLOBALS[_module, _name] = _StorageKind(_dtype)
for _name in ("UntypedStorage", "_UntypedStorage"):
    _GLOBALS["torch.storage", _name] = _StorageKind(torch.uint8)
for _name, _value in vars(torch).items():
    if isinstance(_value, torch.dtype):
        _GLOBALS["torch", _name] = _value
for _module in ("numpy.core", "numpy._core"):
    _GLOBALS[f"{_module}.multiarray", "scalar"] = _scalar
    _GLOBALS[f"{_module}.multiarray", "_reconstruct"] = _reconstruct
    _GLOBALS[f"{_module}.numeric", "_frombuffer"] = _array
for _module in ("builtins", "__builtin__"):
    _GLOBALS[_module, "set"] = _set
    _GLOBALS[_module, "frozenset"] = _set
    for _name in ("list", "dict", "int", "float", "str", "bool", "tuple"):
        _GLOBALS[_module, _name] = _Name(_name)
for _module in ("pathlib", "pathlib._local"):
    for _name in _PATHS:
        _GLOBALS[_module, _name] = _path
