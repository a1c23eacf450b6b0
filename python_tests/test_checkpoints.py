"""Atomic files, and backbones that go out to torchvision and come in from other projects."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from densecl_ext.checkpoints import (
    export_backbone,
    import_backbone,
    load_backbone,
    load_checkpoint,
    read_backbone,
    save_checkpoint,
)
from densecl_ext.checkpoints.storage import atomic_file

torchvision = pytest.importorskip("torchvision")


# ---------------------------------------------------------------- storage


def test_a_crash_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "last.pt"
    save_checkpoint(file, {"step": 1})

    class Crash(Exception):
        pass

    with pytest.raises(Crash), atomic_file(file) as out:
        out.write(b"half of it")
        raise Crash
    assert load_checkpoint(file) == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]
    save_checkpoint(file, {"step": 2})
    assert load_checkpoint(file) == {"step": 2}


def test_full_disk_is_an_error_that_says_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "last.pt"

    def full(state: Any, out: Any) -> None:
        out.write(b"some")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match=r"last.pt .*No space left.*nothing was written"):
            save_checkpoint(file, {})
    save_checkpoint(file, {"step": 1})
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="the previous one is intact"):
        save_checkpoint(file, {})
    monkeypatch.undo()
    assert load_checkpoint(file) == {"step": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_checkpoint(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("hello, this is not a checkpoint")
    with pytest.raises(ValueError, match="text.pt"):
        load_checkpoint(tmp_path / "text.pt")
    whole = tmp_path / "whole.pt"
    save_checkpoint(whole, {"a": torch.zeros(10_000)})
    (tmp_path / "cut.pt").write_bytes(whole.read_bytes()[:5000])
    with pytest.raises(ValueError, match="cut.pt is damaged or cut short"):
        load_checkpoint(tmp_path / "cut.pt")


class Unsafe:
    pass


def test_pickled_objects_need_trust(tmp_path: Path) -> None:
    torch.save({"x": Unsafe()}, tmp_path / "objects.pt")
    with pytest.raises(ValueError, match="trusted=True"):
        load_checkpoint(tmp_path / "objects.pt")
    assert isinstance(load_checkpoint(tmp_path / "objects.pt", trusted=True)["x"], Unsafe)


# ---------------------------------------------------------------- export


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    """A resnet18 with statistics that are not the initial ones."""
    torch.manual_seed(1)
    network = torchvision.models.resnet18(weights=None)
    with torch.no_grad():
        for name, buffer in network.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
    return network.eval()


@pytest.fixture(scope="module")
def backbone_tensors(network: torch.nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in network.state_dict().items() if not k.startswith("fc.")}


def run_checkpoint(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What a run's checkpoint looks like to an export: other encoders beside the query backbone."""
    model = {f"backbone.{k}": v for k, v in tensors.items()}
    model |= {f"momentum_encoder.module.backbone.{k}": v + 1 for k, v in tensors.items()}
    model["neck.dense_head.0.weight"] = torch.zeros(3)
    return {"format": "densecl_ext", "version": 1, "model": model, "step": 7}


def features(network: Any, images: Tensor) -> Tensor:
    x = network.maxpool(network.relu(network.bn1(network.conv1(images))))
    return network.layer4(network.layer3(network.layer2(network.layer1(x))))


def test_export_loads_strictly_into_torchvision(
    tmp_path: Path, network: torch.nn.Module, backbone_tensors: dict[str, Tensor]
) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    save_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt", run_checkpoint(backbone_tensors))
    state = torch.get_rng_state()
    written = export_backbone(tmp_path / "run", tmp_path / "out" / "backbone.pth")
    assert torch.equal(torch.get_rng_state(), state)
    assert written.architecture == "resnet18"
    assert any("fc.weight" in note and "random" in note for note in written.notes)

    theirs = torchvision.models.resnet18()
    theirs.load_state_dict(torch.load(tmp_path / "out" / "backbone.pth"), strict=True)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(features(theirs.eval(), images), features(network, images))
        assert torch.equal(load_backbone(written.path)(images), features(network, images))
    # The same export again gives the same file contents, fc included.
    again = export_backbone(tmp_path / "run", tmp_path / "again.pth")
    assert all(torch.equal(again.tensors[k], v) for k, v in written.tensors.items())


