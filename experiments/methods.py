"""The arms: each a module that takes two views of a batch and returns its loss.

All start from the same backbone weights and see the same views. DenseCL and MoCo v2 are this
project's; DINO, BYOL, SimSiam and VICRegL use lightly's losses, with the heads and the settings of
their papers as far as they fit a network of 128 channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densecl_ext import DenseCL, MomentumEncoder
from densecl_ext.nn.matching import geometric_match
from experiments.peers import PixPro, SlotCon

# What all arms share (tuned arms replace some of it): see docs/evidence.md.
QUEUE, HIDDEN, MOMENTUM, BN_GROUPS = 2048, 512, 0.99, 4


class Measured(DenseCL):
    """DenseCL that computes the metrics of its step only when asked to."""

    telling = True

    def _metrics(self, *args: Any) -> dict[str, Tensor]:
        return super()._metrics(*args) if self.telling else {}


class Ours(nn.Module):
    """DenseCL with any of its options; lambda 0 is MoCo v2."""

    capturable = True  # by a CUDA graph
    telling = True

    def __init__(self, backbone: nn.Module, steps: int, **options: Any) -> None:
        super().__init__()
        defaults = {
            "hidden_dim": HIDDEN,
            "queue_length": QUEUE,
            "momentum": MOMENTUM,
            "key_bn_groups": BN_GROUPS,
        }
        self.model = Measured(backbone, **{**defaults, **options})
        self.health: dict[str, float] = {}

    def forward(self, q: Tensor, k: Tensor, crop_q: Tensor, crop_k: Tensor) -> Tensor:
        self.model.telling = self.telling
        out = self.model(q, k, crop_q=crop_q, crop_k=crop_k)
        if self.telling:
            names = ("position_share", "same_index", "same_index_geometric")
            self.health = {n: float(out.metrics[n]) for n in names if n in out.metrics}
        return out.loss

    @property
    def dense_head(self) -> nn.Module | None:
        return self.model.neck.dense_head if self.model.with_dense else None


def mlp(widths: list[int], *, last_norm: bool = False) -> nn.Sequential:
    """Fully connected layers with batch norm and ReLU in between."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        last = i == len(widths) - 2
        layers.append(nn.Linear(a, b, bias=last and not last_norm))
        if not last:
            layers += [nn.BatchNorm1d(b), nn.ReLU(inplace=True)]
        elif last_norm:
            layers.append(nn.BatchNorm1d(b, affine=False))
    return nn.Sequential(*layers)


