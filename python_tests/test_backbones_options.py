"""Output stride and padding: other features from the same weights by the same names."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from densecl_ext import DenseCL
from densecl_ext.backbones import build_backbone

pytest.importorskip("torchvision")


@pytest.fixture(autouse=True)
def _warnings_are_errors() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def built(name: str, **options: Any) -> Any:
    """From one seed, with batch-norm statistics and branches that leave their mark."""
    torch.manual_seed(3)
    backbone = build_backbone(name, **options)
    torch.manual_seed(4)
    with torch.no_grad():
        for key, value in backbone.state_dict().items():
            if key.endswith("running_mean"):
                value.normal_(std=0.1)
            elif key.endswith("running_var"):
                value.uniform_(0.5, 2.0)
            elif "layer_scale" in key:
                value.fill_(0.5)
    return backbone.eval()


def outputs(backbone: nn.Module, names: tuple[str, ...], images: Tensor) -> list[Tensor]:
    seen: list[Tensor] = []
    for name in names:
        backbone.get_submodule(name).register_forward_hook(lambda m, a, out: seen.append(out))
    backbone(images)
    return seen


# ---------------------------------------------------------------- dilation


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "regnet_x_400mf"])
@torch.no_grad()
def test_dilated_network_computes_the_plain_one_between(name: str, output_stride: int) -> None:
    """At every position of the coarse grid, odd sizes too, and the same in early stages."""
    plain, dilated = built(name).double(), built(name, output_stride=output_stride).double()
    assert list(dilated.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in dilated.state_dict().items())
    assert dilated.stride == output_stride and dilated.left_out == ()
    assert dilated.out_channels == plain.out_channels
    images = torch.randn(2, 3, 65, 97, dtype=torch.float64)
    stages = {"regnet_x_400mf": ("trunk_output.block1", "trunk_output.block2")}
    early = stages.get(name, ("layer1", "layer2"))
    for one, other in zip(
        outputs(plain, early, images), outputs(dilated, early, images), strict=True
    ):
        assert torch.equal(one, other)
    fine, coarse = dilated(images), plain(images)
    assert fine.shape[2:] == (-(-65 // output_stride), -(-97 // output_stride))
    step = 32 // output_stride
    torch.testing.assert_close(fine[:, :, ::step, ::step], coarse, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("output_stride", "replaced"), [(16, [False, False, True]), (8, [False, True, True])]
)
@torch.no_grad()
def test_dilation_is_torchvisions(output_stride: int, replaced: list[bool]) -> None:
    from torchvision import models

    ours = built("resnet50", output_stride=output_stride)
    theirs = models.resnet50(replace_stride_with_dilation=replaced).eval()
    theirs.load_state_dict(ours.state_dict(), strict=False)
    images = torch.randn(2, 3, 65, 97)
    assert torch.equal(ours(images), outputs(theirs, ("layer4",), images)[0])


def test_regnet_with_attention_keeps_names_and_grows() -> None:
    """Its squeeze and excitation averages over more positions, so equality cannot be asked."""
    plain, dilated = built("regnet_y_400mf"), built("regnet_y_400mf", output_stride=8)
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in dilated.state_dict().items())
    assert dilated(torch.zeros(1, 3, 65, 97)).shape == (1, plain.out_channels, 9, 13)


def test_output_stride_of_its_own_changes_nothing() -> None:
    for name in ("resnet18", "convnext_tiny"):
        backbone = build_backbone(name, output_stride=32)
        assert backbone.stride == 32 and backbone.left_out == ()
        assert not any(m.dilation != (1, 1) for m in backbone.modules() if isinstance(m, nn.Conv2d))


# ---------------------------------------------------------------- truncation


@pytest.mark.parametrize(
    ("name", "output_stride", "stage", "channels", "left_out"),
    [
        ("resnet18", 8, "layer2", 128, ("layer3", "layer4")),
        ("resnet50", 16, "layer3", 1024, ("layer4",)),
        ("regnet_y_400mf", 16, "trunk_output.block3", 208, ("trunk_output.block4",)),
        ("convnext_tiny", 16, "features.5", 384, ("features.6", "features.7")),
    ],
)
@torch.no_grad()
def test_truncated_network_is_the_beginning_of_the_plain_one(
    name: str, output_stride: int, stage: str, channels: int, left_out: tuple[str, ...]
) -> None:
    plain = built(name)
    short = built(name, output_stride=output_stride, truncate=True)
    short.load_state_dict({k: plain.state_dict()[k] for k in short.state_dict()})
    assert short.left_out == left_out and short.last_stage == stage
    assert (short.stride, short.out_channels) == (output_stride, channels)
    rest = [k for k in plain.state_dict() if not k.startswith(tuple(f"{p}." for p in left_out))]
    assert list(short.state_dict()) == rest
    images = torch.randn(2, 3, 65, 97)
    assert torch.equal(short(images), outputs(plain, (stage,), images)[0])


def test_truncation_that_was_not_asked_for_is_told() -> None:
    told = r"convnext_tiny cannot be dilated.*output_stride=8 leaves out features.4, features.5"
    with pytest.warns(UserWarning, match=told):
        backbone = build_backbone("convnext_tiny", output_stride=8)
    assert backbone.left_out == ("features.4", "features.5", "features.6", "features.7")
    assert backbone(torch.zeros(1, 3, 64, 96)).shape == (1, backbone.out_channels, 8, 12)


# ---------------------------------------------------------------- padding


@pytest.mark.parametrize("padding", ["reflect", "replicate"])
@pytest.mark.parametrize("name", ["resnet18", "regnet_x_400mf", "convnext_tiny"])
@torch.no_grad()
def test_padding_changes_borders_alone(name: str, padding: str) -> None:
    """No further in than zeros reach, which a change of the outermost pixels shows."""
    options: dict[str, Any] = {"output_stride": 8, "truncate": True}
    zeros, other = built(name, **options), built(name, padding=padding, **options)
    assert other.padding == padding
    assert list(other.state_dict()) == list(zeros.state_dict())
    assert all(torch.equal(v, zeros.state_dict()[k]) for k, v in other.state_dict().items())
    images = torch.randn(1, 3, 320, 320)
    differs = (zeros(images) != other(images)).any(dim=1)[0]
    moved = images.clone()
    moved[:, :, :, 0] += 1.0
    reached = (zeros(images) != zeros(moved)).any(dim=1)[0].any(dim=0)
    edge = int(reached.nonzero().max()) + 2
    assert 2 * edge < differs.shape[0], "the image has no middle"
    assert differs[0].all() and differs[:, -1].all()
    assert not differs[edge:-edge, edge:-edge].any()


@torch.no_grad()
def test_zeros_write_positions_and_the_others_do_not() -> None:
    """An image of one colour has one feature, unless the border shows."""
    images = torch.ones(1, 3, 96, 96)
    for name, padding in itertools.product(
        ("resnet18", "regnet_x_400mf", "convnext_tiny"), ("zeros", "reflect", "replicate")
    ):
        side = 160 if name == "convnext_tiny" else 96  # 7 x 7 convolutions reflect 3 positions
        grid = built(name, padding=padding)(images[:, :, :1, :1].expand(1, 3, side, side))
        spread = (grid - grid[:, :, 1:2, 1:2]).abs().amax() / grid.abs().amax()
        assert (spread > 1e-2) == (padding == "zeros"), (name, padding, float(spread))
        assert padding == "zeros" or spread < 1e-4


@pytest.mark.parametrize("size", [(96, 96), (65, 97)])
def test_max_pooling_has_nothing_to_change(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size)
    pool = nn.MaxPool2d(3, stride=2, padding=1)
    for mode in ("reflect", "replicate"):
        padded = torch.nn.functional.pad(x, (1, 1, 1, 1), mode=mode)
        assert torch.equal(nn.MaxPool2d(3, stride=2)(padded), pool(x))


def test_images_too_small_to_reflect_are_told() -> None:
    backbone = built("resnet18", padding="reflect")
    with pytest.raises(ValueError, match=r"resnet18: images of 32 x 32 are too small.*replicate"):
        backbone(torch.zeros(1, 3, 32, 32))
    built("resnet18", padding="replicate")(torch.zeros(1, 3, 32, 32))


def test_a_training_step_on_a_dilated_padded_backbone() -> None:
    backbone = build_backbone("resnet18", output_stride=8, truncate=True, padding="replicate")
    model = DenseCL(backbone, queue_length=64, dim=8, hidden_dim=16, key_bn_groups=2)
    views = torch.randn(2, 4, 3, 64, 64)
    for _ in range(2):  # in the first there is no negative
        output = model(views[0], views[1])
    output.loss.backward()
    assert all(p.grad is not None for p in backbone.parameters())
    assert model.momentum_encoder.module.backbone.conv1.padding_mode == "replicate"
    build_backbone("resnet18").load_state_dict(backbone.state_dict(), strict=False)


# ---------------------------------------------------------------- timm

TIMMS = ["timm/resnet18", "timm/test_convnext", "timm/test_efficientnet"]


@pytest.mark.parametrize("name", TIMMS)
@torch.no_grad()
def test_timm_dilates(name: str) -> None:
    pytest.importorskip("timm")
    plain, dilated = built(name), built(name, output_stride=8)
    shapes = {k: v.shape for k, v in plain.state_dict().items()}
    assert {k: v.shape for k, v in dilated.state_dict().items()} == shapes
    assert (dilated.stride, dilated.out_channels) == (8, plain.out_channels)
    assert dilated(torch.zeros(1, 3, 64, 96)).shape == (1, plain.out_channels, 8, 12)
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in dilated.state_dict().items())


@pytest.mark.parametrize("name", [*TIMMS, "timm/swin_tiny_patch4_window7_224"])
@torch.no_grad()
def test_timm_truncates(name: str) -> None:
    pytest.importorskip("timm")
    plain = built(name)
    if "swin" in name:
        with pytest.warns(UserWarning, match=r"swin.*leaves out layers.3, norm"):
            short = built(name, output_stride=16)
    else:
        short = built(name, output_stride=16, truncate=True)
    assert short.stride == 16 and short.left_out
    assert short.state_dict().keys() < plain.state_dict().keys()
    short.load_state_dict({k: plain.state_dict()[k] for k in short.state_dict()})
    images = torch.randn(1, 3, *plain.native_size)
    features = plain.network.forward_intermediates(images, intermediates_only=True)
    features = [f for f in features if f.shape[2] == plain.native_size[0] // 16]
    assert torch.equal(short(images), features[-1])
    assert short.out_channels == features[-1].shape[1]


@torch.no_grad()
def test_timm_pads() -> None:
    pytest.importorskip("timm")
    zeros, other = built("timm/resnet18"), built("timm/resnet18", padding="replicate")
    images = torch.ones(1, 3, 96, 96)
    assert other(images).std(dim=(2, 3)).max() < 1e-4 < zeros(images).std(dim=(2, 3)).max()
    with pytest.raises(ValueError, match="test_vit must be 'zeros'.*none of its layers is padded"):
        build_backbone("timm/test_vit", padding="reflect")
    with pytest.raises(ValueError, match="StdConv2d.* layers pad in their own way"):
        build_backbone("timm/test_nfnet", padding="reflect")


def test_what_timm_cannot_is_told() -> None:
    pytest.importorskip("timm")
    for options in ({"output_stride": 8}, {"output_stride": 32}):
        with pytest.raises(ValueError, match=r"test_vit has no features .* stages have 16"):
            build_backbone("timm/test_vit", **options)
    assert build_backbone("timm/test_vit", output_stride=16).stride == 16
