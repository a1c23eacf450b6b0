"""DenseCL: backbone, two heads, key encoder, two queues and the loss in one module."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from densecl_ext.backbones import build_backbone, feature_channels
from densecl_ext.nn.batchnorm import exchanged_forward, shuffled_forward
from densecl_ext.nn.distributed import gather_keys, own_rows, world_size
from densecl_ext.nn.health import match_metrics, position_metrics, vector_metrics
from densecl_ext.nn.losses import DenseCLLoss, DenseCLTerms
from densecl_ext.nn.matcher import Matched, Matcher
from densecl_ext.nn.momentum import MomentumEncoder
from densecl_ext.nn.necks import DenseCLNeck, NeckOutput, Predictor
from densecl_ext.nn.phases import phase
from densecl_ext.nn.queue import KeyQueue
from densecl_ext.nn.syncnorm import sync_batch_norms

DENSE_NEGATIVES = ("pooled", "position")
KEY_BN = ("split", "shuffle", "sync")


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

    Initialise ``torch.distributed`` before the model is built. Every process enqueues the keys of
    all of them, so that the queues stay equal; wrap the model with ``broadcast_buffers=False`` (the
    queues are large) and build it from the same seed on every rank. The global generators must be
    in the same state on all: what is drawn for an image does not depend on who has it.

    Metrics (0-d, float32, on the model's device, no gradient; of the first direction where the loss
    is symmetric):

    - ``positive_similarity``: mean cosine of a query and its key (global vectors).
    - ``negative_similarity``: mean cosine of a query and the keys of the batch's other images.
    - ``top1``: share of queries whose own key is the most similar of the batch's keys.
    - ``feature_std``: spread of the unit queries over the batch, 1 for evenly spread
      directions, 0 for collapse.
    - ``effective_rank``: directions that the unit queries take up, as the participation ratio of
      their covariance's eigenvalues; at most min(N - 1, D).
    - ``queue_filled``: share of the queue that holds keys before this batch's, 0 to 1.
    - ``queue_age``: mean age of a key in the queue, in steps.
    - ``matched``: share of grid positions that have a match.
    - ``same_index``: share of the matches that name the query's own grid position.
    - ``same_index_geometric``: the same of the geometric matches: what it should be near. Above
      it by far, matching goes by position. Also the share of ``match_agreement`` that a matching
      blind to the content reaches by naming its own position.
    - ``match_agreement``: with another matching than geometric, share of the positions with a
      geometric match for which the two name the same key position.
    - ``position_share``, ``content_free_loss``: how much of the dense head is grid position, see
      :func:`densecl_ext.nn.health.position_metrics`.
    - ``loss_lambda``: the weight of the dense term in this step.

    Those of a branch that does not run are left out, as are those that need crops without them.

    Args:
        backbone: a name for ``build_backbone`` (random start), or a module
            (N, 3, H, W) -> (N, C, h, w); load pre-trained weights into it first and both encoders
            start from them.
        dim: D, size of the vectors.
        hidden_dim: hidden width of both heads.
        queue_length: K of both queues. The paper's 65,536 suits ImageNet and COCO; a data set of a
            few thousand images wants fewer keys than images.
        momentum: of the key encoder, 0.999 in the paper.
        temperature: of both losses.
        dense_temperature: of the dense loss, where it shall differ.
        loss_lambda: weight of the dense term, in [0, 1].
        grid_size: pool the dense branch, and the features it is matched by, to S x S; None keeps
            the backbone's grid.
        matching: ``"backbone"`` (the paper's), ``"dense"`` (by the dense head's output),
            ``"geometric"`` (by the crops, which forward then needs) or ``"random"``.
        geometric_steps: with another matching, match by the crops in this many steps at the start.
        mutual_matching: with ``"backbone"`` or ``"dense"``, leave out positions whose best match
            is not mutual.
        row_weight: weight of a grid position in the dense loss: ``"none"``, ``"overlap"`` (how well
            the two cells cover each other in the image, needs crops) or ``"similarity"`` (of the
            backbone's features, squared, as in PixCon).
        dense_negatives: the dense keys that become negatives: ``"pooled"``, one mean over the grid
            per image (the paper's), or ``"position"``, single grid positions drawn at random
            (section 3.3). Pooled keys hold no position, which rewards a network for telling nothing
            else: see docs/training.md.
        positions_per_image: grid positions drawn per image with ``"position"``.
        symmetric: let the views change places and take the mean of both losses; twice the work.
        predictor_dim: hidden width of a predictor on the query side; None has none.
        lambda_warmup_steps: training steps at the start during which the dense term has weight 0.
            It is still computed and its queue filled.
        queue_dtype: dtype of the stored keys and of the loss's arithmetic.
        queue_init: ``"empty"`` or ``"random"`` (the paper's), see :class:`KeyQueue`.
        key_bn: how batch norm keeps from telling which key belongs to which query
            (:mod:`densecl_ext.nn.batchnorm`). ``"split"``: the key encoder normalises groups of
            this process's batch apart, in random order; nothing is sent. ``"shuffle"``: as the
            paper does, processes exchange the key images, and their outputs, at random; alone it
            is ``"split"``. ``"sync"``: both encoders normalise over the batch of all processes
            (which tells a little), so that results do not depend on their number.
        key_bn_groups: groups of ``"split"``; 8 imitates the paper's 8 GPUs. 1 is plain batch norm,
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
        ['content_free_loss', 'effective_rank']
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
        dense_temperature: float | None = None,
        loss_lambda: float = 0.5,
        grid_size: int | tuple[int, int] | None = None,
        matching: str = "backbone",
        geometric_steps: int = 0,
        mutual_matching: bool = False,
        row_weight: str = "none",
        dense_negatives: str = "pooled",
        positions_per_image: int = 1,
        symmetric: bool = False,
        predictor_dim: int | None = None,
        lambda_warmup_steps: int = 0,
        queue_dtype: torch.dtype = torch.float32,
        queue_init: str = "empty",
        key_bn: str = "split",
        key_bn_groups: int = 8,
        backbone_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.matcher = Matcher(matching, geometric_steps, mutual_matching, row_weight)
        if dense_negatives not in DENSE_NEGATIVES:
            raise ValueError(
                f"DenseCL: dense_negatives must be one of {DENSE_NEGATIVES}, got "
                f"{dense_negatives!r}"
            )
        if key_bn not in KEY_BN:
            raise ValueError(f"DenseCL: key_bn must be one of {KEY_BN}, got {key_bn!r}")
        for name, count, least in (
            ("lambda_warmup_steps", lambda_warmup_steps, 0),
            ("key_bn_groups", key_bn_groups, 1),
            ("positions_per_image", positions_per_image, 1),
        ):
            if count < least:
                raise ValueError(f"DenseCL: {name} must be at least {least}, got {count}")
        self.criterion = DenseCLLoss(
            loss_lambda, temperature, dense_temperature=dense_temperature, mutual=mutual_matching
        )
        self.dense_negatives = dense_negatives
        self.positions_per_image = positions_per_image
        self.symmetric = symmetric
        self.lambda_warmup_steps = lambda_warmup_steps
        self.key_bn = key_bn
        exchanged = key_bn == "shuffle" and world_size() > 1
        self.key_bn_groups = 1 if exchanged or key_bn == "sync" else key_bn_groups
        self.with_dense = loss_lambda > 0.0
        self.with_global = loss_lambda < 1.0 or lambda_warmup_steps > 0

        self.backbone = build_backbone(backbone) if isinstance(backbone, str) else backbone
        channels = backbone_channels or feature_channels(self.backbone)
        self.neck = DenseCLNeck(channels, hidden_dim, dim, grid_size)
        if key_bn == "sync" and world_size() > 1:
            self.backbone = sync_batch_norms(self.backbone)
        self.momentum_encoder = MomentumEncoder(
            Encoder(self.backbone, self.neck), momentum, bn_groups=self.key_bn_groups
        )
        self.predictor = None
        if predictor_dim is not None:
            self.predictor = Predictor(
                dim, predictor_dim, with_global=self.with_global, with_dense=self.with_dense
            )
            if key_bn == "sync" and world_size() > 1:
                sync_batch_norms(self.predictor)
        # A head without a loss must not look trainable: weight decay would shrink it, and
        # DistributedDataParallel would wait for its gradient.
        self.neck.global_head.requires_grad_(self.with_global)
        self.neck.dense_head.requires_grad_(self.with_dense)
        self.global_queue = KeyQueue(queue_length, dim, queue_dtype, init=queue_init)
        self.dense_queue = KeyQueue(queue_length, dim, queue_dtype, init=queue_init)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.gather: Callable[[Tensor], Tensor] = gather_keys
        self._pending: list[Tensor] = []  # keys of the step's parts so far

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
        part: int = 0,
        parts: int = 1,
    ) -> DenseCLOutput:
        """One step on two views of the same images, or one part of it.

        A step in several parts (gradient accumulation) moves the key encoder in its first part, and
        in its last enqueues the keys of all parts at once, in the order of the whole batch.

        Args:
            view_q: (N, 3, H, W), normalised images for the query encoder.
            view_k: (N, 3, H, W), the other views of the same images, for the key encoder.
            crop_q: (N, 5), crop box and flip of each query view
                (:func:`densecl_ext.nn.matching.geometric_match`); needed by matching "geometric".
            crop_k: (N, 5) of each key view.
            part: which part of the step this is, from 0 on; parts come in order.
            parts: of how many, all of N images.
        """
        self._check(view_q, view_k, crop_q, crop_k)
        loss_lambda = self._current_lambda()
        if self.training and part == 0:
            self._pending = []
            with phase("momentum"):
                self.momentum_encoder.update_({"backbone": self.backbone, "neck": self.neck})
        metrics = self._queue_metrics(loss_lambda, view_q.shape[0] * parts * world_size())
        terms, key = self._direction(view_q, view_k, crop_q, crop_k, loss_lambda, metrics)
        keys = [key]
        if self.symmetric:
            other, key = self._direction(view_k, view_q, crop_k, crop_q, loss_lambda, None)
            terms = DenseCLTerms(*((a + b) / 2 for a, b in zip(terms, other, strict=True)))
            keys.append(key)
        if self.training:
            with phase("enqueue"):
                self._pending.append(torch.cat([self._new_keys(key) for key in keys], dim=1))
                if part == parts - 1:
                    self._enqueue_(len(keys))
                    self.step.add_(1)
        return DenseCLOutput(*terms, metrics)

    def _direction(
        self,
        view_q: Tensor,
        view_k: Tensor,
        crop_q: Tensor | None,
        crop_k: Tensor | None,
        loss_lambda: float | Tensor,
        metrics: dict[str, Tensor] | None,
    ) -> tuple[DenseCLTerms, NeckOutput]:
        """Loss of one view's queries against the other's keys; metrics are added to ``metrics``."""
        with phase("query_forward"):
            query = self._query(view_q)
        with phase("key_forward"):
            key = self._key(view_k)
        matched = None
        if self.with_dense:
            with phase("matching"):
                matched = self.matcher(query, key, crop_q, crop_k, self.step)
        with phase("losses"):
            terms = self.criterion(
                query.vector,
                key.vector,
                query.grid,
                key.grid,
                self.global_queue,
                self.dense_queue,
                match=None if matched is None else matched.match,
                row_weight=None if matched is None else matched.weight,
                loss_lambda=loss_lambda,
            )
        if metrics is not None:
            with phase("metrics"):
                metrics |= self._metrics(query, key, matched)
        return terms, key

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
        query = self.neck(
            self.backbone(view_q), with_global=self.with_global, with_dense=self.with_dense
        )
        return query if self.predictor is None else self.predictor(query)

    def _key(self, view_k: Tensor) -> NeckOutput:
        heads = {"with_global": self.with_global, "with_dense": self.with_dense}
        if self.training and self.key_bn == "shuffle" and world_size() > 1:
            return exchanged_forward(self.momentum_encoder, view_k, **heads)  # type: ignore
        if self.training and self.key_bn_groups > 1:
            return shuffled_forward(self.momentum_encoder, view_k, **heads)  # type: ignore
        return self.momentum_encoder(view_k, **heads)

    @torch.no_grad()
    def _negatives(self, grid: Tensor) -> Tensor:
        """Dense keys of an image for the queue, of key grids (N, D, S, S): (N, n, D)."""
        positions = grid.float().flatten(2)  # (N, D, S)
        if self.dense_negatives == "pooled":
            return positions.mean(dim=2).unsqueeze(1)
        images, dim, count = positions.shape
        shape = 1, self.positions_per_image
        drawn = own_rows(lambda n: torch.randint(count, (n, *shape), device=grid.device), images)
        return positions.gather(2, drawn.expand(-1, dim, -1)).transpose(1, 2)

    @torch.no_grad()
    def _new_keys(self, key: NeckOutput) -> Tensor:
        """What the queues get of each image: (N, P, D), the vector first, then the dense keys."""
        found = []
        if key.vector is not None:
            found.append(key.vector.float().unsqueeze(1))  # (N, 1, D)
        if key.grid is not None:
            found.append(self._negatives(key.grid))  # (N, n, D)
        return torch.cat(found, dim=1)

    @torch.no_grad()
    def _enqueue_(self, directions: int) -> None:
        """Put the step's keys of all processes into the queues, in the order of its batch."""
        parts, ranks = len(self._pending), world_size()
        keys = self.gather(torch.cat(self._pending))  # (R * parts * N, directions * P, D)
        self._pending = []
        if ranks > 1 and parts > 1:  # every part of the batch is shared by all ranks
            keys = keys.unflatten(0, (ranks, parts, -1)).transpose(0, 1).flatten(0, 2)
        for key in keys.chunk(directions, dim=1):
            if self.with_global:
                self.global_queue.enqueue_(key[:, 0])
                key = key[:, 1:]
            if self.with_dense:
                self.dense_queue.enqueue_(key.flatten(0, 1))

    def _queue_metrics(self, loss_lambda: float | Tensor, images: int) -> dict[str, Tensor]:
        queue = self.global_queue if self.with_global else self.dense_queue
        per_step = images * (2 if self.symmetric else 1)
        if not self.with_global and self.dense_negatives == "position":
            per_step *= self.positions_per_image
        weight = (
            loss_lambda
            if isinstance(loss_lambda, Tensor)
            else torch.full((), loss_lambda, device=self.step.device)
        )
        held = queue.filled.float()
        return {
            "queue_filled": held / len(queue),
            "queue_age": held / (2 * per_step),
            "loss_lambda": weight,
        }

    def _metrics(
        self, query: NeckOutput, key: NeckOutput, matched: Matched | None
    ) -> dict[str, Tensor]:
        metrics: dict[str, Tensor] = {}
        if query.vector is not None and key.vector is not None:
            metrics |= vector_metrics(query.vector, key.vector)
        if matched is not None:
            assert query.grid is not None and key.grid is not None
            sizes = query.grid.shape[2:], key.grid.shape[2:]
            metrics |= match_metrics(matched.match, matched.truth, *sizes)
            metrics |= position_metrics(
                query.grid,
                key.grid,
                matched.match,
                self.dense_queue.keys,
                self.dense_queue.filled,
                self.criterion.dense_temperature,
            )
        return metrics

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
        needs = self.matcher.needs_crops()
        if crop_q is None and needs and self.with_dense:
            raise ValueError(
                f"DenseCL: {needs} needs crop_q and crop_k (N, 5), got None; the "
                "loaders of densecl_ext.data return them with the views"
            )
        if crop_q is not None and crop_q.shape[0] != view_q.shape[0]:
            raise ValueError(
                f"DenseCL: crop_q must be ({view_q.shape[0]}, 5), got {tuple(crop_q.shape)}"
            )
