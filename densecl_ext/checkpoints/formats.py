"""Where other projects keep the query backbone inside their checkpoints.

Only names matter here. A file is opened in three steps: the mapping of tensors is found in it (its
container), wrappers such as `module.` are taken off the names, and the prefix before the ResNet's
stem tells whose form it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from densecl_ext.checkpoints.names import from_detectron2, from_huggingface, from_sequential
from densecl_ext.checkpoints.provenance import stamp
from densecl_ext.checkpoints.schema import is_run


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a library names a ResNet's tensors: the stem's name, and the way to torchvision's."""

    stem: str
    rename: Callable[[str], str]


TORCHVISION = Layout("conv1.weight", str)
SEQUENTIAL = Layout("0.weight", from_sequential)
HUGGINGFACE = Layout("embedder.embedder.convolution.weight", from_huggingface)
DETECTRON2 = Layout("stem.conv1.weight", from_detectron2)
LAYOUTS = (TORCHVISION, SEQUENTIAL, HUGGINGFACE, DETECTRON2)


@dataclasses.dataclass(frozen=True)
class Form:
    """One way to name a backbone's tensors.

    Attributes:
        name: whose form it is.
        prefix: what stands before the stem, without wrappers.
        layout: how names go on after the prefix.
        beside: beginnings of other names, one of which must be there; () asks for none.
        top: keys of the whole file, one of which must be there; () asks for none.
    """

    name: str
    prefix: str
    layout: Layout = TORCHVISION
    beside: tuple[str, ...] = ()
    top: tuple[str, ...] = ()


# The first that fits is taken: the query's encoder before the key's, the telling names before the
# common ones.
FORMS = (
    Form("densecl_ext run", "model.backbone."),
    Form("DenseCL (CoinCheung)", "encoder_q.", beside=("encoder_q.dense_head.",)),
    Form("SlotCon", "encoder_q.", beside=("grouping_q.", "slot_")),
    Form("MoCo", "encoder_q."),
    Form("MoCo v3", "base_encoder."),
    Form("BYOL", "online_encoder.net."),
    Form("BYOL", "online_network.encoder."),
    Form("BYOL", "online_network.backbone."),
    Form("BYOL", "online_encoder."),
    Form("BYOL (mmselfsup)", "online_net.0."),
    Form("PixPro", "encoder.", beside=("value_transform.",)),
    Form("SoCo", "encoder.", beside=("encoder_k.",)),
    Form("SimSiam", "encoder.", beside=("predictor.",)),
    Form("a model with an encoder", "encoder."),
    Form("VISSL", "trunk._feature_blocks."),
    Form("VISSL", "_feature_blocks."),
    Form("DINO", "backbone.", top=("teacher", "student")),
    Form("VICRegL", "backbone.", beside=("maps_projector.",)),
    Form("OpenSelfSup / mmselfsup / mmpretrain", "backbone.", top=("meta",)),
    Form("solo-learn", "backbone.", top=("pytorch-lightning_version",)),
    Form("Barlow Twins / VICReg", "backbone.", beside=("projector.",)),
    Form("SimCLR", "backbone.", beside=("backbone.fc.",)),
    Form("a model with a backbone", "backbone."),
    Form("OpenSelfSup encoder", "encoder_q.0."),
    Form("lightly", "backbone.", SEQUENTIAL),
    Form("lightly", "query_encoder.", SEQUENTIAL),
    Form("lightly", "student_backbone.", SEQUENTIAL),
    Form("BYOL", "encoder.", SEQUENTIAL),
    Form("Hugging Face ResNet", "resnet.", HUGGINGFACE),
    Form("Hugging Face ResNet", "backbone.", HUGGINGFACE),
    Form("Hugging Face ResNet", "", HUGGINGFACE),
    Form("detectron2", "backbone.bottom_up.", DETECTRON2),
    Form("detectron2", "backbone.", DETECTRON2),
    Form("detectron2", "", DETECTRON2),
    Form("SwAV", "", beside=("prototypes.", "projection_head.")),
    Form("plain state dict", ""),
    Form("plain state dict", "", SEQUENTIAL),
)

# Names after the prefix that belong to a method's heads and not to the network.
HEADS = (
    "fc.",
    "head.",
    "heads.",
    "dense_head.",
    "projection_head.",
    "prototypes.",
    "projector.",
    "predictor.",
    "classifier.",
)

