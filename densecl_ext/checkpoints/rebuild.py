"""The few things that a checkpoint may name, each built by a function that checks what it is told.

`unpickle` looks every name of a pickle up in `GLOBALS` and calls nothing else.
"""

from __future__ import annotations

import argparse
import collections
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

_SCALARS = (str, bytes, int, float, bool, type(None))


def require(holds: bool, told: str) -> None:
    """Raises ValueError with the words unless the condition holds."""
    if not holds:
        raise ValueError(told)


class StorageKind:
    """Stands for torch.FloatStorage and the like: only its dtype matters."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


class Storage:
    """The elements (n,) that tensors are views of."""

    def __init__(self, dtype: torch.dtype, raw: Tensor) -> None:
        require(raw.numel() % dtype.itemsize == 0, "a storage has half an element")
        self.flat = raw.view(dtype)


def require_keys(keys: Iterable[Any]) -> None:
    """Raises ValueError unless all are scalars or tuples of scalars, whose hash takes no time."""
    for key in keys:
        plain = isinstance(key, _SCALARS) or (
            isinstance(key, tuple) and all(isinstance(part, _SCALARS) for part in key)
        )
        require(plain, f"a {type(key).__name__} as a key")


def is_count(value: Any) -> bool:
    """Whether it is an integer from 0 on that an index can be."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


# ---------------------------------------------------------------- torch


def _tensor(
    storage: Storage,
    offset: int,
    size: Any,
    stride: Any,
    requires_grad: Any = False,
    hooks: Any = None,
    metadata: Any = None,
) -> Tensor:
    require(isinstance(storage, Storage) and is_count(offset), "a tensor without storage")
    size, stride = tuple(size), tuple(stride)
    require(
        len(size) == len(stride) <= 64 and all(map(is_count, (*size, *stride))),
        "a tensor of impossible shape",
    )
    require(not metadata, "a lazily negated or conjugated tensor")
    numel = math.prod(size)
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    require(numel == 0 or last < storage.flat.numel(), "a tensor beyond its storage")
    require(numel < 1 << 40, "a tensor of impossible shape")
    if numel == 0:
        return storage.flat.new_empty(size)
    return storage.flat.as_strided(size, stride, offset)


