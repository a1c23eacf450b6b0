"""Linear segmentation of frozen features: the cheapest test of a dense representation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from densecl_ext.evaluate.features import extract_features, input_size, prepare_images
from densecl_ext.evaluate.metrics import IGNORE_INDEX, SegmentationResult, confusion_matrix


class LabelledImages(Protocol):
    """What the probe reads: a sequence of (image (3, H, W), label (H, W)), uint8, of one size."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Tensor, Tensor]: ...


def linear_segmentation(
    backbone: nn.Module,
    train: LabelledImages,
    val: LabelledImages,
    *,
    num_classes: int,
    class_names: Sequence[str] = (),
    layers: Sequence[str] | None = None,
    scale: float = 1.0,
    epochs: int = 20,
    batch_size: int = 32,
    lr: float = 3e-3,
    weight_decay: float = 1e-4,
    label_stride: int = 2,
    seed: int = 0,
    device: torch.device | str = "cpu",
    report: Callable[[str], None] | None = None,
) -> SegmentationResult:
    """Train one linear layer on frozen features and measure the segmentation it gives.

    The backbone stays in evaluation mode and gets no gradient. Its features are standardised per
    channel with the training images' mean and deviation, a 1 x 1 convolution maps them to class
    scores, and the scores are enlarged (bilinear) to the labels' size. Cross-entropy, AdamW, cosine
    schedule. The same arguments give the same result on one machine.

    Args:
        backbone: (N, 3, H, W) to (N, C, h, w); moved to ``device``.
        train: images that the linear layer learns from.
        val: images that it is measured on.
        num_classes: number of classes; labels are below it or 255 (ignored).
        class_names: for the result; numbers where empty.
        layers: whose outputs are the features, see :func:`extract_features`; None is the last.
        scale: images are resized by this factor before the backbone (labels keep their size); for
            a timm network to the nearest multiples of its stride.
        epochs: passes over ``train``.
        batch_size: images a step.
        lr: the highest learning rate.
        weight_decay: of the linear layer.
        label_stride: training uses one pixel in this many each way; measuring uses all.
        seed: of the order of the images.
        device: where to compute.
        report: told what happens, in a line now and then.

    Returns:
        The confusion matrix over all pixels of ``val``, with mIoU and more.

    Raises:
        ValueError: an empty set, images of different sizes, a label out of range, a value that
            does not fit.
    """
    start = time.perf_counter()
    confusions = linear_confusions(
        backbone, train, val, num_classes=num_classes, class_names=class_names, layers=layers,
        scale=scale, epochs=epochs, batch_size=batch_size, lr=lr, weight_decay=weight_decay,
        label_stride=label_stride, seed=seed, device=device, report=report,
    )  # fmt: skip
    names = tuple(class_names) or tuple(str(i) for i in range(num_classes))
    return SegmentationResult(confusions.sum(0), names, time.perf_counter() - start)


