"""The parts of a run, from its configuration."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from densecl_ext.backbones import build_backbone
from densecl_ext.checkpoints import read_backbone
from densecl_ext.data import ViewLoader, build_loader
from densecl_ext.nn.model import DenseCL
from densecl_ext.train.config import PretrainConfig
from densecl_ext.train.schedule import duration_in_steps


def open_loader(config: PretrainConfig, device: torch.device) -> ViewLoader:
    """The two-view loader of a configuration; raises ValueError for a folder it cannot use."""
    return build_loader(
        config.data,
        batch_size=config.batch_size,
        size=config.image_size,
        backend=config.loader,
        device=device,
        workers=None if config.workers == "auto" else int(config.workers),
        seed=config.seed,
        drop_last=True,
        channels_last=config.channels_last,
    )


def starting_backbone(config: PretrainConfig) -> nn.Module:
    """The backbone by name, with the weights to start from.

    Raises:
        ValueError: unknown backbone, or weights that do not fit it.
        FileNotFoundError: the weights file is not there.
    """
    name = config.weights
    if name == "none":
        return build_backbone(config.backbone)
    if not Path(name).is_file() and len(Path(name).parts) == 1 and not Path(name).suffix:
        return build_backbone(config.backbone, weights=name)
    read = read_backbone(name)
    if read.architecture != config.backbone:
        raise ValueError(
            f"pretrain: weights: {name} holds a {read.architecture}, but backbone is "
            f"{config.backbone}"
        )
    backbone = build_backbone(config.backbone)
    backbone.load_state_dict(read.tensors, strict=True)
    return backbone


def build_model(config: PretrainConfig, backbone: nn.Module, steps_per_epoch: int) -> DenseCL:
    """The model of a resolved configuration, around a backbone, on the CPU."""
    model = DenseCL(
        backbone,
        dim=config.dim,
        hidden_dim=config.hidden_dim,
        queue_length=int(config.queue_length),
        momentum=float(config.key_momentum),
        temperature=config.temperature,
        loss_lambda=config.loss_lambda,
        grid_size=None if config.grid_size == "none" else int(config.grid_size),
        matching=config.matching,
        lambda_warmup_steps=duration_in_steps(config.lambda_warmup, steps_per_epoch),
        queue_dtype=torch.bfloat16 if config.queue_dtype == "bf16" else torch.float32,
        queue_init=config.queue_init,
        key_bn_groups=config.key_bn_groups,
    )
    if config.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def build_optimizer(config: PretrainConfig, model: nn.Module) -> torch.optim.SGD:
    """SGD over all trainable parameters, weight decay on every one, as in the paper.

    On a GPU in one launch (fused); on the CPU torch's loop is as fast.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.SGD(
        parameters,
        lr=float(config.lr),
        momentum=config.sgd_momentum,
        weight_decay=config.weight_decay,
        fused=True if parameters[0].is_cuda else None,
    )
