"""Where weights come from, told inside the file that carries them, with a checksum of them."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from densecl_ext._version import __version__
from densecl_ext.checkpoints.digest import content_checksum
from densecl_ext.checkpoints.schema import is_run

STAMP = "densecl_ext"
_CHECKSUM = "checksum"
# Every loader of this project feeds images like this; torchvision's and timm's models expect it.
NORMALISATION = {
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "channels": "RGB, values from 0 to 1 before",
}
LICENCE = (
    "not stated; whoever publishes these weights states it, as the training images and any weights "
    "it started from allow"
)


def stamped(tensors: Mapping[str, Tensor], provenance: Mapping[str, Any]) -> OrderedDict[str, Any]:
    """A state_dict that says where it comes from.

    The words stand in `_metadata`, where torch keeps the versions of modules: saved with the
    tensors, and no key that a strict `load_state_dict` could stumble over.
    """
    state: OrderedDict[str, Any] = OrderedDict(tensors)
    words = {**provenance, _CHECKSUM: _checksum(tensors)}
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
    if _checksum(tensors) != expected:
        raise ValueError("its weights do not match the checksum that was written with them")


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    return content_checksum(dict(sorted(tensors.items())))  # .safetensors keeps no order


def to_text(state: Mapping[str, Any]) -> dict[str, str]:
    """What a `stamped` state_dict says, for the metadata of .safetensors, which is text alone."""
    return {"format": "pt", STAMP: json.dumps(stamp(state), sort_keys=True)}


def from_text(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> OrderedDict[str, Any]:
    """A state_dict with the words that `to_text` wrote, where there are any."""
    state: OrderedDict[str, Any] = OrderedDict(tensors)
    if STAMP in metadata:
        state._metadata = {STAMP: json.loads(metadata[STAMP])}  # type: ignore[attr-defined]
    return state


def origin(content: Any, path: Path, form: str, architecture: str) -> dict[str, Any]:
    """What is known of weights: of a run its recipe and length, else the file they came from.

    Args:
        content: what the file holds.
        path: the file.
        form: whose form it has.
        architecture: of the backbone.

    Returns:
        Plain values: program, architecture, normalisation, licence, and steps, images and recipe
        of a run, or the source of other files. Folders of the machine are left out.
    """
    known = {
        key: value for key, value in stamp(content).items() if key not in (_CHECKSUM, "options")
    }
    words: dict[str, Any] = {
        "program": f"densecl_ext {__version__}",
        "torch": str(torch.__version__),
        "architecture": architecture,
        "normalisation": NORMALISATION,
        "licence": LICENCE,
    }
    if known:
        return words | known
    if not is_run(content):
        return words | {"source": f"{path.name} ({form})"}
    if content.get("config", {}).get("pixel_mean", "auto") != "auto":
        words["normalisation"] = _normalisation(content["config"])
    recipe = {
        key: Path(value).name if key == "weights" else value
        for key, value in content.get("config", {}).items()
        if key not in ("data", "output")
    }
    return words | {
        "program": f"densecl_ext {content.get('densecl_ext', __version__)}",
        "method": "DenseCL" if recipe.get("loss_lambda", 0.5) else "MoCo v2",
        "steps": content.get("step"),
        "images": content.get("data", {}).get("images"),
        "recipe": recipe,
    }


def _normalisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """How a run with other images than 8-bit RGB, or numbers of its own, prepared them."""

    def numbers(name: str) -> list[float]:
        return [float(part) for part in str(config[name]).split(",")]

    words = NORMALISATION | {"mean": numbers("pixel_mean"), "std": numbers("pixel_std")}
    channels = config.get("channels", "rgb")
    if channels == "rgb":
        return words
    stated = config.get("value_range", "none")
    if stated == "none":
        low_high = "values from 0 to 1 before"
        return words | {"channels": f"{channels} channels, {low_high}"}
    low, high = numbers("value_range")
    told = f"{channels} channels, values of {low:g} to {high:g} scaled to 0 to 1 before"
    return words | {"channels": told, "value_range": [low, high]}


def unknown_normalisation(channels: int) -> dict[str, Any]:
    """For weights of others that take other images than RGB: nothing is known."""
    return {
        "mean": [0.0] * channels,
        "std": [1.0] * channels,
        "channels": f"{channels} channels, prepared in a way that their source does not state",
    }


def summary(words: Mapping[str, Any]) -> str:
    """The provenance in one line."""
    if "source" in words:
        return f"from {words['source']}"
    parts = [str(words.get("method", words.get("program", "")))]
    for name in ("steps", "images"):
        if words.get(name) is not None:
            parts.append(f"{words[name]} {name}")
    return ", ".join(parts)


def normalisation_line(words: Mapping[str, Any]) -> str:
    """How images must be prepared, in one line."""
    values = words.get("normalisation", NORMALISATION)
    mean, std = (", ".join(f"{v:g}" for v in values[key]) for key in ("mean", "std"))
    return f"{values['channels']}; mean {mean}; standard deviation {std}"


def model_card(title: str, words: Mapping[str, Any], usage: str) -> str:
    """A page about the weights, in Markdown with the front matter of model hubs."""
    rows = [
        f"| {name} | {value} |"
        for name, value in words.items()
        if isinstance(value, (str, int, float)) and name not in ("licence", "architecture")
    ]
    recipe = words.get("recipe", {})
    lines = [
        "---",
        "library_name: timm",
        "tags: [image-feature-extraction, self-supervised-learning]",
        "---",
        f"# Model card: {title}",
        "",
        f"A backbone ({words['architecture']}) without classifier, {summary(words)}.",
        "",
        f"Images: {normalisation_line(words)}.",
        "",
        f"Licence: {words.get('licence', LICENCE)}.",
        "",
        "| | |",
        "|---|---|",
        *rows,
    ]
    if usage:
        lines += ["", "## Use it", "", "```python", usage, "```"]
    if recipe:
        lines += ["", "## Recipe", "", "```yaml"]
        lines += [f"{name}: {json.dumps(value)}" for name, value in recipe.items()] + ["```"]
    return "\n".join(lines) + "\n"
