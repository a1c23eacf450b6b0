"""A child for the tests of benchmarks/child.py: answers, chatters, hangs or dies as it is told."""

from __future__ import annotations

import os
import time

from benchmarks.child import requests

if __name__ == "__main__":
    for request, answer in requests():
        print("this is not an answer")
        os.write(1, b"nor is this\n")
        if request["do"] == "die":
            os._exit(3)
        if request["do"] == "hang":
            time.sleep(60.0)
        answer({"did": request["do"], "pid": os.getpid()})
