"""Peak memory of one training step of a vision transformer, with our losses and with the formula.

    python -m benchmarks.vit_memory [--backbone timm/vit_small_patch16_224] [--batch 8]

A grid of 14 x 14 positions is four times a ResNet's, and the formula's logits grow with it: M x (K
+ 1) numbers, M = N * 196, several times over. Each step runs in a process of its own, on the CPU;
what counts is the high-water mark of the resident set above what lay there before the step.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

from benchmarks.processes import Lost, Worker
from benchmarks.step import VIT, StepCase
from benchmarks.worker import Settings, answer, peak_of

VARIANTS = {"ours": "ours", "formula": "reference", "backbone alone": "backbone alone"}


def measure(variant: str, case: StepCase, threads: int = 2) -> dict[str, Any]:
    """Bytes and loss of one variant's step; empty where it died, as for want of memory."""
    process, settings = Worker(), Settings(torch.device("cpu"), threads=threads)
    try:
        found = process.call(1800.0, answer, settings, peak_of, case, VARIANTS[variant])
    except Lost:
        found = {}
    finally:
        process.close()
    return found.get("info", {})


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 1 where a variant could not be measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vit_memory", description=__doc__)
    parser.add_argument("--backbone", default=VIT)
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args(arguments)
    case = StepCase(options.batch, options.backbone, precision="fp32")
    print(f"one training step, {options.backbone}, {case.size} px, batch {options.batch}")
    missing = 0
    for variant in VARIANTS:
        found = measure(variant, case)
        missing |= not found
        told = f"{found['bytes'] / 1e6:8,.0f} MB above rest" if found else "not measured"
        told += f", loss {found['value']:.4f}" if variant in ("ours", "formula") and found else ""
        print(f"  {variant:<15} {told}")
    return int(missing)


if __name__ == "__main__":
    sys.exit(main())
