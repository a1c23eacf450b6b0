"""Three training steps of DenseCL against a plain transcription of the paper.

The transcription is written from the paper's text: two encoders, two lists of keys, similarities by
einsum, all logits in one matrix, cross entropy with class 0. It knows nothing of the package.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_models import TinyBackbone, two_views
from torch import Tensor, nn

from densecl_ext.nn.model import DenseCL

DIM, HIDDEN, MOMENTUM, TEMPERATURE = 8, 16, 0.9, 0.2
CLOSE = {"rtol": 2e-5, "atol": 2e-6}


class PaperEncoder(nn.Module):
    """Backbone, global head, dense head (section 3.2)."""

    def __init__(self, backbone: nn.Module, channels: int, grid_size: int | None) -> None:
        super().__init__()
        self.backbone = backbone
        self.fc = nn.Sequential(nn.Linear(channels, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, DIM))
        self.conv = nn.Sequential(
            nn.Conv2d(channels, HIDDEN, 1), nn.ReLU(), nn.Conv2d(HIDDEN, DIM, 1)
        )
        self.grid_size = grid_size

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.backbone(images)
        vector = self.fc(F.adaptive_avg_pool2d(features, 1).flatten(1))
        if self.grid_size is not None:
            features = F.adaptive_avg_pool2d(features, self.grid_size)
        return vector, self.conv(features), features


class Ring:
    """The last K keys as a list; None where there is no key yet."""

    def __init__(self, start: Tensor, filled: int) -> None:
        self.rows = [row.clone() if i < filled else None for i, row in enumerate(start)]
        self.next = 0

    def negatives(self) -> Tensor:
        held = [row for row in self.rows if row is not None]
        return torch.stack(held) if held else torch.zeros(0, DIM)

    def push(self, keys: Tensor) -> None:
        for key in keys:
            self.rows[self.next] = key
            self.next = (self.next + 1) % len(self.rows)


class Paper:
    """One process of DenseCL; ``groups`` > 1 normalises groups of permuted keys apart."""

    def __init__(
        self, model: DenseCL, grid_size: int | None, loss_lambda: float, groups: int
    ) -> None:
        backbone = copy.deepcopy(model.backbone)
        self.encoder_q = PaperEncoder(backbone, backbone.out_channels, grid_size)
        self.encoder_q.fc.load_state_dict(model.neck.global_head.state_dict())
        self.encoder_q.conv.load_state_dict(model.neck.dense_head.state_dict())
        self.encoder_k = copy.deepcopy(self.encoder_q)
        self.queues = [
            Ring(queue.keys, int(queue.filled)) for queue in (model.global_queue, model.dense_queue)
        ]
        self.loss_lambda, self.groups = loss_lambda, groups

    @torch.no_grad()
    def keys(self, images: Tensor) -> tuple[Tensor, ...]:
        for k, q in zip(self.encoder_k.parameters(), self.encoder_q.parameters(), strict=True):
            k.data = MOMENTUM * k.data + (1 - MOMENTUM) * q.data
        if self.groups == 1:
            return self.encoder_k(images)
        order = torch.randperm(len(images))
        results: list[tuple[Tensor, ...] | None] = [None] * len(images)
        for group in range(self.groups):
            first, last = (g * len(images) // self.groups for g in (group, group + 1))
            members = order[first:last]
            outputs = self.encoder_k(images[members])
            for position, image in enumerate(members.tolist()):
                results[image] = tuple(output[position] for output in outputs)
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True))

    def loss(self, view_q: Tensor, view_k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, q_grid, q_features = self.encoder_q(view_q)
        k, k_grid, k_features = self.keys(view_k)
        q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
        loss_global = self.contrast(q, k, self.queues[0])

        pooled = F.normalize(k_grid.mean(dim=(2, 3)), dim=1)  # one key per image
        q_grid = F.normalize(q_grid.flatten(2), dim=1)
        k_grid = F.normalize(k_grid.flatten(2), dim=1)
        with torch.no_grad():
            similarity = torch.einsum(
                "ncs,nct->nst",
                F.normalize(q_features.flatten(2), dim=1),
                F.normalize(k_features.flatten(2), dim=1),
            )
            match = similarity.argmax(dim=2)  # (N, S)
        positives = torch.gather(k_grid, 2, match.unsqueeze(1).expand(-1, DIM, -1))
        loss_dense = self.contrast(
            q_grid.permute(0, 2, 1).reshape(-1, DIM),
            positives.permute(0, 2, 1).reshape(-1, DIM),
            self.queues[1],
        )
        self.queues[0].push(k)
        self.queues[1].push(pooled)
        loss = (1 - self.loss_lambda) * loss_global + self.loss_lambda * loss_dense
        return loss, loss_global, loss_dense

    @staticmethod
    def contrast(queries: Tensor, keys: Tensor, queue: Ring) -> Tensor:
        positive = torch.einsum("nc,nc->n", queries, keys).unsqueeze(1)
        negative = torch.einsum("nc,kc->nk", queries, queue.negatives())
        logits = torch.cat([positive, negative], dim=1) / TEMPERATURE
        return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))


def build(**settings: object) -> DenseCL:
    torch.manual_seed(3)
    return DenseCL(
        TinyBackbone(),
        dim=DIM,
        hidden_dim=HIDDEN,
        momentum=MOMENTUM,
        temperature=TEMPERATURE,
        **settings,  # type: ignore[arg-type]
    ).train()


def sgd(module: nn.Module) -> torch.optim.SGD:
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return torch.optim.SGD(trained, lr=0.1, momentum=0.9, weight_decay=1e-3)


def ours_by_paper_name(encoder: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of a backbone and neck under the names of PaperEncoder."""
    renamed = {f"backbone.{name}": p for name, p in encoder.backbone.named_parameters()}
    renamed |= {f"fc.{name}": p for name, p in encoder.neck.global_head.named_parameters()}
    renamed |= {f"conv.{name}": p for name, p in encoder.neck.dense_head.named_parameters()}
    return renamed


