"""Every op and kernel once, on small shapes, against the CPU.

`python -m tools.gpu_checks [NAME ...]`. Each check runs in a process of its own first (`make gpu
PART=smoke`), then under compute-sanitizer (`PART=sanitize`). The portable kernels come first, then
Hopper's, whose names begin with "sm90".
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import cases
from benchmarks.step import step as training_step
from densecl_ext import ops
from densecl_ext.nn.batchnorm import SplitBatchNorm

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALF = DTYPES[1:]
Outputs = Sequence[Tensor]
Device = torch.device


def unit(*shape: int) -> Tensor:
    """Random rows of unit length."""
    return F.normalize(torch.randn(*shape), dim=-1)


def close(name: str, got: Tensor, truth: Tensor, tolerance: float) -> None:
    """Raise unless both are close, in units of the largest element."""
    got, truth = got.detach().cpu().double(), truth.detach().cpu().double()
    off = (got - truth).abs().max() / truth.abs().max().clamp(min=1e-30)
    if not off <= tolerance:
        raise AssertionError(f"{name}: off by {float(off):.2e}, allowed {tolerance:.0e}")


def as_on_cpu(
    name: str,
    function: Callable[..., Outputs],
    given: Sequence[Any],
    device: Device,
    *bounds: float,
) -> None:
    """The function's outputs on the device beside the CPU's, each within its bound."""

    def on(where: str | Device) -> Outputs:
        moved = [x.to(where, copy=True) if isinstance(x, Tensor) else x for x in given]
        return function(*moved)

    for i, (got, truth) in enumerate(zip(on(device), on("cpu"), strict=True)):
        close(f"{name}, output {i}", got, truth, bounds[min(i, len(bounds) - 1)])


def with_gradients(function: Callable[..., Any], count: int) -> Callable[..., Outputs]:
    """The loss or losses, and the gradients of the first `count` arguments."""

    def call(*given: Any, **options: Any) -> Outputs:
        leaves = [x.requires_grad_() for x in given[:count]]
        losses = function(*leaves, *given[count:], **options)
        losses = losses if isinstance(losses, tuple) else (losses,)
        return [*losses, *torch.autograd.grad(torch.stack(losses).sum(), leaves)]

    return call


def nce(device: Device, dtypes: Sequence[torch.dtype], sizes: Any, **options: Any) -> None:
    """info_nce with part of the queue filled, and NaN behind it."""
    for dtype in dtypes:
        for rows, length, features in sizes:
            query, positive, queue = (unit(n, features) for n in (rows, rows, length))
            if options.get("near"):  # keys that take most of a row's sum
                queue[: rows // 2] = query[: rows // 2] + 0.05 * torch.randn(rows // 2, features)
            filled = torch.tensor(length - 5)
            queue[length - 5 :] = torch.nan

            def loss(q: Tensor, p: Tensor, n: Tensor, count: Tensor) -> Tensor:
                temperature = options.get("temperature", 0.2)
                return ops.info_nce(q, p, n, filled=count, temperature=temperature)

            given = (query, positive, queue.to(dtype), filled)
            name = f"info_nce {dtype} {rows} {length} {features}"
            as_on_cpu(name, with_gradients(loss, 2), given, device, 1e-3, 1e-2)


def dense(device: Device, dtypes: Sequence[torch.dtype]) -> None:
    """dense_info_nce: a match with gaps, both gradients, whose keys several positions share."""
    for dtype in dtypes:
        query, key, queue = torch.randn(3, 128, 49), torch.randn(3, 128, 49), unit(300, 128)
        match = torch.randint(-1, 49, (3, 49))
        given = (query, key, match, queue.to(dtype))
        loss = with_gradients(ops.dense_info_nce, 2)
        as_on_cpu(f"dense_info_nce {dtype}", loss, given, device, 1e-3, 1e-2)


def joint(device: Device, dtypes: Sequence[torch.dtype]) -> None:
    """Both losses of a step by one launch, gradients of query and grid."""
    for dtype in dtypes:
        vectors = [torch.randn(20, 128) for _ in range(2)]
        grids = [torch.randn(20, 128, 49) for _ in range(2)]
        queues = [unit(300, 128).to(dtype) for _ in range(2)]
        match = torch.randint(0, 49, (20, 49))

        def losses(q: Tensor, g: Tensor, p: Tensor, k: Tensor, m: Tensor, *n: Tensor) -> Any:
            return ops.joint_info_nce(q, p, n[0], g, k, m, n[1])

        given = (vectors[0], grids[0], vectors[1], grids[1], match, *queues)
        as_on_cpu(f"joint {dtype}", with_gradients(losses, 2), given, device, 1e-3, 1e-3, 1e-2)


def key_gradient(device: Device) -> None:
    """Rows added up key by key."""
    for images, positions, keys, features in ((3, 49, 49, 128), (2, 784, 5, 40)):
        given = (
            torch.randn(images, positions, features),
            torch.randint(-1, keys, (images, positions)),
        )

        def once(rows: Tensor, match: Tensor, keys: int = keys) -> Outputs:
            return (torch.ops.densecl_ext._key_gradient(rows, match, keys),)

        as_on_cpu(f"key_gradient {keys}", once, given, device, 1e-5)


def match(device: Device, sizes: Any, dtypes: Sequence[torch.dtype] = DTYPES) -> None:
    """dense_match: the chosen key is as near as the nearest; both layouts; mutual matches."""
    for dtype in dtypes:
        for images, channels, queries, keys in sizes:
            for layout in (torch.contiguous_format, torch.channels_last):
                grids = [torch.randn(images, channels, n, 1).to(dtype) for n in (queries, keys)]
                query, key = (x.contiguous(memory_format=layout) for x in grids)
                units = [F.normalize(x.double().flatten(2), dim=1) for x in grids]
                similarity = units[0].transpose(1, 2) @ units[1]  # (N, Sq, Sk)
                found = ops.dense_match(query.to(device), key.to(device)).cpu()
                chosen = similarity.gather(2, found.unsqueeze(2)).squeeze(2)
                name = f"dense_match {dtype} {images} {channels} {queries} {keys}"
                close(name, chosen, similarity.amax(dim=2), 1e-5)
                mutual = ops.dense_match(query.to(device), key.to(device), mutual=True).cpu()
                if not torch.equal(mutual[mutual >= 0], found[mutual >= 0]):
                    raise AssertionError(f"{name}: mutual matches are not among the matches")


def match_bulk(device: Device) -> None:
    """Hopper's bulk copies: whole chunks of channels, 7 x 7 grids; in parts, and in one launch."""
    match(device, ((2, 512, 49, 49), (300, 64, 49, 49)))
    for dtype in DTYPES:
        query, key = (torch.randn(2, 512, 49).to(device, dtype) for _ in range(2))
        ours = ops.dense_match(query, key)
        before = os.environ.get("DENSECL_CUDA_KERNEL", "")
        os.environ["DENSECL_CUDA_KERNEL"] = "portable"
        other = ops.dense_match(query, key)
        os.environ["DENSECL_CUDA_KERNEL"] = before
        if not torch.equal(ours, other):
            raise AssertionError(f"dense_match {dtype}: bulk copies give other bits than pieces")


