"""Checks the CUDA kernels' machine code: nothing spills, and Hopper's kernel is Hopper's.

    python csrc/tests/machine_code.py FILE.so [FILE.o ...]

cuobjdump comes from the CUDA toolkit or, where that has none, from the triton wheel. Prints what
every kernel takes, and fails where one keeps registers in local memory, or where the sm_90a sweep
of info_nce lacks the warpgroup products (HGMMA) or the tensor memory accelerator's copies
(UTMALDG).

Of that sweep's loop over the queue it prints, and holds to limits, what the source alone cannot
promise: that a tile's exponentials (MUFU.EX2) lie between the wait for its scores and the wait for
the previous tile's weighted sum, which the tensor cores work on meanwhile, and how many
instructions a warp takes a tile.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

HOPPER_KERNEL = "SweepMaps"  # a parameter that its sweep alone has
HOPPER_INSTRUCTIONS = ("HGMMA", "UTMALDG")

# Waits of the loop: one group of products may be under way, and none.
SCORES_CAME = "WARPGROUP.DEPBAR.LE gsb0, 0x1"
SUMS_CAME = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
VOTE = "BAR.RED"  # on heavy weights

# The most instructions a warp may take a tile, by (bfloat16, running maximum): with the vote where
# there is one. A tile is 128 queue rows up to 128 features and 64 beyond.
MOST_INSTRUCTIONS = {
    (True, False): {64: 460, 128: 480, 192: 310, 256: 340},
    (True, True): {64: 680, 128: 720, 192: 520, 256: 570},
    (False, False): {64: 340, 128: 350, 192: 240, 256: 280},
    (False, True): {64: 540, 128: 580, 192: 440, 256: 500},
}


class Kernel(NamedTuple):
    """What one kernel takes on one architecture."""

    arch: str
    name: str
    registers: int
    stack: int
    local: int


class Instruction(NamedTuple):
    """One line of a disassembly."""

    address: int
    text: str

    def target(self) -> int | None:
        """Where it branches to."""
        found = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)$", self.text)
        return int(found[1], 16) if found else None

    def falls_through(self) -> bool:
        """Whether the next instruction may follow."""
        return not re.match(r"(BRA|EXIT|RET)\b(?!\.DIV)", self.text)


class Turn(NamedTuple):
    """The fewest instructions that one turn of the sweep's loop takes."""

    instructions: int
    with_vote: int  # where it votes on heavy weights
    exponentials: int
    overlapped: int  # of them, between the waits


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


def functions(printed: str) -> dict[str, list[Instruction]]:
    """The functions in the output of cuobjdump -sass."""
    held: dict[str, list[Instruction]] = {}
    code: list[Instruction] = []
    for line in printed.splitlines():
        if found := re.match(r"\s*Function : (\S+)", line):
            code = held[found[1]] = []
        elif found := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", line):
            code.append(Instruction(int(found[1], 16), found[2]))
    return held


def shortest(code: list[Instruction], through: list[Callable[[str], bool]]) -> list[str] | None:
    """The fewest instructions from first to last, by way of what `through` wants, in order."""
    places = {instruction.address: i for i, instruction in enumerate(code)}
    state = (0, 0)  # where it stands, how many of `through` it has passed
    before: dict[tuple[int, int], tuple[int, int] | None] = {state: None}
    queue = deque([state])
    while queue:
        state = queue.popleft()
        place, passed = state
        if passed < len(through) and through[passed](code[place].text):
            passed += 1
        if place == len(code) - 1:
            if passed < len(through):
                continue
            path = []
            step: tuple[int, int] | None = state
            while step is not None:
                path.append(code[step[0]].text)
                step = before[step]
            return path[::-1]
        following = [place + 1] if code[place].falls_through() else []
        target = code[place].target()
        if target in places:
            following.append(places[target])
        for next_place in following:
            if (next_place, passed) not in before:
                before[next_place, passed] = state
                queue.append((next_place, passed))
    return None


