"""`knn` and `linear`: image classification from pooled features."""

from __future__ import annotations

import csv
import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from densecl_ext.data.folder import find_images
from densecl_ext.data.images import read_rgb, reason_of
from densecl_ext.evaluate.dense import NetworkInputs, recalibrate
from densecl_ext.evaluate.features import extract_features, untouched
from densecl_ext.evaluate.incontext import CHUNK
from densecl_ext.evaluate.options import NetworkOptions, require_at_least, require_positive
from densecl_ext.evaluate.report import Report
from densecl_ext.evaluate.segmentation import solve_linear

LABELS = "labels.csv"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassificationOptions(NetworkOptions):
    """What the protocols on images with one label share.

    Attributes:
        data: folder with labels.csv (columns file, label) and images/, or one subfolder a class.
        image_size: images are resized and centre-cropped to a square of this side in pixels.
        val_share: share of every class that is measured, drawn by the seed; 0 is leave-one-out
            (knn only).
        limit: use at most this many images, evenly spread; 0 uses all.
    """

    data: str = ""
    image_size: int = 128
    val_share: float = 0.5
    limit: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "image_size")
        require_at_least(self, 0, "limit")
        if not 0.0 <= self.val_share < 1.0:
            raise ValueError(
                f"{type(self).__name__}: val_share must lie in [0, 1), got {self.val_share}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class KnnOptions(ClassificationOptions):
    """Classification by the nearest neighbours of pooled features.

    Attributes:
        neighbours: k.
        temperature: neighbours vote with weight exp(cosine / T).
        val_share: share of every class that is measured, drawn by the seed; 0 is leave-one-out.
    """

    neighbours: int = 20
    temperature: float = 0.07
    val_share: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "neighbours")
        require_positive(self, "temperature")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearOptions(ClassificationOptions):
    """Classification by a linear layer on pooled features, solved by L-BFGS.

    Attributes:
        weight_decay: this times the sum of squared weights is added to the loss.
        iterations: limit of the solver's iterations.
    """

    weight_decay: float = 1e-3
    iterations: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "iterations")
        require_at_least(self, 0, "weight_decay")
        if not self.val_share:
            raise ValueError("LinearOptions: val_share must be above 0: nothing would be measured")


