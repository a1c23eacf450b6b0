"""Two augmented 224 px views of photographs: images a second of one core, of several loaders.

    python -m benchmarks.loaders --photos DIR [--rounds 3]

Each runs in a process of its own, without worker processes and with one thread for each pool, over
the same images with MoCo v2's augmentation. Counted is the processor time of the process, all its
threads together: what one core would do alone, whatever else the machine does. Rounds take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

BATCH, SIZE = 32, 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def ours(backend: str, **settings: Any) -> Callable[[str], Iterator[int]]:
    def batches(photos: str) -> Iterator[int]:
        from densecl_ext.data import build_loader

        workers = 0 if backend == "torchvision" else 1
        loader = build_loader(
            photos, batch_size=BATCH, size=SIZE, backend=backend, workers=workers, **settings
        )
        for epoch in range(1000):
            loader.set_epoch(epoch)
            for batch in loader:
                yield len(batch.index)

    return batches


def endless(loader: Any, views: Callable[[Any], Any]) -> Iterator[int]:
    while True:
        for batch in loader:
            yield len(views(batch))


def of_timm(photos: str) -> Iterator[int]:
    """timm's dataset, transform and loader; the transform runs twice on each decoded image."""
    import torch
    from timm.data import ImageDataset, create_loader, create_transform

    transform = create_transform(
        SIZE,
        is_training=True,
        scale=(0.2, 1.0),
        color_jitter=(0.4, 0.4, 0.4, 0.1),
        color_jitter_prob=0.8,
        grayscale_prob=0.2,
        gaussian_blur_prob=0.5,
        auto_augment=None,
        interpolation="bilinear",
        mean=MEAN,
        std=STD,
    )
    dataset = ImageDataset(photos)
    loader = create_loader(
        dataset,
        (3, SIZE, SIZE),
        BATCH,
        is_training=True,
        num_workers=0,
        persistent_workers=False,
        use_prefetcher=False,
        device=torch.device("cpu"),
    )
    # create_loader has put its own transform there.
    dataset.transform = lambda image: torch.stack([transform(image), transform(image)])
    return endless(loader, lambda batch: batch[0])


def of_lightly(photos: str) -> Iterator[int]:
    import torch
    from lightly.data import LightlyDataset
    from lightly.transforms import MoCoV2Transform

    dataset = LightlyDataset(photos, transform=MoCoV2Transform(input_size=SIZE))
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=BATCH, shuffle=True, drop_last=True, num_workers=0
    )
    return endless(loader, lambda batch: batch[0][0])


LOADERS: dict[str, Callable[[str], Iterator[int]]] = {
    "ours, torchvision": ours("torchvision"),
    "ours, torchvision, reduced JPEG": ours("torchvision", reduced_jpeg=True),
    "ours, DALI": ours("dali"),
    "ours, memory": ours("memory"),
    "timm": of_timm,
    "lightly": of_lightly,
}


def measure(name: str, photos: str, seconds: float) -> float:
    """Images per second of processor time, once the loader runs."""
    import torch

    torch.set_num_threads(1)
    batches = LOADERS[name](photos)
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
    parser.add_argument("--only", help="one loader, once: what the rounds run")
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options.only, options.photos, options.seconds)))
        return
    rates: dict[str, list[float]] = {name: [] for name in LOADERS}
    command = [sys.executable, "-m", "benchmarks.loaders", "--photos", options.photos]
    command += ["--seconds", str(options.seconds), "--only"]
    for _ in range(options.rounds):
        for name, found in rates.items():
            done = subprocess.run(
                [*command, name],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
            )
            if done.returncode == 0:
                found.append(json.loads(done.stdout.splitlines()[-1]))
            else:
                print(f"{name}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
    print("| loader | images/s of a core | rounds |\n|---|---|---|")
    for name, found in rates.items():
        if found:
            told = ", ".join(f"{rate:.1f}" for rate in found)
            print(f"| {name} | {statistics.median(found):.1f} | {told} |")


if __name__ == "__main__":
    main()
