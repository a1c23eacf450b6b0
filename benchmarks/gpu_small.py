"""Every op on small shapes on the GPU, for compute-sanitizer: `python -m benchmarks.gpu_small`.

Ragged sizes, all dtypes, both sweeps of info_nce where the GPU has both, queues that wrap round.
The results are held against the CPU's.
"""

from __future__ import annotations

import os

import torch

from densecl_ext import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unit(*shape: int) -> torch.Tensor:
    """Random rows of unit length."""
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


def check(name: str, ours: torch.Tensor, truth: torch.Tensor, tolerance: float) -> None:
    """Raise unless both are close, in units of the largest element."""
    off = (ours.cpu().double() - truth.double()).abs().max() / truth.double().abs().max()
    if not off <= tolerance:
        raise AssertionError(f"{name}: off by {float(off):.2e}, allowed {tolerance:.0e}")


def info_nce() -> None:
    """Both sweeps, with and without gradient, part of the queue filled."""
    kernels = ["portable"]
    if torch.cuda.get_device_capability() == (9, 0):
        kernels.append("sm90")
    for kernel in kernels:
        os.environ["DENSECL_CUDA_KERNEL"] = kernel
        for dtype in DTYPES if kernel == "portable" else DTYPES[1:]:
            for rows, length, features in ((3, 70, 16), (130, 400, 128), (49, 257, 256)):
                query, positive, queue = (
                    unit(rows, features),
                    unit(rows, features),
                    unit(length, features),
                )
                queue = queue.to(dtype)
                filled = torch.tensor(length - 5)
                results = []
                for device in ("cpu", "cuda"):
                    given = query.to(device).requires_grad_()
                    loss = ops.info_nce(
                        given, positive.to(device), queue.to(device), filled=filled.to(device)
                    )
                    loss.backward()
                    results.append((loss.detach(), given.grad))
                name = f"info_nce {kernel} {dtype} {rows} {length} {features}"
                check(name, results[1][0], results[0][0], 1e-3)
                check(name, results[1][1], results[0][1].cpu(), 1e-2)
    os.environ.pop("DENSECL_CUDA_KERNEL", None)


def dense_match() -> None:
    """One tile and several, blocks with all features and slices of them, both ways of a layout."""
    for dtype in DTYPES:
        for images, channels, queries, keys in ((3, 40, 49, 49), (1, 333, 70, 120), (2, 65, 1, 9)):
            for layout in (torch.contiguous_format, torch.channels_last):
                query = torch.randn(images, channels, queries, 1).to(dtype)
                key = torch.randn(images, channels, keys, 1).to(dtype)
                query, key = (x.contiguous(memory_format=layout) for x in (query, key))
                unit_query, unit_key = (
                    torch.nn.functional.normalize(x.double().flatten(2), dim=1)
                    for x in (query, key)
                )
                similarity = unit_query.transpose(1, 2) @ unit_key  # (N, Sq, Sk)
                match = ops.dense_match(query.cuda(), key.cuda()).cpu()
                chosen = similarity.gather(2, match.unsqueeze(2)).squeeze(2)
                name = f"dense_match {dtype} {images} {channels} {queries} {keys}"
                check(name, chosen, similarity.amax(dim=2), 1e-5)
                mutual = ops.dense_match(query.cuda(), key.cuda(), mutual=True).cpu()
                if not torch.equal(mutual[mutual >= 0], match[mutual >= 0]):
                    raise AssertionError(f"{name}: mutual matches are not among the matches")


def others() -> None:
    """The ops that move or average."""
    for dtype in DTYPES:
        queue, keys = torch.zeros(37, 24, dtype=dtype), torch.randn(20, 24)
        target, source = torch.randn(1003), torch.randn(1003).to(dtype)
        results = []
        for device in ("cpu", "cuda"):
            rows, pointer = queue.to(device), torch.tensor([30], device=device)
            ops.enqueue_(rows, pointer, keys.to(device))
            moved = target.clone().to(device)
            ops.ema_update_([moved], [source.to(device)], 0.9)
            results.append((rows, moved, pointer))
        check(f"enqueue_ {dtype}", results[1][0], results[0][0], 1e-2)
        check(f"ema_update_ {dtype}", results[1][1], results[0][1], 1e-6)
        assert int(results[1][2]) == int(results[0][2]) == 13


def main() -> None:
    """Run them all."""
    torch.manual_seed(0)
    if not torch.cuda.is_available():
        raise SystemExit("gpu_small: no GPU")
    info_nce()
    dense_match()
    others()
    torch.cuda.synchronize()
    print("every op agrees with the CPU on small shapes")


if __name__ == "__main__":
    main()