class SimSiam(nn.Module):
    """SimSiam (arXiv 2011.10566): projector of three layers, predictor with a bottleneck."""

    capturable = True

    def __init__(self, backbone: nn.Module, steps: int, dim: int = HIDDEN) -> None:
        super().__init__()
        from lightly.loss import NegativeCosineSimilarity

        self.backbone = backbone
        self.projector = mlp([backbone.out_channels, dim, dim, dim], last_norm=True)  # type: ignore
        self.predictor = mlp([dim, dim // 4, dim])
        self.criterion = NegativeCosineSimilarity()

    def forward(self, q: Tensor, k: Tensor, crop_q: Tensor, crop_k: Tensor) -> Tensor:
        z = [self.projector(self.backbone(view).mean((2, 3))) for view in (q, k)]
        p = [self.predictor(one).float() for one in z]
        a, b = (one.detach().float() for one in z)
        return (self.criterion(p[0], b) + self.criterion(p[1], a)) / 2


class BYOL(nn.Module):
    """BYOL (arXiv 2006.07733): a momentum target, a predictor, no negatives."""

    capturable = True

    def __init__(self, backbone: nn.Module, steps: int, dim: int = 128) -> None:
        super().__init__()
        from lightly.loss import NegativeCosineSimilarity

        self.backbone = backbone
        self.projector = mlp([backbone.out_channels, HIDDEN, dim])  # type: ignore
        self.predictor = mlp([dim, HIDDEN, dim])
        self.target = MomentumEncoder(nn.Sequential(backbone, Pooled(self.projector)), MOMENTUM)
        self.criterion = NegativeCosineSimilarity()

    def forward(self, q: Tensor, k: Tensor, crop_q: Tensor, crop_k: Tensor) -> Tensor:
        online = nn.Sequential(self.backbone, Pooled(self.projector))
        self.target.update_(online)
        p = [self.predictor(online(view)).float() for view in (q, k)]
        z = [self.target(view).float() for view in (q, k)]
        return (self.criterion(p[0], z[1]) + self.criterion(p[1], z[0])) / 2


class Pooled(nn.Module):
    """A head on the mean over the grid."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Tensor) -> Tensor:
        return self.head(features.mean((2, 3)))


class Prototypes(nn.Module):
    """Cosines to learned directions: DINO's last layer, weight-normalised with norms of 1."""

    def __init__(self, channels: int, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(count, channels) / channels**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x.float(), dim=1) @ F.normalize(self.weight.float(), dim=1).T


class DINO(nn.Module):
    """DINO (arXiv 2104.14294) with two global views, as all arms have two."""

    def __init__(self, backbone: nn.Module, steps: int, outputs: int = 1024) -> None:
        super().__init__()
        from lightly.loss import DINOLoss

        head = nn.Sequential(
            mlp([int(backbone.out_channels), HIDDEN, HIDDEN, 128]),  # type: ignore[arg-type]
            Prototypes(128, outputs),
        )
        self.student = nn.Sequential(backbone, Pooled(head))
        self.teacher = MomentumEncoder(self.student, MOMENTUM)
        self.criterion = DINOLoss(output_dim=outputs, warmup_teacher_temp_epochs=5)
        self.steps, self.done = steps, 0

    def forward(self, q: Tensor, k: Tensor, crop_q: Tensor, crop_k: Tensor) -> Tensor:
        self.teacher.update_(self.student)
        student = [self.student(view).float() for view in (q, k)]
        teacher = [self.teacher(view).float() for view in (q, k)]
        epoch = int(30 * self.done / self.steps)  # the teacher's temperature warms up in a sixth
        self.done += 1
        with torch.autocast(q.device.type, enabled=False):
            return self.criterion(teacher, student, epoch=epoch)


class VICRegL(nn.Module):
    """VICRegL (arXiv 2210.01571): VICReg of the global vectors and of matched positions.

    Half of the local matches go by place, half to the nearest features. alpha is 0.75, the losses
    are as published, but over all positions instead of the best 20.
    """

    def __init__(self, backbone: nn.Module, steps: int, alpha: float = 0.75) -> None:
        super().__init__()
        from lightly.loss import VICRegLoss

        self.backbone, self.alpha = backbone, alpha
        channels = int(backbone.out_channels)  # type: ignore[arg-type]
        self.projector = mlp([channels, HIDDEN, HIDDEN, HIDDEN])
        self.local_projector = mlp([channels, 128, 128, 128])
        self.criterion = VICRegLoss()

    def forward(self, q: Tensor, k: Tensor, crop_q: Tensor, crop_k: Tensor) -> Tensor:
        features = [self.backbone(view) for view in (q, k)]
        pooled = [self.projector(f.mean((2, 3))).float() for f in features]
        with torch.autocast(q.device.type, enabled=False):
            loss_global = self.criterion(*pooled)
        images, _, height, width = features[0].shape
        local = [
            self.local_projector(f.permute(0, 2, 3, 1).flatten(0, 2))
            .float()
            .unflatten(0, (images, -1))
            for f in features
        ]  # (N, S, D)
        by_place = [
            geometric_match(crop_q, crop_k, (height, width)),
            geometric_match(crop_k, crop_q, (height, width)),
        ]
        with torch.no_grad():
            unit = [F.normalize(f.float().flatten(2), dim=1) for f in features]
            near = torch.einsum("ncs,nct->nst", *unit)
            by_feature = [near.argmax(2), near.argmax(1)]
        losses = []
        with torch.autocast(q.device.type, enabled=False):
            for matches in (by_place, by_feature):
                for i, match in enumerate(matches):
                    a, b = local[i], local[1 - i]
                    b = b.gather(1, match.clamp(min=0)[..., None].expand(-1, -1, b.shape[2]))
                    if matches is by_place:  # by features all have a match, and nothing waits
                        rows = (match >= 0).nonzero(as_tuple=True)
                        a, b = a[rows], b[rows]
                    losses.append(self.criterion(a.flatten(0, -2), b.flatten(0, -2)))
        loss_local = torch.stack(losses).mean()
        return self.alpha * loss_global + (1 - self.alpha) * loss_local


CURE = {"matching": "geometric", "dense_negatives": "position"}
ARMS: dict[str, tuple[type[nn.Module], dict[str, Any], float]] = {
    # name: (method, its options, learning rate at batch 64)
    "mocov2": (Ours, {"loss_lambda": 0.0}, 0.2),
    "mocov2_reflect": (Ours, {"loss_lambda": 0.0}, 0.2),
    "densecl_paper": (Ours, {}, 0.2),
    "densecl_paper_reflect": (Ours, {}, 0.2),
    "densecl_geometric": (Ours, {"matching": "geometric"}, 0.2),
    "densecl_position": (Ours, {"dense_negatives": "position"}, 0.2),
    "ours": (Ours, {**CURE, "loss_lambda": 0.7, "positions_per_image": 4}, 0.2),
    "simsiam": (SimSiam, {}, 0.1),
    "byol": (BYOL, {}, 0.2),
    "dino": (DINO, {}, 0.2),
    "vicregl": (VICRegL, {}, 0.025),
    "pixpro": (PixPro, {}, 0.2),
    "slotcon": (SlotCon, {}, 0.2),
}
