"""Dense contrastive self-supervised pre-training (DenseCL, CVPR 2021) with native ops for PyTorch.

The ops, for your own loop: :func:`info_nce`, :func:`dense_info_nce`, :func:`joint_info_nce`,
:func:`dense_match`, :func:`ema_update_`, :func:`enqueue_`. The modules around them:
:class:`KeyQueue`, :class:`InfoNCELoss`, :class:`DenseCLLoss`, :class:`MomentumEncoder`,
:class:`DenseCLNeck`, :class:`DenseCL`. Importing this package needs torch and numpy alone;
``densecl_ext.data``, ``.train``, ``.evaluate`` and ``.visualize`` need the ``[train]`` extra and
are imported by name.
"""

from densecl_ext._version import __version__
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