def _tensor_v3(
    storage: Storage,
    offset: int,
    size: Any,
    stride: Any,
    requires_grad: Any,
    hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> Tensor:
    require(isinstance(storage, Storage) and isinstance(dtype, torch.dtype), "no tensor")
    typed = Storage(dtype, storage.flat.view(torch.uint8))
    return _tensor(typed, offset, size, stride, metadata=metadata)


def _parameter(data: Any, *_: Any) -> Tensor:
    require(isinstance(data, Tensor), "a parameter that is no tensor")
    return data


def _from_type(function: Any, kind: Any, arguments: Any, state: Any) -> Tensor:
    require(function in (_tensor, _tensor_v3, _parameter), "no plain tensor")
    return function(*arguments)


def _size(values: Any = ()) -> torch.Size:
    return torch.Size(values)


def _layout(name: Any) -> Any:
    return name


def _text(text: Any) -> str:
    require(isinstance(text, str), "no text")
    return text


class _Name(str):
    """Stands for a class that is only named in the file, never called."""


# ---------------------------------------------------------------- numpy


class NumpyDType:
    """numpy.dtype: a code such as "f8", and its byte order, which arrives as a state."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code, self.order = code, "<"

    def __setstate__(self, state: Any) -> None:
        self.order = {"<": "<", ">": ">", "|": "|", "=": "<"}[state[1]]

    def numpy(self) -> np.dtype[Any]:
        """The dtype itself; raises ValueError for anything but numbers and strings."""
        require(
            isinstance(self.code, str) and self.code[:1] in "biufcSU" and len(self.code) < 12,
            f"a numpy array of {self.code!r}",
        )
        return np.dtype(self.code).newbyteorder(self.order)


class NumpyArray(np.ndarray[Any, Any]):
    """numpy.ndarray, whose shape and bytes arrive as a state."""

    def __setstate__(self, state: Any) -> None:
        _version, shape, dtype, fortran, data = state
        whole = _array(_raw(data), dtype, tuple(shape), "F" if fortran else "C")
        raw = whole.tobytes("F" if fortran else "C")
        state = (1, whole.shape, whole.dtype, bool(fortran), raw)
        super().__setstate__(state)


def _array(data: Any, dtype: Any, shape: Any, order: str = "C") -> np.ndarray[Any, Any]:
    require(isinstance(dtype, NumpyDType) and all(map(is_count, shape)), "no numpy array")
    kind = dtype.numpy()
    require(
        len(shape) <= 32 and math.prod(shape) * kind.itemsize == len(data),
        "a numpy array of another size than its bytes",
    )
    flat = np.frombuffer(data, np.uint8).copy().view(kind) if len(data) else np.empty(0, kind)
    return flat.reshape(shape, order="F" if order == "F" else "C")


def _reconstruct(kind: Any, *_: Any) -> NumpyArray:
    return np.empty(0, np.uint8).view(NumpyArray)


def _scalar(dtype: Any, data: Any = b"") -> Any:
    return _array(_raw(data), dtype, (1,))[0]


def _raw(data: Any) -> bytes:
    if isinstance(data, str):  # Python 2's strings are bytes
        return data.encode("latin1")
    require(isinstance(data, bytes), "a numpy array without bytes")
    return data


# ---------------------------------------------------------------- Python


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    require(isinstance(text, str) and encoding in ("latin1", "latin-1"), "no encoded bytes")
    return text.encode("latin1")


def _set(values: Any = ()) -> set[Any]:
    values = list(values)
    require_keys(values)
    return set(values)


def _mapping(*values: Any) -> dict[Any, Any]:
    """A defaultdict or a Counter, as plain dicts."""
    return dict(values[-1]) if values and isinstance(values[-1], dict) else {}


def _path(*parts: Any) -> str:
    require(all(isinstance(part, str) for part in parts), "a path of other things than names")
    return "/".join(parts).replace("//", "/")


def _ordered(items: Any = ()) -> collections.OrderedDict[Any, Any]:
    items = [tuple(item) for item in (items.items() if isinstance(items, dict) else items)]
    require_keys(key for key, _ in items)
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

GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _ordered,
    ("collections", "defaultdict"): _mapping,
    ("collections", "Counter"): _mapping,
    ("argparse", "Namespace"): argparse.Namespace,
    ("_codecs", "encode"): _encode,
    ("torch", "Size"): _size,
    ("torch.torch_version", "TorchVersion"): _text,
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
    ("numpy", "dtype"): NumpyDType,
    ("numpy", "ndarray"): _Name("numpy.ndarray"),
}
for _name, _dtype in _STORAGES.items():
    for _module in ("torch", "torch.cuda", "torch.storage"):
        GLOBALS[_module, _name] = StorageKind(_dtype)
for _name in ("UntypedStorage", "_UntypedStorage"):
    GLOBALS["torch.storage", _name] = StorageKind(torch.uint8)
for _name, _value in vars(torch).items():
    if isinstance(_value, torch.dtype):
        GLOBALS["torch", _name] = _value
for _module in ("numpy.core", "numpy._core"):
    GLOBALS[f"{_module}.multiarray", "scalar"] = _scalar
    GLOBALS[f"{_module}.multiarray", "_reconstruct"] = _reconstruct
    GLOBALS[f"{_module}.numeric", "_frombuffer"] = _array
for _module in ("builtins", "__builtin__"):
    GLOBALS[_module, "set"] = _set
    GLOBALS[_module, "frozenset"] = _set
    for _name in ("list", "dict", "int", "float", "str", "bool", "tuple"):
        GLOBALS[_module, _name] = _Name(_name)
for _module in ("pathlib", "pathlib._local"):
    for _name in _PATHS:
        GLOBALS[_module, _name] = _path
