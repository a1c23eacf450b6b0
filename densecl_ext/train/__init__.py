"""Training: the configuration, the step and the loop.

`PretrainConfig` needs the standard library alone and `TrainingStep` torch; `pretrain` needs the
extra `densecl_ext[train]`. What needs more is imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from densecl_ext.train.config import PretrainConfig, load_recipe, recipe_names

if TYPE_CHECKING:
    from densecl_ext.train.loop import PretrainResult, TrainingDiverged, pretrain
    from densecl_ext.train.step import StepOutput, TrainingStep

__all__ = [
    "PretrainConfig",
    "PretrainResult",
    "StepOutput",
    "TrainingDiverged",
    "TrainingStep",
    "load_recipe",
    "pretrain",
    "recipe_names",
]


def __getattr__(name: str) -> Any:
    if name in ("PretrainResult", "TrainingDiverged", "pretrain"):
        from densecl_ext.train import loop

        return getattr(loop, name)
    if name in ("StepOutput", "TrainingStep"):
        from densecl_ext.train import step

        return getattr(step, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
