"""Several dense protocols from one pass over the images: the features are computed once.

Training images leave rows (a sample of grid positions: standardised feature, soft label); a
protocol fits something to the rows that turns features into class scores; the validation images go
by in batches, every protocol scores every batch, and scores are enlarged to the labels' size.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from densecl_ext.evaluate.features import (
    device_of,
    extract_features,
    has_batch_norm,
    input_size,
    prepare_images,
    recalibrate_batch_norm,
    untouched,
)
from densecl_ext.evaluate.metrics import (
    IGNORE_INDEX,
    SegmentationResult,
    confusion_matrices,
    miou_of,
)
from densecl_ext.evaluate.options import NetworkOptions, PixelOptions, require_at_least
from densecl_ext.evaluate.pixels import DenseData, LabelledImages
from densecl_ext.evaluate.report import Report

LEAST_LABELLED = 0.5
"""A grid position teaches where more than this share of its pixels has a label."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowOptions(PixelOptions):
    """Options of protocols that learn from a sample of grid positions.

    Attributes:
        rows: grid positions to learn from, drawn at random from the training images.
    """

    rows: int = 80_000

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "rows")


@dataclasses.dataclass(frozen=True)
class Rows:
    """A sample of the training images' grid positions.

    Attributes:
        features: float32 (R, C), standardised by ``mean`` and ``deviation``.
        labels: float32 (R, K), the shares of the classes among a position's labelled pixels.
        mean: (1, C, 1, 1) of all training positions.
        deviation: (1, C, 1, 1).
        grid: height and width of a feature map.
    """

    features: Tensor
    labels: Tensor
    mean: Tensor
    deviation: Tensor
    grid: tuple[int, int]

    def standardise(self, features: Tensor) -> Tensor:
        """(N, C, h, w) of the same network as the rows are."""
        return (features - self.mean) / self.deviation


Scorer = Callable[[Tensor], Tensor]
"""Standardised features (N, C, h, w) to scores (N, K, h, w), of which the largest wins."""


class DenseProtocol(Protocol):
    """How a dense protocol takes part in the shared pass."""

    @property
    def name(self) -> str:
        """The protocol's."""

    @property
    def options(self) -> RowOptions:
        """The protocol's."""

    def fit(self, rows: Rows) -> tuple[Scorer, dict[str, Any]]:
        """Learn from the rows; the second value goes into the protocol line."""


def evaluate_dense(
    backbone: nn.Module, data: DenseData, protocols: Sequence[DenseProtocol]
) -> dict[str, Report]:
    """Measure a frozen network by several dense protocols with one pass over the images.

    The network is given back as it was: mode, batch-norm statistics, weights.

    Args:
        backbone: (N, 3, H, W) to (N, C, h, w), on the device where everything is computed.
        data: from :meth:`DenseData.load`.
        protocols: :class:`~densecl_ext.evaluate.segmentation.Linear`,
            :class:`~densecl_ext.evaluate.incontext.InContext`, ...; all with the same layers,
            scale, recalibration, precision, rows and seed, which decide the features.

    Returns:
        A report for each protocol by its name, in the order given.

    Raises:
        ValueError: no protocol, options of the network or the sample that differ, a label out of
            range, no labelled position.
    """
    start = time.perf_counter()
    options = _common(protocols)
    num_classes = len(data.class_names)
    with untouched(backbone):
        recalibrated = recalibrate(backbone, data.train.images, options)
        rows = sample_rows(backbone, data.train, num_classes, options)
        shared = time.perf_counter() - start
        fitted, seconds = {}, {}
        for protocol in protocols:
            begun = time.perf_counter()
            fitted[protocol.name] = protocol.fit(rows)
            seconds[protocol.name] = time.perf_counter() - begun
        counts: dict[str, list[Tensor]] = {name: [] for name in fitted}
        examples = {name: Examples(data.val, data.class_names) for name in fitted}
        first = 0
        for features, labels in _batches(backbone, data.val, options):
            standard = rows.standardise(features)
            for name, (scorer, _) in fitted.items():
                begun = time.perf_counter()
                confusions, predicted = score(scorer(standard), labels, num_classes)
                counts[name] += confusions
                examples[name].add(first, predicted)
                seconds[name] += time.perf_counter() - begun
            first += len(labels)
    settings = {
        **data.settings,
        "features": (rows.features.shape[1], *rows.grid),
        "layers": options.layers or "last",
        "scale": options.scale,
        "batch_norm": f"recalibrated on {recalibrated} images" if recalibrated else "own",
        "precision": options.precision,
        "rows": f"{len(rows.features)}(labelled share > {LEAST_LABELLED:g})",
        "seed": options.seed,
    }
    return {
        name: segmentation_report(
            name, torch.stack(counts[name]), data.class_names, {**settings, **stated},
            shared + seconds[name], examples[name].draw,
        )
        for name, (_, stated) in fitted.items()
    }  # fmt: skip


