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
    Form("plain ResNet", ""),
    Form("plain ResNet, saved in parallel", "module."),
)

CONTAINERS = ("state_dict", "model")


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
        f"the names begin with {', '.join(list(tensors)[:5])}"
    )
