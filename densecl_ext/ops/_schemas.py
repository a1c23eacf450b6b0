"""``torch.ops.densecl_ext.*`` under the names and signatures of the public functions.

They decompose into the typed functions of this package and with them into the native ops, so a
graph captured by torch.export or torch.compile holds the native ops alone.
"""

from __future__ import annotations

from typing import Any

import torch

from densecl_ext.ops._dense_match import dense_match
from densecl_ext.ops._ema_update import ema_update_
from densecl_ext.ops._enqueue import enqueue_
from densecl_ext.ops._info_nce import dense_info_nce, info_nce

_LOSS_OPTIONS = (
    "*, float temperature=0.2, bool normalize=True, Tensor? filled=None, "
    'Tensor? row_weight=None, str reduction="mean"'
)

_library = torch.library.Library("densecl_ext", "FRAGMENT")


def _define(schema: str, function: Any) -> None:
    _library.define(schema)
    _library.impl(schema.split("(")[0], function, "CompositeImplicitAutograd")


_define(
    f"info_nce(Tensor query, Tensor positive, Tensor queue, {_LOSS_OPTIONS}) -> Tensor", info_nce
)
_define(
    "dense_info_nce(Tensor query_grid, Tensor key_grid, Tensor match, Tensor queue, "
    f"{_LOSS_OPTIONS}) -> Tensor",
    dense_info_nce,
)
_define(
    "dense_match(Tensor query_features, Tensor key_features, *, bool mutual=False) -> Tensor",
    dense_match,
)
_define("ema_update_(Tensor(a!)[] targets, Tensor[] sources, float momentum) -> ()", ema_update_)
_define(
    "ema_update_.tensor_momentum(Tensor(a!)[] targets, Tensor[] sources, Tensor momentum) -> ()",
    ema_update_,
)
_define(
    "enqueue_(Tensor(a!) queue, Tensor(b!) pointer, Tensor keys, *, Tensor(c!)? filled=None, "
    "bool normalize=True) -> ()",
    enqueue_,
)
