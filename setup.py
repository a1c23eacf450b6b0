"""Builds the extension modules; everything about the package itself is in pyproject.toml.

densecl_ext._C     the ops: torch stable ABI, bindings (csrc/ops) and CPU kernels (csrc/kernels/cpu)
densecl_ext._host  what the machine can do: pybind11, without torch (csrc/host and the same kernels)
densecl_ext._C_cuda the ops on CUDA tensors: csrc/ops/cuda and csrc/kernels/cuda, where nvcc is

Environment: DENSECL_CUDA=auto|0|1, DENSECL_CUDA_ARCHS, DENSECL_CUDA_WARNINGS=error|allow,
CUDA_HOME, MAX_JOBS, CXX.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))

import build_plan

# How CUDA launches are cut is host code, which every build holds and tests.
KERNELS = build_plan.sources(ROOT, "csrc/kernels/cpu/*.cpp", "csrc/kernels/cuda/plan/*.cpp")
CUDA_SOURCES = build_plan.sources(ROOT, "csrc/kernels/cuda/*.cu")
HOPPER_SOURCES = build_plan.sources(ROOT, "csrc/kernels/cuda/sm90/*.cu")
INCLUDE_DIRS = [
    str(ROOT / "csrc" / "kernels" / "include"),
    str(ROOT / "csrc" / "kernels"),
    str(ROOT / "csrc"),
]
CUDA_INCLUDE_DIRS = [str(ROOT / "csrc" / "kernels" / "cuda"), *INCLUDE_DIRS]
HEADERS = build_plan.sources(ROOT, "csrc/**/*.h", "csrc/**/*.cuh")


def extensions() -> list[Extension]:
    """The modules, as far as they can be described without torch."""
    ops = Extension(
        "densecl_ext._C",
        build_plan.sources(ROOT, "csrc/ops/*.cpp") + KERNELS,
        include_dirs=[*INCLUDE_DIRS],
        depends=HEADERS,
        extra_compile_args=[*build_plan.CXX_FLAGS, *build_plan.STABLE_ABI_FLAGS],
        libraries=["torch_cpu"],  # loaded by `import torch` under this very name, hence no rpath
        language="c++",
        py_limited_api=True,
    )
    host = Extension(
        "densecl_ext._host",
        build_plan.sources(ROOT, "csrc/host/*.cpp"),
        include_dirs=[*INCLUDE_DIRS],
        depends=HEADERS,
        extra_compile_args=[*build_plan.CXX_FLAGS],
        language="c++",
    )
    cuda = Extension(
        "densecl_ext._C_cuda",
        build_plan.sources(ROOT, "csrc/ops/cuda/*.cpp") + CUDA_SOURCES,
        include_dirs=[*CUDA_INCLUDE_DIRS],
        depends=HEADERS,
        # The runtime is linked in, its symbols hidden from other libraries' copies of it.
        libraries=["torch_cpu", "torch_cuda", "cudart_static", "dl", "pthread", "rt"],
        extra_link_args=["-Wl,--exclude-libs,ALL"],
        language="c++",
        py_limited_api=True,
    )
    return [ops, host, cuda]


class BuildModules(build_ext):
    """Compiles with torch's BuildExtension (ninja) and records what was built.

    torch is imported only when there is something to compile: metadata and source distributions
    do without.
    """

    def run(self) -> None:
        """Builds, then writes _build_info.json beside the modules and prints the summary."""
        started = time.perf_counter()
        super().run()
        folder = ROOT if self.inplace else Path(self.build_lib)
        if not self.info["cuda"]["built"]:
            for stale in (folder / "densecl_ext").glob("_C_cuda.*so"):
                stale.unlink()
        target = folder / "densecl_ext" / "_build_info.json"
        target.write_text(json.dumps(self.info, indent=2) + "\n", encoding="utf-8")
        print(build_plan.summary(self.info, time.perf_counter() - started), flush=True)

    def build_extensions(self) -> None:
        """Hands the compilation to torch's BuildExtension."""
        cxx = shlex.split(os.environ.get("CXX", "c++"))[0]
        problem = build_plan.toolchain_problem(
            cxx, Path(sysconfig.get_path("include")) / "Python.h"
        )
        if problem is not None:
            raise build_plan.BuildError(problem)
        torch, cpp_extension = import_torch()
        settle_cuda_home(cpp_extension)
        decision = build_plan.cuda_decision(
            os.environ.get("DENSECL_CUDA", "auto"),
            CUDA_SOURCES,
            torch.version.cuda,
            nvcc := find_nvcc(cpp_extension),
            nvcc and cuda_release(nvcc),
        )
        archs = build_plan.cuda_archs(os.environ.get("DENSECL_CUDA_ARCHS"))

        drop_rpaths(self.compiler)
        ops, host, cuda = self.extensions
        ops.include_dirs += cpp_extension.include_paths()
        ops.library_dirs += cpp_extension.library_paths()
        host.include_dirs.append(pybind11_include(cpp_extension))

        compile_command = cpp_extension.BuildExtension(self.distribution)
        ninja = compile_command.use_ninja
        vars(compile_command).update(vars(self))
        # ninja knows better than distutils what is up to date.
        compile_command.force = compile_command.force or ninja
        compile_command.extensions = [ops]
        compile_command.build_extensions()
        # The kernels' objects serve both modules.
        host.extra_objects = self.compiler.object_filenames(KERNELS, output_dir=self.build_temp)
        compile_command.extensions = [host]
        compile_command.build_extensions()
        if decision.build:
            self.describe_cuda(cuda, cpp_extension, archs)
            compile_command.extensions = [cuda]
            compile_command.build_extensions()
        else:
            self.extensions = [ops, host]

        self.info = {
            "version": self.distribution.get_version(),
            "torch": torch.__version__,
            "target_abi": build_plan.TARGET_ABI,
            "cxx": compiler_line(cxx),
            "flags": " ".join([*build_plan.CXX_FLAGS, *build_plan.STABLE_ABI_FLAGS]),
            "cuda": {
                "built": decision.build,
                "reason": decision.reason,
                "archs": archs if decision.build else [],
            },
        }

    def describe_cuda(self, cuda: Extension, cpp_extension: Any, archs: list[str]) -> None:
        """Adds what is known only now, and the objects that are compiled apart."""
        hopper = build_plan.HOPPER in archs
        defines = [f"-DDENSECL_HOPPER={int(hopper)}"]
        warnings = os.environ.get("DENSECL_CUDA_WARNINGS")
        nvcc_flags = [*build_plan.nvcc_flags(warnings), *defines]
        cuda.extra_compile_args = {
            # USE_CUDA declares torch's C function for the current stream.
            "cxx": [*build_plan.CXX_FLAGS, *build_plan.STABLE_ABI_FLAGS, *defines, "-DUSE_CUDA"],
            "nvcc": [*nvcc_flags, *build_plan.gencode_flags(archs)],
        }
        cuda.include_dirs += cpp_extension.include_paths()
        cuda.library_dirs += [*cpp_extension.library_paths(), cuda_libraries(cpp_extension)]
        cuda.extra_objects = self.compiler.object_filenames(KERNELS, output_dir=self.build_temp)
        if hopper and HOPPER_SOURCES:
            # Instructions that only Hopper has: other architectures' assemblers never see them.
            gencode = build_plan.gencode_flags([build_plan.HOPPER])
            cuda.extra_objects += self.compiler.compile(
                HOPPER_SOURCES,
                output_dir=self.build_temp,
                include_dirs=CUDA_INCLUDE_DIRS,
                extra_postargs={"cxx": [], "nvcc": [*nvcc_flags, *gencode]},
                depends=HEADERS,
            )


