"""What the run computes on: device and precision."""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers.logger import Logger
from lightning.fabric.plugins import MixedPrecision, Precision

from densecl_ext.train.config import PretrainConfig


class KeepInputs(MixedPrecision):
    """Autocast to bfloat16 that leaves the inputs alone.

    Fabric's own plugin rounds every floating input, which would move the crop boxes by whole
    pixels.
    """

    def convert_input(self, data: Any) -> Any:
        """Returns the inputs as they are; autocast converts where an operator wants it."""
        return data


def pick_device(name: str) -> torch.device:
    """Turns the option `device` into a device.

    Args:
        name: "auto" (the first GPU if there is one, else the CPU), "cpu", "cuda" or "cuda:N".

    Raises:
        ValueError: not the name of such a device.
        RuntimeError: a GPU is asked for that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"pretrain: device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", device.index or 0)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.index >= count:
        raise RuntimeError(
            f"pretrain: device {name!r} is not available: torch {torch.__version__} sees {count} "
            "GPUs; "
            "`densecl info` tells why"
        )
    return device


def has_native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def build_fabric(config: PretrainConfig, device: torch.device, loggers: list[Logger]) -> Fabric:
    """Fabric on one device, in the precision of the (resolved) configuration.

    Raises:
        RuntimeError: started by a launcher with several processes.
    """
    bf16 = config.precision == "bf16"
    precision: Precision = KeepInputs("bf16-mixed", device.type) if bf16 else Precision()
    fabric = Fabric(
        accelerator=device.type,
        devices=1 if device.type == "cpu" else [device.index],
        plugins=[precision],
        loggers=loggers,
    )
    if fabric.world_size > 1:
        raise RuntimeError(
            f"pretrain: started as one of {fabric.world_size} processes, but a run uses one "
            "process and one device; "
            "start it without a launcher"
        )
    return fabric
