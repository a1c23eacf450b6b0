"""What a build of densecl_ext consists of, decided without importing torch or compiling anything.

Pure functions and small data, so that the tests can ask for every answer. ``setup.py`` carries
the plan out and ``densecl_build.py`` (the PEP 517 backend) asks where a torch is.
"""

from __future__ import annotations

import re
import shutil
import site
import sys
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

MINIMUM_TORCH = (2, 10)
MINIMUM_SETUPTOOLS = (77, 0)
TARGET_ABI = "2.10"
TORCH_REQUIREMENT = f"torch>={TARGET_ABI}"

CXX_FLAGS = ("-std=c++20", "-O3", "-g0", "-fvisibility=hidden")
# Major and minor of the oldest torch that may load the module; torch's own headers then hide
# whatever is newer, and refuse every header outside the stable ABI.
STABLE_ABI_FLAGS = ("-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY")

CUDA_SETTINGS = ("auto", "0", "1")
# Machine code for Ampere and Ada (8.x) and Hopper (9.0a: with its own instructions), and PTX that
# the driver compiles for whatever comes later.
CUDA_ARCHS = "8.0+PTX;9.0a"
HOPPER = "9.0a"
NVCC_FLAGS = ("-std=c++20", "-O3", "-lineinfo", "--compiler-options", "-fvisibility=hidden")
# No torch header is compiled by nvcc, so what it warns of is ours; a warning that a new host
# compiler brings must not cost a machine its build, though: DENSECL_CUDA_WARNINGS=allow.
WARNING_FLAGS = {"error": ("-Werror", "all-warnings"), "allow": ()}


class BuildError(RuntimeError):
    """The build cannot go on; the message says what to do about it."""


@dataclass(frozen=True)
class CudaDecision:
    """Whether the CUDA kernels are built, and the sentence that says why or why not."""

    build: bool
    reason: str


def cuda_decision(
    setting: str,
    sources: Sequence[str],
    torch_cuda: str | None,
    nvcc: str | None,
    nvcc_version: str | None = None,
) -> CudaDecision:
    """Decides whether the CUDA kernels are built.

    A GPU in the building machine plays no part: a machine without one builds for machines with one.

    Args:
        setting: The value of ``DENSECL_CUDA``: "auto" builds where it can, "1" insists, "0"
            leaves it.
        sources: The ``.cu`` files of this version.
        torch_cuda: The CUDA version torch was built with, None for a CPU build.
        nvcc: Path of the CUDA compiler, None where there is none.
        nvcc_version: Its version, None where it did not say.

    Raises:
        ValueError: ``setting`` is none of the three.
        BuildError: ``setting`` is "1" and something is missing.
    """
    if setting not in CUDA_SETTINGS:
        raise ValueError(f"DENSECL_CUDA must be one of auto, 0, 1; got {setting!r}")
    if setting == "0":
        return CudaDecision(False, "switched off by DENSECL_CUDA=0")
    missing = None
    if not sources:
        missing = "no CUDA sources in this version"
    elif torch_cuda is None:
        missing = "the torch built against has no CUDA"
    elif nvcc is None:
        missing = "no nvcc found (set CUDA_HOME to the CUDA toolkit)"
    elif nvcc_version is not None and release(nvcc_version)[0] != release(torch_cuda)[0]:
        missing = f"nvcc is of CUDA {nvcc_version}, torch for CUDA {torch_cuda}"
    if missing is None:
        return CudaDecision(True, f"nvcc {nvcc}, torch for CUDA {torch_cuda}")
    if setting == "1":
        raise BuildError(f"DENSECL_CUDA=1, but the CUDA kernels cannot be built: {missing}")
    return CudaDecision(False, missing)


def toolkit_of(dry_run: str) -> str | None:
    """The toolkit's folder, from what `nvcc --dryrun` prints on standard error."""
    found = re.search(r"^#\$ TOP=(.+)$", dry_run, re.MULTILINE)
    return found[1].strip() if found else None


