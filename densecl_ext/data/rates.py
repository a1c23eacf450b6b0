"""How fast each loader is on some images, here."""

from __future__ import annotations

import time
import warnings
from typing import Any

from densecl_ext.data.images import Reading, reason_of
from densecl_ext.data.loader import BACKENDS, build_loader
from densecl_ext.data.source import Chosen, ImageSource

# Images that are taken at most; the memory loader decodes all of them first.
_MOST = 512


def loader_rates(
    source: ImageSource,
    reading: Reading,
    *,
    size: int,
    workers: int | None = None,
    seconds: float = 4.0,
    device: str = "cpu",
) -> dict[str, float | str]:
    """Images a second, two views of each, once the loader runs.

    Args:
        source: The images, of which some hundred are taken.
        reading: How they are read.
        size: Side of the views in pixels.
        workers: Processes or threads; None takes the loaders' choice.
        seconds: For each loader, from its first batch on.
        device: Where the views end up.

    Returns:
        Loader -> images/s, or why it was not measured.
    """
    count = len(source)
    step = max(1, count // _MOST)
    chosen = Chosen(source, range(0, count, step)[:_MOST])
    rates: dict[str, float | str] = {}
    for backend in BACKENDS:
        if backend == "auto" or (reading.channels is not None and backend != "torchvision"):
            continue  # the others read RGB alone
        try:
            rates[backend] = _rate(chosen, reading, backend, size, workers, seconds, device)
        except Exception as error:
            rates[backend] = reason_of(error)
    return rates


def _rate(
    source: ImageSource,
    reading: Reading,
    backend: str,
    size: int,
    workers: int | None,
    seconds: float,
    device: str,
) -> float:
    loader: Any = build_loader(
        source,
        batch_size=min(32, len(source)),
        size=size,
        backend=backend,
        device=device,
        workers=workers,
        max_pixels=reading.max_pixels,
        value_range=reading.value_range,
        channels=reading.channels,
    )
    seen, began = 0, 0.0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for epoch in range(1000):
                loader.set_epoch(epoch)
                for batch in loader:
                    if began:
                        seen += len(batch.index)
                    else:
                        began = time.perf_counter()
                    if time.perf_counter() - began > seconds:
                        return round(seen / (time.perf_counter() - began), 1)
    finally:
        loader.close()
    raise AssertionError
