"""DenseCL: backbone, two heads, key encoder, two queues and the loss in one module."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densecl_ext.backbones import build_backbone, feature_channels
from densecl_ext.nn.batchnorm import shuffled_forward
from densecl_ext.nn.distributed import gather_keys
from densecl_ext.nn.losses import DenseCLLoss
from densecl_ext.nn.matching import MATCHINGS, feature_match, geometric_match, random_match
from densecl_ext.nn.momentum import MomentumEncoder
from densecl_ext.nn.necks import DenseCLNeck, NeckOutput
from densecl_ext.nn.phases import phase
from densecl_ext.nn.queue import KeyQueue


class DenseCLOutput(NamedTuple):
    """What one forward of :class:`DenseCL` returns.

    Attributes:
        loss: () to call ``backward`` on.
        loss_global: () InfoNCE of the global vectors, 0 where it is not computed.
        loss_dense: () InfoNCE of the grid positions, 0 where it is not computed.
        metrics: name to detached 0-d float32 tensor, see :class:`DenseCL`.
    """

    loss: Tensor
    loss_global: Tensor
    loss_dense: Tensor
    metrics: dict[str, Tensor]


class Encoder(nn.Module):
    """A backbone and its neck: images (N, 3, H, W) to :class:`NeckOutput`."""

    def __init__(self, backbone: nn.Module, neck: DenseCLNeck) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck

    def forward(
        self, images: Tensor, *, with_global: bool = True, with_dense: bool = True
    ) -> NeckOutput:
        """Run the backbone and the heads that are asked for."""
        features = self.backbone(images)  # (N, C, h, w)
        return self.neck(features, with_global=with_global, with_dense=with_dense)


class DenseCL(nn.Module):
    """Dense contrastive learning (Wang et al., CVPR 2021), one training step per forward.

    In training mode a forward does, in this order: momentum update of the key encoder, query
    forward, key forward (in random order, batch norm in groups), matching, both losses, enqueue of
    the new keys. The caller runs ``loss.backward()`` and the optimizer over ``parameters()`` that
    require a gradient. In evaluation mode nothing is updated and the losses are computed alike.

    At the first step of an empty queue there is no negative: the loss and its gradients are 0.

    ``loss_lambda=0`` is MoCo v2, exactly: the dense head is frozen and not run, the dense queue
    stays as it is. ``loss_lambda=1`` without warm-up leaves out the global branch in the same way.

    Under ``torch.distributed`` every process enqueues the keys of all of them, so that the queues
    stay equal; wrap the model with ``broadcast_buffers=False`` (the queues are large) and build it
    from the same seed on every rank.

    Metrics (0-d, float32, on the model's device, no gradient):
        ``positive_similarity``: mean cosine of a query and its key (global vectors).
        ``negative_similarity``: mean cosine of a query and the keys of the batch's other images.
        ``feature_std``: spread of the unit queries over the batch, 1 for evenly spread
        directions, 0 for collapse.
        ``queue_filled``: share of the queue that holds keys before this batch's, 0 to 1.
        ``matched``: share of grid positions that have a match.
        ``match_agreement``: with crops given and another matching than geometric, share of the
        positions with a geometric match for which the two name the same key position.
        ``loss_lambda``: the weight of the dense term in this step.
        The first three speak of the global branch and are left out where it is not computed, as
        ``matched`` and ``match_agreement`` are without the dense branch.

    Args:
        backbone: name of a torchvision ResNet or ``timm/NAME`` (random start), or a module
            (N, 3, H, W) -> (N, C, h, w); load pre-trained weights into it first and both encoders
            start from them.
        dim: D, size of the vectors.
        hidden_dim: hidden width of both heads.
        queue_length: K of both queues. The paper's 65,536 suits ImageNet and COCO; a data set of a
            few thousand images wants fewer keys than images.
        momentum: of the key encoder, 0.999 in the paper.
        temperature: of both losses.
        loss_lambda: weight of the dense term, in [0, 1].
        grid_size: pool the dense branch, and the features it is matched by, to S x S; None keeps
            the backbone's grid.
        matching: ``"backbone"`` (the paper's), ``"dense"`` (by the dense head's output),
            ``"geometric"`` (by the crops, which forward then needs) or ``"random"``.
        mutual_matching: with ``"backbone"`` or ``"dense"``, leave out positions whose best match
            is not mutual.
        lambda_warmup_steps: training steps at the start during which the dense term has weight 0.
            It is still computed and its queue filled.
        queue_dtype: dtype of the stored keys and of the loss's arithmetic.
        queue_init: ``"empty"`` or ``"random"`` (the paper's), see :class:`KeyQueue`.
        key_bn_groups: groups of the batch that the key encoder's batch norms normalise apart, so
            that keys do not share statistics with their queries
            (:mod:`densecl_ext.nn.batchnorm`); 8 imitates the paper's 8 GPUs. 1 is plain batch norm,
            which leaks on a single process.
        backbone_channels: C, where it cannot be found out.

    Raises:
        ValueError: a setting out of range, views of different shapes, or crops that are missing.

    Example:
        >>> import torch
        >>> from densecl_ext import DenseCL
        >>> backbone = torch.nn.Conv2d(3, 64, kernel_size=8, stride=8)  # or "resnet50"
        >>> model = DenseCL(backbone, queue_length=1024)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.03)
        >>> for _ in range(2):
        ...     out = model(torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32))
        ...     optimizer.zero_grad()
        ...     out.loss.backward()
        ...     optimizer.step()
        >>> sorted(out.metrics)[:2]
        ['feature_std', 'loss_lambda']
    """

    step: Tensor

    def __init__(
        self,
        backbone: str | nn.Module = "resnet50",
        *,
        dim: int = 128,
        hidden_dim: int = 2048,
        queue_length: int = 65536,
        momentum: float = 0.999,
        temperature: float = 0.2,
        loss_lambda: float = 0.5,
        grid_size: int | tuple[int, int] | None = None,
        matching: str = "backbone",
        mutual_matching: bool = False,
        lambda_warmup_steps: int = 0,
        queue_dtype: torch.dtype = torch.float32,
        queue_init: str = "empty",
        key_bn_groups: int = 8,
        backbone_channels: int | None = None,
    ) -> None:
        super().__init__()
        if matching not in MATCHINGS:
            raise ValueError(f"DenseCL: matching must be one of {MATCHINGS}, got {matching!r}")
        if mutual_matching and matching not in ("backbone", "dense"):
            raise ValueError(
                "DenseCL: mutual_matching needs matching 'backbone' or 'dense', got "
                f"matching={matching!r}"
            )
        if lambda_warmup_steps < 0:
            raise ValueError(
                f"DenseCL: lambda_warmup_steps must be at least 0, got {lambda_warmup_steps}"
            )
        if key_bn_groups < 1:
            raise ValueError(f"DenseCL: key_bn_groups must be at least 1, got {key_bn_groups}")
        self.criterion = DenseCLLoss(loss_lambda, temperature, mutual=mutual_matching)
        self.matching = matching
        self.mutual_matching = mutual_matching
        self.lambda_warmup_steps = lambda_warmup_steps
        self.key_bn_groups = key_bn_groups
        self.with_dense = loss_lambda > 0.0
        self.with_global = loss_lambda < 1.0 or lambda_warmup_steps > 0

        self.backbone = build_backbone(backbone) if isinstance(backbone, str) else backbone
        channels = backbone_channels or feature_channels(self.backbone)
        self.neck = DenseCLNeck(channels, hidden_dim, dim, grid_size)
        self.momentum_encoder = MomentumEncoder(
            Encoder(self.backbone, self.neck), momentum, bn_groups=key_bn_groups
        )
        # A head without a loss must not look trainable: weight decay would shrink it, and
        # DistributedDataParallel would wait for its gradient.
        self.neck.global_head.requires_grad_(self.with_global)
        self.neck.dense_head.requires_grad_(self.with_dense)
        self.global_queue = KeyQueue(queue_length, dim, queue_dtype, init=queue_init)
        self.dense_queue = KeyQueue(queue_length, dim, queue_dtype, init=queue_init)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    @property
    def loss_lambda(self) -> float:
        """Weight of the dense term after the warm-up."""
        return self.criterion.loss_lambda

    def forward(
        self,
        view_q: Tensor,
        view_k: Tensor,
        *,
        crop_q: Tensor | None = None,
        crop_k: Tensor | None = None,
    ) -> DenseCLOutput:
        """One step on two views of the same images.

        Args:
            view_q: (N, 3, H, W), normalised images for the query encoder.
            view_k: (N, 3, H, W), the other views of the same images, for the key encoder.
            crop_q: (N, 5), crop box and flip of each query view
                (:func:`densecl_ext.nn.matching.geometric_match`); needed by matching "geometric".
            crop_k: (N, 5) of each key view.
        """
        self._check(view_q, view_k, crop_q, crop_k)
        loss_lambda = self._current_lambda()
        if self.training:
            with phase("momentum"):
                parts = {"backbone": self.backbone, "neck": self.neck}
                self.momentum_encoder.update_(parts)
        with phase("query_forward"):
            query = self._query(view_q)
        with phase("key_forward"):
            key = self._key(view_k)
        metrics = self._queue_metrics(loss_lambda, view_q.device)
        match = None
        if self.with_dense:
            with phase("matching"):
                match = self._match(query, key, crop_q, crop_k)
                metrics |= _match_metrics(match, self._truth(query, key, crop_q, crop_k))
        with phase("losses"):
            if self.with_global:
                metrics |= _vector_metrics(query.vector, key.vector)
            loss, loss_global, loss_dense = self.criterion(
                query.vector,
                key.vector,
                query.grid,
                key.grid,
                self.global_queue,
                self.dense_queue,
                match=match,
                loss_lambda=loss_lambda,
            )
        if self.training:
            with phase("enqueue"):
                self._enqueue_(key)
                self.step.add_(1)
        return DenseCLOutput(loss, loss_global, loss_dense, metrics)

    @torch.no_grad()
    def load_backbone_weights(self, state_dict: dict[str, Tensor], *, strict: bool = True) -> None:
        """Start from pre-trained weights: load them into both encoders' backbones.

        ``model.backbone.load_state_dict`` alone would leave the key encoder where it was.

        Raises:
            RuntimeError: with ``strict``, keys or shapes that do not fit.
        """
        self.backbone.load_state_dict(state_dict, strict=strict)
        self.momentum_encoder.copy_(Encoder(self.backbone, self.neck))

    def _current_lambda(self) -> float | Tensor:
        """The dense term's weight in this step; a tensor while a warm-up may be pending.

        The step count stays on the device: reading it would make the host wait.
        """
        if self.lambda_warmup_steps == 0 or not self.with_dense:
            return self.loss_lambda
        return (self.step >= self.lambda_warmup_steps).float() * self.loss_lambda

    def _query(self, view_q: Tensor) -> NeckOutput:
        return self.neck(
            self.backbone(view_q), with_global=self.with_global, with_dense=self.with_dense
        )

    def _key(self, view_k: Tensor) -> NeckOutput:
        heads = {"with_global": self.with_global, "with_dense": self.with_dense}
        if self.training and self.key_bn_groups > 1:
            return shuffled_forward(self.momentum_encoder, view_k, **heads)  # type: ignore
        return self.momentum_encoder(view_k, **heads)

    @torch.no_grad()
    def _match(
        self, query: NeckOutput, key: NeckOutput, crop_q: Tensor | None, crop_k: Tensor | None
    ) -> Tensor:
        """Match of every query position, (N, prod(S))."""
        assert query.grid is not None and key.grid is not None
        assert query.features is not None and key.features is not None
        if self.matching == "backbone":
            return feature_match(query.features, key.features, mutual=self.mutual_matching)
        if self.matching == "dense":
            return feature_match(query.grid, key.grid, mutual=self.mutual_matching)
        grids = query.grid.shape[2:], key.grid.shape[2:]
        if self.matching == "random":
            return random_match(query.grid.shape[0], *grids, device=query.grid.device)
        assert crop_q is not None and crop_k is not None
        return geometric_match(crop_q, crop_k, *grids)

    @torch.no_grad()
    def _truth(
        self, query: NeckOutput, key: NeckOutput, crop_q: Tensor | None, crop_k: Tensor | None
    ) -> Tensor | None:
        """The geometric match beside another matching, where the crops are known."""
        if crop_q is None or crop_k is None or self.matching == "geometric":
            return None
        assert query.grid is not None and key.grid is not None
        return geometric_match(crop_q, crop_k, query.grid.shape[2:], key.grid.shape[2:])

    @torch.no_grad()
    def _enqueue_(self, key: NeckOutput) -> None:
        """Put one key per image into each queue; the dense one is pooled, then normalised."""
        vector, grid = key.vector, key.grid
        pooled = None if grid is None else grid.float().mean(dim=(2, 3))  # (N, D)
        if vector is not None and pooled is not None:
            both = gather_keys(torch.cat([vector.float(), pooled], dim=1))  # one collective
            vector, pooled = both.chunk(2, dim=1)
        elif vector is not None:
            vector = gather_keys(vector)
        elif pooled is not None:
            pooled = gather_keys(pooled)
        if vector is not None:
            self.global_queue.enqueue_(vector)
        if pooled is not None:
            self.dense_queue.enqueue_(pooled)

    def _queue_metrics(
        self, loss_lambda: float | Tensor, device: torch.device
    ) -> dict[str, Tensor]:
        queue = self.global_queue if self.with_global else self.dense_queue
        weight = (
            loss_lambda
            if isinstance(loss_lambda, Tensor)
            else torch.full((), loss_lambda, device=device)
        )
        return {"queue_filled": queue.filled.float() / len(queue), "loss_lambda": weight}

    def _check(
        self, view_q: Tensor, view_k: Tensor, crop_q: Tensor | None, crop_k: Tensor | None
    ) -> None:
        if view_q.dim() != 4 or view_q.shape != view_k.shape:
            raise ValueError(
                "DenseCL: view_q and view_k must be (N, 3, H, W) of one shape, got "
                f"{tuple(view_q.shape)} and {tuple(view_k.shape)}"
            )
        if (crop_q is None) != (crop_k is None):
            raise ValueError("DenseCL: crop_q and crop_k must be given together, got only one")
        if crop_q is None and self.matching == "geometric" and self.with_dense:
            raise ValueError(
                "DenseCL: matching 'geometric' needs crop_q and crop_k (N, 5), got None; the "
                "loaders of densecl_ext.data return them with the views"
            )
        if crop_q is not None and crop_q.shape[0] != view_q.shape[0]:
            raise ValueError(
                f"DenseCL: crop_q must be ({view_q.shape[0]}, 5), got {tuple(crop_q.shape)}"
            )


@torch.no_grad()
def _vector_metrics(query: Tensor | None, key: Tensor | None) -> dict[str, Tensor]:
    """Similarities and spread of the global vectors (N, D)."""
    assert query is not None and key is not None
    images, dim = query.shape
    query = F.normalize(query.float(), dim=1)
    key = F.normalize(key.float(), dim=1)
    positive = (query * key).sum()
    every = query.sum(dim=0) @ key.sum(dim=0)  # all N * N cosines, in O(N D)
    spread = (query - query.mean(dim=0)).square().mean(dim=0).sqrt().mean()
    return {
        "positive_similarity": positive / images,
        "negative_similarity": (every - positive) / max(1, images * (images - 1)),
        "feature_std": spread * dim**0.5,
    }


@torch.no_grad()
def _match_metrics(match: Tensor, truth: Tensor | None) -> dict[str, Tensor]:
    """Share of matched positions, and of those that agree with the geometry."""
    metrics = {"matched": (match >= 0).float().mean()}
    if truth is not None:
        known = truth >= 0
        agree = ((match == truth) & known).float().sum()
        metrics["match_agreement"] = agree / known.float().sum().clamp(min=1.0)
    return metrics