def cuda_archs(setting: str | None) -> list[str]:
    """The architectures to build for: ``DENSECL_CUDA_ARCHS``, or those of a release.

    Args:
        setting: "8.0+PTX;9.0a" for example: machine code of 8.0 and 9.0a, PTX of 8.0 too.

    Raises:
        ValueError: something that is no architecture.
    """
    archs = [arch.strip() for arch in (setting or CUDA_ARCHS).split(";") if arch.strip()]
    for arch in archs:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch):
            raise ValueError(
                f"DENSECL_CUDA_ARCHS must be architectures such as {CUDA_ARCHS}, got {arch!r}"
            )
        if release(arch) < (8, 0):
            raise ValueError(f"DENSECL_CUDA_ARCHS: the kernels need 8.0 or later, got {arch!r}")
    return archs


def nvcc_flags(warnings: str | None) -> list[str]:
    """What nvcc is given beside the architectures; ``warnings``: ``DENSECL_CUDA_WARNINGS``.

    Raises:
        ValueError: ``warnings`` is neither "error", which is the default, nor "allow".
    """
    if (warnings or "error") not in WARNING_FLAGS:
        raise ValueError(f"DENSECL_CUDA_WARNINGS must be one of error, allow; got {warnings!r}")
    return [*NVCC_FLAGS, *WARNING_FLAGS[warnings or "error"]]


def gencode_flags(archs: Sequence[str]) -> list[str]:
    """What tells nvcc to compile for the architectures."""
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def sources(root: Path, *patterns: str) -> list[str]:
    """Source files below ``root`` that match, sorted, as the relative paths setuptools wants."""
    found = {
        path.relative_to(root).as_posix() for pattern in patterns for path in root.glob(pattern)
    }
    return sorted(found)


def release(version: str) -> tuple[int, int]:
    """Major and minor of a version such as "2.11.0+cu130"; (0, 0) where it has none."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def require_setuptools(version: str) -> None:
    """Raises BuildError for a setuptools that cannot read pyproject.toml's licence."""
    if release(version) < MINIMUM_SETUPTOOLS:
        raise BuildError(
            f"building densecl_ext needs setuptools {MINIMUM_SETUPTOOLS[0]} or later, this "
            f"environment has {version}: pip install --upgrade setuptools, or install without "
            "--no-build-isolation"
        )


def environment_paths() -> list[str]:
    """The site-packages folders of the environment that asked for the build.

    Inside pip's isolated build ``sys.path`` no longer holds them; ``sysconfig`` still names them.
    """
    folders = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib")]
    if sys.prefix == sys.base_prefix and site.ENABLE_USER_SITE:
        folders.append(site.getusersitepackages())
    return list(dict.fromkeys(folders))


def torch_version(paths: Iterable[str]) -> str | None:
    """Version of the torch in one of ``paths``, from its metadata: importing it takes seconds."""
    for found in distributions(name="torch", path=list(paths)):
        return found.version
    return None


def toolchain_problem(cxx: str, python_header: Path) -> str | None:
    """What is missing for compiling an extension, with the Debian package; None if nothing is."""
    if shutil.which(cxx) is None:
        return (
            f"no C++ compiler: {cxx!r} was not found. Install one (Debian, Ubuntu: apt-get install "
            "g++) or name it in the environment variable CXX"
        )
    if not python_header.is_file():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        return (
            f"no Python headers: {python_header} does not exist. Install them (Debian, Ubuntu: "
            f"apt-get install python3-dev, or python{version}-dev where there are several Pythons)"
        )
    return None


def summary(info: Mapping[str, object], seconds: float) -> str:
    """The lines printed at the end of a build, from what is recorded in ``_build_info.json``."""
    cuda = info["cuda"]
    assert isinstance(cuda, Mapping)
    kernels = "built (densecl_ext._C_cuda)" if cuda["built"] else "not built"
    archs = f", for {' '.join(cuda['archs'])}" if cuda["built"] else ""
    rows = {
        "built against": f"torch {info['torch']}",
        "runs under": f"torch >= {info['target_abi']} (stable ABI)",
        "compiler": info["cxx"],
        "flags": info["flags"],
        "ops and CPU kernels": "built (densecl_ext._C)",
        "host module": "built (densecl_ext._host)",
        "CUDA kernels": f"{kernels}: {cuda['reason']}{archs}",
        "compile time": f"{seconds:.0f} s",
    }
    width = max(map(len, rows))
    lines = [f"  {name + ':':<{width + 1}} {value}" for name, value in rows.items()]
    return "\n".join([f"densecl_ext {info['version']}: build summary", *lines])
