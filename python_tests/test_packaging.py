"""The build's decisions, the backend's requirements, what the built modules ask of a machine."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import build_plan
import densecl_build
import pytest
from build_plan import (
    BuildError,
    cuda_archs,
    cuda_decision,
    gencode_flags,
    nvcc_flags,
    toolchain_problem,
)
from setuptools import build_meta

import densecl_ext

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(densecl_ext.__file__).parent


def test_cuda_is_decided_by_setting_sources_and_toolkit() -> None:
    sources = ["csrc/kernels/cuda/info_nce.cu"]
    assert cuda_decision("auto", sources, "13.0", "/cuda/bin/nvcc").build
    assert cuda_decision("1", sources, "13.0", "/cuda/bin/nvcc").build
    off = cuda_decision("0", sources, "13.0", "/cuda/bin/nvcc")
    assert not off.build
    assert "DENSECL_CUDA=0" in off.reason
    assert cuda_decision("auto", sources, "13.0", "/cuda/bin/nvcc", "13.2").build


@pytest.mark.parametrize(
    ("sources", "torch_cuda", "nvcc", "reason"),
    [
        ([], "13.0", "/cuda/bin/nvcc", "no CUDA sources in this version"),
        (["a.cu"], None, "/cuda/bin/nvcc", "the torch built against has no CUDA"),
        (["a.cu"], "13.0", None, "no nvcc found"),
    ],
)
def test_missing_cuda_is_told_or_refused(
    sources: list[str], torch_cuda: str | None, nvcc: str | None, reason: str
) -> None:
    decision = cuda_decision("auto", sources, torch_cuda, nvcc)
    assert not decision.build
    assert reason in decision.reason
    with pytest.raises(BuildError, match=reason):
        cuda_decision("1", sources, torch_cuda, nvcc)


def test_nvcc_and_torch_of_different_cuda_are_told() -> None:
    decision = cuda_decision("auto", ["a.cu"], "12.8", "/cuda/bin/nvcc", "13.0")
    assert not decision.build
    assert decision.reason == "nvcc is of CUDA 13.0, torch for CUDA 12.8"
    with pytest.raises(BuildError, match="nvcc is of CUDA 13.0"):
        cuda_decision("1", ["a.cu"], "12.8", "/cuda/bin/nvcc", "13.0")


def test_a_warning_need_not_cost_a_build() -> None:
    assert nvcc_flags(None) == nvcc_flags("error")
    assert [flag for flag in nvcc_flags(None) if flag not in nvcc_flags("allow")] == [
        "-Werror", "all-warnings",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="DENSECL_CUDA_WARNINGS must be one of error, allow"):
        nvcc_flags("0")


def test_architectures() -> None:
    assert cuda_archs(None) == cuda_archs("") == ["8.0+PTX", "9.0a"]
    assert cuda_archs(" 9.0a; 12.0 ") == ["9.0a", "12.0"]
    assert gencode_flags(["8.0+PTX", "9.0a"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_80,code=compute_80",
        "-gencode=arch=compute_90a,code=sm_90a",
    ]
    for wrong in ("sm_90", "9", "90a", "9.0a+SASS"):
        with pytest.raises(ValueError, match="DENSECL_CUDA_ARCHS must be"):
            cuda_archs(wrong)
    with pytest.raises(ValueError, match="need 8.0 or later, got '7.5'"):
        cuda_archs("9.0a;7.5")


def test_an_unknown_cuda_setting_is_refused() -> None:
    with pytest.raises(ValueError, match="auto, 0, 1; got 'yes'"):
        cuda_decision("yes", [], None, None)


def test_a_missing_toolchain_names_the_package(tmp_path: Path) -> None:
    header = tmp_path / "Python.h"
    assert "python3-dev" in (toolchain_problem(sys.executable, header) or "")
    header.touch()
    assert toolchain_problem(sys.executable, header) is None
    assert "apt-get install g++" in (toolchain_problem("no-such-compiler", header) or "")


def install_fake_torch(folder: Path, version: str) -> None:
    metadata = folder / f"torch-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")


@pytest.mark.parametrize(
    ("version", "wanted"),
    [
        (None, ["torch>=2.10"]),
        ("2.9.1", ["torch>=2.10"]),
        ("2.10.0", []),
        ("2.11.0+cu130", []),
        ("2.13.0+cpu", []),
        ("3.0.0", []),
    ],
)
@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_torch_is_asked_for_only_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    version: str | None,
    wanted: list[str],
    kind: str,
) -> None:
    if version is not None:
        install_fake_torch(tmp_path, version)
    monkeypatch.setattr(densecl_build, "environment_paths", lambda: [str(tmp_path)])
    monkeypatch.setattr(build_meta, f"get_requires_for_build_{kind}", lambda _: ["wheel"])
    requirements = getattr(densecl_build, f"get_requires_for_build_{kind}")()
    assert requirements == ["wheel", *wanted]


def test_the_environments_torch_comes_last(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install_fake_torch(tmp_path, "2.11.0")
    monkeypatch.setattr(densecl_build, "environment_paths", lambda: [str(tmp_path)])
    monkeypatch.setattr(densecl_build, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "path", ["first"])
    densecl_build._reach_torch()
    assert sys.path == ["first", str(tmp_path)]


def test_an_importable_torch_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install_fake_torch(tmp_path, "2.11.0")
    monkeypatch.setattr(densecl_build, "environment_paths", lambda: [str(tmp_path)])
    monkeypatch.setattr(sys, "path", [*sys.path])
    densecl_build._reach_torch()
    assert str(tmp_path) not in sys.path


def test_an_old_setuptools_is_told_and_not_its_own_traceback() -> None:
    build_plan.require_setuptools("77.0.1")
    with pytest.raises(BuildError, match="needs setuptools 77 or later, this environment has 65.5"):
        build_plan.require_setuptools("65.5.0")


def test_the_toolkit_is_the_one_that_nvcc_names() -> None:
    printed = "#$ _HERE_=/opt/cuda/bin\n#$ TOP=/opt/cuda/bin/..\n#$ NVVMIR_LIBRARY_DIR=x\n"
    assert build_plan.toolkit_of(printed) == "/opt/cuda/bin/.."
    assert build_plan.toolkit_of("nvcc: command not found\n") is None


def test_the_build_is_recorded() -> None:
    info = json.loads((PACKAGE / "_build_info.json").read_text())
    assert info.keys() == {"version", "torch", "target_abi", "cxx", "flags", "cuda"}
    assert info["version"] == densecl_ext.__version__
    assert info["target_abi"] == "2.10"
    assert info["cuda"].keys() == {"built", "reason", "archs"}
    assert bool(info["cuda"]["archs"]) == info["cuda"]["built"]
    printed = build_plan.summary(info, seconds=12.3)
    for told in (info["torch"], info["cxx"], info["cuda"]["reason"], "12 s"):
        assert told in printed


def tool_output(tool: str, *arguments: str) -> str:
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def built(name: str) -> str:
    found = list(PACKAGE.glob(f"{name}.*so"))
    assert len(found) == 1, f"{found}: remove what an older build left"
    return str(found[0])


@pytest.fixture(params=["_C", "_C_cuda"])
def op_module(request: pytest.FixtureRequest) -> str:
    """The path of a built op module."""
    if request.param == "_C_cuda" and not list(PACKAGE.glob("_C_cuda.*so")):
        pytest.skip("built without CUDA kernels")
    return built(request.param)


def test_the_ops_need_only_the_stable_abi(op_module: str) -> None:
    symbols = tool_output("nm", "-D", "-C", "--undefined-only", op_module)
    names = [line.split(" ", 1)[1].strip() for line in symbols.splitlines() if " U " in line]
    assert any("aoti_torch" in name or "torch_" in name for name in names)
    outside = [name for name in names if re.search(r"\b(c10|at|torch|caffe2)::", name)]
    assert not outside
    # The CUDA runtime is linked in: whichever version torch brings does not matter.
    assert not [name for name in names if name.startswith("cu")]


@pytest.mark.parametrize("name", ["_C", "_C_cuda", "_host"])
def test_the_modules_name_no_folder_and_little_else(name: str) -> None:
    if name == "_C_cuda" and not list(PACKAGE.glob("_C_cuda.*so")):
        pytest.skip("built without CUDA kernels")
    dynamic = tool_output("readelf", "-d", built(name))
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", dynamic))
    system = {"libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6", "libpthread.so.0"}
    others = {library for library in needed - system if not library.startswith("ld-linux")}
    torch = {"_C": {"libtorch_cpu.so"}, "_C_cuda": {"libtorch_cpu.so", "libtorch_cuda.so"}}
    assert others == torch.get(name, set())


def test_a_source_distribution_needs_no_torch_and_holds_everything(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    shutil.copytree(
        ROOT,
        checkout,
        ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "shared"),
    )
    program = (
        "import sys; sys.modules['torch'] = None; sys.path.insert(0, 'build_backend');"
        f"import densecl_build; print(densecl_build.build_sdist({str(tmp_path)!r}))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=checkout, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
    with tarfile.open(tmp_path / result.stdout.splitlines()[-1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    packed = {
        path.relative_to(ROOT).as_posix()
        for pattern in (
            "csrc/**/*.cpp",
            "csrc/**/*.h",
            "csrc/**/*.cu",
            "csrc/**/*.cuh",
            "csrc/**/*.sh",
            "build_backend/*.py",
            "densecl_ext/**/*.py",
            "densecl_ext/recipes/*.yaml",
            "python_tests/*.py",
        )
        for path in ROOT.glob(pattern)
    }
    packed |= {"LICENSE", "Makefile", "CMakeLists.txt", "setup.py", "pyproject.toml"}
    assert packed <= names
    assert not [name for name in names if name.endswith((".so", "_build_info.json"))]
