"""benchmarks/worker.py's rows, but those in FAULTS go wrong; "sm90" ones unless all is portable."""

from __future__ import annotations

import json
import os
from typing import Any

from benchmarks.rows import Row
from benchmarks.worker import run_row as real
from python_tests import faulty_worker


def run_row(row: Row, names: tuple[str, ...], *rest: Any) -> dict[str, Any]:
    """As the real one does, after the fault."""
    fault, _, name = json.loads(os.environ["FAULTS"]).get(row.id, "").partition(":")
    if name and name not in names:  # "fault:name": one candidate alone
        fault = ""
    if fault == "sm90":
        fault = "" if os.environ.get("DENSECL_CUDA_KERNEL") == "portable" else "fault"
    if fault:
        getattr(faulty_worker, fault)()
    return real(row, names, *rest)
