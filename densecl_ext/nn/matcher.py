"""Chooses the positive of every grid position, and its weight, as a model's options say."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from densecl_ext.nn.distributed import own_rows
from densecl_ext.nn.matching import (
    MATCHINGS,
    ROW_WEIGHTS,
    feature_match,
    geometric_match,
    overlap_weight,
    random_match,
    similarity_weight,
)
from densecl_ext.nn.necks import NeckOutput


class Matched(NamedTuple):
    """What a :class:`Matcher` returns.

    Attributes:
        match: int64 (N, prod(Sq)), flat key position of every query position, or -1.
        truth: the geometric match, None where the crops are not known.
        weight: float32 (N, prod(Sq)) of the dense loss, None where all positions count alike.
    """

    match: Tensor
    truth: Tensor | None
    weight: Tensor | None


@dataclasses.dataclass(frozen=True)
class Matcher:
    """Options of the matching, as :class:`densecl_ext.DenseCL` takes them.

    Attributes:
        matching: one of :data:`densecl_ext.nn.matching.MATCHINGS`.
        geometric_steps: with another matching, match by the crops in this many steps at the start.
        mutual: leave out positions whose best match by features is not mutual.
        row_weight: one of :data:`densecl_ext.nn.matching.ROW_WEIGHTS`.

    Raises:
        ValueError: an option out of range, or two that do not go together.
    """

    matching: str = "backbone"
    geometric_steps: int = 0
    mutual: bool = False
    row_weight: str = "none"

    def __post_init__(self) -> None:
        """Checks the options."""
        if self.matching not in MATCHINGS:
            raise ValueError(f"DenseCL: matching must be one of {MATCHINGS}, got {self.matching!r}")
        if self.row_weight not in ROW_WEIGHTS:
            raise ValueError(
                f"DenseCL: row_weight must be one of {ROW_WEIGHTS}, got {self.row_weight!r}"
            )
        if self.geometric_steps < 0:
            raise ValueError(
                f"DenseCL: geometric_steps must be at least 0, got {self.geometric_steps}"
            )
        if self.mutual and self.matching not in ("backbone", "dense"):
            raise ValueError(
                "DenseCL: mutual_matching needs matching 'backbone' or 'dense', got "
                f"matching={self.matching!r}"
            )

    def needs_crops(self) -> str:
        """The option that cannot do without crops; empty where none needs them."""
        if self.matching == "geometric":
            return "matching 'geometric'"
        if self.geometric_steps:
            return "geometric_steps"
        return "row_weight 'overlap'" if self.row_weight == "overlap" else ""

    @torch.no_grad()
    def __call__(
        self,
        query: NeckOutput,
        key: NeckOutput,
        crop_q: Tensor | None,
        crop_k: Tensor | None,
        step: Tensor,
    ) -> Matched:
        """Match the positions of a batch.

        Args:
            query: of the query encoder, with grid and features.
            key: of the key encoder.
            crop_q: (N, 5) crop box and flip of the query views.
            crop_k: (N, 5) of the key views.
            step: () int64, training steps done, on the device.
        """
        assert query.grid is not None and key.grid is not None
        assert query.features is not None and key.features is not None
        sizes = query.grid.shape[2:], key.grid.shape[2:]
        truth = None
        if crop_q is not None and crop_k is not None:
            truth = geometric_match(crop_q, crop_k, *sizes)
        if self.matching == "geometric":
            assert truth is not None
            match = truth
        elif self.matching == "random":
            device = query.grid.device
            match = own_rows(lambda n: random_match(n, *sizes, device=device), query.grid.shape[0])
        elif self.matching == "dense":
            match = feature_match(query.grid, key.grid, mutual=self.mutual)
        else:
            match = feature_match(query.features, key.features, mutual=self.mutual)
        if self.geometric_steps and self.matching != "geometric":
            assert truth is not None
            # Both are computed: which one counts is decided where the step count lives.
            match = torch.where(step < self.geometric_steps, truth, match)
        weight = None
        if self.row_weight == "similarity":
            weight = similarity_weight(query.features, key.features, match)
        elif self.row_weight == "overlap":
            assert crop_q is not None and crop_k is not None
            weight = overlap_weight(crop_q, crop_k, match, *sizes)
        return Matched(match, truth, weight)