def enqueue(device: Device, batch: int) -> None:
    """A queue that wraps round, with a few blocks and with more keys than warps."""
    for dtype in DTYPES:
        for features in (24, 128):
            length = batch + 17
            queue, keys = torch.zeros(length, features, dtype=dtype), torch.randn(batch, features)

            def write(queue: Tensor, pointer: Tensor, filled: Tensor, keys: Tensor) -> Outputs:
                ops.enqueue_(queue, pointer, keys, filled=filled)
                return queue, pointer, filled

            given = (queue, torch.tensor([length - 7]), torch.tensor(9), keys)
            name = f"enqueue_ {dtype} {batch} {features}"
            as_on_cpu(name, write, given, device, 1e-2 if dtype in HALF else 1e-6, 0.0)


def split_batch_norm(device: Device) -> None:
    """Groups of a batch, beside torch's calls group by group on the CPU."""
    for dtype in DTYPES:
        for shape in ((11, 68, 3, 3), (16, 128, 28, 28)):
            x = (1.0 + torch.randn(shape)).to(dtype).contiguous(memory_format=torch.channels_last)

            def normalise(x: Tensor) -> Outputs:
                layer = SplitBatchNorm(x.shape[1], groups=4).to(x.device)
                with torch.no_grad():
                    out = layer(x)
                statistics = layer.running_mean, layer.running_var
                return [out, *(x for x in statistics if x is not None)]

            bound = 1e-2 if dtype in HALF else 1e-5
            as_on_cpu(f"split_batch_norm {dtype} {shape}", normalise, (x,), device, bound, 1e-5)


