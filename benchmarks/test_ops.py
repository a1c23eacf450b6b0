"""Every row of suites.py on the CPU; a GPU has rows of its own, which gpu_rows.py runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import suites
from benchmarks.compare import run_row
from benchmarks.memory import MemoryProcess
from densecl_ext import _host


@pytest.mark.parametrize("row", suites.rows(), ids=lambda row: row.id)
@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_op(
    row: suites.Row, device: torch.device, benchmark: Any, memories: MemoryProcess, quick: bool
) -> None:
    if row.isa is not None and row.isa not in _host.available_isas():
        pytest.skip(f"this machine lacks {row.isa}")
    benchmark.group = row.id
    run_row(row, device, benchmark, memories, quick=quick)
