"""Checks the CUDA kernels' machine code: nothing spills, and Hopper's kernel is Hopper's.

    python csrc/tests/machine_code.py FILE.so [FILE.o ...]

cuobjdump comes from the CUDA toolkit or, where that has none, from the triton wheel. Prints what
every kernel takes, and fails where one keeps registers in local memory, or where the sm_90a sweep
of info_nce lacks the warpgroup products (HGMMA) or the tensor memory accelerator's copies
(UTMALDG).
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HOPPER_KERNEL = "SweepMaps"  # a parameter that its sweep alone has
HOPPER_INSTRUCTIONS = ("HGMMA", "UTMALDG")


class Kernel(NamedTuple):
    """What one kernel takes on one architecture."""

    arch: str
    name: str
    registers: int
    stack: int
    local: int


def find_cuobjdump() -> str:
    """Path of cuobjdump."""
    candidates = [shutil.which("cuobjdump")]
    if "CUDA_HOME" in os.environ:
        candidates.append(str(Path(os.environ["CUDA_HOME"]) / "bin" / "cuobjdump"))
    triton = importlib.util.find_spec("triton")
    for folder in (triton.submodule_search_locations or []) if triton else []:
        candidates.append(str(Path(folder) / "backends" / "nvidia" / "bin" / "cuobjdump"))
    for candidate in candidates:
        if candidate is not None and os.access(candidate, os.X_OK):
            return candidate
    sys.exit("machine_code.py: no cuobjdump: it comes with the CUDA toolkit and with triton")


def kernels(printed: str) -> Iterator[Kernel]:
    """The kernels in the output of cuobjdump --dump-resource-usage."""
    arch = name = ""
    for line in printed.splitlines():
        if found := re.match(r"arch = (\S+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function (\S+):", line):
            name = found[1]
        elif found := re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", line):
            yield Kernel(arch, name, *(int(number) for number in found.groups()))


def instructions(printed: str) -> dict[str, set[str]]:
    """Which of Hopper's instructions each function of a disassembly holds."""
    held: dict[str, set[str]] = {}
    name = ""
    for line in printed.splitlines():
        if found := re.match(r"\s*Function : (\S+)", line):
            name = found[1]
            held[name] = set()
        for instruction in HOPPER_INSTRUCTIONS:
            if name and instruction in line:
                held[name].add(instruction)
    return held


def main(files: list[str]) -> int:
    """Exit status: 1 where something is wrong."""
    cuobjdump = find_cuobjdump()
    problems, hopper = [], 0

    def run(*arguments: str) -> str:
        return subprocess.run(
            [cuobjdump, *arguments], capture_output=True, text=True, check=True
        ).stdout

    for file in files:
        found = list(kernels(run("--dump-resource-usage", file)))
        for kernel in sorted(set(found)):
            label = f"{kernel.arch} {kernel.name}"
            print(f"{kernel.registers:4} registers  {label}")
            if kernel.stack or kernel.local:
                problems.append(f"{label}: {kernel.stack} bytes of stack, {kernel.local} local")
        for name, held in instructions(run("-arch", "sm_90a", "-sass", file)).items():
            if HOPPER_KERNEL not in name:
                continue
            hopper += 1
            missing = set(HOPPER_INSTRUCTIONS) - held
            if missing:
                problems.append(f"sm_90a {name}: no {' and no '.join(sorted(missing))}")
        print(f"{file}: {len(set(found))} kernels")
    print(f"Hopper's sweep of info_nce: {hopper or 'not in these files'}")
    for problem in problems:
        print(problem, file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
