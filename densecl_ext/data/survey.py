"""What a set of images is like, before anything is trained on it."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from densecl_ext.data.bands import read_bands, scaled
from densecl_ext.data.images import Encoded, Reading, decode, printable, reason_of
from densecl_ext.data.source import ImageSource

# A standard deviation of gray levels (of 255) below which there is next to nothing in an image.
_EMPTY = 3.0
# Side of the thumbnails that tell whether neighbours show nearly the same.
_THUMB = 16
_PAIRS = 64
_EXAMPLES = 5
# Most different values of a label mask, in one channel.
_LABELS = 32
_BLOCK = 1 << 20

_ENDING_OF = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
    "NPY": (".npy",),
    "NPZ": (".npz",),
}


class Facts(NamedTuple):
    """One image.

    Attributes:
        kind: The format, by the content.
        size: Width and height, upright.
        channels: As stored; a palette counts as three.
        depth: Bits of a value, "8", "16", "32", with "float" before it for floating point.
        values: Lowest and highest.
        orientation: EXIF's.
        frames: Of an animation or a multi-page file that is read as its first.
        spread: Standard deviation of the gray levels, 0 to 255.
        levels: How many different values, of 8-bit images.
        skipped: Why the loaders would not take it, "" where they do.
        thumb: float32 (16, 16), gray, for comparisons; None where it does not read.
    """

    kind: str
    size: tuple[int, int]
    channels: int
    depth: str
    values: tuple[float, float]
    orientation: int
    frames: int
    spread: float
    levels: int
    skipped: str
    thumb: np.ndarray | None


@dataclass
class Survey:
    """What was found; :meth:`report` makes plain values of it.

    Attributes:
        source: The images.
        looked_at: Numbers of the images that were decoded, in the order of their names.
        facts: Of those that could be told of, by number.
        skipped: Why the others would be skipped, by number.
        duplicates: Groups of images whose content is the same, byte for byte.
        compared: How many images' content was compared for that.
        neighbours: Median correlation of an image with the next one by name.
        strangers: The same of images far apart.
        seconds: How long it took.
    """

    source: ImageSource
    looked_at: list[int] = field(default_factory=list)
    facts: dict[int, Facts] = field(default_factory=dict)
    skipped: dict[int, str] = field(default_factory=dict)
    duplicates: list[list[int]] = field(default_factory=list)
    compared: int = 0
    neighbours: float = 0.0
    strangers: float = 0.0
    seconds: float = 0.0

    @property
    def empty(self) -> list[int]:
        """Numbers of the images with next to nothing in them."""
        return [index for index, facts in self.facts.items() if facts.spread < _EMPTY]

    @property
    def masks(self) -> list[int]:
        """Numbers of the images that look like label masks: few values, in one channel."""
        return [
            index
            for index, facts in self.facts.items()
            if facts.channels == 1 and 0 < facts.levels <= _LABELS
        ]

    @property
    def video(self) -> bool:
        """Whether images are nearly their neighbours, as frames of a video are."""
        return self.neighbours > 0.85 and 1 - self.neighbours < 0.5 * (1 - self.strangers)

    def report(self) -> dict[str, Any]:
        """Everything as plain values, ready for JSON."""
        facts = list(self.facts.values())
        names = self._names
        sizes = np.array([one.size for one in facts] or [(0, 0)])
        ranges: dict[str, tuple[float, float]] = {}
        for one in facts:
            low, high = ranges.get(one.depth, one.values)
            ranges[one.depth] = min(low, one.values[0]), max(high, one.values[1])
        misnamed = [
            index
            for index, one in self.facts.items()
            if (ending := self.source[index].suffix.lower())
            and ending in {e for endings in _ENDING_OF.values() for e in endings}
            and ending not in _ENDING_OF[one.kind]
        ]
        return {
            "data": list(self.source.roots),
            "images": len(self.source),
            "bytes": int(self.source.sizes().clip(0).sum()),
            "looked_at": len(self.looked_at),
            "seconds": round(self.seconds, 1),
            "left_out": {kind[1]: count for kind, count in self.source.left_out.items()},
            "other_endings": dict(self.source.endings.most_common()),
            "formats": _counts(one.kind for one in facts),
            "misnamed": {"count": len(misnamed), "examples": names(misnamed)},
            "channels": _counts(one.channels for one in facts),
            "bits": _counts(one.depth for one in facts),
            "values": {depth: list(ranges[depth]) for depth in sorted(ranges)},
            "orientation": _counts(one.orientation for one in facts),
            "animated": sum(one.frames > 1 for one in facts),
            "width": _spread(sizes[:, 0]),
            "height": _spread(sizes[:, 1]),
            "short_side": _spread(sizes.min(axis=1)),
            "skipped": {
                "count": len(self.skipped),
                "why": _counts(self.skipped.values()),
                "examples": {
                    printable(self.source[index]): why
                    for index, why in list(self.skipped.items())[:_EXAMPLES]
                },
            },
            "duplicates": {
                "groups": len(self.duplicates),
                "images": sum(len(group) - 1 for group in self.duplicates),
                "compared": self.compared,
                "examples": [names(group) for group in self.duplicates[:_EXAMPLES]],
            },
            "near_empty": {"count": len(self.empty), "examples": names(self.empty)},
            "like_masks": {"count": len(self.masks), "examples": names(self.masks)},
            "neighbours": {
                "correlation": round(self.neighbours, 3),
                "far_apart": round(self.strangers, 3),
                "like_video": self.video,
            },
        }

    def _names(self, numbers: list[int]) -> list[str]:
        return [printable(self.source[number]) for number in numbers[:_EXAMPLES]]


def survey(
    source: ImageSource, reading: Reading, *, seconds: float = 30.0, threads: int = 1
) -> Survey:
    """Look at the images, all of them or as many as the time allows, drawn at random.

    Args:
        source: The images.
        reading: How the loaders would read them.
        seconds: After which no further image is looked at. Comparing the content of images of one
            size takes up to a third of it more.
        threads: Threads that decode.

    Returns:
        What was found.
    """
    began = time.monotonic()
    found = Survey(source)
    order = np.random.default_rng(0).permutation(len(source)).tolist()
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(order), 64):
            block = order[start : start + 64]
            for index, facts in zip(
                block, pool.map(lambda i: look(source, i, reading), block), strict=True
            ):
                found.looked_at.append(index)
                if isinstance(facts, str):
                    found.skipped[index] = facts
                else:
                    found.facts[index] = facts
                    if facts.skipped:
                        found.skipped[index] = facts.skipped
            if time.monotonic() - began > seconds:
                break
        _compare_neighbours(found, reading, pool)
    found.looked_at.sort()
    for part in (found.facts, found.skipped):
        numbers = sorted(part)
        ordered = [part[number] for number in numbers]
        part.clear()
        part.update(zip(numbers, ordered, strict=True))  # type: ignore[arg-type]
    _find_duplicates(found, time.monotonic() + seconds / 3)
    found.seconds = time.monotonic() - began
    return found


def look(source: ImageSource, index: int, reading: Reading) -> Facts | str:
    """What there is to tell of an image; a reason where nothing is."""
    try:
        file = source.encoded(index, reading)
        skipped, frames, gray = "", 1, None
        if file.kind not in ("NPY", "NPZ"):
            frames = _frames(file)
        if reading.channels is None:
            try:
                image = decode(file, reading).image
                gray = np.asarray(image.convert("L"), dtype=np.float32)
            except Exception as error:
                skipped = reason_of(error)
        values = read_bands(file, max_pixels=reading.max_pixels)
    except Exception as error:
        return reason_of(error)
    height, width, channels = values.shape
    if reading.channels is not None and channels != reading.channels:
        skipped = f"ValueError: {channels} channels, expected {reading.channels}"
    finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    if gray is None or values.dtype.itemsize > 1:
        own = (low, high) if high > low else (low, low + 1)
        gray = 255 * scaled(values, own).mean(axis=2)
    kind = {"f": "float", "i": "signed "}.get(values.dtype.kind, "")
    return Facts(
        kind=file.kind,
        size=(width, height),
        channels=channels,
        depth=f"{kind}{8 * values.dtype.itemsize}",
        values=(low, high),
        orientation=file.orientation,
        frames=frames if channels <= 4 else 1,
        spread=float(gray.std()),
        levels=int(np.count_nonzero(np.bincount(values.ravel())))
        if values.dtype == np.uint8
        else 0,
        skipped=skipped,
        thumb=_thumb(gray),
    )


def _frames(file: Encoded) -> int:
    if file.kind not in ("GIF", "WEBP", "TIFF", "PNG"):
        return 1
    try:
        from densecl_ext.data.images import _open

        return int(getattr(_open(file), "n_frames", 1))
    except Exception:
        return 1


def _thumb(gray: np.ndarray) -> np.ndarray:
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(gray, dtype=np.float32))
    return np.asarray(image.resize((_THUMB, _THUMB), Image.Resampling.BOX), dtype=np.float32)


def _compare_neighbours(found: Survey, reading: Reading, pool: ThreadPoolExecutor) -> None:
    count = len(found.source)
    firsts = [index for index in found.facts if index + 1 < count][:_PAIRS]
    missing = [index + 1 for index in firsts if index + 1 not in found.facts]
    more = dict(
        zip(missing, pool.map(lambda i: look(found.source, i, reading), missing), strict=True)
    )

    def thumb(index: int) -> np.ndarray | None:
        facts = found.facts.get(index) or more.get(index)
        return facts.thumb if isinstance(facts, Facts) else None

    near = [_correlation(thumb(index), thumb(index + 1)) for index in firsts]
    far = [
        _correlation(thumb(one), thumb(other))
        for one, other in zip(firsts, firsts[1:] + firsts[:1], strict=True)
        if abs(one - other) > count // 8
    ]
    found.neighbours, found.strangers = _median(near), _median(far)


def _correlation(one: np.ndarray | None, other: np.ndarray | None) -> float:
    if one is None or other is None:
        return float("nan")
    one, other = one - one.mean(), other - other.mean()
    scale = float(np.sqrt((one**2).sum() * (other**2).sum()))
    return float((one * other).sum()) / scale if scale > 0 else float("nan")


def _median(values: list[float]) -> float:
    known = [value for value in values if value == value]
    return float(np.median(known)) if known else 0.0


def _find_duplicates(found: Survey, until: float) -> None:
    """Compare the content of images of one size; those of a size of their own have no double."""
    sizes = found.source.sizes()
    order = np.argsort(sizes, kind="stable")
    same = np.diff(sizes[order]) == 0
    alike = np.zeros(len(sizes), dtype=bool)
    alike[order[1:][same]] = alike[order[:-1][same]] = True
    found.compared = int((~alike).sum())
    digests: dict[bytes, list[int]] = {}
    for index in order[alike[order]].tolist():
        if time.monotonic() > until:
            break
        found.compared += 1
        try:
            digest = _digest(found.source, index)
        except (OSError, ValueError):
            continue
        digests.setdefault(digest, []).append(index)
    found.duplicates = sorted(sorted(group) for group in digests.values() if len(group) > 1)


def _digest(source: ImageSource, index: int) -> bytes:
    path = source[index]
    if Path(path).is_file():
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
        return digest.digest()
    return hashlib.sha256(source.encoded(index).data).digest()


def _counts(values: Iterator[Any] | Any) -> dict[str, int]:
    return {str(value): count for value, count in Counter(values).most_common()}


def _spread(values: np.ndarray) -> dict[str, int]:
    return {
        "lowest": int(values.min()),
        "median": int(np.median(values)),
        "highest": int(values.max()),
    }
