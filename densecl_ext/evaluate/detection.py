"""`detection`: torchvision's Faster R-CNN with a feature pyramid on our backbone."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from densecl_ext.evaluate.coco import BoxedImages, average_precision
from densecl_ext.evaluate.features import IMAGENET_MEAN, IMAGENET_STD, device_of
from densecl_ext.evaluate.options import require_at_least, require_positive
from densecl_ext.evaluate.report import Report

LEAST_STRIDE = 4
"""The pyramid begins at this stride, as torchvision's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectionOptions:
    """Object detection: Faster R-CNN with FPN, the whole network trained.

    Attributes:
        data: folder with images/ and COCO json files.
        train_split: name of the json that is learned from, without .json.
        val_split: name of the json that is measured.
        levels: names of the layers whose outputs the pyramid takes, fine to coarse; empty takes the
            last layer of each stride from 4 on.
        image_size: shorter side of the images as the detector sees them.
        largest: longer side at most.
        iterations: training steps.
        batch_size: images a step.
        lr: learning rate of SGD; 10 % of the steps warm up, then it falls as a cosine.
        weight_decay: of all weights.
        channels: of the pyramid and the heads.
        coarsest: the pyramid goes on by subsampling to this stride.
        limit: use at most this many images of each split, evenly
            spread; 0 uses all.
        seed: of the heads, the order of the images, and their flips.
    """

    data: str = ""
    train_split: str = "train"
    val_split: str = "val"
    levels: tuple[str, ...] = ()
    image_size: int = 224
    largest: int = 320
    iterations: int = 400
    batch_size: int = 4
    lr: float = 0.01
    weight_decay: float = 1e-4
    channels: int = 128
    coarsest: int = 32
    limit: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        require_at_least(
            self, 1, "image_size", "largest", "iterations", "batch_size", "channels", "coarsest"
        )
        require_at_least(self, 0, "limit", "seed", "weight_decay")
        require_positive(self, "lr")


def detection(
    backbone: nn.Module,
    options: DetectionOptions,
    *,
    data: tuple[BoxedImages, BoxedImages] | None = None,
) -> Report:
    """Train a copy of the network as a detector and measure COCO's average precision.

    Args:
        backbone: (N, 3, H, W) to (N, C, h, w), on the device where everything is computed; a copy
            is trained, with its batch norms.
        options: of the protocol.
        data: training and validation images of :func:`load_detection`; None reads them.

    Returns:
        AP (mean over IoU .5 to .95), AP50 and AP75 of the validation images.

    Raises:
        ValueError: data or options that do not fit, a loss that is no longer finite.
        ImportError: torchvision or pycocotools is not installed.
    """
    start = time.perf_counter()
    train, val = data or load_detection(options)
    if train.categories != val.categories:
        raise ValueError(
            f"detection: both splits must have the same categories, got {len(train.categories)} "
            f"and {len(val.categories)}"
        )
    device = device_of(backbone)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)  # heads, and the samples of anchors and boxes
        detector, levels = build_detector(copy.deepcopy(backbone), len(train.categories), options)
        detector.to(device)
        _train(detector, train, options, device)
    detector.eval()
    found = []
    with torch.no_grad():
        for image in val.images:
            (one,) = detector([image.to(device).float() / 255.0])
            found.append({name: value.cpu() for name, value in one.items()})
    settings: dict[str, Any] = {
        "data": Path(options.data).resolve().name,
        "train": f"{options.train_split}({len(train)})",
        "val": f"{options.val_split}({len(val)})",
        "categories": len(train.categories),
        "detector": "Faster R-CNN with FPN (torchvision)",
        "levels": ",".join(f"{name}/{stride}" for name, stride in levels.items()),
        "coarsest": options.coarsest,
        "channels": options.channels,
        "image_size": (options.image_size, options.largest),
        "trained": "all",
        "iterations": options.iterations,
        "batch": options.batch_size,
        "lr": options.lr,
        "weight_decay": options.weight_decay,
        "augmentation": "flip",
        "seed": options.seed,
    }
    numbers = average_precision(val, found)
    return Report("detection", numbers, settings, seconds=time.perf_counter() - start)


def load_detection(options: DetectionOptions) -> tuple[BoxedImages, BoxedImages]:
    """Both splits of ``options.data``; raises as :meth:`BoxedImages.load`."""
    root = Path(options.data)
    if options.train_split == options.val_split:
        raise ValueError(
            f"detection: train_split and val_split must differ, both are {options.val_split!r}"
        )
    train, val = (
        BoxedImages.load(root / f"{split}.json", root / "images", options.limit)
        for split in (options.train_split, options.val_split)
    )
    return train, val


def build_detector(
    backbone: nn.Module, categories: int, options: DetectionOptions
) -> tuple[nn.Module, dict[str, int]]:
    """Put torchvision's Faster R-CNN with a feature pyramid onto a backbone.

    Returns:
        The detector, and name -> stride of the layers that feed the pyramid.
    """
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.ops import MultiScaleRoIAlign

    levels = pyramid_levels(backbone, options.levels)
    strides = list(levels.values())
    extra = max(0, round(math.log2(options.coarsest / strides[-1])))
    pyramid = Pyramid(backbone, tuple(levels), options.channels, extra)
    strides += [strides[-1] * 2 ** (index + 1) for index in range(extra)]
    detector = FasterRCNN(
        pyramid,
        num_classes=categories + 1,
        min_size=options.image_size,
        max_size=options.largest,
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
        # torchvision's rule: anchors of eight cells' side
        rpn_anchor_generator=AnchorGenerator(
            tuple((8 * stride,) for stride in strides), ((0.5, 1.0, 2.0),) * len(strides)
        ),
        box_roi_pool=MultiScaleRoIAlign([str(i) for i in range(len(levels))], 7, 2),
        rpn_pre_nms_top_n_train=500,
        rpn_pre_nms_top_n_test=500,
        rpn_post_nms_top_n_train=200,
        rpn_post_nms_top_n_test=200,
        box_batch_size_per_image=64,
    )
    return detector, levels