def linear_confusions(
    backbone: nn.Module,
    train: LabelledImages,
    val: LabelledImages,
    *,
    num_classes: int,
    class_names: Sequence[str] = (),
    layers: Sequence[str] | None = None,
    scale: float = 1.0,
    epochs: int = 20,
    batch_size: int = 32,
    lr: float = 3e-3,
    weight_decay: float = 1e-4,
    label_stride: int = 2,
    seed: int = 0,
    device: torch.device | str = "cpu",
    precision: str = "float32",
    report: Callable[[str], None] | None = None,
    keep: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """What :func:`linear_segmentation` does, with one confusion matrix an image.

    Args and errors are those of that function; ``precision`` is the backbone's, ``keep`` is given
    the index of a batch's first image and its predictions, uint8 (n, H, W).

    Returns:
        int64 (N, C, C) of the images of ``val``: rows are labels, columns predictions.
    """
    for name, value in (
        ("num_classes", num_classes),
        ("epochs", epochs),
        ("batch_size", batch_size),
        ("label_stride", label_stride),
        ("scale", scale),
        ("lr", lr),
    ):
        if not value > 0:
            raise ValueError(f"linear_segmentation: {name} must be positive, got {value}")
    if class_names and len(class_names) != num_classes:
        raise ValueError(
            f"linear_segmentation: class_names must be {num_classes} names, got {len(class_names)}"
        )
    if not len(train) or not len(val):
        raise ValueError("linear_segmentation: train and val must hold images, one is empty")
    tell = report or (lambda line: None)
    device = torch.device(device)
    backbone = backbone.to(device)

    features, labels = _features(
        backbone, train, num_classes, layers, scale, batch_size, device, precision
    )
    tell(f"features {tuple(features.shape[1:])} of {len(train)} training images")
    mean = features.float().mean(dim=(0, 2, 3), keepdim=True)  # (1, C, 1, 1)
    deviation = features.float().std(dim=(0, 2, 3), keepdim=True)
    inverse = 1.0 / (deviation + 1e-5)
    linear = _train_linear(
        features, labels[:, ::label_stride, ::label_stride], mean, inverse, num_classes,
        epochs=epochs, batch_size=batch_size, lr=lr, weight_decay=weight_decay, seed=seed,
        tell=tell,
    )  # fmt: skip
    del features

    confusions = []
    for first in range(0, len(val), batch_size):
        chosen = range(first, min(first + batch_size, len(val)))
        part, truth = _features(
            backbone, [val[i] for i in chosen], num_classes, layers, scale, batch_size, device,
            precision,
        )  # fmt: skip
        with torch.no_grad():
            scores = linear((part.float() - mean) * inverse)
            scores = F.interpolate(
                scores, size=truth.shape[1:], mode="bilinear", align_corners=False
            )
        predicted = scores.argmax(1).cpu()
        if keep is not None:
            keep(first, predicted.byte())
        for one, label in zip(predicted, truth, strict=True):
            confusions.append(confusion_matrix(one, label, num_classes))
    return torch.stack(confusions)


def _features(
    backbone: nn.Module,
    images: LabelledImages,
    num_classes: int,
    layers: Sequence[str] | None,
    scale: float,
    batch_size: int,
    device: torch.device,
    precision: str = "float32",
) -> tuple[Tensor, Tensor]:
    """Features (N, C, h, w) float16 on the device and labels (N, H, W) uint8 on the CPU."""
    features: list[Tensor] = []
    labels: list[Tensor] = []
    for first in range(0, len(images), batch_size):
        pairs = [images[i] for i in range(first, min(first + batch_size, len(images)))]
        shapes = {tuple(image.shape) for image, _ in pairs}
        if len(shapes) != 1 or (labels and labels[0].shape[1:] != pairs[0][1].shape):
            raise ValueError(
                f"linear_segmentation: images must be of one size, got {sorted(shapes)}"
            )
        label = torch.stack([label for _, label in pairs])
        wrong = label[(label >= num_classes) & (label != IGNORE_INDEX)]
        if wrong.numel():
            raise ValueError(
                f"linear_segmentation: labels must be below num_classes = {num_classes} or "
                f"{IGNORE_INDEX}, got {int(wrong.max())}"
            )
        size = input_size(backbone, (label.shape[1], label.shape[2]), scale)
        inputs = prepare_images(torch.stack([image for image, _ in pairs]), size, device)
        # standardised later on: float16 keeps 11 bits of them at half the memory
        maps = extract_features(backbone, inputs, layers, precision=precision)
        features.append(maps.clamp(-6e4, 6e4).half())
        labels.append(label)
    return torch.cat(features), torch.cat(labels)


def _train_linear(
    features: Tensor,
    labels: Tensor,
    mean: Tensor,
    inverse: Tensor,
    num_classes: int,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    weight_decay: float,
    seed: int,
    tell: Callable[[str], None],
) -> nn.Conv2d:
    """The 1 x 1 convolution from standardised features to class scores."""
    linear = nn.Conv2d(features.shape[1], num_classes, 1, device=features.device)
    nn.init.zeros_(linear.weight)  # the problem is convex: the start needs no chance
    assert linear.bias is not None
    nn.init.zeros_(linear.bias)
    optimizer = torch.optim.AdamW(linear.parameters(), lr=lr, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * math.ceil(len(features) / batch_size)
    step = 0
    for epoch in range(epochs):
        total = 0.0
        for chosen in torch.randperm(len(features), generator=generator).split(batch_size):
            for group in optimizer.param_groups:
                group["lr"] = 0.5 * lr * (1.0 + math.cos(math.pi * step / steps))
            target = labels[chosen].long().to(features.device)
            scores = linear((features[chosen.to(features.device)].float() - mean) * inverse)
            scores = F.interpolate(
                scores, size=target.shape[1:], mode="bilinear", align_corners=False
            )
            losses = F.cross_entropy(
                scores, target, ignore_index=IGNORE_INDEX, reduction="sum"
            ) / max(1, int((target != IGNORE_INDEX).sum()))
            optimizer.zero_grad(set_to_none=True)
            losses.backward()
            optimizer.step()
            total += float(losses.detach()) * len(chosen)
            step += 1
        if epoch in (0, epochs - 1) or (epoch + 1) % 10 == 0:
            tell(f"probe epoch {epoch + 1}/{epochs}, cross-entropy {total / len(features):.3f}")
    return linear
