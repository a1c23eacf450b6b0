"""What a run's checkpoint must look like: keys, types, shapes, dtypes and ranges."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

FORMAT = "densecl_ext"
VERSION = 1
REQUIRED = ("config", "data", "epoch", "step", "model", "optimizer", "loader", "rng")
_MOST = 1 << 62
WEIGHTS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def is_run(content: Any) -> bool:
    """Whether a file says that it is the checkpoint of a run."""
    return isinstance(content, Mapping) and content.get("format") == FORMAT


def check_run(content: Mapping[str, Any]) -> None:
    """Checks every part of a run's checkpoint that is there.

    Raises:
        ValueError: a part has another type, shape, dtype or range than a run writes; it is named.
    """
    for name, check in _PARTS.items():
        if name in content:
            check(content[name], name)
    epochs, steps = _bounds(content)
    loader = content.get("loader", {})
    total = None if epochs is None or steps is None else epochs * steps
    for name, value, most in (
        ("epoch", content.get("epoch"), epochs),
        ("step", content.get("step"), total),
        ("loader['epoch']", loader.get("epoch"), epochs),
        ("loader['position']", loader.get("position"), steps),
    ):
        if value is not None and most is not None and value > most:
            raise ValueError(f"{name} is {value}, this run has at most {most}")


def check_complete(content: Mapping[str, Any]) -> None:
    """Checks that nothing is missing of what a run goes on from; raises ValueError."""
    missing = [name for name in REQUIRED if name not in content]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}")


def check_weights(tensors: Mapping[str, Any], where: str = "") -> None:
    """Checks tensors of a network: real floats or counts, stored one by one, none impossible.

    Raises:
        ValueError: a tensor is complex, boolean where weights are, sparse, ..., or a count or a
            variance is negative.
    """
    for key, tensor in tensors.items():
        name = f"{where}{key}"
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is a {type(tensor).__name__}, not a tensor")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise ValueError(f"{name} is a sparse, quantized or empty shell of a tensor")
        learnt = name.rpartition(".")[2] in ("weight", "bias", "running_mean", "running_var")
        if learnt and tensor.dtype not in WEIGHTS:
            raise ValueError(f"{name} has dtype {tensor.dtype}, expected a real float")
        if tensor.dtype.is_complex:
            raise ValueError(f"{name} has dtype {tensor.dtype}, expected a real one")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"{name} has more elements than it stores")
        counts = name.endswith(("num_batches_tracked", "pointer", "filled"))
        if counts and (tensor.dtype != torch.int64 or tensor.numel() != 1):
            raise ValueError(f"{name} must be one int64, got {tensor.dtype} {tuple(tensor.shape)}")
        if (counts or name.endswith("running_var")) and bool((tensor < 0).any()):
            raise ValueError(f"{name} is negative")


def _bounds(content: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Most epochs of the run, and most steps of an epoch, where the checkpoint tells them."""
    config, data = content.get("config", {}), content.get("data", {})
    epochs, batch, images = config.get("epochs"), config.get("batch_size"), data.get("images")
    whole = all(_is_int(value) and value > 0 for value in (batch, images))
    steps = math.ceil(images / batch) if whole else None
    return (epochs if _is_int(epochs) else None), steps


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _count(value: Any, name: str) -> None:
    if not _is_int(value) or not 0 <= value < _MOST:
        raise ValueError(f"{name} must be an integer from 0 on, got {_short(value)}")


def _number(value: Any, name: str) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {_short(value)}")


def _text(value: Any, name: str) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, got {_short(value)}")


def _named(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{name} must be a dict by names, got {_short(value)}")
    return value


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} {value.dtype}"
    if isinstance(value, (bool, int, float, str)):
        return repr(value)[:60]
    return f"a {type(value).__name__}"


def _config(value: Any, name: str) -> None:
    for key, item in _named(value, name).items():
        if isinstance(item, (list, tuple)):
            plain = all(isinstance(part, (str, int, float, bool)) for part in item)
        else:
            plain = item is None or isinstance(item, (str, int, float, bool))
        if not plain:
            raise ValueError(f"{name}[{key!r}] must be a plain value, got {_short(item)}")


def _data(value: Any, name: str) -> None:
    _named(value, name)
    if "images" in value:
        _count(value["images"], f"{name}['images']")


def _metrics(value: Any, name: str) -> None:
    for key, item in _named(value, name).items():
        _number(item, f"{name}[{key!r}]")


def _model(value: Any, name: str) -> None:
    tensors = _named(value, name)
    check_weights(tensors, f"{name}.")
    for key, keys in tensors.items():
        queue, _, last = key.rpartition(".")
        for limit in ("pointer", "filled"):
            held = tensors.get(f"{queue}.{limit}")
            if last == "keys" and held is not None and int(held) > len(keys):
                raise ValueError(f"{name}.{queue}.{limit} is {int(held)} of {len(keys)} keys")


def _optimizer(value: Any, name: str) -> None:
    _named(value, name)
    state, groups = value.get("state"), value.get("param_groups")
    if not isinstance(state, Mapping) or not isinstance(groups, list):
        raise ValueError(f"{name} must have a dict `state` and a list `param_groups`")
    for key, slots in state.items():
        _count(key, f"a key of {name}['state']")
        for slot, item in _named(slots, f"{name}['state'][{key}]").items():
            if isinstance(item, Tensor):
                if item.dtype not in WEIGHTS:
                    raise ValueError(f"{name}['state'][{key}][{slot!r}] has dtype {item.dtype}")
            elif item is not None:
                _number(item, f"{name}['state'][{key}][{slot!r}]")
    for index, group in enumerate(groups):
        where = f"{name}['param_groups'][{index}]"
        for key in ("lr", "momentum", "weight_decay"):
            if key in _named(group, where):
                _number(group[key], f"{where}[{key!r}]")
                if group[key] < 0:
                    raise ValueError(f"{where}[{key!r}] is negative")


def _loader(value: Any, name: str) -> None:
    for key in ("epoch", "position"):
        if key in _named(value, name):
            _count(value[key], f"{name}[{key!r}]")


def _window(value: Any, name: str) -> None:
    if "count" in _named(value, name):
        _count(value["count"], f"{name}['count']")


def _rng(value: Any, name: str) -> None:
    state = _named(value, name).get("torch")
    if state is not None and (not isinstance(state, Tensor) or state.dtype != torch.uint8):
        raise ValueError(f"{name}['torch'] must be a tensor of bytes, got {_short(state)}")


_PARTS: dict[str, Callable[[Any, str], None]] = {
    "version": _count,
    "densecl_ext": _text,
    "config": _config,
    "data": _data,
    "epoch": _count,
    "step": _count,
    "metrics": _metrics,
    "model": _model,
    "optimizer": _optimizer,
    "loader": _loader,
    "window": _window,
    "rng": _rng,
}
