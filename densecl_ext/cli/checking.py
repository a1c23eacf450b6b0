"""`densecl check`."""

from __future__ import annotations

import json as json_format
import shlex
from typing import Any

import click

from densecl_ext.cli.command import Word, command


@command(
    "check",
    "Look at images before training on them: formats, sizes, channels, values, what would be "
    "skipped and why, duplicates, each loader's speed, and the recipe that suits them.\n\nTakes "
    "what `densecl pretrain --data` takes. Nothing is changed.",
    "densecl check photos --sheet views.png",
    click.Argument(["data"], nargs=-1, required=True, type=Word("DIR")),
    click.Option(["--json"], is_flag=True, help="as JSON"),
    click.Option(
        ["--sheet"],
        metavar="FILE",
        type=Word("FILE"),
        help="write a picture of 16 images with the two augmented views that the network gets",
    ),
    click.Option(
        ["--seconds"],
        type=click.FloatRange(min=1),
        default=30.0,
        help="after which no further image is looked at (default: 30)",
    ),
    click.Option(
        ["--image-size"],
        type=click.IntRange(min=16),
        default=224,
        help="side of the views whose loading is timed (default: 224)",
    ),
    click.Option(
        ["--channels"],
        type=click.IntRange(min=1),
        help="read images of that many channels, as `densecl pretrain --channels` does",
    ),
    click.Option(["--no-loaders"], is_flag=True, help="do not time the loaders"),
)
def check(
    data: tuple[str, ...],
    json: bool,
    sheet: str | None,
    seconds: float,
    image_size: int,
    channels: int | None,
    no_loaders: bool,
) -> None:
    """Looks, and tells."""
    from densecl_ext.train.checking import check_images

    report = check_images(
        list(data),
        channels=channels,
        seconds=seconds,
        image_size=image_size,
        rates=not no_loaders,
        sheet=sheet,
    )
    if json:
        print(json_format.dumps(report, indent=2))
    else:
        print(table(report))


def table(report: dict[str, Any]) -> str:
    """The report as lines for a person."""
    rows: list[tuple[str, str]] = [
        (
            "images",
            f"{report['images']:,}, {report['bytes'] / 1e6:,.1f} MB; looked at "
            f"{report['looked_at']:,} in {report['seconds']:g} s",
        ),
        ("formats", _told(report["formats"])),
        ("channels", _told(report["channels"])),
        ("bits a value", _told(report["bits"])),
        *(
            (f"values, {bits} bits", f"{low:g} to {high:g}")
            for bits, (low, high) in report["values"].items()
        ),
        *_measured(report.get("measured_range")),
        *((name.replace("_", " "), _span(report[name])) for name in ("width", "height")),
        ("short side", _span(report["short_side"])),
        ("EXIF orientation", _turned(report["orientation"])),
        ("left out", _left_out(report)),
        ("would be skipped", _count(report["skipped"]["count"])),
        *(("", f"{count} x {why}") for why, count in report["skipped"]["why"].items()),
        *(("", f"{name}: {why}") for name, why in report["skipped"]["examples"].items()),
        *_examples("exact copies", report["duplicates"]["images"], report["duplicates"]),
        *_examples("near-empty", report["near_empty"]["count"], report["near_empty"]),
        *_examples("like label masks", report["like_masks"]["count"], report["like_masks"]),
        *_examples("ending of another format", report["misnamed"]["count"], report["misnamed"]),
        ("animated, first frame is read", _count(report["animated"])),
        (
            "next by name correlates",
            f"{report['neighbours']['correlation']:.2f}, far apart "
            f"{report['neighbours']['far_apart']:.2f}"
            + (": like frames of a video" if report["neighbours"]["like_video"] else ""),
        ),
    ]
    if report.get("loaders"):
        size = report["loaders"]["image_size"]
        for name, rate in report["loaders"]["images_per_second"].items():
            told = f"{rate:,.0f} images/s" if isinstance(rate, (int, float)) else rate
            rows.append((f"loader {name}, {size} px", told))
    if report.get("sheet"):
        rows.append(("16 images, two views each", report["sheet"]))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows if value]
    lines += ["", "suggested:", f"  {report['suggestion']['command']}"]
    lines += [f"  - {reason}" for reason in report["suggestion"]["why"]]
    return "\n".join(lines)


def _measured(low_high: list[float] | None) -> list[tuple[str, str]]:
    if low_high is None:
        return []
    return [("measured range", f"{low_high[0]:g} to {low_high[1]:g} hold all but 0.2 % of them")]


def _count(count: int) -> str:
    return f"{count:,}" if count else "none"


def _told(counts: dict[str, int]) -> str:
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{name} ({count:,})" for name, count in counts.items())


def _turned(counts: dict[str, int]) -> str:
    return "upright" if set(counts) <= {"1"} else _told(counts)


def _span(spread: dict[str, int]) -> str:
    return f"{spread['lowest']} to {spread['highest']} px, median {spread['median']}"


def _left_out(report: dict[str, Any]) -> str:
    told = [f"{count:,} {kind}" for kind, count in report["left_out"].items()]
    endings = _told_all(report["other_endings"])
    return ", ".join(told) + (f" ({endings})" if endings else "") if told else "none"


def _told_all(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in list(counts.items())[:8])


def _examples(name: str, count: int, found: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [(name, _count(count))]
    for example in found["examples"]:
        several = [example] if isinstance(example, str) else example
        rows.append(("", " = ".join(shlex.quote(one) for one in several)))
    return rows
