"""Which recipe suits a set of images, from what a survey found."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any, NamedTuple

from densecl_ext.data.survey import Survey
from densecl_ext.train.config import auto_queue_length

# Up to this many images the recipe for small sets is meant.
_SMALL = 50_000


class Suggestion(NamedTuple):
    """A recipe with options, and why.

    Attributes:
        recipe: A recipe's name, or "none" for the defaults.
        options: Option name -> value.
        why: One sentence each.
    """

    recipe: str
    options: dict[str, Any]
    why: list[str]

    def command(self, data: list[str]) -> str:
        """The command line that uses it."""
        words = ["densecl pretrain --data", *data]
        words += [] if self.recipe == "none" else ["--recipe", self.recipe]
        for name, value in self.options.items():
            words.append(f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}"))
        return " ".join(words)


def suggest(found: Survey, rates: dict[str, Any], *, gpu: bool) -> Suggestion:
    """Choose recipe, batch, queue, image size and how images are read.

    Args:
        found: What the images are like.
        rates: Loader -> images/s, or a text where it was not measured.
        gpu: Whether there is a GPU to train on.
    """
    options: dict[str, Any] = {}
    why: list[str] = []
    report = found.report()
    facts = list(found.facts.values())
    images = len(found.source)
    if found.masks and len(found.masks) > 0.05 * len(found.looked_at):
        folders = {str(found.source[index].parent) for index in found.masks[:1000]}
        why.append(
            f"{len(found.masks)} of {len(found.looked_at)} images look like label masks "
            f"({', '.join(sorted(folders)[:3])}): name the images' folder alone"
        )
    # What RGB cannot hold: arrays, and TIFF files of other bands than gray or RGB.
    bands = [
        one.channels
        for one in facts
        if one.kind in ("NPY", "NPZ") or one.kind == "TIFF" and one.channels not in (1, 3)
    ]
    if bands and 2 * len(bands) > len(facts):
        options["channels"] = Counter(bands).most_common(1)[0][0]
        why.append(f"most images have {options['channels']} channels that RGB cannot hold")
    deep = [one for one in facts if one.depth != "8"]
    if deep:
        low = min(one.values[0] for one in deep)
        high = max(one.values[1] for one in deep)
        floats = any(one.depth.startswith("float") for one in deep)
        if floats or high < 32768 or "channels" in options:
            options["value_range"] = "auto"
            why.append(
                f"values of more than 8 bits run from {low:g} to {high:g}: a range has to be "
                "stated or measured"
            )
    if found.video:
        options["every_nth"] = 5
        images = -(-images // 5)
        why.append(
            f"images correlate with the next one by name ({found.neighbours:.2f}, far apart "
            f"{found.strangers:.2f}), as frames of a video do: near-duplicates become each other's "
            "negatives"
        )
    short = report["short_side"]["median"]
    small = images <= _SMALL
    largest = 128 if small else 224
    options["image_size"] = max(64, min(largest, short // 32 * 32))
    why.append(
        f"the median short side is {short} px; views of {options['image_size']} px "
        + ("enlarge them little" if short < 2 * options["image_size"] else "are smaller")
    )
    batch = 8
    while batch < (64 if small else 256) and images // (2 * batch) >= 16:
        batch *= 2
    options["batch_size"] = batch
    options["queue_length"] = auto_queue_length(images)
    why.append(
        f"{images:,} images: {images // batch} steps an epoch with batch {batch}; a queue of "
        f"{options['queue_length']:,} holds at most half of them"
    )
    jpeg = report["formats"].get("JPEG", 0)
    if 2 * jpeg > len(facts) and short >= 4 * options["image_size"] and "channels" not in options:
        options["reduced_jpeg"] = True
        why.append(
            "most images are JPEG files much larger than the views: decoding them at a fraction of "
            "their size saves most of the time"
        )
    measured = {name: rate for name, rate in rates.items() if isinstance(rate, (int, float))}
    fits = _memory_needed(found, options["image_size"]) < 0.25 * _memory()
    able = {name: rate for name, rate in measured.items() if name != "memory" or fits}
    if "channels" not in options and "reduced_jpeg" not in options and able:
        options["loader"] = max(able, key=lambda name: able[name])
        why.append(f"{options['loader']} gave {able[options['loader']]:g} images/s here")
    if report["skipped"]["count"]:
        as_rgb = " as RGB" if "channels" in options else ""
        why.append(f"{report['skipped']['count']} images would be skipped{as_rgb}")
    if report["duplicates"]["images"]:
        why.append(
            f"{report['duplicates']['images']} images are exact copies: each is a negative of its "
            "own copy; remove them"
        )
    if not gpu and not small:
        why.append("there is no GPU here, and this many images want one")
    return Suggestion("small_data" if small else "none", options, why)


def _memory_needed(found: Survey, size: int) -> float:
    """Bytes of all images as the memory loader keeps them."""
    kept = []
    for one in found.facts.values():
        shrink = min(1.0, 1.25 * size / max(1, min(one.size)))
        kept.append(3 * one.size[0] * one.size[1] * shrink**2)
    return sum(kept) / max(1, len(kept)) * len(found.source)


def _memory() -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
