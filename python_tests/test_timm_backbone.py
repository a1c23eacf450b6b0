"""Networks of timm as backbones: their grids, their names, and the way back into timm."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

timm = pytest.importorskip("timm")

from data_images import scene
from train_runs import image_folder, tiny_config

from densecl_ext import DenseCL
from densecl_ext.backbones import RESNETS, build_backbone, feature_channels
from densecl_ext.checkpoints import (
    export_backbone,
    import_backbone,
    load_backbone,
    load_checkpoint,
    read_backbone,
    save_checkpoint,
)
from densecl_ext.cli import main
from densecl_ext.evaluate.features import extract_features, input_size
from densecl_ext.visualize import find_matches

VIT = "timm/vit_tiny_patch16_224"
SMALL = "timm/test_vit"  # timm's own for tests: 0.37 million weights, 160 px, patches of 16


def theirs(name: str, **options: Any) -> Any:
    return timm.create_model(name.removeprefix("timm/"), num_classes=0, **options)


@pytest.fixture(scope="module")
def small() -> torch.nn.Module:
    torch.manual_seed(1)
    return build_backbone(SMALL).eval()


@pytest.mark.parametrize(
    ("name", "size", "channels", "stride", "prefix"),
    [
        (VIT, (224, 224), 192, 16, 1),
        (VIT, (64, 96), 192, 16, 1),
        ("timm/deit_tiny_distilled_patch16_224", (64, 64), 192, 16, 2),
        ("timm/test_vit2", (32, 64), 64, 16, None),
        ("timm/test_vit3", (48, 64), 96, 16, None),
        ("timm/test_convnext", (64, 96), 64, 32, None),
        ("timm/swin_tiny_patch4_window7_224", (64, 96), 768, 32, None),
    ],
)
@torch.no_grad()
def test_position_is_place(
    name: str, size: tuple[int, int], channels: int, stride: int, prefix: int | None
) -> None:
    """Every grid position holds the token of its place, by timm's own arrangement of them."""
    backbone = build_backbone(name).eval()
    height, width = size[0] // stride, size[1] // stride
    images = torch.randn(2, 3, *size)
    grid = backbone(images)
    assert feature_channels(backbone) == backbone.out_channels == channels
    assert grid.shape == (2, channels, height, width)
    raw = backbone.network.forward_features(images)
    if prefix is not None:
        assert backbone.prefix_tokens == prefix
    for row, column in ((0, 0), (0, width - 1), (height - 1, 0), (height - 1, width - 1)):
        if raw.dim() == 3:
            before = raw.shape[1] - height * width
            expected = raw[:, before + row * width + column]
        elif "swin" in name:
            expected = raw[:, row, column]
        else:
            expected = raw[:, :, row, column]
        assert torch.equal(grid[:, :, row, column], expected)


@torch.no_grad()
def test_a_patch_moves_its_own_position() -> None:
    """Through the patch embedding alone, one changed patch changes one position of the grid."""
    backbone = build_backbone(VIT).eval()
    backbone.network.blocks = torch.nn.Sequential()  # attention would spread the change
    images = torch.randn(1, 3, 64, 96)
    changed = images.clone()
    changed[:, :, 32:48, 80:96] += 1.0
    moved = (backbone(images) != backbone(changed)).any(dim=1)[0]
    assert moved.nonzero().tolist() == [[2, 5]]


def test_state_dict_is_timms(small: torch.nn.Module) -> None:
    network = theirs(SMALL)
    assert list(small.state_dict()) == list(network.state_dict())
    twin = build_backbone(SMALL)
    twin.load_state_dict(network.state_dict())
    assert all(torch.equal(v, network.state_dict()[k]) for k, v in twin.state_dict().items())
    with pytest.raises(RuntimeError, match="Missing.*cls_token"):
        twin.load_state_dict({k: v for k, v in network.state_dict().items() if k != "cls_token"})
    with pytest.raises(RuntimeError, match="Unexpected.*another"):
        twin.load_state_dict({**network.state_dict(), "another": torch.zeros(1)})


def test_a_weights_file_of_timms(tmp_path: Path) -> None:
    network = timm.create_model("test_vit", num_classes=7)
    torch.save(network.state_dict(), tmp_path / "timm.pth")
    backbone = build_backbone(SMALL, weights=tmp_path / "timm.pth")
    assert all(torch.equal(v, network.state_dict()[k]) for k, v in backbone.state_dict().items())
    with pytest.raises(ValueError, match="does not fit"):
        build_backbone("timm/test_vit2", weights=tmp_path / "timm.pth")
    with pytest.raises(ValueError, match="must be a file, got 'DEFAULT'"):
        build_backbone(SMALL, weights="DEFAULT")


