"""Loads the native op modules and remembers why an optional one is missing."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import torch  # noqa: F401  the op modules resolve their symbols in an imported torch

_HOW_TO_BUILD = "build it with `pip install .` (or `python setup.py build_ext --inplace`)"


def _load(name: str) -> str | None:
    """Import an op module, which registers its operators; returns why it could not be."""
    try:
        importlib.import_module(f"densecl_ext.{name}")
    except ImportError as error:
        return str(error)
    return None


def _hidden() -> Path | None:
    """A built densecl_ext further down the path, which the source checkout hides."""
    here = Path(__file__).resolve().parent
    for entry in sys.path:
        other = Path(entry or ".").resolve() / "densecl_ext"
        if other != here and any(other.glob("_C.*")):
            return other
    return None


_missing_cpu = _load("_C")
if _missing_cpu is not None:
    installed = _hidden()
    if installed is not None:
        raise ImportError(
            f"densecl_ext: {Path(__file__).resolve().parent} is a source checkout that is not "
            f"built, and hides the installed {installed}; run Python from another folder, or "
            f"{_HOW_TO_BUILD}"
        )
    raise ImportError(
        f"densecl_ext: the native ops are not built for this Python: {_missing_cpu}; "
        f"{_HOW_TO_BUILD}"
    )

missing_cuda: str | None = _load("_C_cuda")
"""Why there are no CUDA kernels (an import error's text), or None where there are."""


def require_kernels(op: str, device: torch.device) -> None:
    """Raise RuntimeError where no kernel of ours runs on the device."""
    if device.type in ("cpu", "meta") or (device.type == "cuda" and missing_cuda is None):
        return
    if device.type == "cuda":
        raise RuntimeError(
            f"{op}: this build of densecl_ext has no CUDA kernels ({missing_cuda}); "
            "move the tensors to the CPU, or use densecl_ext.reference on the GPU"
        )
    raise RuntimeError(f"{op}: runs on CPU and CUDA tensors, got device {device}")
