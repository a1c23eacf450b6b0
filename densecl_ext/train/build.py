"""The parts of a run, from its configuration."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal
from urllib.error import URLError

import torch
from torch import nn

from densecl_ext.backbones import build_backbone, feature_grid
from densecl_ext.backbones.build import load_weights
from densecl_ext.checkpoints import read_backbone
from densecl_ext.data import LeftOutWarning, ViewLoader, build_loader
from densecl_ext.data.loader import available_cores
from densecl_ext.nn.model import DenseCL
from densecl_ext.train.config import PretrainConfig
from densecl_ext.train.launch import Ranks
from densecl_ext.train.schedule import duration_in_steps
from densecl_ext.train.supervise import share_batch


def open_loader(config: PretrainConfig, ranks: Ranks) -> ViewLoader:
    """The two-view loader of a configuration; raises ValueError for a folder it cannot use."""
    workers = None if config.workers == "auto" else int(config.workers)
    if workers is None and ranks.on_machine > 1:
        workers = min(8, max(1, available_cores() // ranks.on_machine))
    with warnings.catch_warnings():
        if not ranks.first:
            warnings.simplefilter("ignore", LeftOutWarning)  # rank 0 has the same to say
        return _open_loader(config, ranks, workers)


def _open_loader(config: PretrainConfig, ranks: Ranks, workers: int | None) -> ViewLoader:
    return build_loader(
        config.data,
        batch_size=config.batch_size,
        size=config.image_size,
        backend=config.loader,
        device=ranks.device,
        workers=workers,
        seed=config.seed,
        crop_scale=(config.smallest_crop, 1.0),
        drop_last=True,
        channels_last=config.channels_last,
        max_pixels=config.max_pixels,
        value_range=stated_range(config.value_range),
        cache_size=None if config.cache_size == "auto" else int(config.cache_size),
        every_nth=config.every_nth,
        reduced_jpeg=config.reduced_jpeg,
        channels=None if config.channels == "rgb" else int(config.channels),
        mean=None if config.pixel_mean == "auto" else numbers(config.pixel_mean),
        std=None if config.pixel_std == "auto" else numbers(config.pixel_std),
        rank=ranks.rank,
        ranks=ranks.world,
        parts=config.accumulate,
    )


def stated_range(text: str) -> tuple[float, float] | Literal["auto"] | None:
    """The value of the option `value_range`."""
    if text in ("none", "auto"):
        return None if text == "none" else "auto"
    low, high = numbers(text)
    return low, high


def numbers(text: str) -> tuple[float, ...]:
    """The numbers of an option such as 0,4095."""
    return tuple(map(float, text.split(",")))


def measured_options(config: PretrainConfig, loader: ViewLoader) -> dict[str, str]:
    """What `open_loader` has measured over the images, as options."""
    reading, augmentation = (getattr(loader, name, None) for name in ("reading", "augmentation"))
    found: dict[str, str] = {}
    if reading is not None and config.value_range == "auto":
        found["value_range"] = joined(reading.value_range) if reading.value_range else "none"
    if augmentation is not None and config.channels != "rgb":
        found["pixel_mean"] = joined(augmentation.mean)
        found["pixel_std"] = joined(augmentation.std)
    return found


def joined(values: Iterable[float]) -> str:
    """Numbers as the options have them."""
    return ",".join(f"{value:.15g}" for value in values)


def starting_backbone(config: PretrainConfig) -> nn.Module:
    """The backbone by name, with the weights to start from.

    Raises:
        ValueError: unknown backbone, or weights that do not fit it.
        FileNotFoundError: the weights file is not there.
    """
    name = config.weights
    shape: dict[str, Any] = {
        "output_stride": None if config.output_stride == "none" else config.output_stride,
        "padding": config.padding,
        "truncate": config.truncate,
        "in_channels": 3 if config.channels == "rgb" else int(config.channels),
    }
    if name == "none":
        return build_backbone(config.backbone, **shape)
    if not Path(name).is_file() and len(Path(name).parts) == 1 and not Path(name).suffix:
        try:
            return build_backbone(config.backbone, weights=name, **shape)
        except URLError as error:
            raise OSError(
                f"pretrain: weights: {name} of {config.backbone} cannot be downloaded "
                f"({error.reason}); download the file elsewhere and name it, or weights none"
            ) from error
    read = read_backbone(name)
    if read.architecture != config.backbone:
        raise ValueError(
            f"pretrain: weights: {name} holds a {read.architecture}, but backbone is "
            f"{config.backbone}"
        )
    backbone = build_backbone(config.backbone, **shape)
    load_weights(backbone, read.tensors)
    return backbone


def check_batch(config: PretrainConfig, backbone: nn.Module, world: int) -> None:
    """Raises ValueError for one image a batch where batch norm would see one value a channel."""
    seen = share_batch(config.batch_size, world, config.accumulate)
    norms = any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in backbone.modules())
    if seen > 1 or not norms:
        return
    stride = feature_grid(backbone).stride
    if config.image_size <= stride:
        shared = f" for {world} processes x {config.accumulate} parts"
        raise ValueError(
            f"pretrain: batch_size {config.batch_size}{shared if config.batch_size > 1 else ''} at "
            f"image_size {config.image_size} leaves batch norm one value "
            f"a channel (the backbone's stride is {stride}), and it needs two: raise either"
        )


def build_model(
    config: PretrainConfig, backbone: nn.Module, steps_per_epoch: int, world: int = 1
) -> DenseCL:
    """The model of a resolved configuration, around a backbone, on the CPU."""
    # With one group a process would normalise keys over the very images of its queries.
    groups = config.key_bn_groups
    if world > 1 and groups > 1:
        groups = max(2, round(groups / world))
    model = DenseCL(
        backbone,
        dim=config.dim,
        hidden_dim=config.hidden_dim,
        queue_length=int(config.queue_length),
        momentum=float(config.key_momentum),
        temperature=config.temperature,
        dense_temperature=(
            None if config.dense_temperature == "auto" else float(config.dense_temperature)
        ),
        loss_lambda=config.loss_lambda,
        grid_size=None if config.grid_size == "none" else int(config.grid_size),
        matching=config.matching,
        geometric_steps=round(config.geometric_share * config.epochs * steps_per_epoch),
        mutual_matching=config.mutual_matching,
        row_weight=config.row_weight,
        dense_negatives=config.dense_negatives,
        positions_per_image=config.positions_per_image,
        symmetric=config.symmetric,
        predictor_dim=None if config.predictor_dim == "none" else int(config.predictor_dim),
        lambda_warmup_steps=duration_in_steps(config.lambda_warmup, steps_per_epoch),
        queue_dtype=torch.bfloat16 if config.queue_dtype == "bf16" else torch.float32,
        queue_init=config.queue_init,
        key_bn=config.key_bn,
        key_bn_groups=groups,
    )
    if config.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def build_optimizer(config: PretrainConfig, model: DenseCL) -> torch.optim.Optimizer:
    """SGD as in the paper, weight decay on every parameter, or AdamW; fused on a GPU.

    With ``layer_decay`` below 1 the backbone's layers learn more slowly the farther they are from
    the heads. AdamW decays no vector (biases, norms), as is usual for transformers.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    layers = layer_numbers([name for name, _ in trained if name.startswith("backbone.")])
    last = max(layers.values(), default=0) + 1
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trained:
        scale = config.layer_decay ** (last - layers.get(name, last))
        decays = config.optimizer == "sgd" or parameter.dim() > 1
        key = scale, config.weight_decay if decays else 0.0
        groups.setdefault(key, []).append(parameter)
    options: dict[str, Any] = {
        "lr": float(config.lr),
        "fused": True if trained[0][1].is_cuda else None,
    }
    parameters: list[dict[str, Any]] = [
        {"params": params, "lr_scale": scale, "weight_decay": decay}
        for (scale, decay), params in groups.items()
    ]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **options)
    return torch.optim.SGD(parameters, momentum=config.sgd_momentum, **options)


def layer_numbers(names: list[str]) -> dict[str, int]:
    """The depth of every parameter of a backbone, 0 at the input.

    A layer is what is numbered in the names (blocks.3, layer2.1): it counts in the order in which
    the network registers them, and what lies between two numbered ones belongs to the first.
    """
    depth, seen, numbers = 0, "", {}
    for name in names:
        numbered = re.match(r".*?\.\d+\.", name)
        layer = numbered[0] if numbered else seen
        if layer != seen:
            depth, seen = depth + 1, layer
        numbers[name] = depth
    return numbers