def drop_rpaths(compiler: Any) -> None:
    """Takes out the run paths some Pythons were configured with: they name this machine."""
    for name in ("linker_so", "linker_so_cxx"):
        if hasattr(compiler, name):
            command = [
                part for part in getattr(compiler, name) if not part.startswith("-Wl,-rpath")
            ]
            setattr(compiler, name, command)


def import_torch() -> tuple[Any, Any]:
    """Torch and its cpp_extension, or a sentence that says how to get them."""
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        raise build_plan.BuildError(
            f"densecl_ext is built against torch >= {build_plan.TARGET_ABI}, which could not "
            f"be imported ({error}). Install torch first, or build without --no-build-isolation, "
            "which fetches one"
        ) from error
    if build_plan.release(torch.__version__) < build_plan.MINIMUM_TORCH:
        raise build_plan.BuildError(
            f"densecl_ext needs torch >= {build_plan.TARGET_ABI}, found {torch.__version__}; "
            "update torch, or build without --no-build-isolation"
        )
    return torch, cpp_extension


def settle_cuda_home(cpp_extension: Any) -> None:
    """Where the environment names no toolkit, asks the nvcc on the PATH for its own.

    torch takes the folder that nvcc stands in for the toolkit's; a wrapper stands somewhere else.
    """
    nvcc = shutil.which("nvcc")
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if cpp_extension.CUDA_HOME is None or named or nvcc is None:
        return
    asked = [nvcc, "--dryrun", "-x", "cu", os.devnull]
    printed = subprocess.run(asked, capture_output=True, text=True).stderr
    home = build_plan.toolkit_of(printed)
    if home is not None and Path(home).is_dir():
        cpp_extension.CUDA_HOME = os.path.realpath(home)


def find_nvcc(cpp_extension: Any) -> str | None:
    """Path of nvcc in the CUDA toolkit that torch found; a CPU-only torch finds none."""
    if cpp_extension.CUDA_HOME is None:
        return None
    nvcc = Path(cpp_extension.CUDA_HOME) / "bin" / "nvcc"
    return str(nvcc) if nvcc.is_file() else None


def cuda_release(nvcc: str) -> str | None:
    """The CUDA version that nvcc says it is of."""
    printed = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+\.\d+)", printed)
    return found[1] if found else None


def cuda_libraries(cpp_extension: Any) -> str:
    """The folder of the toolkit that holds cudart_static."""
    home = Path(cpp_extension.CUDA_HOME)
    for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
        if (home / folder / "libcudart_static.a").is_file():
            return str(home / folder)
    raise build_plan.BuildError(
        f"the CUDA toolkit in {home} has no libcudart_static.a: install its runtime (development "
        "files), or build without the CUDA kernels: DENSECL_CUDA=0"
    )


def pybind11_include(cpp_extension: Any) -> str:
    """Folder of pybind11's headers: its own package's, or else the copy that torch ships."""
    try:
        import pybind11
    except ImportError:
        return str(cpp_extension.include_paths()[0])
    return str(pybind11.get_include())


def compiler_line(cxx: str) -> str:
    """First line that the compiler prints about itself."""
    printed = subprocess.run([cxx, "--version"], capture_output=True, text=True, check=True).stdout
    return printed.splitlines()[0]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildModules})