def test_what_does_not_fit_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="did you mean timm/vit_tiny_patch16_224"):
        build_backbone("timm/vit_tny_patch16_224")
    with pytest.raises(ValueError, match=r"multiples of 16, got 100 x 96"):
        build_backbone(SMALL)(torch.zeros(1, 3, 100, 96))
    with pytest.raises(ValueError, match=r"must have 224 x 224 pixels.*got 64 x 64"):
        build_backbone("timm/mixer_s32_224")(torch.zeros(1, 3, 64, 64))
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"densecl_ext\[timm\]"):
        build_backbone(SMALL)


def test_features_that_are_no_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    from timm.models.vision_transformer import VisionTransformer

    monkeypatch.setattr(VisionTransformer, "forward_features", lambda self, x: x.mean((2, 3)))
    with pytest.raises(ValueError, match=r"gives features \(1, 3\).*no grid"):
        build_backbone(SMALL)


@pytest.mark.parametrize("name", [SMALL, "timm/test_convnext"])
def test_a_training_step(name: str) -> None:
    """Key batch-norm groups change nothing where there is no batch norm."""
    views = torch.randn(2, 4, 3, 64, 64)
    outputs = []
    for groups in (1, 4):
        torch.manual_seed(2)
        model = DenseCL(name, queue_length=64, dim=8, hidden_dim=16, key_bn_groups=groups)
        for _ in range(2):  # in the first there is no negative
            output = model(views[0], views[1])
        output.loss.backward()
        outputs.append((output, model))
    (first, plain), (second, grouped) = outputs
    torch.testing.assert_close(first.loss, second.loss, rtol=1e-5, atol=1e-6)
    for one, other in zip(plain.parameters(), grouped.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-5)
    names = {n for n, p in plain.backbone.named_parameters() if p.grad is None}
    assert all(".head." in n for n in names), "only what lies behind the features has no gradient"
    plain.load_backbone_weights(build_backbone(name).state_dict())


# ---------------------------------------------------------------- files


def run_file(path: Path, backbone: torch.nn.Module, name: str) -> Path:
    model = {f"backbone.{k}": v for k, v in backbone.state_dict().items()}
    model |= {f"momentum_encoder.module.{k}": v + 1.0 for k, v in model.items()}
    content = {"format": "densecl_ext", "config": {"backbone": name}, "model": model}
    save_checkpoint(path, content)
    return path


@pytest.mark.parametrize("name", [SMALL, "timm/test_convnext", "timm/swin_tiny_patch4_window7_224"])
def test_a_run_goes_to_timm(tmp_path: Path, name: str) -> None:
    backbone = build_backbone(name).eval()
    run = run_file(tmp_path / "run.pt", backbone, name)
    written = export_backbone(run, tmp_path / "timm.pth", "timm")
    assert written.architecture == name
    network = theirs(name)
    network.load_state_dict(torch.load(tmp_path / "timm.pth"), strict=True)
    images = torch.randn(1, 3, *backbone.native_size)
    with torch.no_grad():
        pooled = network.eval().forward_features(images)
        assert torch.equal(read_grid(pooled, backbone(images)), backbone(images))


def read_grid(raw: Tensor, grid: Tensor) -> Tensor:
    if raw.shape == grid.shape:
        return raw
    tokens = raw.flatten(1, -2)[:, -grid[0, 0].numel() :]
    return tokens.transpose(1, 2).reshape(grid.shape)


def test_files_say_which_network_they_hold(tmp_path: Path, small: torch.nn.Module) -> None:
    run = run_file(tmp_path / "run.pt", small, SMALL)
    images = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        expected = small(images)
        assert torch.equal(load_backbone(run)(images), expected)
        export_backbone(run, tmp_path / "ours.pth", "backbone")
        assert torch.equal(load_backbone(tmp_path / "ours.pth")(images), expected)
        # timm's own names tell nothing; named in the file or on the way in, they do
        export_backbone(run, tmp_path / "timm.pth", "timm")
        assert torch.equal(load_backbone(tmp_path / "timm.pth")(images), expected)
        torch.save(dict(torch.load(tmp_path / "timm.pth")), tmp_path / "bare.pth")
        with pytest.raises(ValueError, match="no ResNet found"):
            load_backbone(tmp_path / "bare.pth")
        import_backbone(tmp_path / "bare.pth", tmp_path / "in.pth", architecture=SMALL)
        assert torch.equal(load_backbone(tmp_path / "in.pth")(images), expected)
    assert read_backbone(tmp_path / "in.pth").architecture == SMALL
    with pytest.raises(ValueError, match="torchvision does not have; to must be 'timm'"):
        export_backbone(run, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="holds a timm/test_vit, expected resnet18"):
        import_backbone(tmp_path / "in.pth", tmp_path / "x.pth", architecture="resnet18")
    with pytest.raises(ValueError, match="not exactly the network.*missing"):
        import_backbone(run, tmp_path / "x.pth", architecture="timm/test_vit2")
    assert not (tmp_path / "x.pth").exists()


