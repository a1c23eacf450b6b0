"""`finetune`: the whole network, with an FCN head, trained on labelled images."""

from __future__ import annotations

import copy
import dataclasses
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from densecl_ext.backbones import feature_channels
from densecl_ext.evaluate.dense import (
    DenseData,
    Examples,
    LabelledImages,
    score,
    segmentation_report,
)
from densecl_ext.evaluate.features import device_of, input_size, prepare_images
from densecl_ext.evaluate.metrics import IGNORE_INDEX
from densecl_ext.evaluate.options import (
    PRECISIONS,
    PixelOptions,
    require_at_least,
    require_positive,
)
from densecl_ext.evaluate.report import Report


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneOptions(PixelOptions):
    """Segmentation with an FCN head, the whole network trained.

    Attributes:
        labelled: learn from this many training images, evenly spread from an offset that the seed
            draws; 0 takes all.
        iterations: training steps.
        batch_size: images a step.
        lr: the highest learning rate of SGD; 10 % of the steps warm up, then it falls as a cosine.
        backbone_lr: factor of the learning rate for the backbone.
        weight_decay: of all weights.
        head_channels: width of the head; 0 is a quarter of the features, at least 64.
    """

    labelled: int = 0
    iterations: int = 600
    batch_size: int = 8
    lr: float = 0.05
    backbone_lr: float = 1.0
    weight_decay: float = 1e-4
    head_channels: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "iterations")
        require_at_least(self, 0, "labelled", "weight_decay", "backbone_lr", "head_channels")
        require_positive(self, "lr")
        if self.layers:
            raise ValueError("FinetuneOptions: layers must be empty: the last features are trained")


class FCNHead(nn.Sequential):
    """3 x 3 convolution, batch norm, ReLU, 1 x 1 convolution (Long et al. 2015, arXiv 1411.4038).

    Args:
        in_channels: C.
        channels: width between the convolutions.
        num_classes: K.

    Shape:
        (N, C, h, w) to (N, K, h, w).
    """

    def __init__(self, in_channels: int, channels: int, num_classes: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, num_classes, 1),
        )


def finetune(
    backbone: nn.Module, options: FinetuneOptions, *, data: DenseData | None = None
) -> Report:
    """Train a copy of the network with an FCN head and measure its segmentation.

    SGD with momentum 0.9, cross-entropy at the labels' resolution, images mirrored at random. The
    same seed draws the same head, images and flips for every network.

    Args:
        backbone: (N, 3, H, W) to (N, C, h, w), on the device where everything is computed; a copy
            is trained.
        options: of the protocol.
        data: what :meth:`DenseData.load` read with the same options; None reads it.

    Returns:
        mIoU, pixel accuracy and frequency-weighted IoU over all pixels of the validation images.

    Raises:
        ValueError: data or options that do not fit, a loss that is no longer finite.
    """
    start = time.perf_counter()
    data = data or DenseData.load(options)
    device = device_of(backbone)
    num_classes = len(data.class_names)
    network = copy.deepcopy(backbone)
    channels = feature_channels(network)
    width = options.head_channels or max(64, channels // 4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        head = FCNHead(channels, width, num_classes).to(device)
    train = _subset(data.train, options)
    _train(network, head, train, num_classes, options)
    confusions: list[Tensor] = []
    examples = Examples(data.val, data.class_names)
    network.eval()
    head.eval()
    with torch.no_grad():
        for first in range(0, len(data.val), options.batch_size):
            part = slice(first, first + options.batch_size)
            inputs = _inputs(network, data.val.images[part], options, device)
            with _autocast(options, device):
                scores = head(network(inputs))
            counted, predicted = score(scores, data.val.labels[part], num_classes)
            confusions += counted
            examples.add(first, predicted)
    settings: dict[str, Any] = {
        **data.settings,
        "labelled": f"{len(train)} of {len(data.train)}",
        "scale": options.scale,
        "head": f"FCN {width}",
        "trained": "backbone and head",
        "iterations": options.iterations,
        "batch": options.batch_size,
        "lr": options.lr,
        "backbone_lr": options.backbone_lr,
        "weight_decay": options.weight_decay,
        "augmentation": "flip",
        "precision": options.precision,
        "seed": options.seed,
    }
    return segmentation_report(
        "finetune",
        torch.stack(confusions),
        data.class_names,
        settings,
        time.perf_counter() - start,
        examples.draw,
    )


def _subset(images: LabelledImages, options: FinetuneOptions) -> LabelledImages:
    """The labelled images: evenly spread, since neighbours in a video show the same."""
    count, total = options.labelled, len(images)
    if not count or count >= total:
        return images
    generator = torch.Generator().manual_seed(options.seed)
    offset = int(torch.randint(total, (1,), generator=generator))
    chosen = (torch.arange(count) * total // count + offset) % total
    return LabelledImages(images.images[chosen], images.labels[chosen])


def _train(
    network: nn.Module,
    head: nn.Module,
    train: LabelledImages,
    num_classes: int,
    options: FinetuneOptions,
) -> None:
    labels = train.labels
    if bool(((labels >= num_classes) & (labels != IGNORE_INDEX)).any()):
        raise ValueError(
            f"finetune: labels must be below num_classes = {num_classes} or {IGNORE_INDEX}"
        )
    device = device_of(head)
    network.train()
    for parameter in network.parameters():
        parameter.requires_grad_(True)
    groups = [
        {"params": list(network.parameters()), "factor": options.backbone_lr},
        {"params": list(head.parameters()), "factor": 1.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.SGD(
        groups, lr=options.lr, momentum=0.9, weight_decay=options.weight_decay
    )
    warm = max(1, options.iterations // 10)
    total = max(1, options.iterations - warm)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1.0 + float(torch.cos(torch.tensor(torch.pi * (step - warm) / total))))

    generator = torch.Generator().manual_seed(options.seed)
    order = torch.empty(0, dtype=torch.int64)
    for step in range(options.iterations):
        while len(order) < options.batch_size:
            order = torch.cat([order, torch.randperm(len(train), generator=generator)])
        chosen, order = order[: options.batch_size], order[options.batch_size :]
        flip = torch.rand(len(chosen), generator=generator) < 0.5
        images, target = train.images[chosen], labels[chosen]
        images = torch.where(flip[:, None, None, None], images.flip(3), images)
        target = torch.where(flip[:, None, None], target.flip(2), target).long().to(device)
        for group in optimizer.param_groups:
            group["lr"] = options.lr * group["factor"] * factor(step)
        with _autocast(options, device):
            scores = head(network(_inputs(network, images, options, device)))
        scores = F.interpolate(
            scores.float(), size=target.shape[1:], mode="bilinear", align_corners=False
        )
        counted = (target != IGNORE_INDEX).sum().clamp(min=1)
        loss = F.cross_entropy(scores, target, ignore_index=IGNORE_INDEX, reduction="sum") / counted
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    if not torch.isfinite(loss):
        raise ValueError(f"finetune: the loss is {float(loss)}; lower lr, which is {options.lr}")


def _inputs(
    network: nn.Module, images: Tensor, options: PixelOptions, device: torch.device
) -> Tensor:
    size = input_size(network, (images.shape[2], images.shape[3]), options.scale)
    return prepare_images(images, size, device).contiguous(memory_format=torch.channels_last)


def _autocast(options: PixelOptions, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=options.precision == PRECISIONS[1])
