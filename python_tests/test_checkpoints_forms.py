"""Backbones out of other projects' checkpoints: each form as that project writes it."""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from densecl_ext.checkpoints import formats, import_backbone, load_checkpoint, read_backbone
from densecl_ext.checkpoints.names import (
    from_detectron2,
    from_huggingface,
    from_sequential,
    to_detectron2,
    to_huggingface,
)

torchvision = pytest.importorskip("torchvision")
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    torch.manual_seed(2)
    network = torchvision.models.resnet18(weights=None)
    return {k: v for k, v in network.state_dict().items() if not k.startswith("fc.")}


def under(prefix: str, tensors: Tensors) -> Tensors:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def worse(prefix: str, tensors: Tensors) -> Tensors:
    """Another encoder of the same shape, which must not be taken."""
    return under(prefix, {name: tensor + 1 for name, tensor in tensors.items()})


def head(*names: str) -> Tensors:
    return {name: torch.zeros(2, 2) for name in names}


def moco_v3(t: Tensors) -> Any:
    state = under("module.base_encoder.", t) | worse("module.momentum_encoder.", t)
    state |= head("module.base_encoder.fc.0.weight", "module.predictor.0.weight")
    return {"epoch": 1, "arch": "resnet18", "state_dict": state}


def simsiam(t: Tensors) -> Any:
    state = under("module.encoder.", t)
    return {"state_dict": state | head("module.encoder.fc.0.weight", "module.predictor.0.weight")}


def pixpro(t: Tensors) -> Any:
    state = worse("module.encoder_k.", t) | under("module.encoder.", t)
    state |= head("module.projector.linear1.weight", "module.value_transform.weight")
    return {"opt": argparse.Namespace(lr=np.float64(0.1)), "model": state, "epoch": 100}


def soco(t: Tensors) -> Any:
    state = worse("module.encoder_k.", t) | under("module.encoder.", t)
    return {"model": state | head("module.projector.linear1.weight")}


def slotcon(t: Tensors) -> Any:
    state = worse("module.encoder_k.", t) | under("module.encoder_q.", t)
    return {"args": argparse.Namespace(), "model": state | head("module.grouping_q.slot.weight")}


def vicregl(t: Tensors) -> Any:
    heads = head("module.maps_projector.0.weight", "module.projector.0.weight")
    return {"epoch": 1, "model": under("module.backbone.", t) | heads}


def barlow_twins(t: Tensors) -> Any:
    return {"epoch": 1, "model": under("module.backbone.", t) | head("module.projector.0.weight")}


def simclr(t: Tensors) -> Any:
    heads = head("backbone.fc.0.weight")
    return {"epoch": 1, "arch": "resnet18", "state_dict": under("backbone.", t) | heads}


def solo_learn(t: Tensors) -> Any:
    state = under("backbone.", t) | worse("momentum_backbone.", t) | head("projector.0.weight")
    return {"state_dict": state, "pytorch-lightning_version": "2.0", "hyper_parameters": {"a": 1}}


def sequential(prefix: str) -> Callable[[Tensors], Any]:
    places = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}

    def form(t: Tensors) -> Any:
        named = {}
        for name, tensor in t.items():
            first, _, rest = name.partition(".")
            named[f"{prefix}{places[first]}.{rest}"] = tensor
        return {"state_dict": named | head("projection_head.layers.0.weight"), "epoch": 1}

    return form


def byol_mmselfsup(t: Tensors) -> Any:
    state = worse("target_net.module.0.", t) | under("online_net.0.", t)
    return {"meta": {}, "state_dict": state}


def byol_lucidrains(t: Tensors) -> Any:
    state = worse("target_encoder.net.", t) | under("online_encoder.net.", t)
    return state | head("online_encoder.projector.0.weight")


def byol_two_networks(t: Tensors) -> Any:
    return {"online_network_state_dict": sequential("encoder.")(t)["state_dict"]}


def swav(t: Tensors) -> Any:
    return under("module.", t) | head("module.projection_head.0.weight", "module.prototypes.weight")


def vissl(t: Tensors) -> Any:
    trunk = under("_feature_blocks.", t)
    model = {"trunk": trunk, "heads": {"0.clf.weight": torch.zeros(2, 2)}}
    return {"classy_state_dict": {"base_model": {"model": model, "meta": {}}}, "iteration": 3}


def dino(t: Tensors) -> Any:
    return {
        "student": worse("module.backbone.", t) | head("module.head.mlp.0.weight"),
        "teacher": under("backbone.", t) | head("head.mlp.0.weight"),
        "args": argparse.Namespace(arch="resnet18"),
        "epoch": np.int64(3),
        "dino_loss": {"center": torch.zeros(1, 4)},
    }


def timm_averaged(t: Tensors) -> Any:
    return {"state_dict": worse("", t), "state_dict_ema": dict(t), "arch": "resnet18"}


def hugging_face(t: Tensors) -> Any:
    named = {f"resnet.{to_huggingface(name)}": tensor for name, tensor in t.items()}
    return named | head("classifier.1.weight")


def hugging_face_bare(t: Tensors) -> Any:
    return {to_huggingface(name): tensor for name, tensor in t.items()}


