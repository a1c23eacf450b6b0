"""The ops: native, differentiable where that makes sense, registered with torch.

The same functions in pure PyTorch are in :mod:`densecl_ext.reference`.
"""

from densecl_ext import _native  # noqa: F401  registers the operators
from densecl_ext.ops import _schemas  # noqa: F401
from densecl_ext.ops._dense_match import dense_match
from densecl_ext.ops._ema_update import ema_update_
from densecl_ext.ops._enqueue import enqueue_
from densecl_ext.ops._info_nce import dense_info_nce, info_nce
from densecl_ext.ops._joint_info_nce import joint_info_nce

__all__ = [
    "dense_info_nce",
    "dense_match",
    "ema_update_",
    "enqueue_",
    "info_nce",
    "joint_info_nce",
]
