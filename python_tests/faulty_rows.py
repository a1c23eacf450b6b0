"""benchmarks/worker.py, but rows named in FAULTS go wrong; "sm90" ones unless all is portable."""

from __future__ import annotations

import json
import os
import signal
import time
from typing import Any

from benchmarks import worker

faults: dict[str, str] = json.loads(os.environ["FAULTS"])
real = worker.respond


def respond(request: dict[str, Any], *rest: Any) -> dict[str, Any]:
    """As the real one does, after the fault."""
    fault = faults.get(request.get("row", ""), "")
    if ":" in fault:  # "fault:name": one candidate alone
        fault, _, name = fault.partition(":")
        fault = fault if request["only"] in ("", name) else ""
    if fault == "hang":
        time.sleep(60.0)
    elif fault == "fault":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif fault == "garbage":
        os.write(3, b"Xid 31: {\n")
    elif fault == "sm90" and os.environ.get("DENSECL_CUDA_KERNEL") != "portable":
        os.kill(os.getpid(), signal.SIGABRT)
    return real(request, *rest)


if __name__ == "__main__":
    worker.respond = respond
    worker.main()