def test_safetensors_come_in(tmp_path: Path) -> None:
    torch_files = pytest.importorskip("safetensors.torch")
    network = timm.create_model("test_vit")
    torch_files.save_file(network.state_dict(), tmp_path / "model.safetensors")
    written = import_backbone(
        tmp_path / "model.safetensors", tmp_path / "in.pth", architecture=SMALL
    )
    assert written.left_out == ["head.bias", "head.weight"]
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:999])
    with pytest.raises(ValueError, match="cut.safetensors is damaged or cut short"):
        load_checkpoint(tmp_path / "cut.safetensors")


def test_export_fails_loudly_when_features_differ(
    tmp_path: Path, small: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    import densecl_ext.checkpoints.exchange as exchange

    def other(name: str) -> torch.nn.Module:
        backbone = build_backbone(name)
        backbone.network.norm.eps = 0.1
        return backbone

    monkeypatch.setattr(exchange, "build_backbone", other)
    run = run_file(tmp_path / "run.pt", small, SMALL)
    with pytest.raises(RuntimeError, match="other features.*nothing was written"):
        export_backbone(run, tmp_path / "out.pth", "timm")
    assert not (tmp_path / "out.pth").exists()


def test_resnets_go_to_timm_too(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    assert set(RESNETS) <= set(timm.list_models())
    torch.save(build_backbone("resnet18").state_dict(), tmp_path / "resnet.pth")
    written = export_backbone(tmp_path / "resnet.pth", tmp_path / "timm.pth", "timm")
    theirs("resnet18").load_state_dict(torch.load(written.path), strict=True)


# ---------------------------------------------------------------- evaluate, visualize, pretrain


def test_images_are_resized_to_whole_patches(small: torch.nn.Module) -> None:
    assert input_size(small, (360, 480)) == (352, 480)
    assert input_size(small, (360, 480), 0.5) == (176, 240)
    assert input_size(small, (5, 5)) == (16, 16)
    assert input_size(torch.nn.Conv2d(3, 4, 8, stride=8), (361, 480), 0.5) == (180, 240)
    features = extract_features(small, torch.zeros(1, 3, *input_size(small, (100, 90))))
    assert features.shape == (1, 64, 6, 6)


def test_matches_of_a_vision_transformer(small: torch.nn.Module) -> None:
    pixels = torch.frombuffer(bytearray(scene(3, 96, 96).tobytes()), dtype=torch.uint8)
    image = pixels.reshape(96, 96, 3).permute(2, 0, 1)
    whole = (0.0, 0.0, 96.0, 96.0, False)
    _, _, matches = find_matches(small, image, (whole, whole), size=96)
    assert len(matches) == 36 and bool(matches.right.all())


def test_pretraining_and_what_follows(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    from densecl_ext.train import pretrain

    data = image_folder(tmp_path / "images")
    config = tiny_config(data, tmp_path / "run", backbone=SMALL, epochs=1, base_lr=0.1)
    result = pretrain(config)
    assert result.step == 3
    written = export_backbone(result.output, tmp_path / "timm.pth", "timm")
    theirs(SMALL).load_state_dict(torch.load(written.path), strict=True)
    export_backbone(result.output, tmp_path / "ours.pth", "backbone")
    again = tiny_config(
        data, tmp_path / "again", backbone=SMALL, weights=str(tmp_path / "ours.pth"), epochs=1
    )
    assert pretrain(again).step == 3


def test_the_command_line(
    tmp_path: Path, small: torch.nn.Module, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = str(run_file(tmp_path / "run.pt", small, SMALL)), str(tmp_path / "timm.pth")
    assert main(["export", run, "--to", "timm", "--output", out]) == 0
    told = capsys.readouterr().out
    assert "loaded strictly into timm's model, features equal" in told
    assert "timm.create_model('test_vit', num_classes=0)" in told
    assert main(["import", out, "--backbone", SMALL, "--output", str(tmp_path / "in.pth")]) == 0
    assert "timm/test_vit, " in capsys.readouterr().out
    assert main(["export", run, "--output", str(tmp_path / "x.pth")]) == 2
    assert "torchvision does not have; to must be 'timm'" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident set from /proc")
def test_the_step_stores_no_logits() -> None:
    from benchmarks import worker
    from benchmarks.processes import Worker
    from benchmarks.step import step

    if not os.access(worker.RESET, os.W_OK):
        pytest.skip("no /proc/self/clear_refs")
    settings = worker.Settings(torch.device("cpu"), threads=1)
    build = partial(step, batch=4, backbone=SMALL, size=160, queue_length=65536, precision="fp32")
    peaks = []
    for name in ("ours", "reference"):
        process = Worker()
        peaks.append(process.call(600.0, worker.peak_of, build, name, settings))
        process.close()
    case = build(torch.device("cpu"))
    losses = [float(case.candidate(name).results()[0]) for name in ("ours", "reference")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    copy = 4 * 10 * 10 * 65537 * 4  # of the logits
    assert peaks[0] < copy < peaks[1] / 2
