"""A worker for the tests of benchmarks/processes.py: answers, or goes wrong as it is told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from benchmarks.processes import requests

if __name__ == "__main__":
    for request, answer in requests():
        print("this is not an answer")
        os.write(1, b"nor is this\n")
        done = {"did": request["do"], "pid": os.getpid()}
        if request["do"] == "hang":
            time.sleep(60.0)
        elif request["do"] == "exit":
            os._exit(3)
        elif request["do"] == "fault":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif request["do"] in ("garbage", "half a line"):
            # Where the answers go: behind the streams' own numbers.
            line = b"Xid 31: {\n" if request["do"] == "garbage" else b'{"did": '
            os.write(3, line)
            time.sleep(60.0)
        elif request["do"] in ("grandchild", "orphan"):
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
            if request["do"] == "orphan":  # it holds this process's pipes open
                os.write(2, f"child {child.pid}\n".encode())
                os._exit(3)
            done["child"] = child.pid
        answer(done)
