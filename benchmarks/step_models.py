"""What the step's benchmark trains: our model, and the same model with the published code."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import NotAvailable
from densecl_ext import reference
from densecl_ext.nn.losses import DenseCLLoss, DenseCLTerms
from densecl_ext.nn.model import DenseCL, Encoder
from densecl_ext.nn.momentum import MomentumEncoder
from densecl_ext.nn.necks import NeckOutput

VIT = "vit_small_patch16_224"


class PublishedQueue(nn.Module):
    """MoCo's and DenseCL's queue: (D, K), random at the start; the host reads its pointer."""

    queue: Tensor
    pointer: Tensor
    filled: Tensor

    def __init__(self, length: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("queue", F.normalize(torch.randn(dim, length), dim=0))  # (D, K)
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("filled", torch.tensor(length))

    def __len__(self) -> int:
        return self.queue.shape[1]

    def negatives(self) -> Tensor:
        """(K, D), a copy: the queue is written before the backward pass."""
        return self.queue.clone().detach().T

    @torch.no_grad()
    def enqueue_(self, keys: Tensor) -> None:
        """Write keys (B, D); the published code asks that B divides K, this one cuts the batch."""
        keys = F.normalize(keys, dim=1)
        start, length = int(self.pointer), len(self)
        first = min(len(keys), length - start)
        self.queue[:, start : start + first] = keys[:first].T
        if first < len(keys):
            self.queue[:, : len(keys) - first] = keys[first:].T
        self.pointer[0] = (start + len(keys)) % length


class PublishedMomentumEncoder(MomentumEncoder):
    """Parameter by parameter, as published."""

    @torch.no_grad()
    def update_(self, module: nn.Module) -> None:
        """Move every parameter towards the module's."""
        momentum = float(self.momentum)
        for target, source in zip(*self._pairs(module), strict=True):
            target.data = target.data * momentum + source.data * (1.0 - momentum)


class PublishedLoss(DenseCLLoss):
    """Both terms with the matrix of logits in memory."""

    def forward(  # type: ignore[override]
        self,
        query_global: Tensor,
        key_global: Tensor,
        query_dense: Tensor | None,
        key_dense: Tensor | None,
        global_queue: PublishedQueue,
        dense_queue: PublishedQueue,
        *,
        match: Tensor | None = None,
        loss_lambda: float | None = None,
    ) -> DenseCLTerms:
        """As of DenseCLLoss."""
        weight = self.loss_lambda if loss_lambda is None else loss_lambda
        whole = reference.info_nce(
            query_global, key_global, global_queue.negatives(), temperature=self.temperature
        )
        if query_dense is None or key_dense is None or match is None:
            return DenseCLTerms(whole, whole, torch.zeros_like(whole))
        dense = reference.dense_info_nce(
            query_dense, key_dense, match, dense_queue.negatives(), temperature=self.temperature
        )
        return DenseCLTerms((1.0 - weight) * whole + weight * dense, whole, dense)


class ReferenceDenseCL(DenseCL):
    """DenseCL with reference.py's ops, the published update loop and the published queues."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        loss, encoder = self.criterion, self.momentum_encoder
        self.criterion = PublishedLoss(loss.loss_lambda, loss.temperature)
        self.momentum_encoder = PublishedMomentumEncoder(
            Encoder(self.backbone, self.neck), float(encoder.momentum), bn_groups=self.key_bn_groups
        )
        length, dim = self.global_queue.keys.shape
        self.global_queue = PublishedQueue(length, dim)  # type: ignore[assignment]
        self.dense_queue = PublishedQueue(length, dim)  # type: ignore[assignment]

    @torch.no_grad()
    def _match(
        self, query: NeckOutput, key: NeckOutput, crop_q: Tensor | None, crop_k: Tensor | None
    ) -> Tensor:
        assert query.features is not None and key.features is not None
        return reference.dense_match(query.features, key.features)


class VitBackbone(nn.Module):
    """A timm vision transformer as (N, 3, H, W) -> (N, C, h, w), its class token left out."""

    def __init__(self, name: str, image: int) -> None:
        super().__init__()
        try:
            import timm
        except ImportError as error:
            raise NotAvailable(f"timm is not installed ({error})") from error
        self.vit = timm.create_model(name, num_classes=0, img_size=image)
        self.out_channels = int(self.vit.num_features)

    def forward(self, images: Tensor) -> Tensor:
        """Feature map of the last block."""
        tokens = self.vit.forward_features(images)[:, self.vit.num_prefix_tokens :]  # (N, h w, C)
        side = int(tokens.shape[1] ** 0.5)
        return tokens.transpose(1, 2).reshape(len(tokens), -1, side, side)


def backbone(name: str, image: int) -> nn.Module | str:
    """By name; "tiny" for a network that takes no time on a CPU."""
    if name == "tiny":
        layers = nn.Conv2d(3, 16, 8, stride=8), nn.BatchNorm2d(16), nn.ReLU()
        return nn.Sequential(*layers, nn.Conv2d(16, 32, 2, stride=2))
    return VitBackbone(name, image) if name == VIT else name


def build(config: dict[str, Any], device: torch.device) -> tuple[DenseCL, torch.optim.Optimizer]:
    """Model and optimizer of a configuration of step.py, ready to train."""
    torch.manual_seed(0)
    kind = ReferenceDenseCL if config["model"] == "reference" else DenseCL
    dtype = torch.bfloat16 if config["model"] == "ours" else torch.float32
    bottom = backbone(config["backbone"], config["image"])
    model = kind(
        bottom,
        queue_length=config["queue"],
        queue_dtype=dtype,
        queue_init="random",
        loss_lambda=config["loss_lambda"],
        backbone_channels=32 if config["backbone"] == "tiny" else None,
    )
    model.to(device=device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=0.03,
        momentum=0.9,
        weight_decay=1e-4,
        fused=True,
    )
    return model, optimizer
