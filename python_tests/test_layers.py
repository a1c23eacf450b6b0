"""The layer rules: who may include, import or call whom (CONTRIBUTING.md)."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "densecl_ext"

# A module imports from its own level or from below. Names are the first part after densecl_ext.
LEVELS = [
    {"_version", "options"},
    {"_native", "reference"},
    {"ops"},
    {"backbones"},
    {"nn", "data"},
    {"checkpoints"},
    {"train", "evaluate", "visualize", "info"},
    {"study", "protocols"},
    {"cli", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
# Built modules and the ops' registry stay behind these.
NATIVE = {"ops", "_native"}
HOST = NATIVE | {"info"}
IMPORTED_LAZILY = {
    "torchvision",
    "timm",
    "safetensors",
    "nvidia",
    "lightning",
    "PIL",
    "yaml",
    "matplotlib",
    "tensorboard",
    "torchmetrics",
    "pycocotools",
    "tqdm",
    "pyarrow",
    "tifffile",
}


def cpp_files(*folders: str) -> list[Path]:
    found = [
        path
        for folder in folders
        for suffix in ("*.cpp", "*.h", "*.cu", "*.cuh")
        for path in (CSRC / folder).rglob(suffix)
    ]
    return sorted(found)


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', path.read_text(), flags=re.MULTILINE)


def python_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    """The part of the package that a file belongs to; "" for the package's own __init__."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py").replace("__init__", "")


def imported_parts(path: Path) -> Iterator[tuple[str, int]]:
    """Parts of densecl_ext that a file imports, anywhere in it, with the line."""
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            module = node.module or ""
            if module == "densecl_ext":
                names = [f"densecl_ext.{alias.name}" for alias in node.names]
            else:
                names = [module]
        for name in names:
            package, _, rest = name.partition(".")
            if package == "densecl_ext":
                yield rest.partition(".")[0], node.lineno


@pytest.mark.parametrize(
    ("folders", "forbidden"),
    [
        (("kernels", "host", "tests"), r"^(torch|ATen|c10|caffe2)/"),
        (("kernels", "ops", "tests"), r"^pybind11/"),
        (("kernels", "tests"), r"^Python\.h$"),
        (("ops", "host"), r"(mm|amx|avx|sse)\w*intrin\.h$|^arm_|^x86intrin"),
        (("kernels",), r"^(ops|host)/"),
        (("ops",), r"^(host|cpu|cuda|ptx|kernels)/|^cuda"),
        (("host",), r"^(ops|cpu|cuda|ptx|kernels)/|^cuda"),
    ],
    ids=["torch", "pybind11", "python", "intrinsics", "up", "private-ops", "private-host"],
)
def test_cpp_includes(folders: tuple[str, ...], forbidden: str) -> None:
    files = cpp_files(*folders)
    assert files
    wrong = [
        f"{path.relative_to(ROOT)}: {header}"
        for path in files
        for header in includes(path)
        if re.search(forbidden, header)
    ]
    assert not wrong


def test_kernels_reach_the_chip_through_the_wrappers_alone() -> None:
    """Angle brackets let the include path choose between nvcc's header and the emulator's."""
    wrappers = {path.name for path in (CSRC / "kernels/cuda/ptx").glob("*.cuh")}
    twins = {path.name for path in (CSRC / "tests/cuda_emulator/ptx").glob("*.cuh")}
    assert wrappers == twins
    wrong = []
    for path in cpp_files("kernels/cuda", "tests/cuda"):
        text = path.read_text()
        name = str(path.relative_to(ROOT))
        wrong += [f'{name}: "ptx/' for _ in re.findall(r'#\s*include\s*"(?:\w+/)*ptx/', text)]
        if "kernels/cuda/ptx" not in name:
            wrong += [f"{name}: {found}" for found in re.findall(r"\basm\b|__CUDA_ARCH\w*", text)]
            wrong += [f"{name}: {header}" for header in includes(path) if "cuda_" in header]
    allowed = "cuda_emulator/"
    assert not [line for line in wrong if allowed not in line]


def test_every_part_has_a_level() -> None:
    parts = {part_of(path) for path in python_files()} - {""}
    assert parts <= LEVEL.keys(), "give the new part its level in LEVELS"


def test_imports_run_downwards() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {target}"
        for path in python_files()
        if (part := part_of(path))
        for target, line in imported_parts(path)
        if target in LEVEL and LEVEL[target] > LEVEL[part]
    ]
    assert not wrong


def imported_files(path: Path) -> Iterator[Path]:
    """Files of the package that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            place = ROOT / name.replace(".", "/")
            if name.startswith("densecl_ext.") and place.with_suffix(".py").is_file():
                yield place.with_suffix(".py")


def test_no_circles() -> None:
    """No file reaches itself through what it imports, functions' own imports included."""
    below = {path: set(imported_files(path)) for path in python_files()}
    reached = {path: set(targets) for path, targets in below.items()}
    for _ in below:
        grown = {p: t.union(*(reached.get(q, set()) for q in t)) for p, t in reached.items()}
        if grown == reached:
            break
        reached = grown
    circles = [str(path.relative_to(ROOT)) for path, targets in reached.items() if path in targets]
    assert not circles


def test_data_stands_alone() -> None:
    parts = {
        target
        for path in (PACKAGE / "data").rglob("*.py")
        for target, _ in imported_parts(path)
        if target in LEVEL
    }
    assert parts <= {"data"}


def test_only_the_ops_touch_the_native_modules() -> None:
    wrong = []
    for path in python_files():
        part = part_of(path)
        for target, line in imported_parts(path):
            allowed = {"_C": NATIVE, "_C_cuda": NATIVE, "_host": HOST}.get(target)
            if allowed is not None and part not in allowed:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {target}")
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Attribute)
                and ast.unparse(node) == "torch.ops.densecl_ext"
                and part not in NATIVE
            ):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} calls torch.ops.densecl_ext")
    assert not wrong


def test_import_is_light() -> None:
    """Only torch and numpy are needed, and the import takes under 0.3 s on top of theirs.

    Processor time, which on an idle machine is the time a person waits, and holds on a busy one.
    """
    program = """
import json, sys, time
import numpy, torch
before = set(sys.modules)
start = time.process_time()
import densecl_ext
seconds = time.process_time() - start
print(json.dumps([seconds, sorted({name.split(".")[0] for name in set(sys.modules) - before})]))
"""
    best = float("inf")
    for _ in range(4):
        result = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
        )
        seconds, modules = json.loads(result.stdout)
        assert "densecl_ext" in modules
        assert not IMPORTED_LAZILY & set(modules)
        best = min(best, seconds)
        if best < 0.3:
            break
    assert best < 0.3


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name]


def test_files_name_no_machine() -> None:
    """A path of somebody's machine or a registry's address in a file breaks everywhere else."""
    pattern = re.compile(
        r"(?<![\w.])/(work|home|root|Users)/"
        r"|\bpypi\.(org|python)|pythonhosted|registry\.npmjs|--(extra-)?index-url|find-links"
    )
    wrong = []
    for path in tracked_files():
        if path == Path(__file__) or not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), start=1):
            if pattern.search(line):
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not wrong
