"""Exports: each library loads its own, and what was there stays until the new file is proven."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from densecl_ext.checkpoints import (
    TARGETS,
    export_backbone,
    import_backbone,
    load_backbone,
    load_checkpoint,
    read_backbone,
    save_checkpoint,
)
from densecl_ext.cli import exchanging

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    network = torchvision.models.resnet18(weights=None)
    for name, buffer in network.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2.0)
    model = {f"backbone.{k}": v for k, v in network.state_dict().items() if k[:3] != "fc."}
    folder = tmp_path_factory.mktemp("run")
    (folder / "checkpoints").mkdir()
    (folder / "config.yaml").write_text("epochs: 3\n")
    save_checkpoint(
        folder / "checkpoints" / "last.pt",
        {
            "format": "densecl_ext",
            "version": 1,
            "densecl_ext": "1.2",
            "config": {"backbone": "resnet18", "epochs": 3, "data": "/secret", "batch_size": 4},
            "data": {"images": 40},
            "step": 30,
            "model": model,
        },
    )
    return folder


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def expected(run: Path, images: Tensor) -> Tensor:
    with torch.no_grad():
        return load_backbone(run)(images)


def test_the_command_line_knows_all_targets() -> None:
    assert exchanging.TARGETS == TARGETS


def test_safetensors_by_the_ending(run: Path, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    file = tmp_path / "a.safetensors"
    written = export_backbone(run, file)
    theirs = torchvision.models.resnet18()
    theirs.load_state_dict(safetensors.load_file(file), strict=True)
    assert "safetensors.torch.load_file" in written.usage
    data = bytearray(file.read_bytes())
    data[-1000] ^= 4
    file.write_bytes(data)
    with pytest.raises(ValueError, match="a.safetensors is damaged.*do not match the checksum"):
        load_checkpoint(file)


def test_provenance_travels(run: Path, tmp_path: Path) -> None:
    written = export_backbone(run, tmp_path / "a.pth")
    state = torch.load(tmp_path / "a.pth")  # torch's own restricted reader takes it
    torchvision.models.resnet18().load_state_dict(state, strict=True)
    words = state._metadata["densecl_ext"]
    assert (words["steps"], words["images"], words["program"]) == (30, 40, "densecl_ext 1.2")
    assert words["normalisation"]["mean"] == [0.485, 0.456, 0.406]
    assert words["recipe"] == {"backbone": "resnet18", "epochs": 3, "batch_size": 4}
    assert "/secret" not in (tmp_path / "a.pth").read_bytes().decode("latin1")
    assert any("0.485, 0.456, 0.406" in note and "RGB" in note for note in written.notes)
    card = (tmp_path / "a.pth.md").read_text()
    for part in ("30", "40", "0.229", "Licence", "batch_size: 4", "torchvision.models.resnet18()"):
        assert part in card
    assert str(tmp_path) not in card
    # And through a second file.
    import_backbone(tmp_path / "a.pth", tmp_path / "b.safetensors")
    assert read_backbone(tmp_path / "b.safetensors").provenance["steps"] == 30
    (tmp_path / "a.pth.md").write_text("my own notes")
    export_backbone(run, tmp_path / "a.pth")
    assert (tmp_path / "a.pth.md").read_text() == "my own notes"


def test_mmengine(run: Path, tmp_path: Path, images: Tensor, expected: Tensor) -> None:
    """What `load_checkpoint` of mmengine does: state_dict, names of a torchvision-like ResNet."""
    written = export_backbone(run, tmp_path / "m.pth", "mmengine")
    content = torch.load(tmp_path / "m.pth")
    assert content["meta"]["densecl_ext"]["images"] == 40
    wanted = {k for k in torchvision.models.resnet18().state_dict() if k[:3] != "fc."}
    assert content["state_dict"].keys() == wanted
    assert "bgr_to_rgb=True" in written.usage and "123.675" in written.usage
    with torch.no_grad():
        assert torch.equal(load_backbone(tmp_path / "m.pth")(images), expected)
    with pytest.raises(ValueError, match=r"must end in .pth or .pt, got .*m.safetensors"):
        export_backbone(run, tmp_path / "m.safetensors", "mmengine")


@pytest.mark.parametrize("name", ["d.pkl", "d.pth"])
def test_detectron2(run: Path, tmp_path: Path, images: Tensor, expected: Tensor, name: str) -> None:
    written = export_backbone(run, tmp_path / name, "detectron2")
    if name == "d.pkl":
        content = pickle.loads((tmp_path / name).read_bytes(), encoding="latin1")
    else:
        content = torch.load(tmp_path / name)
    assert content["matching_heuristics"] is True and content["__author__"] == "densecl_ext"
    names = set(content["model"])
    assert {"stem.conv1.weight", "stem.conv1.norm.running_var", "res5.1.conv2.weight"} <= names
    assert "res3.0.shortcut.norm.bias" in names and len(names) == 100
    for line in ("STRIDE_IN_1X1 = False", "PIXEL_MEAN = [123.675", 'FORMAT = "RGB"', "DEPTH = 18"):
        assert line in written.usage
    with torch.no_grad():
        assert torch.equal(load_backbone(tmp_path / name)(images), expected)
    with pytest.raises(ValueError, match=r"must end in .pkl or .pth"):
        export_backbone(run, tmp_path / "d.safetensors", "detectron2")


def test_huggingface(run: Path, tmp_path: Path, images: Tensor, expected: Tensor) -> None:
    pytest.importorskip("safetensors")
    hub = tmp_path / "hub"
    export_backbone(run, hub, "huggingface")
    network = timm.create_model(f"local-dir:{hub}", pretrained=True, num_classes=0).eval()
    with torch.no_grad():
        assert torch.equal(network.forward_features(images), expected)
        assert torch.equal(load_backbone(hub)(images), expected)
    assert list(network.pretrained_cfg["mean"]) == [0.485, 0.456, 0.406]
    config = json.loads((hub / "config.json").read_text())
    assert config["model_type"] == "resnet" and config["architecture"] == "resnet18"
    assert "Model card" in (hub / "README.md").read_text()
    assert not [path for path in tmp_path.iterdir() if path.name != "hub"]
    with pytest.raises(ValueError, match="is the folder of a run"):
        export_backbone(run, run, "huggingface")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="must be a folder"):
        export_backbone(run, tmp_path / "file", "huggingface")


@pytest.mark.slow
def test_transformers(run: Path, tmp_path: Path, images: Tensor, expected: Tensor) -> None:
    transformers = pytest.importorskip("transformers")
    export_backbone(run, tmp_path / "hub", "huggingface")
    network = transformers.ResNetBackbone.from_pretrained(str(tmp_path / "hub")).eval()
    with torch.no_grad():
        assert torch.allclose(network(images).feature_maps[-1], expected, atol=1e-4)
    processor = transformers.AutoImageProcessor.from_pretrained(str(tmp_path / "hub"))
    assert list(processor.image_mean) == [0.485, 0.456, 0.406]


@pytest.mark.slow
def test_onnx(run: Path, tmp_path: Path, expected: Tensor, images: Tensor) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    export_backbone(run, tmp_path / "a.onnx", "onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"))
    (result,) = session.run(None, {"images": images.numpy()})
    assert torch.allclose(torch.from_numpy(result), expected, atol=1e-3)
    words = {p.key: p.value for p in onnx.load(tmp_path / "a.onnx").metadata_props}
    assert json.loads(words["densecl_ext"])["steps"] == 30
    with pytest.raises(ValueError, match=r"must end in .onnx"):
        export_backbone(run, tmp_path / "a.pth", "onnx")


# ---------------------------------------------------------------- what is there is not lost


def test_a_failed_write_keeps_the_file(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new file is read back before it takes the name, whatever is wrong with it."""
    pytest.importorskip("safetensors")
    import safetensors.torch

    save, save_safe = torch.save, safetensors.torch.save

    def change(tensors: Any) -> Any:
        changed = type(tensors)(tensors)
        changed["conv1.weight"] = changed["conv1.weight"] + 1
        return changed

    monkeypatch.setattr(torch, "save", lambda content, file: save(change(content), file))
    monkeypatch.setattr(safetensors.torch, "save", lambda t, m: save_safe(change(t), m))
    for name in ("a.pth", "a.safetensors"):
        (tmp_path / name).write_bytes(b"good")
        with pytest.raises(RuntimeError, match="reading the file back gave other weights"):
            export_backbone(run, tmp_path / name)
        with pytest.raises(RuntimeError, match="reading the file back gave other weights"):
            import_backbone(run, tmp_path / name)
        assert (tmp_path / name).read_bytes() == b"good"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "a.safetensors"]


