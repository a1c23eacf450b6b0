"""Where weights come from, told inside the file that carries them, with a checksum of them."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from densecl_ext.checkpoints.digest import content_checksum

STAMP = "densecl_ext"
_CHECKSUM = "checksum"
# Every loader of this project feeds images like this; torchvision's and timm's models expect it.
NORMALISATION = {
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "channels": "RGB, values from 0 to 1 before",
}


def stamped(tensors: Mapping[str, Tensor], provenance: Mapping[str, Any]) -> OrderedDict[str, Any]:
    """A state_dict that says where it comes from.

    The words stand in `_metadata`, where torch keeps the versions of modules: saved with the
    tensors, and no key that a strict `load_state_dict` could stumble over.
    """
    state: OrderedDict[str, Any] = OrderedDict(tensors)
    words = {**provenance, _CHECKSUM: content_checksum(dict(tensors))}
    state._metadata = {STAMP: words}  # type: ignore[attr-defined]
    return state


def stamp(content: Any) -> dict[str, Any]:
    """What a state_dict, or the one inside a checkpoint, says about itself; {} for nothing."""
    holders = [content]
    if isinstance(content, Mapping):
        holders.append(content.get("state_dict"))
    for holder in holders:
        metadata = getattr(holder, "_metadata", None)
        words = metadata.get(STAMP) if isinstance(metadata, Mapping) else None
        if isinstance(words, dict):
            return words
    return {}


def check_stamp(content: Any) -> None:
    """Compares the checksum that a state_dict carries with its tensors; raises ValueError."""
    expected = stamp(content).get(_CHECKSUM)
    if expected is None:
        return
    has_words = isinstance(getattr(content, "_metadata", None), Mapping)
    tensors = content if has_words else content["state_dict"]
    if content_checksum(dict(tensors)) != expected:
        raise ValueError("its weights do not match the checksum that was written with them")


def to_text(words: Mapping[str, Any]) -> dict[str, str]:
    """For the metadata of .safetensors, which holds text alone."""
    return {"format": "pt", STAMP: json.dumps(words, sort_keys=True)}


def from_text(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> OrderedDict[str, Any]:
    """A state_dict with the words that `to_text` wrote, where there are any."""
    state: OrderedDict[str, Any] = OrderedDict(tensors)
    if STAMP in metadata:
        state._metadata = {STAMP: json.loads(metadata[STAMP])}  # type: ignore[attr-defined]
    return state
