"""Dense contrastive self-supervised pre-training (DenseCL, CVPR 2021) with native ops for PyTorch.

The ops, for your own loop: :func:`info_nce`, :func:`dense_info_nce`, :func:`joint_info_nce`,
:func:`dense_match`, :func:`ema_update_`, :func:`enqueue_`. The modules around them:
:class:`KeyQueue`, :class:`InfoNCELoss`, :class:`DenseCLLoss`, :class:`MomentumEncoder`,
:class:`DenseCLNeck`, :class:`DenseCL`. Importing this package needs torch and numpy alone;
``densecl_ext.data``, ``.train``, ``.evaluate`` and ``.visualize`` need the ``[train]`` extra and
are imported by name.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from densecl_ext._version import __version__

__all__ = [
    "DenseCL",
    "DenseCLLoss",
    "DenseCLNeck",
    "DenseCLOutput",
    "InfoNCELoss",
    "KeyQueue",
    "MomentumEncoder",
    "__version__",
    "dense_info_nce",
    "dense_match",
    "ema_update_",
    "enqueue_",
    "info_nce",
    "joint_info_nce",
]


def _is_command() -> bool:
    """Whether this process is `densecl` or `python -m densecl_ext`, whose help needs no torch."""
    words = sys.orig_argv[1:3]
    return words == ["-m", "densecl_ext"] or [Path(word).name for word in words[:1]] == ["densecl"]


# An import registers torch.ops.densecl_ext, which saved graphs need. The command alone waits until
# a name is used: torch takes more than a second, which is long for --help and for completion.
if TYPE_CHECKING or not _is_command():
    from densecl_ext.nn.losses import DenseCLLoss, InfoNCELoss
    from densecl_ext.nn.model import DenseCL, DenseCLOutput
    from densecl_ext.nn.momentum import MomentumEncoder
    from densecl_ext.nn.necks import DenseCLNeck
    from densecl_ext.nn.queue import KeyQueue
    from densecl_ext.ops import (
        dense_info_nce,
        dense_match,
        ema_update_,
        enqueue_,
        info_nce,
        joint_info_nce,
    )
else:

    def __getattr__(name: str) -> Any:
        for module in ("ops", "nn.losses", "nn.model", "nn.momentum", "nn.necks", "nn.queue"):
            if name in __all__ and hasattr(home := import_module(f"{__name__}.{module}"), name):
                return getattr(home, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