def test_outputs_that_would_cost_something(run: Path, tmp_path: Path) -> None:
    last = run / "checkpoints" / "last.pt"
    before = last.read_bytes()
    (tmp_path / "link.pt").symlink_to(last)
    os.mkfifo(tmp_path / "pipe")
    for output, told in (
        (last, "is the checkpoint itself"),
        (tmp_path / "link.pt", "is the checkpoint itself"),
        (run / "checkpoints" / "other.pt", "among the files of a run"),
        (run / "config.yaml", "among the files of a run"),
        (run / "metrics.csv", "among the files of a run"),
        ("/dev/null", "must be a regular file"),
        (tmp_path / "pipe", "must be a regular file"),
        (tmp_path, "must be a regular file"),
        ("", "must be a regular file|empty name"),
    ):
        for write in (export_backbone, import_backbone):
            with pytest.raises(ValueError, match=told):
                write(run, output)
    assert last.read_bytes() == before
    export_backbone(run, run / "backbone.pth")  # beside the run's own files is a good place
    (run / "backbone.pth").unlink()
    (run / "backbone.pth.md").unlink()


@pytest.mark.parametrize("to", ["torchvision", "huggingface", "detectron2"])
def test_a_full_disk_names_the_output(run: Path, tmp_path: Path, to: str) -> None:
    name = {"torchvision": "a.safetensors", "huggingface": "hub", "detectron2": "a.pkl"}[to]
    program = f"""
import resource, signal
from densecl_ext.checkpoints import export_backbone
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
try:
    export_backbone({str(run)!r}, {str(tmp_path / name)!r}, {to!r})
except OSError as error:
    print(error)
"""
    root = Path(__file__).resolve().parent.parent
    told = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert "File too large" in told.stdout and str(tmp_path / name) in told.stdout, told.stderr
    assert "unfinished" not in told.stdout and not list(tmp_path.iterdir())
