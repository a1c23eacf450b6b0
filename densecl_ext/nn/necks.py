"""The two projection heads that DenseCL puts on a backbone (DenseCL, section 3.2, figure 2)."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn


class NeckOutput(NamedTuple):
    """What :class:`DenseCLNeck` returns; a head that was not asked for leaves None.

    Attributes:
        vector: (N, D) of the global head, not normalised.
        grid: (N, D, S, S) of the dense head, not normalised.
        features: (N, C, S, S), the very backbone features that the dense head saw: what matching
            by backbone features must compare.
    """

    vector: Tensor | None
    grid: Tensor | None
    features: Tensor | None


class DenseCLNeck(nn.Module):
    """Global head and dense head side by side on one feature map.

    Global: average pool, fully connected, ReLU, fully connected. Dense: adaptive average pool to
    the grid (where ``grid_size`` is set), 1x1 convolution, ReLU, 1x1 convolution. No batch norm.
    The fully connected layers start from He's normal initialisation with zero bias, the
    convolutions from PyTorch's default, as in the paper's experiments.

    Args:
        in_channels: C, channels of the backbone's features.
        hidden_channels: width of both heads' hidden layer.
        out_channels: D, size of the vectors.
        grid_size: S, or (height, width), of the dense grid; any size at any input size. None
            keeps the backbone's own grid (7 x 7 for a ResNet at 224 pixels).

    Raises:
        ValueError: a size below 1, or features of another number of channels.

    Example:
        >>> import torch
        >>> from densecl_ext import DenseCLNeck
        >>> neck = DenseCLNeck(512, grid_size=5)
        >>> out = neck(torch.randn(2, 512, 7, 7))
        >>> out.vector.shape, out.grid.shape, out.features.shape
        (torch.Size([2, 128]), torch.Size([2, 128, 5, 5]), torch.Size([2, 512, 5, 5]))
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int = 2048,
        out_channels: int = 128,
        grid_size: int | tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        size = (grid_size, grid_size) if isinstance(grid_size, int) else grid_size
        if min(in_channels, hidden_channels, out_channels, *(size or ())) < 1:
            raise ValueError(
                "DenseCLNeck: in_channels, hidden_channels, out_channels and grid_size must be at "
                f"least 1, got {in_channels}, {hidden_channels}, {out_channels} and {grid_size}"
            )
        self.in_channels = in_channels
        self.grid_size = size
        self.global_head = nn.Sequential(
            nn.Linear(in_channels, hidden_channels),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_channels, out_channels),
        )
        self.dense_head = nn.Sequential(
            nn.Conv2d(in_channels, hidden_channels, kernel_size=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden_channels, out_channels, kernel_size=1),
        )
        for layer in self.global_head:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    def forward(
        self, features: Tensor, *, with_global: bool = True, with_dense: bool = True
    ) -> NeckOutput:
        """Run the heads on features (N, C, H, W).

        Args:
            features: (N, C, H, W) from the backbone.
            with_global: run the global head.
            with_dense: run the dense head.
        """
        if features.dim() != 4 or features.shape[1] != self.in_channels:
            tokens = features.dim() == 3 and features.shape[2] == self.in_channels
            hint = (
                "; tokens (N, H * W, C) are a map by .transpose(1, 2).unflatten(2, (H, W))"
                if tokens
                else "; a backbone must return its last feature map, and backbone_channels= states "
                "its channels where they cannot be found out"
            )
            raise ValueError(
                f"DenseCLNeck: features must be (N, {self.in_channels}, H, W), got "
                f"{tuple(features.shape)}{hint}"
            )
        vector = grid = pooled = None
        if with_global:
            vector = self.global_head(features.mean(dim=(2, 3)))  # (N, D)
        if with_dense:
            pooled = features
            if self.grid_size is not None and self.grid_size != tuple(features.shape[2:]):
                pooled = F.adaptive_avg_pool2d(features, self.grid_size)  # (N, C, S, S)
            grid = self.dense_head(pooled)  # (N, D, S, S)
        return NeckOutput(vector, grid, pooled)


class Predictor(nn.Module):
    """A small network on the query side alone (BYOL, section 3.1; MoCo v3 and PixCon have it too).

    On each head's output: fully connected (1x1 convolution for the grid), batch norm, ReLU, fully
    connected. Keys do not go through it, and it is not part of what is exported.

    Args:
        channels: D of the heads' outputs; the predictions have as many.
        hidden_channels: width of the hidden layers.
        with_global: make the one for the global vectors.
        with_dense: make the one for the dense grid.
    """

    def __init__(
        self, channels: int, hidden_channels: int, *, with_global: bool, with_dense: bool
    ) -> None:
        super().__init__()
        self.global_predictor = self.dense_predictor = None
        if with_global:
            self.global_predictor = nn.Sequential(
                nn.Linear(channels, hidden_channels),
                nn.BatchNorm1d(hidden_channels),
                nn.ReLU(inplace=True),
                nn.Linear(hidden_channels, channels),
            )
        if with_dense:
            self.dense_predictor = nn.Sequential(
                nn.Conv2d(channels, hidden_channels, kernel_size=1),
                nn.BatchNorm2d(hidden_channels),
                nn.ReLU(inplace=True),
                nn.Conv2d(hidden_channels, channels, kernel_size=1),
            )

    def forward(self, output: NeckOutput) -> NeckOutput:
        """Predict the keys: vector (N, D) and grid (N, D, S, S); features stay as they are."""
        vector, grid = output.vector, output.grid
        if self.global_predictor is not None and vector is not None:
            vector = self.global_predictor(vector)
        if self.dense_predictor is not None and grid is not None:
            grid = self.dense_predictor(grid)
        return NeckOutput(vector, grid, output.features)