def turns(code: list[Instruction]) -> Iterator[Turn]:
    """What the loops of a sweep with gradients take: with a constant shift, then a running one."""
    for wait, instruction in enumerate(code):
        if SCORES_CAME not in instruction.text:
            continue
        loops = []
        for end in range(wait, len(code)):
            target = code[end].target()
            if target is not None and target <= instruction.address:
                begin = next(i for i, one in enumerate(code) if one.address >= target)
                loops.append((end - begin, begin, end))
        if not loops:
            continue
        _, begin, end = min(loops)
        body = code[begin : end + 1]
        waits = [lambda text: SCORES_CAME in text, lambda text: SUMS_CAME in text]
        path = shortest(body, waits)
        assert path is not None
        voting = shortest(body, [waits[0], lambda text: VOTE in text]) or path
        exponentials = sum("MUFU.EX2" in text for text in path)
        yield Turn(len(path), len(voting), exponentials, min(overlapped(path), overlapped(voting)))


def overlapped(path: list[str]) -> int:
    """How many exponentials lie between the waits."""
    first = next(i for i, text in enumerate(path) if SCORES_CAME in text)
    last = next(i for i, text in enumerate(path) if i > first and SUMS_CAME in text)
    return sum("MUFU.EX2" in text for text in path[first:last])


def check_sweep(name: str, code: list[Instruction]) -> tuple[list[str], list[str]]:
    """The rows of the table, and what is wrong with a sweep of info_nce on Hopper."""
    problems = []
    missing = [
        wanted for wanted in HOPPER_INSTRUCTIONS if not any(wanted in one.text for one in code)
    ]
    if missing:
        problems.append(f"sm_90a {name}: no {' and no '.join(missing)}")
    # sweep_kernel<DType, features / 64, gradient, SweepSteps>
    found = re.search(r"DTypeE(\d)ELi(\d)ELb(\d)E(?:\w*?SweepStepsE(\d))?", name)
    if found is None:
        return [], [*problems, f"sm_90a {name}: a sweep that this script cannot read"]
    bfloat16, features, gradient = found[1] == "1", 64 * int(found[2]), found[3] == "1"
    steps = 4 if found[4] is None else int(found[4])
    if not gradient:
        return [], problems
    rows = []
    found_turns = list(turns(code))
    for turn, running in zip(found_turns, (False, True), strict=False):
        label = (
            f"{'bfloat16' if bfloat16 else 'float16 '} {features:3} "
            f"{'running ' if running else 'constant'} steps {steps}"
        )
        rows.append(
            f"{label}: {turn.overlapped:2} of {turn.exponentials} exponentials between the waits, "
            f"{turn.instructions} instructions, {turn.with_vote} with the vote"
        )
        if steps < 4:  # there to be measured against
            continue
        if turn.overlapped < turn.exponentials:
            problems.append(f"{label}: {turn.exponentials - turn.overlapped} exponentials wait")
        most = MOST_INSTRUCTIONS[bfloat16, running][features]
        if turn.with_vote > most:
            problems.append(f"{label}: {turn.with_vote} instructions, at most {most} expected")
    if len(found_turns) != 2:
        problems.append(f"sm_90a {name}: {len(found_turns)} loops with both waits, expected 2")
    return rows, problems


def main(files: list[str]) -> int:
    """Exit status: 1 where something is wrong."""
    cuobjdump = find_cuobjdump()
    problems: list[str] = []
    rows: list[str] = []
    hopper = 0

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
        for name, code in functions(run("-arch", "sm_90a", "-sass", file)).items():
            if HOPPER_KERNEL not in name:
                continue
            hopper += 1
            of_sweep, wrong = check_sweep(name, code)
            rows += of_sweep
            problems += wrong
        print(f"{file}: {len(set(found))} kernels")
    print(f"Hopper's sweep of info_nce: {hopper or 'not in these files'}")
    for row in sorted(rows):
        print(row)
    for problem in problems:
        print(problem, file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
