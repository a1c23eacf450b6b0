"""What the run computes on."""

from __future__ import annotations

from typing import Any

import torch


def pick_device(name: str, *, local_rank: int = 0, on_machine: int = 1) -> torch.device:
    """Turns the option `device` into a device.

    Args:
        name: "auto" (the first GPU if there is one, else the CPU), "cpu", "cuda" or "cuda:N".
        local_rank: of the run's processes on this machine, which this is; each has its own GPU.
        on_machine: how many there are.

    Raises:
        ValueError: not the name of such a device, or of one GPU for several processes.
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
    if on_machine > 1 and device.index is not None:
        raise ValueError(
            f"pretrain: device {name!r} is one GPU, for {on_machine} processes on this machine; "
            "say cuda, and CUDA_VISIBLE_DEVICES to choose among them"
        )
    device = torch.device("cuda", local_rank if on_machine > 1 else device.index or 0)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.index >= count:
        raise RuntimeError(
            f"pretrain: device {str(device) if on_machine > 1 else name!r} is not available: torch "
            f"{torch.__version__} sees {count} GPUs; `densecl info` tells why"
        )
    return device


def set_up(device: torch.device, threads: int | str) -> None:
    """Makes the device the current one, and sets what torch keeps for the whole process.

    Args:
        device: of `pick_device`.
        threads: CPU threads, or "auto" for torch's choice.
    """
    if isinstance(threads, int):
        torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # every step has the same shapes


def has_native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
