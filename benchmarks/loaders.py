"""Two augmented 224 px views of photographs: images a second of one core, of several loaders.

    python -m benchmarks.loaders --photos DIR [--rounds 3]

Each runs in a process of its own, without worker processes and with one thread for each pool, over
the same images with MoCo v2's augmentation. Counted is the processor time of the process, all its
threads together: what one core would do alone, whatever else the machine does. Rounds take turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.processes import Lost, Worker

BATCH, SIZE = 32, 224
OURS: dict[str, dict[str, Any]] = {
    "ours, torchvision": {"backend": "torchvision", "workers": 0},
    "ours, torchvision, reduced JPEG": {"backend": "torchvision", "workers": 0,
                                        "reduced_jpeg": True},
    "ours, DALI": {"backend": "dali", "workers": 1},
    "ours, memory": {"backend": "memory", "workers": 1},
}  # fmt: skip


def ours(photos: str, **settings: Any) -> Iterator[int]:
    from densecl_ext.data import build_loader

    loader = build_loader(photos, batch_size=BATCH, size=SIZE, **settings)
    for epoch in range(1000):
        loader.set_epoch(epoch)
        for batch in loader:
            yield len(batch.index)


def of_timm(photos: str) -> Iterator[int]:
    """timm's dataset, transform and loader; the transform runs twice on each decoded image."""
    import torch
    from timm.data import ImageDataset, create_loader, create_transform

    transform = create_transform(
        SIZE, is_training=True, scale=(0.2, 1.0), color_jitter=(0.4, 0.4, 0.4, 0.1),
        color_jitter_prob=0.8, grayscale_prob=0.2, gaussian_blur_prob=0.5, auto_augment=None,
        interpolation="bilinear", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
    )  # fmt: skip
    dataset = ImageDataset(photos)
    loader = create_loader(
        dataset, (3, SIZE, SIZE), BATCH, is_training=True, num_workers=0,
        persistent_workers=False, use_prefetcher=False, device=torch.device("cpu"),
    )  # fmt: skip
    # create_loader has put its own transform there.
    dataset.transform = lambda image: torch.stack([transform(image), transform(image)])
    while True:
        yield from (len(views) for views, *_ in loader)


def of_lightly(photos: str) -> Iterator[int]:
    import torch
    from lightly.data import LightlyDataset
    from lightly.transforms import MoCoV2Transform

    dataset = LightlyDataset(photos, transform=MoCoV2Transform(input_size=SIZE))
    loader = torch.utils.data.DataLoader(dataset, BATCH, shuffle=True, drop_last=True)
    while True:
        yield from (len(views[0]) for views, *_ in loader)


def measure(name: str, photos: str, seconds: float) -> float:
    """Images per second of processor time, once the loader runs."""
    import torch

    torch.set_num_threads(1)
    others = {"timm": of_timm, "lightly": of_lightly}
    batches = ours(photos, **OURS[name]) if name in OURS else others[name](photos)
    for _ in range(3):
        next(batches)
    seen, began = 0, time.process_time()
    while (taken := time.process_time() - began) < seconds:
        seen += next(batches)
    return seen / taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6.0)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that follow
    rates: dict[str, list[float]] = {name: [] for name in (*OURS, "timm", "lightly")}
    for _ in range(options.rounds):
        for name, found in rates.items():
            worker = Worker()
            try:
                found.append(worker.call(600.0, measure, name, options.photos, options.seconds))
            except Lost as error:
                print(f"{name}: {error}", file=sys.stderr)
            finally:
                worker.close()
    print("| loader | images/s of a core | rounds |\n|---|---|---|")
    for name, found in rates.items():
        if found:
            told = ", ".join(f"{rate:.1f}" for rate in found)
            print(f"| {name} | {statistics.median(found):.1f} | {told} |")


if __name__ == "__main__":
    main()
