"""Backbones by name: what they say of themselves, their names of tensors, weights from files."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TinyBackbone
from torch import Tensor, nn

from densecl_ext.backbones import (
    RESNETS,
    TORCHVISION,
    build_backbone,
    feature_channels,
    feature_grid,
    load_weights,
)
from densecl_ext.backbones.build import meta_backbone
from densecl_ext.backbones.torchvision import FAMILIES

ONE_OF_EACH = ["resnet18", "resnext50_32x4d", "wide_resnet50_2", "regnet_x_400mf"]
ONE_OF_EACH += ["regnet_y_400mf", "convnext_tiny"]


@pytest.mark.parametrize("name", ONE_OF_EACH)
@torch.no_grad()
def test_network_is_torchvisions(name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(1)
    backbone = build_backbone(name).eval()
    network = models.get_model(name).eval()
    heads = tuple(f"{part}." for family in FAMILIES for part in family.head)
    names = [key for key in network.state_dict() if not key.startswith(heads)]
    assert list(backbone.state_dict()) == names
    backbone.load_state_dict({key: network.state_dict()[key] for key in names})

    images = torch.randn(2, 3, 65, 97)
    features = backbone(images)
    grid = feature_grid(backbone)
    assert (backbone.out_channels, backbone.stride, backbone.native_size) == tuple(grid)
    assert feature_channels(backbone) == backbone.out_channels
    rounded = -1 if "convnext" in name else 1  # down, else up
    height, width = (rounded * -(-rounded * side // backbone.stride) for side in (65, 97))
    assert features.shape == (2, backbone.out_channels, abs(height), abs(width))
    head = network.classifier if "convnext" in name else nn.Sequential(nn.Flatten(1), network.fc)
    torch.testing.assert_close(head(network.avgpool(features)), network(images))


@pytest.mark.parametrize(("name", "channels"), [("resnet18", 512), ("resnet50", 2048)])
def test_resnets_have_their_channels(name: str, channels: int) -> None:
    pytest.importorskip("torchvision")
    assert build_backbone(name).out_channels == channels


def test_all_names_exist() -> None:
    models = pytest.importorskip("torchvision.models")
    assert set(TORCHVISION) <= set(models.list_models(module=models))
    assert set(RESNETS) < set(TORCHVISION)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TORCHVISION if "regnet" not in name])
def test_numbers_without_weights(name: str) -> None:
    """A backbone on the meta device states the same as one with weights."""
    pytest.importorskip("torchvision")
    backbone = meta_backbone(name)
    features = backbone(torch.zeros(1, 3, 64, 96, device="meta"))
    assert features.shape == (1, backbone.out_channels, 2, 3) and backbone.stride == 32


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


@pytest.mark.parametrize("name", ["resnet18", "regnet_y_400mf", "convnext_tiny"])
def test_weights_of_the_plain_network_serve_every_option(tmp_path: Path, name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    network = models.get_model(name)
    torch.save(network.state_dict(), tmp_path / "whole.pth")
    for options in ({"output_stride": 8}, {"output_stride": 16, "truncate": True}):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            backbone = build_backbone(
                name, weights=tmp_path / "whole.pth", padding="replicate", **options
            )
        for key, value in backbone.state_dict().items():
            assert torch.equal(value, network.state_dict()[key])
    with pytest.raises(RuntimeError, match="Missing"):
        load_weights(backbone, {})
    with pytest.raises(RuntimeError, match="Unexpected.*another"):
        load_weights(backbone, {**network.state_dict(), "another.weight": torch.zeros(1)})


def test_named_weights_go_into_a_dilated_network(monkeypatch: pytest.MonkeyPatch) -> None:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(1)
    state = models.resnet18().state_dict()
    asked: list[Any] = []

    def stored(weights: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        asked.append(weights)
        return state

    monkeypatch.setattr(models.ResNet18_Weights, "get_state_dict", stored)  # no download
    backbone = build_backbone("resnet18", weights="IMAGENET1K_V1", output_stride=8)
    assert asked == [models.ResNet18_Weights.IMAGENET1K_V1] and backbone.stride == 8
    assert all(torch.equal(v, state[k]) for k, v in backbone.state_dict().items())


def test_unknown_names_options_and_missing_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="resnet18.*'resnet17'"):
        build_backbone("resnet17")
    with pytest.raises(ValueError, match="output_stride must be one of 8, 16, 32 or None.*got 4"):
        build_backbone("resnet18", output_stride=4)
    with pytest.raises(ValueError, match="one of zeros, reflect, replicate, got 'circular'"):
        build_backbone("resnet18", padding="circular")
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
    assert feature_grid(silent) == feature_grid(TinyBackbone(10))
    assert silent.training and not silent.layers[1].training and silent.layers[4].training
    assert all(torch.equal(before[name], value) for name, value in silent.state_dict().items())


def test_the_grid_of_any_module() -> None:
    """An attribute that means something else, as a convolution's stride, is measured instead."""
    patches = nn.Conv2d(3, 10, 8, stride=8)
    assert feature_grid(patches) == (10, 8, None) and patches.stride == (8, 8)
    network = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.MaxPool2d(2))
    assert feature_grid(network, image_size=30) == (6, 4, None)
    network.native_size = (48, 96)
    assert feature_grid(network) == (6, 4, (48, 96))
    network.out_channels, network.stride = 5, 3  # what is stated is believed
    assert feature_grid(network) == (5, 3, (48, 96))


def test_channels_that_cannot_be_found_out() -> None:
    class Pooled(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.mean(dim=(2, 3))

    with pytest.raises(ValueError, match=r"\(N, C, H, W\), got \(1, 3\); .*backbone_channels="):
        feature_channels(Pooled())
    with pytest.raises(ValueError, match="backbone_channels="):
        feature_channels(nn.Sequential(nn.Conv2d(4, 8, 1)))  # not made for RGB
    with pytest.raises(ValueError, match=r"feature_grid: .*must return a tensor"):
        feature_grid(Pooled())
