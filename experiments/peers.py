"""PixPro and SlotCon by their authors' own modules, out of checkouts on PYTHONPATH.

    git clone https://github.com/zdaxie/PixPro PEERS/PixPro         # 2021, MIT
    git clone https://github.com/CVMI-Lab/SlotCon PEERS/SlotCon     # 2022, Apache-2.0
    PYTHONPATH=PEERS/PixPro:PEERS/SlotCon python -m experiments.run --arms pixpro slotcon ...

Forward, losses and momentum updates are theirs, at the settings of their scripts for 100 epochs of
ImageNet (PixPro) and for COCO (SlotCon). Heads fit the network's channels and are as wide as those
of the other arms; the optimizer, the schedule and the views are those of all arms. Run on a CPU;
never on a GPU.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn


class Planar(nn.Sequential):
    """A head whose output is contiguous: their code takes views of it."""

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features).contiguous()


@contextmanager
def alone() -> Iterator[None]:
    """A process group of one, which their code asks for, and batch norm as one process has it."""
    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    with mock.patch.object(nn.SyncBatchNorm, "convert_sync_batchnorm", lambda module: module):
        yield


def epochs_of(steps: int) -> dict[str, int]:
    """So many steps, as their schedules of the momentum count them."""
    return {"num_instances": steps, "batch_size": 1, "world_size": 1, "epochs": 1, "start_epoch": 1}


class PixPro(nn.Module):
    """PixPro (arXiv 2011.10043): pixels near each other in the image agree, after propagation."""

    def __init__(self, backbone: nn.Module, steps: int, dim: int = 512) -> None:
        super().__init__()
        module: Any = importlib.import_module("contrast.models.PixPro")

        channels = int(backbone.out_channels)  # type: ignore[arg-type]
        options = SimpleNamespace(
            **epochs_of(steps), feature_dim=0, head_type="", pixpro_p=2.0, pixpro_momentum=0.99,
            pixpro_pos_ratio=0.7, pixpro_clamp_value=0.0, pixpro_transform_layer=1,
            pixpro_ins_loss_weight=0.0,
        )  # fmt: skip
        # The first is replaced by the second before anything is done with it.
        encoders = iter([backbone, backbone, copy.deepcopy(backbone)])

        def head() -> nn.Module:
            return Planar(module.MLP2d(channels, dim))

        with alone(), mock.patch.object(module, "Proj_Head", head):
            self.method = module.PixPro(lambda **_: next(encoders), options)

    def forward(self, q: Tensor, k: Tensor, crop_q: Tensor, crop_k: Tensor) -> Tensor:
        return self.method(q, k, *(mirrored(crop) for crop in (crop_q, crop_k)))


def mirrored(crops: Tensor) -> Tensor:
    """Left, top, right, bottom of the views as they are: a flipped one begins on the right."""
    x0, y0, x1, y1, flip = crops.unbind(1)
    return torch.stack([torch.where(flip > 0, x1, x0), y0, torch.where(flip > 0, x0, x1), y1], 1)


class SlotCon(nn.Module):
    """SlotCon (arXiv 2205.15288): positions are grouped by prototypes, groups are contrasted."""

    def __init__(self, backbone: nn.Module, steps: int, dim: int = 512) -> None:
        super().__init__()
        module: Any = importlib.import_module("models.slotcon")

        channels = int(backbone.out_channels)  # type: ignore[arg-type]
        options = SimpleNamespace(
            **epochs_of(steps), arch="", dim_hidden=dim, dim_out=256, num_prototypes=256,
            teacher_momentum=0.99, student_temp=0.1, teacher_temp=0.07, center_momentum=0.9,
            group_loss_weight=0.5,
        )  # fmt: skip
        encoders, head = iter([backbone, copy.deepcopy(backbone)]), module.DINOHead2d

        def fitting(_: int, **widths: int) -> nn.Module:
            return head(channels, **widths)

        with alone(), mock.patch.object(module, "DINOHead2d", fitting):
            self.method = module.SlotCon(lambda **_: next(encoders), options)

    def forward(self, q: Tensor, k: Tensor, crop_q: Tensor, crop_k: Tensor) -> Tensor:
        low = torch.maximum(crop_q[:, :2], crop_k[:, :2])
        high = torch.minimum(crop_q[:, 2:4], crop_k[:, 2:4]).maximum(low)
        shared = [common(low, high, crop) for crop in (crop_q, crop_k)]
        return self.method(((q, k), shared, [crop[:, 4] > 0 for crop in (crop_q, crop_k)]))


def common(low: Tensor, high: Tensor, crop: Tensor) -> Tensor:
    """Where the part of the image that both crops show lies in a view, from 0 to 1."""
    size = crop[:, 2:4] - crop[:, :2]
    (x0, y0), (x1, y1) = (((point - crop[:, :2]) / size).unbind(1) for point in (low, high))
    flip = crop[:, 4] > 0
    return torch.stack([torch.where(flip, 1 - x1, x0), y0, torch.where(flip, 1 - x0, x1), y1], 1)
