from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from tiny_models import TinyBackbone
from torch import Tensor, nn

from densecl_ext.backbones import RESNETS, build_backbone, feature_channels


@pytest.mark.parametrize(("name", "channels"), [("resnet18", 512), ("resnet50", 2048)])
def test_resnet_is_torchvisions(name: str, channels: int) -> None:
    models = pytest.importorskip("torchvision.models")
    backbone = build_backbone(name)
    resnet = models.get_model(name)
    assert backbone.out_channels == channels
    names = [key for key in resnet.state_dict() if not key.startswith("fc.")]
    assert list(backbone.state_dict()) == names
    backbone.load_state_dict({key: resnet.state_dict()[key] for key in names})
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        features = backbone.eval()(images)
        assert features.shape == (2, channels, 2, 3)
        logits = resnet.eval().fc(features.mean(dim=(2, 3)))
        torch.testing.assert_close(logits, resnet(images))


def test_all_names_exist() -> None:
    models = pytest.importorskip("torchvision.models")
    assert set(RESNETS) <= set(models.list_models(module=models))


def test_weights_from_a_file(tmp_path: Path) -> None:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(1)
    resnet = models.resnet18()
    whole = tmp_path / "whole.pth"
    torch.save(resnet.state_dict(), whole)
    backbone = build_backbone("resnet18", weights=whole)
    assert all(torch.equal(v, resnet.state_dict()[k]) for k, v in backbone.state_dict().items())
    torch.save(backbone.state_dict(), tmp_path / "less_fc.pth")
    build_backbone("resnet18", weights=str(tmp_path / "less_fc.pth"))

    with pytest.raises(ValueError, match="does not fit"):
        build_backbone("resnet34", weights=whole)
    torch.save({"model": backbone.state_dict()}, tmp_path / "nested.pth")
    with pytest.raises(ValueError, match="state dict of tensors"):
        build_backbone("resnet18", weights=tmp_path / "nested.pth")
    with pytest.raises(FileNotFoundError, match="gone.pth"):
        build_backbone("resnet18", weights="gone.pth")
    with pytest.raises(ValueError, match="'IMAGENET_TYPO'"):
        build_backbone("resnet18", weights="IMAGENET_TYPO")


def test_unknown_name_and_missing_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="resnet18.*'resnet17'"):
        build_backbone("resnet17")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match=r"densecl_ext\[train\]"):
        build_backbone("resnet18")


def test_channels_from_attribute_or_dry_forward() -> None:
    assert feature_channels(TinyBackbone(10)) == 10
    timm_like = nn.Identity()
    timm_like.num_features = 7
    assert feature_channels(timm_like) == 7

    silent = TinyBackbone(10)
    del silent.out_channels
    silent.layers[1].eval()  # a frozen layer stays frozen
    before = {name: value.clone() for name, value in silent.state_dict().items()}
    assert feature_channels(silent) == 10
    assert silent.training and not silent.layers[1].training and silent.layers[4].training
    assert all(torch.equal(before[name], value) for name, value in silent.state_dict().items())


def test_channels_that_cannot_be_found_out() -> None:
    class Pooled(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.mean(dim=(2, 3))

    with pytest.raises(ValueError, match=r"\(N, C, H, W\), got \(1, 3\)"):
        feature_channels(Pooled())
    with pytest.raises(ValueError, match="backbone_channels="):
        feature_channels(nn.Sequential(nn.Conv2d(4, 8, 1)))  # not made for RGB