@dataclasses.dataclass(frozen=True)
class ClassifiedImages:
    """Images with one label each, in memory.

    Attributes:
        images: uint8 (N, 3, S, S).
        labels: int64 (N,).
        class_names: names of the labels.
        settings: what the protocol line says of the data.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def load(cls, options: ClassificationOptions) -> ClassifiedImages:
        """Read the images of ``options.data``.

        Raises:
            ValueError: no labels, a file that is missing or cannot be read, fewer than two classes.
        """
        listed = list_labelled(Path(options.data))
        if options.limit and options.limit < len(listed):
            n = options.limit
            listed = [listed[index * len(listed) // n] for index in range(n)]
        names = tuple(sorted({label for _, label in listed}))
        if len(names) < 2:
            raise ValueError(
                f"evaluate: {options.data} must hold at least two classes, has {names}"
            )
        images = torch.stack([_square(path, options.image_size) for path, _ in listed])
        labels = torch.tensor([names.index(label) for _, label in listed])
        settings = {
            "data": Path(options.data).resolve().name,
            "images": len(images),
            "classes": len(names),
            "image_size": options.image_size,
        }
        return cls(images, labels, names, settings)


def list_labelled(root: Path) -> list[tuple[Path, str]]:
    """Files and their labels: of labels.csv, or of one subfolder a class.

    Raises:
        ValueError: labels.csv lacks a column or names a file that is not there, or there is none
            and images do not lie in subfolders.
    """
    table = root / LABELS
    if table.is_file():
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
        if not rows or not {"file", "label"} <= rows[0].keys():
            raise ValueError(f"evaluate: {table} must have columns file and label and a row")
        listed = [(root / "images" / row["file"], row["label"]) for row in rows]
        missing = [path for path, _ in listed if not path.is_file()]
        if missing:
            raise ValueError(
                f"evaluate: {table} names {missing[0]}, which is no file ({len(missing)} missing)"
            )
        return listed
    files = find_images(root)
    if any(path.parent == root for path in files):
        raise ValueError(
            f"evaluate: {root} must hold {LABELS} (columns file, label) or one subfolder a class"
        )
    return [(path, path.relative_to(root).parts[0]) for path in files]


def knn(
    backbone: nn.Module, options: KnnOptions, *, data: ClassifiedImages | None = None
) -> Report:
    """Classify by the nearest neighbours of pooled features, leave-one-out or on a fixed split.

    Features are averaged over the grid and normalised; the k most similar other images vote with
    weight exp(cosine / T) (Wu et al. 2018, arXiv 1805.01978).

    Args:
        backbone: (N, 3, H, W) to (N, C, h, w), on the device where everything is computed; given
            back as it was.
        options: of the protocol.
        data: what :meth:`ClassifiedImages.load` read with the same options; None reads it.

    Returns:
        Accuracy, the mean of the classes' accuracies, and the accuracy of five guesses.

    Raises:
        ValueError: data or options that do not fit.
    """
    start = time.perf_counter()
    data = data or ClassifiedImages.load(options)
    features, settings = _pooled(backbone, data, options)
    unit = F.normalize(features, dim=1)
    train, val, split = _split(data, options)
    bank, labels = unit[train], data.labels[train].to(unit.device)
    k = min(options.neighbours, len(train) - (not options.val_share))
    votes = []
    for part in val.split(CHUNK):
        similarity = unit[part] @ bank.T
        if not options.val_share:  # leave-one-out: an image is no neighbour of itself
            similarity[torch.arange(len(part)), part] = -torch.inf
        near, where = similarity.topk(k, dim=1)
        weight = (near / options.temperature).softmax(1)
        vote = torch.zeros(len(part), len(data.class_names), device=unit.device)
        votes.append(vote.scatter_add_(1, labels[where], weight))
    settings |= {"split": split, "neighbours": k, "temperature": options.temperature}
    return _report("knn", torch.cat(votes).cpu(), data, val, settings, start)


def linear(
    backbone: nn.Module, options: LinearOptions, *, data: ClassifiedImages | None = None
) -> Report:
    """Classify by a linear layer on pooled, standardised features, solved to the end.

    Args:
        backbone: (N, 3, H, W) to (N, C, h, w), on the device where everything is computed; given
            back as it was.
        options: of the protocol.
        data: what :meth:`ClassifiedImages.load` read with the same options; None reads it.

    Returns:
        As :func:`knn`.

    Raises:
        ValueError: data or options that do not fit.
    """
    start = time.perf_counter()
    data = data or ClassifiedImages.load(options)
    features, settings = _pooled(backbone, data, options)
    train, val, split = _split(data, options)
    features = (features - features[train].mean(0)) / (features[train].std(0) + 1e-5)
    target = F.one_hot(data.labels[train], len(data.class_names)).float().to(features.device)
    weight, bias, steps = solve_linear(
        features[train], target, options.weight_decay, options.iterations
    )
    settings |= {
        "split": split,
        "solver": "lbfgs",
        "weight_decay": options.weight_decay,
        "iterations": f"{steps}(at most {options.iterations})",
    }
    scores = F.linear(features[val], weight, bias).cpu()
    return _report("linear", scores, data, val, settings, start)


@torch.no_grad()
def _pooled(
    backbone: nn.Module, data: ClassifiedImages, options: ClassificationOptions
) -> tuple[Tensor, dict[str, Any]]:
    """Features averaged over the grid, (N, C), and what the protocol line says of them."""
    with untouched(backbone):
        recalibrated = recalibrate(backbone, data.images, options)
        maps = [
            extract_features(backbone, x, options.layers, precision=options.precision).mean((2, 3))
            for x in NetworkInputs(backbone, data.images, options)
        ]
    features = torch.cat(maps)
    settings = {
        **data.settings,
        "features": f"{features.shape[1]}(mean over the grid)",
        "layers": options.layers or "last",
        "batch_norm": f"recalibrated on {recalibrated} images" if recalibrated else "own",
        "precision": options.precision,
    }
    return features, settings


def _split(data: ClassifiedImages, options: ClassificationOptions) -> tuple[Tensor, Tensor, str]:
    """Indices of training and measured images, and the split in words."""
    if not options.val_share:
        every = torch.arange(len(data.labels))
        return every, every, "leave-one-out"
    generator = torch.Generator().manual_seed(options.seed)
    train, val = [], []
    for label in range(len(data.class_names)):
        members = torch.nonzero(data.labels == label).flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        held = round(options.val_share * len(members))
        val.append(members[:held])
        train.append(members[held:])
    chosen, measured = torch.cat(train), torch.cat(val).sort().values
    if not len(chosen) or not len(measured):
        raise ValueError(
            f"evaluate: val_share {options.val_share} leaves {len(chosen)} training and "
            f"{len(measured)} measured images of {len(data.labels)}"
        )
    words = f"{len(chosen)}/{len(measured)} by class and seed {options.seed}"
    return chosen, measured, words


def _report(
    name: str,
    scores: Tensor,
    data: ClassifiedImages,
    measured: Tensor,
    settings: dict[str, Any],
    start: float,
) -> Report:
    truth = data.labels[measured]
    order = scores.topk(min(5, scores.shape[1]), dim=1).indices
    right = order[:, 0] == truth
    counts = torch.bincount(truth, minlength=len(data.class_names))
    hits = torch.bincount(truth[right], minlength=len(data.class_names))
    per_class = (hits / counts)[counts > 0].double()
    numbers = {
        "accuracy": float(right.double().mean()),
        "mean_class_accuracy": float(per_class.mean()),
        "top5_accuracy": float((order == truth[:, None]).any(1).double().mean()),
    }
    return Report(
        name,
        numbers,
        settings,
        terms=torch.stack([right.long(), torch.ones_like(truth)], dim=1),
        headline=lambda sums: sums[:, 0].double() / sums[:, 1],
        seconds=time.perf_counter() - start,
    )


def _square(path: Path, size: int) -> Tensor:
    """An image as uint8 (3, size, size): shorter side to ``size``, then the centre."""
    import numpy as np
    from PIL import Image, ImageOps

    try:
        image = read_rgb(path)
    except Exception as error:
        raise ValueError(f"evaluate: {path}: {reason_of(error)}") from None
    fitted = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return torch.tensor(np.array(fitted)).permute(2, 0, 1)