def test_export_without_fc(tmp_path: Path, backbone_tensors: dict[str, Tensor]) -> None:
    save_checkpoint(tmp_path / "run.pt", run_checkpoint(backbone_tensors))
    bare = export_backbone(tmp_path / "run.pt", tmp_path / "bare.pth", fc=False)
    assert load_checkpoint(tmp_path / "bare.pth").keys() == backbone_tensors.keys()
    assert "strict=False" in bare.notes[0]
    plain = export_backbone(tmp_path / "run.pt", tmp_path / "plain.pth", "backbone")
    assert plain.tensors.keys() == backbone_tensors.keys()
    with pytest.raises(ValueError, match="one of torchvision, timm, backbone.*, got 'caffe'"):
        export_backbone(tmp_path / "run.pt", tmp_path / "x.pth", "caffe")


def test_export_fails_loudly_when_features_differ(
    tmp_path: Path, backbone_tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    import densecl_ext.checkpoints.exchange as exchange

    build = exchange.build_backbone

    def other_stride(name: str) -> torch.nn.Module:
        backbone: Any = build(name)
        backbone.layer4[0].conv1.stride = (1, 1)
        backbone.layer4[0].downsample[0].stride = (1, 1)
        backbone.maxpool.stride = 4
        return backbone

    save_checkpoint(tmp_path / "run.pt", run_checkpoint(backbone_tensors))
    monkeypatch.setattr(exchange, "build_backbone", other_stride)
    with pytest.raises(RuntimeError, match="other features.*nothing was written"):
        export_backbone(tmp_path / "run.pt", tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()


def test_export_of_nan_weights_fails(tmp_path: Path, backbone_tensors: dict[str, Tensor]) -> None:
    broken = backbone_tensors | {"conv1.weight": backbone_tensors["conv1.weight"] * torch.nan}
    save_checkpoint(tmp_path / "run.pt", run_checkpoint(broken))
    with pytest.raises(RuntimeError, match="nothing was written"):
        export_backbone(tmp_path / "run.pt", tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()


def test_export_of_another_network_is_an_error(tmp_path: Path) -> None:
    model = {"backbone.layers.0.weight": torch.zeros(3)}
    save_checkpoint(tmp_path / "run.pt", {"format": "densecl_ext", "model": model})
    with pytest.raises(ValueError, match="no ResNet found.*model.backbone.layers.0.weight"):
        export_backbone(tmp_path / "run.pt", tmp_path / "out.pth")


# ---------------------------------------------------------------- import


def moco(tensors: dict[str, Tensor]) -> dict[str, Any]:
    state = {f"module.encoder_q.{k}": v for k, v in tensors.items()}
    state |= {f"module.encoder_k.{k}": v + 1 for k, v in tensors.items()}
    state |= {"module.encoder_q.fc.0.weight": torch.zeros(2), "module.queue": torch.zeros(2, 2)}
    return {"epoch": 200, "arch": "resnet18", "state_dict": state}


def coin(tensors: dict[str, Tensor]) -> dict[str, Any]:
    content = moco(tensors)
    content["state_dict"]["module.encoder_q.dense_head.0.weight"] = torch.zeros(2)
    return content


def openselfsup(tensors: dict[str, Tensor]) -> dict[str, Any]:
    state = {f"encoder_q.0.{k}": v for k, v in tensors.items()}
    state |= {f"encoder_k.0.{k}": v + 1 for k, v in tensors.items()}
    state |= {f"backbone.{k}": v for k, v in tensors.items()}
    return {"meta": {"epoch": 3}, "state_dict": state | {"queue2": torch.zeros(2, 2)}}


def mmpretrain(tensors: dict[str, Tensor]) -> dict[str, Any]:
    state = {f"backbone.{k}": v for k, v in tensors.items()}
    state |= {f"encoder_k.module.0.{k}": v + 1 for k, v in tensors.items()}
    return {"meta": {}, "state_dict": state | {"neck.mlp.0.weight": torch.zeros(2)}}


def extracted(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {"state_dict": dict(tensors), "author": "DenseCL"}


def old_torch(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {k: v for k, v in tensors.items() if "num_batches_tracked" not in k}


@pytest.mark.parametrize(
    ("form", "left_out"),
    [
        (moco, ["fc.0.weight"]),
        (coin, ["dense_head.0.weight", "fc.0.weight"]),
        (openselfsup, []),
        (mmpretrain, []),
        (extracted, []),
        (old_torch, []),
        (dict, []),
    ],
)
def test_forms_of_other_projects(
    form: Callable[[dict[str, Tensor]], dict[str, Any]],
    left_out: list[str],
    tmp_path: Path,
    backbone_tensors: dict[str, Tensor],
) -> None:
    torch.save(form(backbone_tensors), tmp_path / "theirs.pth")
    read = read_backbone(tmp_path / "theirs.pth")
    assert read.left_out == left_out and read.architecture == "resnet18"
    assert all(torch.equal(v, backbone_tensors[k]) for k, v in read.tensors.items())
    learnt = {k for k in backbone_tensors if "num_batches_tracked" not in k}
    assert learnt <= read.tensors.keys() <= backbone_tensors.keys()


def test_imported_file_is_a_backbone(
    tmp_path: Path, network: torch.nn.Module, backbone_tensors: dict[str, Tensor]
) -> None:
    torch.save(moco(old_torch(backbone_tensors)), tmp_path / "theirs.pth")
    import_backbone(tmp_path / "theirs.pth", tmp_path / "ours.pth", architecture="resnet18")
    images = torch.randn(1, 3, 64, 64)
    backbone = load_backbone(tmp_path / "ours.pth")
    assert not backbone.training
    with torch.no_grad():
        assert torch.equal(backbone(images), features(network, images))


def test_import_is_strict(tmp_path: Path, backbone_tensors: dict[str, Tensor]) -> None:
    def attempt(tensors: Any, message: str, **options: Any) -> None:
        torch.save(tensors, tmp_path / "theirs.pth")
        with pytest.raises(ValueError, match=message):
            import_backbone(tmp_path / "theirs.pth", tmp_path / "ours.pth", **options)
        assert not (tmp_path / "ours.pth").exists()

    missing = {k: v for k, v in backbone_tensors.items() if k != "layer3.0.conv1.weight"}
    attempt(missing, r"nearest is resnet18: 1 missing \(layer3.0.conv1.weight\)")
    attempt(backbone_tensors | {"stem.0.weight": torch.zeros(1)}, "1 unexpected .stem.0.weight")
    small = backbone_tensors | {"conv1.weight": torch.zeros(64, 3, 5, 5)}
    attempt(small, "1 of another shape .conv1.weight")
    attempt(backbone_tensors, "holds a resnet18, expected resnet50", architecture="resnet50")
    attempt({"weights": [1, 2]}, "expected a state_dict.*got a dict of weights")
    attempt([1], "got a list")


def test_a_network_of_gray_images_says_so(
    tmp_path: Path, backbone_tensors: dict[str, Tensor]
) -> None:
    gray = backbone_tensors | {"conv1.weight": torch.rand(64, 1, 7, 7)}
    torch.save(moco(gray), tmp_path / "theirs.pth")
    written = import_backbone(tmp_path / "theirs.pth", tmp_path / "ours.pth")
    assert written.in_channels == 1 and "images of 1 channels" in " ".join(written.notes)
    assert "does not state" in written.provenance["normalisation"]["channels"]
    assert load_backbone(tmp_path / "ours.pth")(torch.rand(2, 1, 64, 64)).shape[0] == 2


def test_architecture_is_told_by_names_and_shapes(tmp_path: Path) -> None:
    with torch.device("meta"):
        shapes = torchvision.models.wide_resnet50_2().state_dict()
    torch.save({k: torch.zeros(v.shape) for k, v in shapes.items()}, tmp_path / "wide.pth")
    assert read_backbone(tmp_path / "wide.pth").architecture == "wide_resnet50_2"
