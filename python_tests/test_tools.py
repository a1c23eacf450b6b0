"""The small measuring tools, on tiny input: that they run and print what the pages quote."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import train_runs as runs

pytest.importorskip("filelock")

ROOT = Path(__file__).resolve().parent.parent


def printed(tool: str, *words: object) -> str:
    command = [sys.executable, "-m", f"tools.{tool}", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_checkpoint_times(tmp_path: Path) -> None:
    data = runs.image_folder(tmp_path / "images")
    result = runs.tiny_run(runs.tiny_config(data, tmp_path / "run", max_steps=1))
    before = result.checkpoint.read_bytes()
    told = printed("checkpoint_times", result.checkpoint, "--folder", tmp_path)
    number = r"(\d+\.\d\d)"
    held = re.search(f"held up {number} to {number} s, .* after {number} to {number} s", told)
    assert held and float(held[3]) <= float(held[4]) and float(held[1]) <= float(held[2])
    assert re.search(rf"checksum of 2 queues of \d+ keys: {number} ms", told)
    assert result.checkpoint.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "run"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_many_files(tmp_path: Path) -> None:
    told = printed("many_files", "--folder", tmp_path / "many", "--files", 400, "--batches", 6)
    assert told.startswith("400 files found in ")
    assert [line.split(":")[0] for line in told.splitlines()[1:]] == [
        f"after {count} batches of 64" for count in (5, 6)
    ]
    assert not (tmp_path / "many").exists()