def ema(device: Device, count: int) -> None:
    """Tensors of all types in one list, some long, some that begin at odd addresses."""
    sizes = [40_003 if i % 340 == 5 else 1 + 37 * i % 500 for i in range(count)]
    targets = [torch.randn(size).to(DTYPES[i % 3]) for i, size in enumerate(sizes)]
    sources = [torch.randn(size).to(DTYPES[i // 3 % 3]) for i, size in enumerate(sizes)]

    def update(*tensors: Tensor) -> Outputs:
        moved = [torch.cat([x[:1], x])[1:] if i % 2 else x for i, x in enumerate(tensors)]
        ops.ema_update_(moved[:count], moved[count:], 0.9)
        return moved[:count]

    as_on_cpu("ema_update_", update, [*targets, *sources], device, 1e-2)


def needs_gpu(device: Device) -> None:
    """A check of what a CPU has not."""
    if device.type != "cuda":
        raise SystemExit("left out: needs a GPU")


def replayed(name: str, function: Callable[[], Outputs], *, cold: bool = False) -> None:
    """A captured call gives the bits of the plain one; `cold`: it is the process's first."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    if not cold:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()
        torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        outputs = function()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    for got, truth in zip(outputs, function(), strict=True):
        if not torch.equal(got, truth):
            raise AssertionError(f"{name}: a replay gives other bits than a call")


def graph(device: Device, *, cold: bool = False) -> None:
    """The loss and the matching in a graph: dependent launches are edges there."""
    needs_gpu(device)
    query, positive, queue = (unit(n, 128).to(device) for n in (300, 300, 5000))
    queue = queue.to(torch.bfloat16)
    grids = [torch.randn(4, 512, 49, device=device) for _ in range(2)]
    query.requires_grad_()

    def once() -> Outputs:
        loss = ops.info_nce(query, positive, queue)
        return [loss.detach(), *torch.autograd.grad(loss, query), ops.dense_match(*grids)]

    replayed("info_nce and dense_match", once, cold=cold)


def graph_enqueue(device: Device) -> None:
    """Both launches in a graph; the pointer moves on at every replay."""
    needs_gpu(device)
    keys, pointer = torch.randn(600, 128, device=device), torch.zeros(1, dtype=torch.int64)
    queue, pointer = torch.zeros(1000, 128, device=device), pointer.to(device)
    ops.enqueue_(queue, pointer, keys)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.enqueue_(queue, pointer, keys)
    for _ in range(3):
        graph.replay()
    if int(pointer) != 4 * 600 % 1000:
        raise AssertionError(f"enqueue_ in a graph: the pointer is {int(pointer)}")
    close("enqueue_ in a graph", queue[800:], F.normalize(keys[:200], dim=1), 1e-6)


def thread(device: Device) -> None:
    """From a thread that has not used CUDA yet: tensor maps are encoded there."""
    found: list[BaseException | None] = []

    def work() -> None:
        try:
            nce(device, HALF, ((130, 400, 128),))
            found.append(None)
        except BaseException as error:
            found.append(error)

    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    if found[0] is not None:
        raise found[0]


def step(device: Device, graph: bool) -> None:
    """Six training steps of a tiny network; captured ones as eager ones."""
    case = training_step(device, **cases.SMALL["step"])
    loss = case.candidate("ours").results()[0]
    if not bool(torch.isfinite(loss)):
        raise AssertionError(f"the loss is {float(loss)}")
    if graph:
        needs_gpu(device)
        close("captured step", case.candidate("CUDA graph").results()[0], loss, 1e-2)


RAGGED = ((3, 70, 16), (130, 400, 128), (49, 257, 256))
PIECES = ((3, 40, 49, 49), (1, 333, 70, 120), (2, 65, 1, 9))
PORTABLE: dict[str, Callable[[Device], None]] = {
    "info_nce": lambda device: nce(device, DTYPES, RAGGED),
    "info_nce, running maximum": lambda device: nce(device, DTYPES, RAGGED, temperature=0.01),
    "dense_info_nce": lambda device: dense(device, DTYPES),
    "joint_info_nce": lambda device: joint(device, DTYPES),
    "key_gradient": key_gradient,
    "dense_match": lambda device: match(device, PIECES),
    "enqueue_": lambda device: enqueue(device, 20),
    "enqueue_, many keys": lambda device: enqueue(device, 20_000),
    "enqueue_, graph": graph_enqueue,
    "ema_update_": lambda device: ema(device, 9),
    "split_batch_norm": split_batch_norm,
    "ema_update_, large tables": lambda device: ema(device, 1021),
    "graph": graph,
    "step": lambda device: step(device, False),
}
HOPPER: dict[str, Callable[[Device], None]] = {
    "sm90 dense_match": match_bulk,
    "sm90 info_nce, one slice": lambda device: nce(device, (HALF[0],), ((128, 384, 128),)),
    "sm90 info_nce, features": lambda device: nce(
        device, HALF, [(130, 700, n) for n in (64, 128, 192, 256)]
    ),
    "sm90 info_nce, slices": lambda device: nce(device, HALF, ((130, 20_000, 128), (3, 70, 16))),
    "sm90 info_nce, running maximum": lambda device: nce(device, HALF, RAGGED, temperature=0.01),
    "sm90 info_nce, heavy": lambda device: nce(device, HALF, RAGGED, temperature=0.07, near=True),
    "sm90 dense_info_nce": lambda device: dense(device, HALF),
    "sm90 joint_info_nce": lambda device: joint(device, HALF),
    "sm90 thread": thread,
    "sm90 graph": graph,
    "sm90 graph, cold": lambda device: graph(device, cold=True),
    "sm90 step": lambda device: step(device, True),
}
CHECKS = PORTABLE | HOPPER
# The sanitizers see every allocation, which torch then makes one by one: no graph can hold that.
SANITIZED = [name for name in CHECKS if "graph" not in name and not name.endswith("step")]


def main() -> int:
    """Exit status: 0 where all agree, 1 otherwise; the others run on."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_checks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--device", type=torch.device, default="cuda")
    options = parser.parse_args()
    failed = 0
    forced = os.environ.get("DENSECL_CUDA_KERNEL", "")
    for name in options.names or CHECKS:
        torch.manual_seed(0)
        if options.device.type == "cuda":
            own = "sm90" if name in HOPPER else "portable"
            os.environ["DENSECL_CUDA_KERNEL"] = forced or own
        started = time.perf_counter()
        try:
            CHECKS[name](options.device)
            if options.device.type == "cuda":
                torch.cuda.synchronize()
            told = "ok"
        except SystemExit as reason:
            told = str(reason)
        except Exception as error:
            failed, told = 1, f"failed: {type(error).__name__}: {str(error).strip()[:300]}"
        print(f"{name}: {told} ({time.perf_counter() - started:.1f} s)", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
