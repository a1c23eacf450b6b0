"""Everything that the next step of a run depends on: taken for a checkpoint, and put back."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from densecl_ext import _version
from densecl_ext.data import ViewLoader
from densecl_ext.train.config import PretrainConfig

PARTS = ("model", "optimizer", "loader", "window")
VALUES = ("epoch", "step", "metrics")
# What of an optimizer's groups belongs to the machine and to the schedule, not to the checkpoint.
OWN = ("lr", "foreach", "fused", "capturable")


def initial_state(config: PretrainConfig, **parts: Any) -> dict[str, Any]:
    """The state of a run before its first step.

    Args:
        config: the resolved configuration.
        parts: what has `state_dict` and `load_state_dict`, under the names in PARTS.

    Returns:
        A dict of plain values ("epoch", "step", ...) and of the parts themselves.
    """
    return {
        "densecl_ext": _version.__version__,
        "config": config.to_mapping(),
        "data": data_identity(parts["loader"]),
        "epoch": 0,
        "step": 0,
        "metrics": {},
        **parts,
    }


def snapshot(state: Mapping[str, Any]) -> dict[str, Any]:
    """Turns a state into what a checkpoint holds: tensors and plain containers."""
    plain = {name: v.state_dict() if name in PARTS else v for name, v in state.items()}
    for group in plain["optimizer"]["param_groups"]:
        group["lr"] = float(group["lr"])  # on a GPU a tensor there
    return {**plain, "rng": rng_state()}


def restore(state: dict[str, Any], checkpoint: Mapping[str, Any]) -> None:
    """Puts a run back to where `snapshot` found it.

    Args:
        state: what `initial_state` gave for the same configuration; changed in place.
        checkpoint: what `snapshot` gave.

    Raises:
        ValueError: the images are not those of the interrupted run.
        RuntimeError: the model does not fit.
    """
    if not same_images(checkpoint["data"], state["loader"]):
        raise ValueError(
            f"pretrain: cannot resume: {state['config']['data']} holds {state['data']['images']} "
            f"images, and the run was started with {checkpoint['data']['images']} or with others"
        )
    for name in VALUES:
        state[name] = checkpoint[name]
    groups = state["optimizer"].param_groups
    own = [{key: group[key] for key in OWN if key in group} for group in groups]
    for name in PARTS:
        state[name].load_state_dict(checkpoint[name])
    for group, values in zip(state["optimizer"].param_groups, own, strict=True):
        group.update(values)
    set_rng_state(checkpoint["rng"])


def data_identity(loader: ViewLoader) -> dict[str, Any]:
    """Number and identity of the images, to tell whether a resumed run sees the same ones."""
    return {"images": loader.num_images, "identity": loader.identity}


def same_images(stored: Mapping[str, Any], loader: ViewLoader) -> bool:
    """Whether a checkpoint's `data_identity` is that of these images.

    Older checkpoints hold a hash of the files' names without folders instead, and are compared by
    that.
    """
    if "names" not in stored:
        return dict(stored) == data_identity(loader)
    digest = hashlib.sha256()
    for number, path in enumerate(getattr(loader, "files", ())):
        digest.update(b"\n" * (number > 0) + os.fsencode(path.name))
    return dict(stored) == {"images": loader.num_images, "names": digest.hexdigest()}


def seed_everything(seed: int) -> None:
    """Seeds Python's, NumPy's and torch's global generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """State of all global generators, as tensors and plain values."""
    numpy_state: Any = np.random.get_state()
    kind, keys, position, has_gauss, gauss = numpy_state
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Puts all global generators back; those of GPUs only where their number is the same."""
    kind, keys, position, has_gauss, gauss = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