# Where tensors lie in a file, best first. Averaged weights stand before those they average, as
# the projects that keep both evaluate them.
CONTAINERS = (
    "classy_state_dict.base_model.model",
    "teacher",
    "student",
    "state_dict_ema",
    "model_ema",
    "state_dict",
    "model",
    "model_state_dict",
    "online_network_state_dict",
    "network",
    "net",
    "encoder",
    "backbone",
)
# What wrappers around a module (data-parallel, compiled, sharded) put into names, in any order.
WRAPPERS = frozenset(
    ("module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
)
NAMED = "densecl_ext backbone"
_NESTED = 6


def find_tensors(content: Any, container: str | None = None) -> dict[str, Tensor]:
    """Finds the tensors inside a loaded checkpoint, by names without wrappers.

    Args:
        content: what the file holds.
        container: where in it the tensors lie ("state" or "a.b"); None searches `CONTAINERS`.

    Returns:
        The tensors, by name. Names found under "model" of a run of this project get the prefix
        "model.".

    Raises:
        ValueError: no tensors there, or two of one name.
    """
    if container is not None:
        inner = _at(content, container)
        if inner is None:
            raise ValueError(f"there is no container {container!r}; it is {_told(content)}")
        tensors = _flat(inner)
    else:
        tensors = {}
        for place in CONTAINERS:
            inner = _at(content, place)
            if isinstance(inner, Mapping) and (tensors := _flat(inner)):
                break
        if not tensors:
            tensors = _flat(content)
    if not tensors:
        raise ValueError(
            "expected a state_dict, or a dict with one under "
            f"{', '.join(CONTAINERS)}, got {_told(content)}"
        )
    if container is None and is_run(content):
        return {f"model.{name}": tensor for name, tensor in _unwrapped(tensors).items()}
    return _unwrapped(tensors)


def find_architecture(content: Any) -> str | None:
    """The network that a file of this project says it holds; None where nothing is said."""
    if not isinstance(content, Mapping):
        return None
    if content.get("format") == NAMED:
        return str(content["architecture"])
    config = content.get("config")
    if is_run(content) and isinstance(config, Mapping):
        return str(config.get("backbone"))
    said = stamp(content).get("architecture")
    return said if isinstance(said, str) else None


def find_options(content: Any) -> dict[str, Any]:
    """What a file of this project says its backbone was built with, less what is plain."""
    if not isinstance(content, Mapping):
        return {}
    if content.get("format") == NAMED:
        said = content.get("options")
    else:
        said = content.get("config") if is_run(content) else stamp(content).get("options")
    if not isinstance(said, Mapping):
        return {}
    options: dict[str, Any] = {}
    if said.get("output_stride") not in (None, "none"):
        options["output_stride"] = int(said["output_stride"])
        if said.get("truncate"):
            options["truncate"] = True
    if said.get("padding", "zeros") != "zeros":
        options["padding"] = str(said["padding"])
    channels = said.get("in_channels", said.get("channels", "rgb"))
    if isinstance(channels, int) and channels != 3:
        options["in_channels"] = channels
    return options


def difference(got: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[int, str]:
    """How two mappings from names to shapes differ, and in how many names, in words."""
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
    tensors: Mapping[str, Tensor], shapes: Mapping[str, Any], prefix: str | None = None
) -> tuple[dict[str, Tensor], list[str], str]:
    """Takes the tensors of a known network out, whatever stands beside them.

    Args:
        tensors: all tensors of a checkpoint.
        shapes: name -> shape of every tensor of the network.
        prefix: what stands before the names; None tries those of `FORMS`.

    Returns:
        The network's tensors, the names under the same prefix that were left out, and the form
        whose prefix it was.

    Raises:
        ValueError: under no such prefix are there all of them in these shapes.
    """
    forms = [_given(prefix)] if prefix is not None else list(FORMS)
    nearest: tuple[int, str] | None = None
    for form in forms:
        under = {k[len(form.prefix) :]: v for k, v in tensors.items() if k.startswith(form.prefix)}
        found = {k: v for k, v in under.items() if k in shapes}
        count, told = difference({k: v.shape for k, v in found.items()}, shapes)
        if count == 0:
            return found, sorted(under.keys() - found.keys()), form.name
        if nearest is None or count < nearest[0]:
            nearest = (count, told)
    assert nearest is not None
    raise ValueError(f"not exactly the network that it should be: {nearest[1]}")


def extract_backbone(
    tensors: Mapping[str, Tensor], top: Any = (), prefix: str | None = None
) -> tuple[dict[str, Tensor], list[str], str]:
    """Takes a ResNet's tensors out and gives them torchvision's names.

    Args:
        tensors: all tensors of a checkpoint, from `find_tensors`.
        top: what the file holds; its keys help to tell the form.
        prefix: what stands before the names; None tries those of `FORMS`.

    Returns:
        The backbone's tensors by torchvision's names, the names under the same prefix that were
        left out as heads, and the name of the form that was recognised.

    Raises:
        ValueError: none of the known forms; the message shows some of the names.
    """
    keys = set(map(str, top)) if isinstance(top, Mapping) else set()
    forms = list(FORMS)
    if prefix is not None:
        forms = [dataclasses.replace(_given(prefix), layout=layout) for layout in LAYOUTS]
    for form in forms:
        if not _fits(form, tensors, keys):
            continue
        under = {k[len(form.prefix) :]: v for k, v in tensors.items() if k.startswith(form.prefix)}
        heads = sorted(name for name in under if name.startswith(HEADS))
        # Files in other layouts carry whole detectors or classifiers beside the ResNet.
        if form.layout is not TORCHVISION:
            renamed = {name: form.layout.rename(name) for name in under}
            heads = sorted(k for k, v in renamed.items() if not v.startswith(_RESNET) or k in heads)
            return {renamed[k]: v for k, v in under.items() if k not in heads}, heads, form.name
        return {k: v for k, v in under.items() if k not in heads}, heads, form.name
    raise ValueError(_unknown(tensors, prefix))


_RESNET = ("conv1.", "bn1.", "layer1.", "layer2.", "layer3.", "layer4.")


def _fits(form: Form, tensors: Mapping[str, Tensor], top: set[str]) -> bool:
    stem = tensors.get(f"{form.prefix}{form.layout.stem}")
    if stem is None or (form.layout is SEQUENTIAL and stem.dim() != 4):
        return False
    if form.top and top.isdisjoint(form.top):
        return False
    return not form.beside or any(name.startswith(form.beside) for name in tensors)


def _given(prefix: str) -> Form:
    parts = [part for part in prefix.split(".") if part and part not in WRAPPERS]
    return Form(f"names after {prefix!r}", "".join(f"{part}." for part in parts))


def _unknown(tensors: Mapping[str, Tensor], prefix: str | None) -> str:
    first = f"the first names are {', '.join(list(tensors)[:5])}"
    if prefix is not None:
        return f"no ResNet found after the prefix {prefix!r}; {first}"
    known = ", ".join(dict.fromkeys(form.name for form in FORMS))
    hints = [
        name.removesuffix(layout.stem)
        for layout in (TORCHVISION, HUGGINGFACE, DETECTRON2)
        for name in tensors
        if name.endswith(f".{layout.stem}")
        and not any(part in name for part in ("layer", "res2", "res3", "res4", "res5"))
    ]
    found = f"; there may be one after {hints[0]!r}: --prefix {hints[0]}" if hints else ""
    return (
        f"no ResNet found in any known form ({known}); {first}{found}; --prefix and --container "
        "say where to look; another network must be named"
    )


def _at(content: Any, place: str) -> Any:
    for part in place.split("."):
        if not isinstance(content, Mapping) or part not in content:
            return None
        content = content[part]
    return content


def _flat(content: Any, depth: int = _NESTED) -> dict[str, Tensor]:
    """Tensors and arrays in nested dicts, names joined by dots."""
    tensors: dict[str, Tensor] = {}
    if not isinstance(content, Mapping) or depth == 0:
        return tensors
    for key, value in content.items():
        if isinstance(value, Tensor):
            tensors[str(key)] = value.detach()
        elif isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
            native = np.asarray(value).astype(value.dtype.newbyteorder("="))
            tensors[str(key)] = torch.from_numpy(native)
        elif isinstance(value, Mapping):
            tensors |= {f"{key}.{k}": v for k, v in _flat(value, depth - 1).items()}
    return tensors


def _unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if short in plain:
            raise ValueError(f"two tensors are named {short}, one of them {name}")
        plain[short] = tensor
    return plain


def _told(content: Any) -> str:
    if isinstance(content, Mapping):
        return f"a dict of {', '.join(map(str, list(content)[:8]))}"
    return f"a {type(content).__name__}"
