"""Peak memory of one training step of a vision transformer, with our losses and with the formula.

    python -m benchmarks.vit_memory [--backbone timm/vit_small_patch16_224] [--batch 8] [--queue N]

A grid of 14 x 14 positions is four times a ResNet's, and the formula's logits grow with it: M x (K
+ 1) numbers, M = N * 196, several times over. Each step runs in a process of its own, on the CPU;
what counts is the high-water mark of the resident set above what lay there before the step.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = ("ours", "formula", "backbone alone")


class Formula:
    """The losses with their logits, on copies of the queues, which the enqueue then changes."""

    @staticmethod
    def joint_info_nce(*tensors: Any, **options: Any) -> Any:
        from densecl_ext import reference

        query, positive, queue, query_grid, key_grid, match, dense_queue = tensors
        grids = query_grid, key_grid, match, dense_queue.clone()
        return reference.joint_info_nce(query, positive, queue.clone(), *grids, **options)


def step_of(
    variant: str, backbone: str, batch: int, queue_length: int, size: int, threads: int
) -> dict[str, Any]:
    """Measure one variant in this process: bytes, seconds, loss, and the grid."""
    import torch

    from benchmarks.memory import peak_of
    from densecl_ext import DenseCL
    from densecl_ext.nn import losses

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = DenseCL(backbone, queue_length=queue_length)
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=0.03, momentum=0.9
    )
    views = torch.randn(2, batch, 3, size, size)
    seen: dict[str, Any] = {}

    def loss_of(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        if variant != "backbone alone":
            return model(first, second).loss
        # Everything but the losses and the queues: what no loss can do without.
        query = model.neck(model.backbone(first))
        key = model.momentum_encoder(second)
        return (query.vector * key.vector).sum() + (query.grid * key.grid).sum()

    def step(first: torch.Tensor, second: torch.Tensor) -> None:
        loss = loss_of(first, second)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen["loss"] = float(loss.detach())

    step(*views[:, :2, :, :64, :64])  # thread pools, lazy imports, the optimizer's momenta
    for queue in (model.global_queue, model.dense_queue):
        queue.enqueue_(torch.randn(queue_length, queue.keys.shape[1]))
    if variant == "formula":
        losses.ops = Formula  # type: ignore[attr-defined]
    with torch.no_grad():
        grid = model.backbone(views[0, :1]).shape[2:]
    start = time.perf_counter()
    peak = peak_of(lambda: step(*views), torch.device("cpu"))
    return {
        "variant": variant, "bytes": peak, "seconds": time.perf_counter() - start,
        "loss": seen["loss"], "rows": batch * grid.numel(), "grid": list(grid),
    }  # fmt: skip


def measure(variant: str, arguments: list[str]) -> dict[str, Any] | None:
    """One variant in a process of its own; None where it died, as for want of memory."""
    command = [sys.executable, "-m", "benchmarks.vit_memory", "--variant", variant, *arguments]
    ran = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    return json.loads(ran.stdout) if ran.returncode == 0 else None


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 1 where a variant could not be measured."""
    words = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vit_memory", description=__doc__)
    parser.add_argument("--backbone", default="timm/vit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--queue", type=int, default=65536)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.variant:
        sizes = (options.batch, options.queue, options.size, options.threads)
        print(json.dumps(step_of(options.variant, options.backbone, *sizes)))
        return 0
    found = {variant: measure(variant, words) for variant in VARIANTS}
    print(f"one training step, {options.backbone}, {options.size} px, batch {options.batch}")
    for variant, result in found.items():
        told = "could not be measured" if result is None else (
            f"{result['bytes'] / 1e6:8,.0f} MB above rest, {result['seconds']:6.1f} s"
            + (f", loss {result['loss']:.4f}" if variant != "backbone alone" else "")
        )  # fmt: skip
        print(f"  {variant:<15} {told}")
    ours = found["ours"]
    if ours is not None:
        logits = ours["rows"] * (options.queue + 1) * 4
        print(
            f"  logits: M = {ours['rows']:,}, M x (K + 1) x 4 bytes = {logits / 1e6:,.0f} MB a copy"
        )
    return int(None in found.values())


if __name__ == "__main__":
    sys.exit(main())
