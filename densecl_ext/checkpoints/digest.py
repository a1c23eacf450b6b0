"""A checksum of a checkpoint's content: whatever container carries it, other content shows."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

CHECKSUM = "densecl_ext checksum"
_DEPTH = 100


def content_checksum(content: Any) -> str:
    """SHA-256 over tensors and plain values, in order, as "sha256:...".

    Args:
        content: tensors, numpy arrays, None, bool, int, float, str, bytes, and dicts, lists,
            tuples of these.

    Raises:
        TypeError: anything else, named by its place.
        ValueError: nested too deeply, or a tensor that repeats its elements without storing them.
    """
    digest = hashlib.sha256()
    _add(digest, content, "", 0)
    return f"sha256:{digest.hexdigest()}"


def _add(digest: Any, value: Any, where: str, depth: int) -> None:
    if depth > _DEPTH:
        raise ValueError(f"{where[:80]}... is nested more than {_DEPTH} deep")
    if isinstance(value, Tensor):
        _add_tensor(digest, value, where)
    elif isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biufSU":
        digest.update(f"numpy:{value.dtype.str}:{value.shape};".encode())
        digest.update(value.tobytes())
    elif value is None or isinstance(value, (bool, int, float, str, bytes)):
        text = f"{_kind(value)}:{value!r};".encode("utf-8", "surrogatepass")
        digest.update(b"%d:" % len(text) + text)
    elif isinstance(value, Mapping):
        digest.update(b"dict:%d;" % len(value))
        for key, item in value.items():
            _add(digest, key, where, depth + 1)
            _add(digest, item, f"{where}[{key!r}]", depth + 1)
    elif isinstance(value, (list, tuple)):
        digest.update(b"%s:%d;" % (b"list" if isinstance(value, list) else b"tuple", len(value)))
        for index, item in enumerate(value):
            _add(digest, item, f"{where}[{index}]", depth + 1)
    else:
        raise TypeError(
            f"state{where} is a {type(value).__name__}; a checkpoint holds tensors, numbers, "
            "strings, dicts, lists and tuples"
        )


def _kind(value: Any) -> str:
    for kind in (bool, int, float, str, bytes):
        if isinstance(value, kind):
            return kind.__name__
    return "none"


def _add_tensor(digest: Any, tensor: Tensor, where: str) -> None:
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise TypeError(f"state{where} is a sparse or quantized tensor")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"state{where} has more elements than it stores")
    digest.update(f"tensor:{tensor.dtype}:{tuple(tensor.shape)};".encode())
    if tensor.numel():
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(np.ascontiguousarray(flat.numpy()))
