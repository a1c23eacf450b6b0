"""What is installed, what was built, what this machine can do, and why anything is missing."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from densecl_ext import _native, _version

BUILD_INFO = Path(__file__).resolve().parent / "_build_info.json"

# Distribution -> what it is needed for; DALI's name carries the CUDA version.
LIBRARIES = {
    "numpy": "everything",
    "torchvision": "backbones by name, the portable loader",
    "pillow": "decoding in the portable loader",
    "lightning": "training",
    "pyyaml": "recipes",
    "tensorboard": "TensorBoard logs",
    "tqdm": "the progress bar",
    "matplotlib": "pictures",
}
DALI = "nvidia-dali-cuda"


def collect() -> dict[str, Any]:
    """Gathers everything that `densecl info` shows.

    Returns:
        A nested dict of plain values, ready for JSON: "densecl_ext", "libraries", "build", "cpu",
        "gpu", "missing". "missing" is a list of sentences: what is not there, why, and what to do.
    """
    missing: list[str] = []
    return {
        "densecl_ext": {
            "version": _version.__version__,
            "path": str(Path(__file__).resolve().parent),
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        "libraries": _libraries(missing),
        "build": _build(missing),
        "cpu": _cpu(missing),
        "gpu": _gpu(missing),
        "missing": missing,
    }


def format_info(info: Mapping[str, Any]) -> str:
    """Writes what `collect` returned as lines for a person."""
    sections = {
        "densecl_ext": "densecl_ext",
        "libraries": "libraries",
        "build": "build",
        "cpu": "CPU",
        "gpu": "GPU",
    }
    lines: list[str] = []
    for key, title in sections.items():
        lines.append(title)
        width = max(len(name) for name in info[key]) + 1
        for name, value in info[key].items():
            lines.append(f"  {name.replace('_', ' ') + ':':<{width}} {_words(value)}")
    lines.append("missing")
    lines += [f"  - {sentence}" for sentence in info["missing"]] or ["  nothing"]
    return "\n".join(lines)


def _words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _libraries(missing: list[str]) -> dict[str, str | None]:
    """Versions by metadata: importing all of them would take seconds."""
    versions: dict[str, str | None] = {"torch": torch.__version__}
    for name, purpose in LIBRARIES.items():
        versions[name] = _version_of(name)
        if versions[name] is None:
            missing.append(
                f"{name} is not installed (needed for: {purpose}): pip install 'densecl_ext[train]'"
            )
    versions["timm"] = _version_of("timm")  # not missed where it is not: nothing else needs it
    names = {dist.metadata["Name"] or "" for dist in importlib.metadata.distributions()}
    dali = sorted(name for name in names if name.lower().startswith(DALI))
    versions["dali"] = f"{_version_of(dali[0])} ({dali[0]})" if dali else None
    if not dali:
        missing.append(
            "DALI is not installed, the torchvision loader is used instead: pip install "
            "nvidia-dali-cuda130 (Linux)"
        )
    return versions


def _build(missing: list[str]) -> dict[str, Any]:
    """What the build recorded, and what of it loads."""
    try:
        recorded = json.loads(BUILD_INFO.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        recorded = {}
        missing.append(
            f"the record of the build cannot be read ({error}): build again with `pip install .`"
        )
    cuda = recorded.get("cuda", {})
    loads = _native.missing_cuda is None
    if not loads:
        reason = cuda.get("reason") if not cuda.get("built") else _native.missing_cuda
        missing.append(f"CUDA kernels: {reason}")
    return {
        "against_torch": recorded.get("torch"),
        "runs_under": f"torch >= {recorded['target_abi']}" if "target_abi" in recorded else None,
        "compiler": recorded.get("cxx"),
        "flags": recorded.get("flags"),
        "cpu_kernels": True,
        "cuda_kernels": loads,
        "cuda_architectures": cuda.get("archs"),
    }


def _cpu(missing: list[str]) -> dict[str, Any]:
    """Instruction sets and threads."""
    cpu: dict[str, Any] = {"model": _cpu_model(), "machine": platform.machine()}
    try:
        import densecl_ext._host as _host
    except ImportError as error:
        missing.append(f"the host module: {error}; build again with `pip install .`")
    else:
        cpu["kernels_known"] = list(_host.known_isas())
        cpu["kernels_that_run_here"] = list(_host.available_isas())
        try:
            cpu["selected"] = _host.selected_isa()
        except RuntimeError as error:
            cpu["selected"] = None
            missing.append(f"CPU kernels as asked for: {error}")
    cpu["forced_by_environment"] = os.environ.get("DENSECL_CPU_ISA")
    cpu["cores"] = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):
        cpu["cores_usable"] = len(os.sched_getaffinity(0))
    cpu["torch_threads"] = torch.get_num_threads()
    return cpu


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _gpu(missing: list[str]) -> dict[str, Any]:
    """GPUs as torch sees them."""
    gpu: dict[str, Any] = {"torch_built_for_cuda": torch.version.cuda}
    if torch.version.cuda is None:
        missing.append(
            "GPU: this torch is a CPU build; install a CUDA build of torch to train on a GPU"
        )
    elif not torch.cuda.is_available():
        missing.append(
            "GPU: torch is a CUDA build but finds no usable GPU or driver (see nvidia-smi); "
            "training runs on the CPU"
        )
    devices = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            devices.append(
                f"{found.name} (sm_{found.major}{found.minor}, {found.total_memory / 2**30:.0f} "
                "GiB)"
            )
    gpu["devices"] = devices
    return gpu
