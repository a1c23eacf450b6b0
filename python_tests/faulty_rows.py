"""benchmarks/worker.py's rows, but those in FAULTS go wrong."""

from __future__ import annotations

import json
import os
from typing import Any

from benchmarks.rows import Row
from benchmarks.worker import Settings
from benchmarks.worker import run_row as real
from python_tests import faulty_worker


def run_row(row: Row, settings: Settings) -> dict[str, Any]:
    """As the real one does, after the fault."""
    if fault := json.loads(os.environ["FAULTS"]).get(row.id):
        getattr(faulty_worker, fault)()
    return real(row, settings)
