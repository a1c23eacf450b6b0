"""Two augmented 224 px views of photographs: images a second of one core, of several loaders.

Each runs in a process of its own, without worker processes and with one thread for each pool, over
the same images with MoCo v2's augmentation. Counted is the processor time of the process, all its
threads together: what one core would do alone, whatever else the machine does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from benchmarks.timing import Settings

BATCH, SIZE = 32, 224
SECONDS = 6.0  # of processor time


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


def rate(name: str, photos: str, settings: Settings) -> dict[str, Any]:
    """A row of results.json: images per second of processor time, once the loader runs."""
    import torch

    torch.set_num_threads(1)
    batches = RATES[name](photos)
    for _ in range(3):
        next(batches)
    seen, began = 0, time.process_time()
    while (taken := time.process_time() - began) < (0.5 if settings.quick else SECONDS):
        seen += next(batches)
    row = {"row": f"views-{name}", "title": f"two {SIZE} px views, {name}, batches of {BATCH}"}
    return row | {"images_per_second": seen / taken}


RATES: dict[str, Callable[[str], Iterator[int]]] = {
    "torchvision": partial(ours, backend="torchvision", workers=0),
    "torchvision, reduced JPEG": partial(ours, backend="torchvision", workers=0, reduced_jpeg=True),
    "DALI": partial(ours, backend="dali", workers=1),
    "memory": partial(ours, backend="memory", workers=1),
    "timm": of_timm,
    "lightly": of_lightly,
}