class Pyramid(nn.Module):
    """A backbone with torchvision's feature pyramid on some of its layers.

    Args:
        backbone: the network.
        levels: names of the layers, fine to coarse.
        channels: of every output map.
        extra: coarser maps by subsampling the last.

    Attributes:
        out_channels: ``channels``, as torchvision's detectors ask.
    """

    def __init__(
        self, backbone: nn.Module, levels: tuple[str, ...], channels: int, extra: int
    ) -> None:
        from torchvision.ops import FeaturePyramidNetwork

        super().__init__()
        self.backbone, self.levels, self.extra = backbone, levels, extra
        self.out_channels = channels
        shapes = [value.shape[1] for value in _outputs(backbone, levels).values()]
        self.fpn = FeaturePyramidNetwork(shapes, channels)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Maps "0", "1", ... from fine to coarse."""
        maps = self.fpn(_run(self.backbone, images, self.levels))
        named = {str(index): value for index, value in enumerate(maps.values())}
        for index in range(len(named), len(named) + self.extra):
            named[str(index)] = nn.functional.max_pool2d(named[str(index - 1)], 1, stride=2)
        return named


def pyramid_levels(backbone: nn.Module, names: tuple[str, ...] = ()) -> dict[str, int]:
    """Layers that feed a pyramid, fine to coarse, with their strides.

    Args:
        backbone: the network; a probe image of 128 x 128 tells the strides.
        names: layers to take; empty takes, among the outermost layers that are not all of the
            network, the last of every stride from 4 on.

    Raises:
        ValueError: there is no such layer, or none with a feature map.
    """
    if names:
        known = dict(backbone.named_modules())
        wrong = [name for name in names if name not in known]
        if wrong:
            outer = ", ".join(name for name, _ in backbone.named_children())
            raise ValueError(f"detection: the backbone has no layer {wrong[0]!r}; has {outer}")
        outputs = _outputs(backbone, names)
    else:
        prefix, children = "", list(backbone.named_children())
        while len(children) == 1 and list(children[0][1].children()):
            prefix, children = (
                f"{prefix}{children[0][0]}.",
                list(children[0][1].named_children()),
            )
        outputs = _outputs(backbone, tuple(prefix + name for name, _ in children))
        if not outputs and children:  # such as a transformer: its tokens are no maps
            outputs = _outputs(backbone, ("",))
    strides = {name: round(128 / value.shape[2]) for name, value in outputs.items()}
    last: dict[int, str] = {}
    for name, stride in strides.items():
        if names or stride >= LEAST_STRIDE:
            last[stride] = name
    if not last:
        raise ValueError("detection: the backbone has no layer of stride 4 or more; state levels")
    return {name: stride for stride, name in sorted(last.items())}


@torch.no_grad()
def _outputs(backbone: nn.Module, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Feature maps (1, C, h, w) of the named layers that have one, in the order of the forward."""
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    try:
        image = torch.zeros(1, 3, 128, 128, device=device_of(backbone))
        return _run(backbone, image, names)
    finally:
        for module, training in modes:
            module.training = training


def _run(backbone: nn.Module, images: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
    """The named layers' feature maps, in the order in which they came."""
    caught: dict[str, Tensor] = {}
    modules = dict(backbone.named_modules())

    def keeper(name: str) -> Any:
        def keep(_m: nn.Module, _i: object, output: Any) -> None:
            if isinstance(output, Tensor) and output.dim() == 4:
                caught.pop(name, None)
                caught[name] = output

        return keep

    hooks = [modules[name].register_forward_hook(keeper(name)) for name in names]
    try:
        backbone(images)
    finally:
        for hook in hooks:
            hook.remove()
    return caught


def _train(
    detector: nn.Module, train: BoxedImages, options: DetectionOptions, device: torch.device
) -> None:
    detector.train()
    for parameter in detector.parameters():
        parameter.requires_grad_(True)
    optimizer = torch.optim.SGD(
        detector.parameters(), lr=options.lr, momentum=0.9, weight_decay=options.weight_decay
    )
    warm = max(1, options.iterations // 10)
    total = max(1, options.iterations - warm)
    generator = torch.Generator().manual_seed(options.seed)
    order: list[int] = []
    for step in range(options.iterations):
        while len(order) < options.batch_size:
            order += torch.randperm(len(train), generator=generator).tolist()
        chosen, order = order[: options.batch_size], order[options.batch_size :]
        flips = (torch.rand(len(chosen), generator=generator) < 0.5).tolist()
        images, targets = [], []
        for index, flip in zip(chosen, flips, strict=True):
            image, boxes = train.images[index], train.boxes[index]
            if flip:
                image, boxes = image.flip(2), boxes.clone()
                boxes[:, [0, 2]] = image.shape[2] - boxes[:, [2, 0]]
            images.append(image.to(device).float() / 255.0)
            targets.append({"boxes": boxes.to(device), "labels": train.labels[index].to(device)})
        rising = (step + 1) / warm
        falling = 0.5 * (1.0 + math.cos(math.pi * (step - warm) / total))
        for group in optimizer.param_groups:
            group["lr"] = options.lr * (rising if step < warm else falling)
        loss = sum(detector(images, targets).values())
        if not torch.isfinite(loss):
            raise ValueError(
                f"detection: the loss is {float(loss)} at step {step}; lower lr, which is "
                f"{options.lr}"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