def detectron2(t: Tensors) -> Any:
    named = {to_detectron2(name): v.numpy() for name, v in t.items() if "num_batches" not in name}
    return {"model": named, "__author__": "third parties", "matching_heuristics": True}


def detector(t: Tensors) -> Any:
    named = {f"backbone.bottom_up.{to_detectron2(name)}": tensor for name, tensor in t.items()}
    return {"model": named | head("roi_heads.box_head.fc1.weight"), "iteration": 90_000}


def wrapped(*wrappers: str) -> Callable[[Tensors], Any]:
    def form(t: Tensors) -> Any:
        return {"model": under("".join(f"{name}." for name in wrappers) + "encoder_q.", t)}

    return form


FORMS = [
    (moco_v3, "MoCo v3"),
    (simsiam, "SimSiam"),
    (pixpro, "PixPro"),
    (soco, "SoCo"),
    (slotcon, "SlotCon"),
    (vicregl, "VICRegL"),
    (barlow_twins, "Barlow Twins / VICReg"),
    (simclr, "SimCLR"),
    (solo_learn, "solo-learn"),
    (sequential("backbone."), "lightly"),
    (byol_mmselfsup, "BYOL (mmselfsup)"),
    (byol_lucidrains, "BYOL"),
    (byol_two_networks, "BYOL"),
    (swav, "SwAV"),
    (vissl, "VISSL"),
    (dino, "DINO"),
    (timm_averaged, "plain state dict"),
    (hugging_face, "Hugging Face ResNet"),
    (detectron2, "detectron2"),
    (detector, "detectron2"),
    (wrapped("module", "_orig_mod"), "MoCo"),
    (wrapped("_orig_mod", "module"), "MoCo"),
]


@pytest.mark.parametrize(("form", "name"), FORMS)
def test_forms(form: Callable[[Tensors], Any], name: str, tmp_path: Path, tensors: Tensors) -> None:
    content = form(tensors)
    if form is detectron2:
        (tmp_path / "theirs").write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, tmp_path / "theirs", _use_new_zipfile_serialization=name != "SwAV")
    read = read_backbone(tmp_path / "theirs")
    assert read.form == name and read.architecture == "resnet18"
    learnt = {key for key in tensors if "num_batches_tracked" not in key}
    assert learnt <= read.tensors.keys() <= tensors.keys()
    assert all(torch.equal(value, tensors[key]) for key, value in read.tensors.items())


Form = Callable[[Tensors], Any]


def prefixed(prefix: str, *beside: str) -> Form:
    return lambda t: under(prefix, t) | head(*beside)


def inside(container: str, form: Form = dict) -> Form:
    return lambda t: {container: form(t), "epoch": 1}


def run(t: Tensors) -> Any:
    model = under("backbone.", t) | worse("momentum_encoder.module.backbone.", t)
    return {"format": "densecl_ext", "version": 1, "model": model}


def mm(t: Tensors) -> Any:
    return {"meta": {}, "state_dict": under("backbone.", t) | head("neck.mlp.0.weight")}


def dino_student(t: Tensors) -> Any:
    return {"student": under("module.backbone.", t), "epoch": 3}


def hugging_face_under(prefix: str) -> Form:
    return lambda t: under(prefix, hugging_face_bare(t))


def detectron2_backbone(t: Tensors) -> Any:
    return {"model": {f"backbone.{to_detectron2(name)}": tensor for name, tensor in t.items()}}


# What else the tables name; names alone are looked at, so no file is needed.
OTHERS = [
    (run, "densecl_ext run"),
    (prefixed("encoder_q.", "encoder_q.dense_head.0.weight"), "DenseCL (CoinCheung)"),
    (prefixed("online_network.encoder."), "BYOL"),
    (prefixed("online_network.backbone."), "BYOL"),
    (prefixed("online_encoder."), "BYOL"),
    (prefixed("encoder."), "a model with an encoder"),
    (prefixed("_feature_blocks."), "VISSL"),
    (dino_student, "DINO"),
    (mm, "OpenSelfSup / mmselfsup / mmpretrain"),
    (prefixed("backbone."), "a model with a backbone"),
    (prefixed("encoder_q.0."), "OpenSelfSup encoder"),
    (sequential("query_encoder."), "lightly"),
    (sequential("student_backbone."), "lightly"),
    (sequential(""), "plain state dict"),
    (hugging_face_bare, "Hugging Face ResNet"),
    (hugging_face_under("backbone."), "Hugging Face ResNet"),
    (inside("encoder", hugging_face_bare), "Hugging Face ResNet"),
    (detectron2_backbone, "detectron2"),
    (inside("model_ema"), "plain state dict"),
    (inside("model_state_dict"), "plain state dict"),
    (inside("network"), "plain state dict"),
    (inside("net"), "plain state dict"),
    (inside("backbone", prefixed("encoder.")), "a model with an encoder"),
    (wrapped("_forward_module", "module", "_orig_mod"), "MoCo"),
    (wrapped("_fsdp_wrapped_module", "_checkpoint_wrapped_module"), "MoCo"),
    *((prefixed("", f"{part}0.weight"), "plain state dict") for part in (
        "fc.", "head.", "heads.", "dense_head.", "projector.", "predictor.", "classifier.")),
]  # fmt: skip


