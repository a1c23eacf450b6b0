"""``torch.ops.densecl_ext.*`` under the names and signatures of the public functions.

They decompose into the typed functions of this package and with them into the native ops, so a
graph captured by torch.export or torch.compile holds the native ops alone. A schema is read off the
function's signature; where that allows several types, the schema has the one below.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from densecl_ext.ops._dense_match import dense_match
from densecl_ext.ops._ema_update import ema_update_
from densecl_ext.ops._enqueue import enqueue_
from densecl_ext.ops._info_nce import dense_info_nce, info_nce
from densecl_ext.ops._joint_info_nce import joint_info_nce

# Optional[...] and not `| None`: that is what torch.library.infer_schema knows.
_SCHEMA_TYPES: dict[str, Any] = {
    "Tensor | Queue": Tensor,
    "float | Tensor": float,
    "int | Tensor | None": Optional[Tensor],  # noqa: UP045
    "Tensor | None": Optional[Tensor],  # noqa: UP045
    "Sequence[Tensor] | nn.Module": Sequence[Tensor],
}

_library = torch.library.Library("densecl_ext", "FRAGMENT")


def _define(
    function: Callable[..., Any],
    mutates: Sequence[str] = (),
    overload: str = "",
    **types: type,
) -> None:
    """Registers the function; types replace those of single arguments."""
    signature = inspect.signature(function)
    parameters = [
        p.replace(annotation=types[name], default=p.empty)
        if name in types
        else p.replace(annotation=_SCHEMA_TYPES.get(p.annotation, p.annotation))
        for name, p in signature.parameters.items()
    ]

    def prototype() -> None: ...

    prototype.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    name = function.__name__ + overload
    _library.define(torch.library.infer_schema(prototype, op_name=name, mutates_args=list(mutates)))
    _library.impl(name, function, "CompositeImplicitAutograd")
    if mutates:
        # Before torch's own fallback, which breaks the stack of an op that returns nothing.
        _library.impl(name, function, "Negative")
        _library.impl(name, function, "Conjugate")


for _loss in (info_nce, dense_info_nce, joint_info_nce):
    # Before the other, which would turn a tensor into a number, without its gradient.
    _define(_loss, overload=".tensor_temperature", temperature=Tensor)
    _define(_loss)
_define(dense_match)
_define(ema_update_, ["targets"])
_define(ema_update_, ["targets"], ".tensor_momentum", momentum=Tensor)
_define(enqueue_, ["queue", "pointer", "filled"])
