"""How long a checkpoint keeps the steps waiting, and how long until it lies on the disk.

    python -m tools.checkpoint_times runs/photos/checkpoints/last.pt [--folder SCRATCH]

Takes a run's checkpoint and saves its content four times, as a run does: the copy into host memory
holds the steps up; writing, syncing and reading back go on behind them. Also the time of the
queues' checksum, which several processes compare.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from densecl_ext.checkpoints import load_checkpoint
from densecl_ext.checkpoints.run_folder import RunFolder
from densecl_ext.checkpoints.writer import CheckpointWriter
from densecl_ext.nn.distributed import queue_checksum

SAVES, CHECKSUMS = 4, 20


def main() -> None:
    """Prints both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--folder", type=Path, help="on the disk that is measured")
    given = parser.parse_args()
    state = load_checkpoint(given.checkpoint)
    held, written = [], []
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        run = RunFolder(folder)
        run.prepare(resume=False, overwrite=True)
        writer = CheckpointWriter(run)
        for _ in range(SAVES):
            begun = time.perf_counter()
            writer.save(state)
            held.append(time.perf_counter() - begun)
            writer.wait()
            written.append(time.perf_counter() - begun)
        run.release()
    size = given.checkpoint.stat().st_size / 1e6
    print(f"{size:.0f} MB: steps held up {min(held):.2f} to {max(held):.2f} s,", end=" ")
    print(f"on the disk and read back after {min(written):.2f} to {max(written):.2f} s")
    queues = [value for name, value in state["model"].items() if name.endswith("queue.keys")]
    begun = time.perf_counter()
    for _ in range(CHECKSUMS):
        queue_checksum(*queues)
    took = 1e3 * (time.perf_counter() - begun) / CHECKSUMS
    print(f"checksum of {len(queues)} queues of {len(queues[0]):,} keys: {took:.2f} ms")


if __name__ == "__main__":
    main()
