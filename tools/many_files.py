"""Millions of files: how long finding them takes, and the memory of who finds and who reads them.

    python -m tools.many_files --folder EMPTY [--files 5000000] [--batches 500]

Makes as many files in 1,000 folders, finds them in a process of its own, takes batches through
two worker processes, prints what it took, and removes all. The files are empty, to fit on a disk:
a worker looks an image's name up and reads one small image instead. Memory is resident; what is a
process's own leaves out what it shares with others.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

FOLDERS, BATCH, SIZE = 1000, 64, 32
IMAGE = ".image.jpg"  # which a scan leaves out


def make(folder: Path, files: int) -> None:
    """Empty files below a folder, a thousandth of them in each of its folders, and an image."""
    from PIL import Image

    for number in range(FOLDERS):
        (folder / f"{number:04}").mkdir(parents=True)
        for within in range(number, files, FOLDERS):
            os.close(os.open(folder / f"{number:04}/{within:08}.jpg", os.O_CREAT | os.O_WRONLY))
    Image.effect_noise((48, 40), 60).save(folder / IMAGE)


def memory(pid: int) -> tuple[float, float]:
    """MB resident, and of that the process's own."""
    fields = dict(
        line.split(":") for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    )
    resident, *own = (
        float(fields[name].split()[0]) / 1024 for name in ("Rss", "Private_Clean", "Private_Dirty")
    )
    return resident, sum(own)


def children() -> list[int]:
    """Processes that this one has started, from any of its threads."""
    parts = Path("/proc/self/task").glob("*/children")
    return sorted(int(word) for part in parts for word in part.read_text().split())


def measure(folder: str, batches: int) -> None:
    """Prints the scan and the readers' memory."""
    from densecl_ext.data import build_loader, open_images
    from densecl_ext.data.images import DEFAULT, Encoded, Reading, read_encoded
    from densecl_ext.data.source import Chosen

    class OneImage(Chosen):
        """Every name stands for the same content."""

        def encoded(self, index: int, reading: Reading = DEFAULT) -> Encoded:
            assert self.name(index).suffix == ".jpg"
            return read_encoded(Path(folder, IMAGE), reading)

    warnings.simplefilter("ignore")
    before = memory(os.getpid())[0]
    began, worked = time.perf_counter(), time.process_time()
    images = open_images(folder)
    took, worked = time.perf_counter() - began, time.process_time() - worked
    more = memory(os.getpid())[0] - before
    print(
        f"{len(images):,} files found in {took:.0f} s, {worked:.0f} s of processor time; "
        f"{more:.0f} MB more resident",
        flush=True,
    )
    loader = build_loader(
        OneImage(images, range(len(images))),
        batch_size=BATCH,
        size=SIZE,
        backend="torchvision",
        workers=2,
    )
    with closing(loader):
        for number, _ in enumerate(loader, 1):
            if number in (5, batches):
                told = [memory(pid) for pid in children()]
                parts = ", ".join(f"{own:.0f} of {all_:.0f} MB" for all_, own in told)
                print(f"after {number} batches of {BATCH}: workers' own memory {parts}", flush=True)
            if number == batches:
                break


def main(words: Sequence[str] | None = None) -> int:
    """Makes the files, measures in a fresh process, removes them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, required=True, help="does not exist yet")
    parser.add_argument("--files", type=int, default=5_000_000)
    parser.add_argument("--batches", type=int, default=500)
    parser.add_argument("--there", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    if given.there:
        measure(str(given.folder), given.batches)
        return 0
    make(given.folder, given.files)
    try:
        command = [sys.executable, "-m", "tools.many_files", "--there", "--folder", given.folder]
        return subprocess.run([*command, "--batches", str(given.batches)], check=False).returncode
    finally:
        shutil.rmtree(given.folder)


if __name__ == "__main__":
    sys.exit(main())