def as_named(content: Any, name: str, tensors: Tensors) -> bool:
    """Whether the backbone of a content is found, under the name of its form."""
    try:
        got, _, form = formats.extract_backbone(formats.find_tensors(content), content)
    except ValueError:
        return False
    whole = {key for key in tensors if "num_batches" not in key} <= got.keys() <= tensors.keys()
    return form == name and whole and all(torch.equal(got[key], tensors[key]) for key in got)


def test_every_entry_of_the_tables_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is left out in turn: some project's file must no longer be read as what it is."""
    with torch.device("meta"):
        names = list(torchvision.models.resnet18().state_dict())[:-2]
    small = {name: torch.full((1, 1, 1, 1), float(n)) for n, name in enumerate(names)}
    contents = [(form(small), name) for form, name in FORMS + OTHERS]
    assert all(as_named(*one, small) for one in contents)
    for table in ("FORMS", "CONTAINERS", "WRAPPERS", "HEADS"):
        whole = getattr(formats, table)
        for entry in whole:
            kept = type(whole)(other for other in whole if other is not entry)
            monkeypatch.setattr(formats, table, kept)
            assert not all(as_named(*one, small) for one in contents), f"{table}: {entry}"
        monkeypatch.setattr(formats, table, whole)


def test_what_no_table_knows(tmp_path: Path, tensors: Tensors) -> None:
    state = under("net.tower.", tensors) | head("net.other.weight")
    torch.save({"things": {"deep": state}, "step": 1}, tmp_path / "theirs.pth")
    with pytest.raises(ValueError) as caught:
        read_backbone(tmp_path / "theirs.pth")
    told = str(caught.value)
    for part in ("theirs.pth", "first names are things.deep.net.tower.conv1", "PixPro", "--prefix"):
        assert part in told
    assert "--prefix things.deep.net.tower." in told
    whole = import_backbone(
        tmp_path / "theirs.pth",
        tmp_path / "ours.pth",
        prefix="net.tower.",
        container="things.deep",
    )
    assert whole.form == "names after 'net.tower.'"
    assert torch.equal(load_checkpoint(whole.path)["conv1.weight"], tensors["conv1.weight"])
    assert read_backbone(tmp_path / "theirs.pth", prefix="module.things.deep.net.tower").tensors
    with pytest.raises(ValueError, match="no ResNet found after the prefix 'net'"):
        read_backbone(tmp_path / "theirs.pth", prefix="net", container="things.deep")
    with pytest.raises(ValueError, match="no container 'other'; it is a dict of things, step"):
        read_backbone(tmp_path / "theirs.pth", container="other")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_become_float32(tmp_path: Path, tensors: Tensors, dtype: torch.dtype) -> None:
    torch.save({k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()},
               tmp_path / "a.pth")  # fmt: skip
    read = read_backbone(tmp_path / "a.pth")
    assert {v.dtype for v in read.tensors.values()} == {torch.float32, torch.int64}
    assert any(str(dtype) in note for note in read.notes)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.uint8])
def test_weights_that_are_no_floats(tmp_path: Path, tensors: Tensors, dtype: torch.dtype) -> None:
    for key in ("conv1.weight", "layer2.0.bn1.running_var", "bn1.bias"):
        torch.save(tensors | {key: tensors[key].to(dtype)}, tmp_path / "a.pth")
        with pytest.raises(ValueError, match=f"a.pth: {key} has dtype"):
            read_backbone(tmp_path / "a.pth")


def test_impossible_statistics(tmp_path: Path, tensors: Tensors) -> None:
    for key, value in (
        ("bn1.running_var", -tensors["bn1.running_var"]),
        ("bn1.num_batches_tracked", torch.tensor(-1)),
        ("bn1.num_batches_tracked", torch.tensor(1.5)),
        ("bn1.weight", torch.ones(1).expand(64)),
    ):
        torch.save(tensors | {key: value}, tmp_path / "a.pth")
        with pytest.raises(ValueError, match=f"a.pth: {key}"):
            read_backbone(tmp_path / "a.pth")


def test_names_lead_there_and_back() -> None:
    for architecture in ("resnet18", "resnet50"):
        with torch.device("meta"):
            names = list(getattr(torchvision.models, architecture)().state_dict())[:-2]
        for to, back in ((to_huggingface, from_huggingface), (to_detectron2, from_detectron2)):
            assert len({to(name) for name in names}) == len(names)
            assert [back(to(name)) for name in names] == names
            with pytest.raises(ValueError, match="no tensor of a ResNet"):
                to("fc.weight")
    assert to_huggingface("layer3.0.downsample.1.weight") == (
        "encoder.stages.2.layers.0.shortcut.normalization.weight"
    )
    assert to_detectron2("layer1.2.bn3.running_mean") == "res2.2.conv3.norm.running_mean"
    assert from_sequential("7.1.bn2.bias") == "layer4.1.bn2.bias"
