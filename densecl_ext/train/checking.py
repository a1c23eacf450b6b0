"""A look at images before a run: what they are, how fast they load, which recipe suits them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from densecl_ext.data.images import Reading
from densecl_ext.data.loader import available_cores
from densecl_ext.data.measuring import measure_range
from densecl_ext.data.opening import open_images
from densecl_ext.data.rates import loader_rates
from densecl_ext.data.survey import Survey, survey
from densecl_ext.train.suggesting import suggest

SHOWN = 16


def check_images(
    data: list[str],
    *,
    channels: int | None = None,
    seconds: float = 30.0,
    image_size: int = 224,
    rates: bool = True,
    sheet: str | Path | None = None,
) -> dict[str, Any]:
    """Look at images, time the loaders on them, suggest a recipe.

    Args:
        data: What `pretrain` takes as its data.
        channels: Read images of that many channels; None reads RGB.
        seconds: After which no further image is looked at.
        image_size: Side of the views whose loading is timed.
        rates: Time the loaders, some seconds each.
        sheet: Where to write a picture of 16 images with their views; None writes none.

    Returns:
        Plain values: what :meth:`densecl_ext.data.survey.Survey.report` gives, "loaders",
        "suggestion" (recipe, options, command, why), and, where there is one, "measured_range" and
        "sheet".

    Raises:
        ValueError: There are no images.
        OSError: The picture cannot be written.
    """
    source = open_images(data, arrays=True)
    found = survey(source, Reading(channels=channels), seconds=seconds, threads=available_cores())
    report = found.report()
    gpu = torch.cuda.is_available()
    # What follows reads the images as the suggestion would.
    suggestion = suggest(found, {}, gpu=gpu)
    channels = suggestion.options.get("channels", channels)
    readable = [
        index
        for index, facts in found.facts.items()
        if index not in found.skipped or facts.channels == channels
    ]
    reading = Reading(channels=channels)
    if readable and "value_range" in suggestion.options:
        reading = dataclasses.replace(reading, value_range=measure_range(source, reading))
        report["measured_range"] = reading.value_range
    if rates and readable:
        measured = loader_rates(source, reading, size=image_size, device="cuda" if gpu else "cpu")
        report["loaders"] = {"image_size": image_size, "images_per_second": measured}
        suggestion = suggest(found, measured, gpu=gpu)
    if sheet is not None and readable:
        size = int(suggestion.options["image_size"])
        report["sheet"] = str(_write_sheet(found, reading, readable, size, Path(sheet)))
    return report | {
        "suggestion": {
            "recipe": suggestion.recipe,
            "options": suggestion.options,
            "command": suggestion.command(data),
            "why": suggestion.why,
        }
    }


def _write_sheet(
    found: Survey, reading: Reading, readable: list[int], size: int, path: Path
) -> Path:
    from densecl_ext.visualize.contact_sheet import contact_sheet

    spread = np.linspace(0, len(readable) - 1, min(SHOWN, len(readable))).round().astype(int)
    numbers = [readable[place] for place in spread]
    picture = contact_sheet(found.source, numbers, size=size, reading=reading)
    picture.save(path)
    return path
