from __future__ import annotations

import pytest
import torch
from torch import nn

from densecl_ext.nn.necks import DenseCLNeck


@pytest.mark.parametrize("size", [(7, 7), (4, 6), (1, 1)])
@pytest.mark.parametrize("grid", [None, 1, 3, 5, 7, 9, 14, (2, 3)])
def test_shapes(size: tuple[int, int], grid: int | tuple[int, int] | None) -> None:
    neck = DenseCLNeck(6, 10, 4, grid_size=grid)
    out = neck(torch.randn(2, 6, *size))
    expected = size if grid is None else (grid, grid) if isinstance(grid, int) else grid
    assert out.vector.shape == (2, 4)
    assert out.grid.shape == (2, 4, *expected)
    assert out.features.shape == (2, 6, *expected)


def test_features_are_what_the_dense_head_saw() -> None:
    neck = DenseCLNeck(6, 10, 4, grid_size=2)
    features = torch.randn(2, 6, 4, 4)
    out = neck(features)
    blocks = features.unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(4, 5))
    torch.testing.assert_close(out.features, blocks)
    by_hand = neck.dense_head[2](neck.dense_head[0](out.features).relu())
    torch.testing.assert_close(out.grid, by_hand)
    vector = neck.global_head[2](neck.global_head[0](features.mean(dim=(2, 3))).relu())
    torch.testing.assert_close(out.vector, vector)


def test_heads_can_be_left_out() -> None:
    neck = DenseCLNeck(6, 10, 4)
    features = torch.randn(2, 6, 4, 4)
    assert neck(features, with_dense=False)[1:] == (None, None)
    assert neck(features, with_global=False).vector is None


def test_layers_and_start_are_the_papers() -> None:
    torch.manual_seed(0)
    neck = DenseCLNeck(512)
    kinds = [type(layer) for layer in neck.modules() if not list(layer.children())]
    assert kinds == [nn.Linear, nn.ReLU, nn.Linear, nn.Conv2d, nn.ReLU, nn.Conv2d]
    assert [tuple(p.shape[:2]) for p in neck.parameters() if p.dim() > 1] == [
        (2048, 512),
        (128, 2048),
        (2048, 512),
        (128, 2048),
    ]
    # He's normal start in the fully connected layers, PyTorch's uniform one in the convolutions
    assert neck.global_head[0].weight.std().item() == pytest.approx((2 / 512) ** 0.5, rel=0.02)
    assert not neck.global_head[0].bias.any()
    assert neck.dense_head[0].weight.abs().max().item() <= (1 / 512) ** 0.5


def test_errors() -> None:
    with pytest.raises(ValueError, match="grid_size"):
        DenseCLNeck(6, grid_size=0)
    with pytest.raises(ValueError, match=r"\(N, 6, H, W\).*\(2, 5, 4, 4\)"):
        DenseCLNeck(6)(torch.randn(2, 5, 4, 4))
    with pytest.raises(ValueError, match=r"tokens .*\.transpose\(1, 2\)\.unflatten"):
        DenseCLNeck(6)(torch.randn(2, 16, 6))
    with pytest.raises(ValueError, match="last feature map"):
        DenseCLNeck(6)(torch.randn(2, 6))
