"""Files of every family and option: out of a run, into the library, and back."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from densecl_ext.backbones import build_backbone
from densecl_ext.checkpoints import (
    export_backbone,
    import_backbone,
    load_backbone,
    read_backbone,
    save_checkpoint,
)
from densecl_ext.cli import main

models = pytest.importorskip("torchvision.models")

SHORT = {"output_stride": 8, "truncate": True}


def run_file(path: Path, backbone: nn.Module, name: str, **options: Any) -> Path:
    config = {"backbone": name, "output_stride": None, "padding": "zeros", **options}
    model = {f"backbone.{k}": v for k, v in backbone.state_dict().items()}
    model |= {f"momentum_encoder.module.{k}": v + 1 for k, v in model.items()}
    save_checkpoint(path, {"format": "densecl_ext", "config": config, "model": model})
    return path


def stage_output(network: Any, stage: str, images: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = network.get_submodule(stage).register_forward_hook(lambda m, a, o: seen.append(o))
    network.eval()(images)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize(
    ("name", "classifier"),
    [("regnet_x_400mf", "fc.weight and fc.bias are"), ("convnext_tiny", "classifier.2.bias are")],
)
@torch.no_grad()
def test_every_family_goes_out_and_comes_in(tmp_path: Path, name: str, classifier: str) -> None:
    backbone = build_backbone(name).eval()
    run = run_file(tmp_path / "run.pt", backbone, name)
    written = export_backbone(run, tmp_path / "out.pth")
    assert written.architecture == name and classifier in written.notes[0]
    network = models.get_model(name)
    network.load_state_dict(torch.load(tmp_path / "out.pth"), strict=True)
    images = torch.randn(1, 3, 64, 96)
    assert torch.equal(stage_output(network, backbone.last_stage, images), backbone(images))

    export_backbone(run, tmp_path / "ours.pth", "backbone")
    assert torch.equal(load_backbone(tmp_path / "ours.pth")(images), backbone(images))
    # An export says which network it is; the same tensors alone do not.
    assert torch.equal(load_backbone(tmp_path / "out.pth")(images), backbone(images))
    torch.save(dict(torch.load(tmp_path / "out.pth")), tmp_path / "bare.pth")
    with pytest.raises(ValueError, match="another network must be named"):
        read_backbone(tmp_path / "bare.pth")
    imported = import_backbone(tmp_path / "bare.pth", tmp_path / "in.pth", architecture=name)
    assert imported.left_out and imported.tensors.keys() == backbone.state_dict().keys()
    assert torch.equal(load_backbone(tmp_path / "in.pth")(images), backbone(images))
    with pytest.raises(ValueError, match="timm has other names.*'torchvision' or 'backbone'"):
        export_backbone(run, tmp_path / "x.pth", "timm")
    assert not (tmp_path / "x.pth").exists()


@pytest.mark.parametrize("options", [{"output_stride": 8}, {"padding": "reflect"}])
@torch.no_grad()
def test_dilated_and_padded_runs_load_strictly(tmp_path: Path, options: dict[str, Any]) -> None:
    backbone = build_backbone("resnet18", **options).eval()
    run = run_file(tmp_path / "run.pt", backbone, "resnet18", **options)
    images = torch.randn(1, 3, 64, 96)
    assert torch.equal(load_backbone(run)(images), backbone(images))
    for to in ("torchvision", "backbone"):
        written = export_backbone(run, tmp_path / f"{to}.pth", to)
        assert not written.missing and written.options == options
        told = ", ".join(f"{key}={value}" for key, value in options.items())
        assert f"pre-trained with {told}; the library's own network" in written.notes[0]
    models.resnet18().load_state_dict(torch.load(tmp_path / "torchvision.pth"), strict=True)
    assert torch.equal(load_backbone(tmp_path / "backbone.pth")(images), backbone(images))
    assert read_backbone(tmp_path / "torchvision.pth").options == {}


@pytest.mark.parametrize("to", ["torchvision", "timm"])
@torch.no_grad()
def test_truncated_runs_say_what_is_missing(tmp_path: Path, to: str) -> None:
    pytest.importorskip("timm")
    backbone = build_backbone("resnet18", padding="replicate", **SHORT).eval()
    run = run_file(tmp_path / "run.pt", backbone, "resnet18", padding="replicate", **SHORT)
    images = torch.randn(1, 3, 64, 96)
    assert torch.equal(load_backbone(run)(images), backbone(images))
    written = export_backbone(run, tmp_path / "out.pth", to)
    assert written.missing == ("layer3", "layer4")
    assert "layer3, layer4 are missing" in written.notes[1] and "strict=False" in written.notes[1]
    network = models.resnet18()
    kept = network.load_state_dict(torch.load(tmp_path / "out.pth"), strict=False)
    assert not kept.unexpected_keys
    assert {key.partition(".")[0] for key in kept.missing_keys} == {"layer3", "layer4", "fc"}
    plain = build_backbone("resnet18", **SHORT).eval()
    plain.load_state_dict(backbone.state_dict())
    assert torch.equal(stage_output(network, "layer2", images), plain(images))

    export_backbone(run, tmp_path / "ours.pth", "backbone")
    assert torch.equal(load_backbone(tmp_path / "ours.pth")(images), backbone(images))
    with pytest.raises(ValueError, match="no ResNet found|nearest is resnet18: .* missing"):
        read_backbone(tmp_path / "out.pth")  # without the word of the run, it is half a network


def test_the_command_says_that_it_is_no_whole_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone = build_backbone("resnet18", **SHORT)
    run = run_file(tmp_path / "run.pt", backbone, "resnet18", **SHORT)
    assert main(["export", str(run), "--output", str(tmp_path / "out.pth")]) == 0
    told = capsys.readouterr().out
    assert "loaded into torchvision's model without layer3, layer4, features equal" in told
    assert "strictly" not in told and "out.pth'), strict=False)" in told


@torch.no_grad()
def test_truncated_weights_that_differ_fail_loudly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import densecl_ext.checkpoints.exchange as exchange

    def other(name: str, **options: Any) -> nn.Module:
        backbone = build_backbone(name, **options)
        backbone.bn1.eps = 0.1
        return backbone

    backbone = build_backbone("resnet18", **SHORT)
    run = run_file(tmp_path / "run.pt", backbone, "resnet18", **SHORT)
    lacking = run_file(tmp_path / "lacking.pt", backbone.layer1, "resnet18", **SHORT)
    with pytest.raises(ValueError, match="not exactly the network.*missing"):
        export_backbone(lacking, tmp_path / "out.pth")
    monkeypatch.setattr(exchange, "build_backbone", other)
    with pytest.raises(RuntimeError, match="other features.*nothing was written"):
        export_backbone(run, tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("timm/test_convnext", {"output_stride": 8}),
        ("timm/test_convnext", {"output_stride": 16, "truncate": True}),
        ("timm/test_efficientnet", {"output_stride": 8, "truncate": True}),
    ],
)
@torch.no_grad()
def test_timms_networks_too(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    timm = pytest.importorskip("timm")
    backbone = build_backbone(name, **options).eval()
    run = run_file(tmp_path / "run.pt", backbone, name, **options)
    images = torch.randn(1, 3, 64, 96)
    assert torch.equal(load_backbone(run)(images), backbone(images))
    written = export_backbone(run, tmp_path / "out.pth", "timm")
    assert written.missing == backbone.left_out
    network = timm.create_model(name.removeprefix("timm/"), num_classes=0)
    network.load_state_dict(torch.load(tmp_path / "out.pth"), strict=not written.missing)
    for key, value in backbone.state_dict().items():
        assert torch.equal(network.state_dict()[key], value)
    export_backbone(run, tmp_path / "ours.pth", "backbone")
    assert torch.equal(load_backbone(tmp_path / "ours.pth")(images), backbone(images))


@torch.no_grad()
def test_a_file_of_a_network_that_had_to_be_truncated(tmp_path: Path) -> None:
    """The run asked for an output stride alone; what became of it stands in no option."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        backbone = build_backbone("convnext_tiny", output_stride=16).eval()
        run = run_file(tmp_path / "run.pt", backbone, "convnext_tiny", output_stride=16)
        written = export_backbone(run, tmp_path / "out.pth")
        images = torch.randn(1, 3, 64, 96)
        assert torch.equal(load_backbone(run)(images), backbone(images))
    assert written.missing == ("features.6", "features.7")
    assert not models.convnext_tiny().load_state_dict(written.tensors, strict=False).unexpected_keys
