"""Training: the configuration, the step and the loop.

`TrainingStep` needs torch alone; `PretrainConfig` and the recipes pydantic and YAML; `pretrain` all
of the extra `densecl_ext[train]`. Each is imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from densecl_ext.train.config import PretrainConfig
    from densecl_ext.train.loop import PretrainResult, TrainingDiverged, pretrain
    from densecl_ext.train.recipes import load_recipe, recipe_names
    from densecl_ext.train.replaying import Replayed, replay
    from densecl_ext.train.step import StepOutput, TrainingStep

__all__ = [
    "PretrainConfig",
    "PretrainResult",
    "Replayed",
    "StepOutput",
    "TrainingDiverged",
    "TrainingStep",
    "load_recipe",
    "pretrain",
    "recipe_names",
    "replay",
]

_MODULES = {
    "config": ("PretrainConfig",),
    "loop": ("PretrainResult", "TrainingDiverged", "pretrain"),
    "recipes": ("load_recipe", "recipe_names"),
    "replaying": ("Replayed", "replay"),
    "step": ("StepOutput", "TrainingStep"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            try:
                return getattr(import_module(f"densecl_ext.train.{module}"), name)
            except ModuleNotFoundError as error:
                raise ImportError(
                    f"densecl_ext.train.{name} needs {error.name}, which is not installed: "
                    "pip install 'densecl_ext[train]'"
                ) from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
