"""Where other projects keep the query backbone inside their checkpoints.

Only key names matter here: every project listed trains torchvision's ResNet under its own prefix.
A form is recognised by its prefix in front of the stem's `conv1.weight`; the first that fits is
taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Form:
    """One way to name a backbone's tensors.

    Attributes:
        name: whose form it is.
        prefix: what stands before `conv1.weight`.
        heads: names after the prefix that are no part of the backbone.
    """

    name: str
    prefix: str
    heads: tuple[str, ...] = ("fc.",)


FORMS = (
    Form("densecl_ext run", "model.backbone."),
    # MoCo v1/v2 and reimplementations on top of it: DistributedDataParallel around a model whose
    # encoder_q is a torchvision ResNet with the head as `fc` (and CoinCheung/DenseCL's
    # `dense_head`).
    Form("MoCo", "module.encoder_q.", ("fc.", "dense_head.")),
    Form("MoCo without DistributedDataParallel", "encoder_q.", ("fc.", "dense_head.")),
    # Official DenseCL (OpenSelfSup), mmselfsup, mmpretrain: the backbone is a module of that name.
    Form("OpenSelfSup / mmselfsup / mmpretrain", "backbone."),
    Form("OpenSelfSup / mmselfsup / mmpretrain, saved in parallel", "module.backbone."),
    Form("OpenSelfSup encoder", "encoder_q.0."),
    # Extracted backbones, and torchvision's own files.
    Form("plain state dict", ""),
    Form("plain state dict, saved in parallel", "module."),
)

CONTAINERS = ("state_dict", "model")
NAMED = "densecl_ext backbone"


def find_tensors(content: Any) -> dict[str, Tensor]:
    """Finds the flat name -> tensor mapping inside a loaded checkpoint.

    Args:
        content: what the file holds: a state_dict, or a dict that keeps one under "state_dict" or
            "model".

    Returns:
        The tensors, by name. Names found under "model" of a run of this project get the prefix
        "model.".

    Raises:
        ValueError: no tensors there.
    """
    if isinstance(content, Mapping):
        own = content.get("format") == "densecl_ext"
        for container in CONTAINERS:
            inner = content.get(container)
            if isinstance(inner, Mapping):
                prefix = "model." if own else ""
                return {f"{prefix}{k}": v for k, v in inner.items() if isinstance(v, Tensor)}
        tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
        if tensors:
            return tensors
    kind = (
        f"a dict of {', '.join(map(str, list(content)[:8]))}"
        if isinstance(content, Mapping)
        else f"a {type(content).__name__}"
    )
    raise ValueError(
        f"expected a state_dict, or a dict with one under {' or '.join(CONTAINERS)}, got {kind}"
    )


def named_backbone(
    architecture: str, tensors: dict[str, Tensor], options: dict[str, Any]
) -> dict[str, Any]:
    """The content of a file that says which network its tensors are, and how it was built."""
    content = {"format": NAMED, "architecture": architecture, "state_dict": tensors}
    return content | ({"options": options} if options else {})


def find_architecture(content: Any) -> str | None:
    """The network that a checkpoint of this project says it holds; None where nothing is said."""
    if not isinstance(content, Mapping):
        return None
    if content.get("format") == NAMED:
        return str(content["architecture"])
    config = content.get("config")
    if content.get("format") == "densecl_ext" and isinstance(config, Mapping):
        return str(config.get("backbone"))
    return None


def find_options(content: Any) -> dict[str, Any]:
    """What a checkpoint of this project says its backbone was built with, less what is plain."""
    if not isinstance(content, Mapping):
        return {}
    said = content.get("options" if content.get("format") == NAMED else "config")
    if content.get("format") not in (NAMED, "densecl_ext") or not isinstance(said, Mapping):
        return {}
    options: dict[str, Any] = {}
    if said.get("output_stride") not in (None, "none"):
        options["output_stride"] = int(said["output_stride"])
        if said.get("truncate"):
            options["truncate"] = True
    if said.get("padding", "zeros") != "zeros":
        options["padding"] = str(said["padding"])
    return options


def difference(got: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[int, str]:
    """How two mappings from names to shapes differ: in so many names, told in words."""
    parts = {
        "missing": sorted(wanted.keys() - got.keys()),
        "unexpected": sorted(got.keys() - wanted.keys()),
        "of another shape": sorted(k for k in got.keys() & wanted.keys() if got[k] != wanted[k]),
    }
    told = "; ".join(
        f"{len(names)} {word} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for word, names in parts.items()
        if names
    )
    return sum(map(len, parts.values())), told


def extract_named(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, Any]
) -> tuple[dict[str, Tensor], list[str], Form]:
    """Takes the tensors of a known network out, whatever stands beside them.

    Args:
        tensors: all tensors of a checkpoint.
        shapes: name -> shape of every tensor of the network.

    Returns:
        The network's tensors, the names under the same prefix that were left out, and the form
        whose prefix it was.

    Raises:
        ValueError: under no known prefix are there all of them in these shapes.
    """
    nearest: tuple[int, str] | None = None
    for form in FORMS:
        under = {k[len(form.prefix) :]: v for k, v in tensors.items() if k.startswith(form.prefix)}
        found = {k: v for k, v in under.items() if k in shapes}
        count, told = difference({k: v.shape for k, v in found.items()}, shapes)
        if count == 0:
            return found, sorted(under.keys() - found.keys()), form
        if nearest is None or count < nearest[0]:
            nearest = (count, told)
    assert nearest is not None
    raise ValueError(f"not exactly the network that it should be: {nearest[1]}")


def extract_backbone(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str], Form]:
    """Takes the backbone's tensors out and gives them torchvision's names.

    Args:
        tensors: all tensors of a checkpoint.

    Returns:
        The backbone's tensors by torchvision's names, the names under the same prefix that were
        left out as heads, and the form that was recognised.

    Raises:
        ValueError: none of the known forms; the message shows some of the names.
    """
    for form in FORMS:
        if f"{form.prefix}conv1.weight" not in tensors:
            continue
        under = {k[len(form.prefix) :]: v for k, v in tensors.items() if k.startswith(form.prefix)}
        heads = sorted(name for name in under if name.startswith(form.heads))
        return {k: v for k, v in under.items() if k not in heads}, heads, form
    prefixes = ", ".join(repr(form.prefix) for form in FORMS)
    raise ValueError(
        f"no ResNet found: looked for conv1.weight after the prefixes {prefixes}; "
        f"the names begin with {', '.join(list(tensors)[:5])}; another network must be named"
    )
