"""PEP 517 backend: setuptools' own, taught to build against the torch that the environment has.

An isolated build would otherwise download a second torch (5 GB) only for its headers. One build
runs under every torch from 2.10 on, so any such torch is as good as another; where there is none,
one is asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec

from build_plan import (
    MINIMUM_TORCH,
    TORCH_REQUIREMENT,
    environment_paths,
    release,
    require_setuptools,
    torch_version,
)
from setuptools import build_meta
from setuptools.build_meta import build_sdist as build_sdist

# pip checks what a build requires in isolation alone, and an older one stops at pyproject.toml.
require_setuptools(version("setuptools"))

Settings = Mapping[str, object] | None

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

prepare_metadata_for_build_wheel = build_meta.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable
get_requires_for_build_sdist = build_meta.get_requires_for_build_sdist


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """Setuptools' requirements, and torch where the environment holds none that will do."""
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch_requirement()


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    """As for a wheel."""
    return build_meta.get_requires_for_build_editable(config_settings) + _torch_requirement()


def build_wheel(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    """Builds a wheel against the torch that is importable, or else the environment's."""
    _reach_torch()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    """Builds the modules in place and the wheel that points at them."""
    _reach_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


def _environment_has_torch() -> bool:
    return release(torch_version(environment_paths()) or "") >= MINIMUM_TORCH


def _torch_requirement() -> list[str]:
    return [] if _environment_has_torch() else [TORCH_REQUIREMENT]


def _reach_torch() -> None:
    """Makes the environment's torch importable, behind all that the build environment brings."""
    if find_spec("torch") is None and _environment_has_torch():
        sys.path.extend(path for path in environment_paths() if path not in sys.path)