def assert_queues_equal(model: DenseCL, paper: Paper, which: tuple[str, ...]) -> None:
    for name in which:
        queue = getattr(model, name)
        ring = paper.queues[("global_queue", "dense_queue").index(name)]
        assert int(queue.pointer) == ring.next
        assert int(queue.filled) == len(ring.negatives())
        for row, expected in zip(queue.keys, ring.rows, strict=True):
            if expected is not None:
                torch.testing.assert_close(row, expected, **CLOSE)


@pytest.mark.parametrize(
    ("grid_size", "batch", "groups", "queue_length", "queue_init", "warmup"),
    [
        (None, 8, 1, 100, "random", 0),
        (None, 8, 4, 20, "empty", 0),  # the third batch wraps round: 24 keys, 20 rows
        (3, 10, 4, 17, "random", 0),  # groups of 2, 3, 2 and 3
        (3, 8, 2, 20, "empty", 2),
        (7, 9, 1, 5, "random", 1),  # more positions than the features have, batch above the queue
    ],
)
def test_three_steps_equal_the_paper(
    grid_size: int | None, batch: int, groups: int, queue_length: int, queue_init: str, warmup: int
) -> None:
    model = build(
        grid_size=grid_size,
        queue_length=queue_length,
        queue_init=queue_init,
        key_bn_groups=groups,
        lambda_warmup_steps=warmup,
    )
    paper = Paper(model, grid_size, 0.5, groups)
    optimizer, paper_optimizer = sgd(model), sgd(paper.encoder_q)
    for step in range(3):
        views = two_views(batch, seed=step)
        paper.loss_lambda = 0.0 if step < warmup else 0.5
        torch.manual_seed(step)  # both sides draw the same permutation of the keys
        out = model(*views)
        torch.manual_seed(step)
        expected = paper.loss(*views)
        for value, wanted in zip(out[:3], expected, strict=True):
            torch.testing.assert_close(value, wanted, **CLOSE)

        optimizer.zero_grad()
        paper_optimizer.zero_grad()
        out.loss.backward()
        expected[0].backward()
        ours = ours_by_paper_name(model)
        for name, parameter in paper.encoder_q.named_parameters():
            torch.testing.assert_close(ours[name].grad, parameter.grad, **CLOSE, msg=name)
        keys = ours_by_paper_name(model.momentum_encoder.module)
        for name, parameter in paper.encoder_k.named_parameters():
            torch.testing.assert_close(keys[name].data, parameter.data, **CLOSE, msg=name)
        assert_queues_equal(model, paper, ("global_queue", "dense_queue"))

        optimizer.step()
        paper_optimizer.step()
    assert float(expected[0].detach()) > 0.5  # there was something to compare
    assert all(float(p.grad.abs().max()) > 0 for p in paper.encoder_q.conv.parameters())


class MoCo(Paper):
    """MoCo v2: the global branch alone."""

    def loss(self, view_q: Tensor, view_k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k = self.encoder_q(view_q)[0], self.keys(view_k)[0]
        q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
        loss = self.contrast(q, k, self.queues[0])
        self.queues[0].push(k)
        return loss, loss, torch.zeros(())


@pytest.mark.parametrize("groups", [1, 4])
def test_lambda_zero_is_moco(groups: int) -> None:
    model = build(loss_lambda=0.0, queue_length=13, queue_init="random", key_bn_groups=groups)
    moco = MoCo(model, None, 0.0, groups)
    moco.encoder_q.conv.requires_grad_(False)  # MoCo has no dense head
    optimizer, moco_optimizer = sgd(model), sgd(moco.encoder_q)
    dense_head = copy.deepcopy(model.neck.dense_head.state_dict())
    dense_queue = model.dense_queue.keys.clone()

    def not_run(*_: object) -> None:
        raise AssertionError("lambda 0 must not run the dense head")

    model.neck.dense_head.register_forward_hook(not_run)
    model.momentum_encoder.module.neck.dense_head.register_forward_hook(not_run)
    for step in range(3):
        views = two_views(8, seed=step)
        torch.manual_seed(step)
        out = model(*views)
        torch.manual_seed(step)
        expected = moco.loss(*views)
        for value, wanted in zip(out[:3], expected, strict=True):
            torch.testing.assert_close(value, wanted, **CLOSE)
        for loss, owner in ((out.loss, optimizer), (expected[0], moco_optimizer)):
            owner.zero_grad()
            loss.backward()
            owner.step()
        ours = ours_by_paper_name(model)
        for name, parameter in moco.encoder_q.named_parameters():
            torch.testing.assert_close(ours[name].data, parameter.data, **CLOSE, msg=name)
        assert_queues_equal(model, moco, ("global_queue",))
    for name, value in model.neck.dense_head.state_dict().items():
        assert torch.equal(value, dense_head[name])
    assert torch.equal(model.dense_queue.keys, dense_queue)
