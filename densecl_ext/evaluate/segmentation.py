"""`segmentation`: a linear layer on frozen features labels every pixel."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from densecl_ext.evaluate.dense import (
    DenseData,
    Examples,
    RowOptions,
    Rows,
    Scorer,
    evaluate_dense,
    recalibrate,
    segmentation_report,
)
from densecl_ext.evaluate.features import device_of, untouched
from densecl_ext.evaluate.linear import linear_confusions
from densecl_ext.evaluate.options import require_at_least, require_positive
from densecl_ext.evaluate.report import Report

SOLVERS = ("adamw", "lbfgs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentationOptions(RowOptions):
    """Linear segmentation of frozen features.

    Attributes:
        solver: adamw trains on the pixels' labels for some epochs; lbfgs solves the convex problem
            on the grid positions' soft labels to the end, which is faster and exact.
        epochs: adamw: passes over the training images.
        lr: adamw: the highest learning rate, cosine schedule.
        label_stride: adamw: training uses one pixel in this many each way.
        weight_decay: adamw: decoupled weight decay; lbfgs: this times the sum of squared weights is
            added to the loss.
        iterations: lbfgs: limit of the solver's iterations.
    """

    solver: str = "adamw"
    epochs: int = 20
    lr: float = 3e-3
    label_stride: int = 2
    weight_decay: float = 1e-4
    iterations: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.solver not in SOLVERS:
            raise ValueError(
                f"SegmentationOptions: solver must be adamw or lbfgs, got {self.solver!r}"
            )
        require_at_least(self, 1, "epochs", "label_stride", "iterations")
        require_positive(self, "lr")
        require_at_least(self, 0, "weight_decay")


def segmentation(
    backbone: nn.Module, options: SegmentationOptions, *, data: DenseData | None = None
) -> Report:
    """Train a linear layer on frozen features and measure the segmentation that it gives.

    Args:
        backbone: (N, 3, H, W) to (N, C, h, w), on the device where everything is computed; given
            back as it was.
        options: of the protocol.
        data: what :meth:`DenseData.load` read with the same options; None reads it.

    Returns:
        mIoU, pixel accuracy and frequency-weighted IoU over all pixels of the validation images.

    Raises:
        ValueError: data or options that do not fit.
    """
    data = data or DenseData.load(options)
    if options.solver == "lbfgs":
        return evaluate_dense(backbone, data, [Linear(options)])["segmentation"]
    start = time.perf_counter()
    examples = Examples(data.val, data.class_names)
    with untouched(backbone):
        recalibrated = recalibrate(backbone, data.train.images, options)
        confusions = linear_confusions(
            backbone, data.train, data.val, num_classes=len(data.class_names),
            layers=options.layers or None, scale=options.scale, epochs=options.epochs,
            batch_size=options.batch_size, lr=options.lr, weight_decay=options.weight_decay,
            label_stride=options.label_stride, seed=options.seed, device=device_of(backbone),
            precision=options.precision, keep=examples.add,
        )  # fmt: skip
    settings = {
        **data.settings,
        "layers": options.layers or "last",
        "scale": options.scale,
        "batch_norm": f"recalibrated on {recalibrated} images" if recalibrated else "own",
        "precision": options.precision,
        "solver": "adamw",
        "epochs": options.epochs,
        "batch": options.batch_size,
        "lr": options.lr,
        "weight_decay": options.weight_decay,
        "label_stride": options.label_stride,
        "seed": options.seed,
    }
    seconds = time.perf_counter() - start
    return segmentation_report(
        "segmentation", confusions, data.class_names, settings, seconds, examples.draw
    )


@dataclasses.dataclass(frozen=True)
class Linear:
    """Linear segmentation for :func:`evaluate_dense`: the converged solution on soft labels."""

    options: SegmentationOptions
    name: str = "segmentation"

    def fit(self, rows: Rows) -> tuple[Scorer, dict[str, Any]]:
        """Solve for the linear layer."""
        options = self.options
        weight, bias, steps = solve_linear(
            rows.features, rows.labels, options.weight_decay, options.iterations
        )

        def scorer(features: Tensor) -> Tensor:
            return F.conv2d(features, weight[:, :, None, None], bias)

        stated = {
            "solver": "lbfgs",
            "weight_decay": options.weight_decay,
            "iterations": f"{steps}(at most {options.iterations})",
        }
        return scorer, stated


def solve_linear(
    features: Tensor, labels: Tensor, weight_decay: float, iterations: int
) -> tuple[Tensor, Tensor, int]:
    """Multinomial logistic regression by L-BFGS with a strong Wolfe line search, from zero.

    Minimises the mean cross-entropy with soft labels plus ``weight_decay`` times the sum of squared
    weights (not biases), which is convex.

    Args:
        features: float32 (R, C), standardised.
        labels: float32 (R, K), rows sum to 1.
        weight_decay: see above.
        iterations: limit of the solver's iterations.

    Returns:
        Weight (K, C), bias (K,), and the iterations that were made.
    """
    weight = torch.zeros(labels.shape[1], features.shape[1], device=features.device)
    bias = torch.zeros(labels.shape[1], 1, device=features.device)
    weight.requires_grad_()
    bias.requires_grad_()
    # classes first: a softmax over the few classes of a row would use a fraction of each vector
    columns, targets = features.T.contiguous(), labels.T.contiguous()  # (C, R), (K, R)
    optimizer = torch.optim.LBFGS(
        [weight, bias], lr=1.0, max_iter=iterations, max_eval=2 * iterations, history_size=10,
        tolerance_grad=1e-5, tolerance_change=1e-7, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        scores = torch.addmm(bias, weight, columns)
        loss = -(targets * F.log_softmax(scores, dim=0)).sum() / targets.shape[1]
        loss = loss + weight_decay * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    steps = int(optimizer.state[weight]["n_iter"])
    return weight.detach(), bias.detach().flatten(), steps
