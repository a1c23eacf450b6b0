"""Confusion matrix and intersection over union of a segmentation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

IGNORE_INDEX = 255
"""Label of pixels that count neither in training nor in evaluation."""


def confusion_matrix(prediction: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """Count pixels by (label, prediction), with torchmetrics.

    Args:
        prediction: class ids of any integer dtype and shape, each in [0, num_classes).
        label: class ids of the same shape, :data:`IGNORE_INDEX` where a pixel does not count.
        num_classes: C.

    Returns:
        int64 (C, C): rows are labels, columns predictions.

    Raises:
        ValueError: shapes differ, or an id lies outside its range.
        ImportError: torchmetrics is not installed (it comes with the extra `train`).
    """
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    if prediction.shape != label.shape:
        raise ValueError(
            "confusion_matrix: prediction and label must have one shape, got "
            f"{tuple(prediction.shape)} and {tuple(label.shape)}"
        )
    counted = label != IGNORE_INDEX
    for name, ids, wrong in (
        ("label", label, ((label < 0) | (label >= num_classes)) & counted),
        ("prediction", prediction, (prediction < 0) | (prediction >= num_classes)),
    ):
        if wrong.any():
            raise ValueError(
                f"confusion_matrix: {name} must lie in [0, {num_classes}), or be {IGNORE_INDEX} "
                f"(label only), got {int(ids[wrong][0])}"
            )
    if num_classes == 1:  # torchmetrics begins at two classes
        return counted.sum().reshape(1, 1)
    return multiclass_confusion_matrix(
        prediction.reshape(-1).long(),
        label.reshape(-1).long(),
        num_classes,
        ignore_index=IGNORE_INDEX,
        validate_args=False,
    )


def confusion_matrices(predictions: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """:func:`confusion_matrix` of every image of a batch, counted at once on its device.

    Args:
        predictions: (N, H, W), class ids in [0, num_classes), such as an argmax over them.
        labels: (N, H, W) of the same device, :data:`IGNORE_INDEX` where a pixel does not count.
        num_classes: C.

    Returns:
        int64 (N, C, C) on the CPU.

    Raises:
        ValueError: a label lies outside its range.
    """
    counted = labels != IGNORE_INDEX
    wrong = labels[counted & (labels >= num_classes)]
    if wrong.numel():
        raise ValueError(
            f"confusion_matrices: label must lie in [0, {num_classes}), or be {IGNORE_INDEX}, got "
            f"{int(wrong[0])}"
        )
    images = torch.arange(len(labels), device=labels.device).view(-1, 1, 1)
    cells = (images * num_classes + labels) * num_classes + predictions  # int64
    shape = len(labels), num_classes, num_classes
    counts = torch.bincount(cells[counted], minlength=math.prod(shape))
    return counts.cpu().view(shape)


def miou_of(confusions: Tensor) -> Tensor:
    """Mean intersection over union of confusion matrices (B, K, K), as :class:`SegmentationResult`.

    Returns:
        float64 (B,): classes without any pixel left out, NaN where none has one.
    """
    counts = confusions.double()
    hit = counts.diagonal(dim1=1, dim2=2)
    union = counts.sum(1) + counts.sum(2) - hit
    return (hit / union).nanmean(1)  # 0 / 0 is NaN


@dataclasses.dataclass(frozen=True)
class SegmentationResult:
    """How well a segmentation fits its labels.

    Attributes:
        confusion: int64 (C, C), rows are labels, columns predictions.
        class_names: C names.
        seconds: how long the evaluation took.
    """

    confusion: Tensor
    class_names: tuple[str, ...]
    seconds: float = 0.0

    @property
    def iou_per_class(self) -> tuple[float, ...]:
        """Intersection over union of each class, NaN for one neither labelled nor predicted."""
        counts = self.confusion.double()
        hit = counts.diag()
        union = counts.sum(0) + counts.sum(1) - hit
        return tuple((hit / union).tolist())  # 0 / 0 is NaN

    @property
    def miou(self) -> float:
        """Mean of the classes' intersection over union, those without any pixel left out."""
        present = [iou for iou in self.iou_per_class if iou == iou]
        return sum(present) / len(present) if present else float("nan")

    @property
    def pixel_accuracy(self) -> float:
        """Share of the labelled pixels that are right."""
        total = int(self.confusion.sum())
        return int(self.confusion.diag().sum()) / total if total else float("nan")

    @property
    def frequency_weighted_iou(self) -> float:
        """Mean of the labelled classes' intersection over union, weighted by their pixels."""
        pixels = self.confusion.double().sum(1)
        total = float(pixels.sum())
        pairs = zip(self.iou_per_class, pixels.tolist(), strict=True)
        return sum(iou * n for iou, n in pairs if n) / total if total else float("nan")

    def table(self) -> str:
        """The result in lines for a person: mIoU, accuracy, then each class, in percent."""
        return results_table({"IoU %": self})


def results_table(results: dict[str, SegmentationResult]) -> str:
    """Several results side by side, in percent: one column each, one line a class.

    Args:
        results: column title -> result; all of the same classes.

    Raises:
        ValueError: no result, or different classes.
    """
    if not results or len({result.class_names for result in results.values()}) != 1:
        raise ValueError("results_table: needs results of one set of classes")
    names: Sequence[str] = next(iter(results.values())).class_names
    rows = [("mIoU", [result.miou for result in results.values()])]
    rows.append(("pixel accuracy", [result.pixel_accuracy for result in results.values()]))
    for index, name in enumerate(names):
        rows.append((f"  {name}", [result.iou_per_class[index] for result in results.values()]))
    left = max(len(name) for name, _ in rows)
    widths = [max(len(title), 5) for title in results]
    lines = [" " * left + "".join(f"  {t:>{w}}" for t, w in zip(results, widths, strict=True))]
    for name, values in rows:
        cells = (f"  {100 * v:>{w}.1f}" for v, w in zip(values, widths, strict=True))
        lines.append(f"{name:<{left}}" + "".join(cells))
    return "\n".join(lines)