def segmentation_report(
    name: str,
    confusions: Tensor,
    names: Sequence[str],
    settings: dict[str, Any],
    seconds: float,
    draw: Callable[[Path], None] | None = None,
) -> Report:
    """The report of any protocol that labels pixels.

    Args:
        name: the protocol's.
        confusions: (N, K, K), one confusion matrix an image.
        names: K class names.
        settings: of the protocol line; the rule for absent classes is added.
        seconds: how long it took.
        draw: see :class:`Report`.
    """
    result = SegmentationResult(confusions.sum(0), tuple(names))
    present = sum(iou == iou for iou in result.iou_per_class)
    settings = {
        **settings,
        "miou": f"mean of the {present} of {len(names)} classes labelled or predicted",
    }
    numbers = {
        "miou": result.miou,
        "pixel_accuracy": result.pixel_accuracy,
        "frequency_weighted_iou": result.frequency_weighted_iou,
    }
    return Report(
        name,
        numbers,
        settings,
        {"iou": dict(zip(result.class_names, result.iou_per_class, strict=True))},
        terms=confusions,
        headline=miou_of,
        draw=draw,
        seconds=seconds,
    )


def recalibrate(backbone: nn.Module, images: Tensor, options: NetworkOptions) -> int:
    """Recalibrate batch norms on evenly spread images as the options say; returns how many."""
    count = min(options.recalibrate, len(images))
    if not count or not has_batch_norm(backbone):
        return 0
    chosen = images[torch.arange(count) * len(images) // count]
    inputs = NetworkInputs(backbone, chosen, options)
    recalibrate_batch_norm(backbone, inputs, precision=options.precision)
    return count


def sample_rows(
    backbone: nn.Module, images: LabelledImages, num_classes: int, options: RowOptions
) -> Rows:
    """Features and soft labels of randomly drawn grid positions of the training images.

    Positions with a labelled share above :data:`LEAST_LABELLED` count; ``options.rows`` of them are
    drawn without replacement (all, where there are fewer) and come in random order. Mean and
    deviation are those of all positions.
    """
    chosen: Tensor | None = None
    kept: list[Tensor] = []
    total = square = torch.zeros(())
    count = first = 0
    for features, _ in _batches(backbone, images, options):
        n, _, h, w = features.shape
        if chosen is None:
            labels = images.labels.to(features.device)
            soft = soft_labels(labels, num_classes, (h, w)).cpu()  # (N * h * w, K)
            labelled = torch.nonzero(soft.sum(1) > LEAST_LABELLED).flatten()
            if not len(labelled):
                raise ValueError(
                    f"evaluate: no position of the {h} x {w} grid of the training images is "
                    f"labelled: every mask is {IGNORE_INDEX}"
                )
            generator = torch.Generator().manual_seed(options.seed)
            drawn = torch.randperm(len(labelled), generator=generator)[: options.rows]
            order = labelled[drawn]
            chosen = order.sort().values
        flat = features.permute(0, 2, 3, 1).flatten(0, 2)  # (n * h * w, C)
        total = total + flat.double().sum(0)
        square = square + flat.double().square().sum(0)
        count += len(flat)
        inside = chosen[(chosen >= first * h * w) & (chosen < (first + n) * h * w)]
        kept.append(flat[(inside - first * h * w).to(flat.device)])
        first += n
    assert chosen is not None
    mean = total / count
    variance = (square / count - mean.square()).clamp(min=0.0) * (count / max(1, count - 1))
    mean, deviation = mean.float(), variance.sqrt().float() + 1e-5
    shuffled = torch.searchsorted(chosen, order)  # the order of the draw, not of the images
    rows = torch.cat(kept)[shuffled.to(mean.device)].sub_(mean).div_(deviation)
    soft = soft[order].to(mean.device)
    shape = (1, -1, 1, 1)
    return Rows(
        rows, soft / soft.sum(1, keepdim=True), mean.view(shape), deviation.view(shape), (h, w)
    )


def soft_labels(labels: Tensor, num_classes: int, grid: tuple[int, int]) -> Tensor:
    """Shares of the classes in every cell of a grid.

    Args:
        labels: uint8 (N, H, W).
        num_classes: K.
        grid: (h, w).

    Returns:
        float32 (N * h * w, K) on the labels' device, which sums to a cell's labelled share.

    Raises:
        ValueError: a label is neither below K nor 255.
    """
    out = torch.empty(len(labels), *grid, num_classes, device=labels.device)
    for first in range(0, len(labels), 32):
        part = labels[first : first + 32]
        wrong = part[(part >= num_classes) & (part != IGNORE_INDEX)]
        if wrong.numel():
            raise ValueError(
                f"evaluate: labels must be below num_classes = {num_classes} or {IGNORE_INDEX}, "
                f"got {int(wrong.max())}"
            )
        planes = torch.stack([part == k for k in range(num_classes)], dim=1).float()
        out[first : first + 32] = F.adaptive_avg_pool2d(planes, grid).permute(0, 2, 3, 1)
    return out.flatten(0, 2)


def score(scores: Tensor, labels: Tensor, num_classes: int) -> tuple[list[Tensor], Tensor]:
    """Enlarge scores (N, K, h, w) to the labels (N, H, W).

    Returns:
        One confusion matrix an image, and the predicted ids, uint8 (N, H, W).
    """
    enlarged = F.interpolate(
        scores.float(), size=labels.shape[1:], mode="bilinear", align_corners=False
    )
    predicted = enlarged.argmax(1)
    confusions = confusion_matrices(predicted, labels.to(predicted.device), num_classes)
    return list(confusions.unbind()), predicted.byte().cpu()


class Examples:
    """A few measured images with their predictions, for a picture.

    Args:
        val: the measured images.
        class_names: of the labels.
        count: how many, evenly spread.
    """

    def __init__(self, val: LabelledImages, class_names: Sequence[str], count: int = 4) -> None:
        self.val, self.class_names = val, class_names
        count = min(count, len(val))
        self.chosen = [index * len(val) // count for index in range(count)]
        self.predicted: list[Tensor] = []

    def add(self, first: int, predicted: Tensor) -> None:
        """Keep what was asked for of the predictions (n, H, W) of images ``first`` and on."""
        here = [i - first for i in self.chosen if first <= i < first + len(predicted)]
        self.predicted += [predicted[index].clone() for index in here]

    def draw(self, png: Path) -> None:
        """Write the picture."""
        from densecl_ext.visualize.segmentations import plot_segmentations

        plot_segmentations(
            self.val.images[self.chosen],
            self.val.labels[self.chosen],
            torch.stack(self.predicted),
            self.class_names,
            png,
        )


class NetworkInputs(Sequence[Tensor]):
    """Batches of network inputs, prepared when they are asked for."""

    def __init__(self, backbone: nn.Module, images: Tensor, options: NetworkOptions) -> None:
        self.parts = images.split(options.batch_size)
        scale = getattr(options, "scale", 1.0)
        self.size = input_size(backbone, (images.shape[2], images.shape[3]), scale)
        self.device = device_of(backbone)

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: Any) -> Any:
        inputs = prepare_images(self.parts[index], self.size, self.device)
        # a third less time for convolutions on a CPU; the values stay
        return inputs.contiguous(memory_format=torch.channels_last)


def _batches(
    backbone: nn.Module, images: LabelledImages, options: RowOptions
) -> Iterator[tuple[Tensor, Tensor]]:
    """Features (n, C, h, w), float32 on the network's device, and labels (n, H, W)."""
    parts = images.labels.split(options.batch_size)
    inputs = NetworkInputs(backbone, images.images, options)
    for batch, labels in zip(inputs, parts, strict=True):
        yield (
            extract_features(backbone, batch, options.layers, precision=options.precision),
            labels,
        )


def _common(protocols: Sequence[DenseProtocol]) -> RowOptions:
    """The options that all must share, which decide the features and the rows."""
    if not protocols:
        raise ValueError("evaluate_dense: protocols must name at least one")
    first = protocols[0].options
    for field in dataclasses.fields(RowOptions):
        values = [getattr(protocol.options, field.name) for protocol in protocols]
        if any(value != values[0] for value in values):
            raise ValueError(
                f"evaluate_dense: protocols of one pass must agree on {field.name}, got {values}"
            )
    return first
