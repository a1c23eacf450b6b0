"""Two augmented 224 px views of every photograph of a folder: images per second."""

from __future__ import annotations

import importlib.util
import os
import statistics
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

BATCH, SIZE = 32, 224
PACKAGES = {"dali": "nvidia.dali", "torchvision": "torchvision"}


@pytest.mark.parametrize("backend", PACKAGES)
def test_two_views(backend: str, device: torch.device, benchmark: Any, quick: bool) -> None:
    photos = os.environ.get("DENSECL_BENCH_PHOTOS", "")
    if not photos:
        pytest.skip("DENSECL_BENCH_PHOTOS names no folder of photographs")
    if backend == "torchvision" and device.type != "cpu":
        pytest.skip("torchvision augments on the CPU")
    if not installed(PACKAGES[backend]):
        pytest.skip(f"{PACKAGES[backend]} is not installed")
    from densecl_ext.data import build_loader

    loader = build_loader(photos, batch_size=BATCH, size=SIZE, backend=backend, device=device)
    batches = min(len(loader) - 3, 4 if quick else 16)
    if batches < 1:
        pytest.skip(f"{photos} holds too few photographs for {BATCH} a batch")
    samples = []
    try:
        for epoch in range(1 if quick else 3):
            loader.set_epoch(epoch)
            stream = iter(loader)
            for _ in range(3):  # worker processes start, queues of finished batches empty
                next(stream)
            samples.append(rate_of(stream, batches, seconds=6.0))
            del stream
    finally:
        loader.close()
    benchmark.group = "two views"
    benchmark.pedantic(lambda: None)
    benchmark.extra_info.update(
        row=f"views-{backend}",
        title=f"two {SIZE} px views, {backend}, batches of {BATCH}",
        device=device.type,
        images_per_second=statistics.median(samples),
        samples=samples,
        images=loader.num_images,
    )


def rate_of(stream: Iterator[Any], batches: int, seconds: float) -> float:
    """Images per second over so many batches, or as many as start within so many seconds."""
    start, taken = time.perf_counter(), 0
    while taken < batches and time.perf_counter() < start + seconds:
        batch = next(stream)
        if batch.view_q.device.type == "cuda":
            torch.cuda.synchronize(batch.view_q.device)
        taken += 1
    return taken * BATCH / (time.perf_counter() - start)


def installed(package: str) -> bool:
    """Whether it can be imported, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False
