"""Dense correspondence: the most similar key position of every query position."""

from __future__ import annotations

import torch
from torch import Tensor

from densecl_ext.ops import _checks

_native_op = torch.ops.densecl_ext._dense_match


def dense_match(query_features: Tensor, key_features: Tensor, *, mutual: bool = False) -> Tensor:
    """Flat index of the key position of highest cosine similarity, within the same image pair.

    DenseCL, section 3.3, eq. 3. Products and sums in float32 for every input type (on a GPU:
    float32 products as three of tf32): the chosen key's cosine is within 2^-23 max(4, sqrt(C)) of
    the best. The (Sq, Sk) similarities are never stored as a whole; where few images must fill a
    GPU, parts of their sums take at most 33 MB. There is no gradient.

    On a CPU vectors may have any length that float32 holds. On a GPU they must be 0 or between
    1e-13 and 1e18 long, or the match is wrong without a word: squares leave float32's range.

    Args:
        query_features: (N, C, *Sq) float32, bfloat16 or float16; any strides.
        key_features: (N, C, *Sk), the same types, at least one position.
        mutual: keep only matches whose key position's own best query position is the one that
            asks (mutual nearest neighbours); the others become -1.

    Returns:
        (N, prod(Sq)) int64. The lowest index on an exact tie (a zero vector is similar to
        nothing, 0, so it ties with everything orthogonal to the query). As torch.argmax has it, a
        NaN counts as the highest, so that bad features end in a NaN loss instead of hiding.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: a dtype outside the three.
        RuntimeError: tensors on different devices, or on one without kernels.
    """
    op = "dense_match"
    _checks.is_grid(op, "query_features", query_features, "(N, C, *Sq)")
    _checks.is_grid(op, "key_features", key_features, "(N, C, *Sk)")
    if key_features.shape[:2] != query_features.shape[:2]:
        tokens = query_features.dim() == 3 and query_features.shape[2] == key_features.shape[-1]
        hint = "; tokens (N, S, C) are a grid by .transpose(1, 2)" if tokens else ""
        raise ValueError(
            f"{op}: key_features must be ({query_features.shape[0]}, {query_features.shape[1]}, "
            f"*Sk) to match query_features, got {_checks.size(key_features)}{hint}"
        )
    query, key = query_features.detach().flatten(2), key_features.detach().flatten(2)
    if key.shape[2] == 0:
        raise ValueError(
            f"{op}: key_features must have at least one position, got {_checks.size(key_features)}"
        )
    _checks.on_one_device(op, {"query_features": query, "key_features": key})
    match: Tensor = _native_op(query, key, mutual)
    return match


@torch.library.register_fake("densecl_ext::_dense_match")
def _fake(query_features: Tensor, key_features: Tensor, mutual: bool) -> Tensor:
    images, _, positions = query_features.shape
    return query_features.new_empty((images, positions), dtype=torch.int64)
