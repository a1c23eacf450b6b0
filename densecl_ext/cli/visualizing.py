"""`densecl visualize`: loss curves, matches, features as colours, and a run's report."""

from __future__ import annotations

from typing import Any

import click

from densecl_ext.cli.command import Commands, Option, Word, command

visualize = Commands(
    "visualize",
    {
        "losses": ("visualizing:losses", "total, global and dense loss over the steps"),
        "matches": ("visualizing:matches", "mutual nearest neighbours of two views of each image"),
        "features": ("visualizing:features", "features as colours: three principal components"),
        "pairs": ("visualizing:pairs", "mutual nearest neighbours of the first image and others"),
        "report": ("visualizing:report", "a run as one HTML file that opens without a network"),
    },
    help="Draw a run's curves, matches and features, or all of it as one HTML file.",
    epilog="densecl visualize report runs/photos --output report.html\n"
    "  densecl visualize matches runs/photos photos/a.jpg photos/b.jpg --output matches.png",
)


def _output(kind: str = "PNG") -> Option:
    return Option(
        ["--output"], required=True, metavar="FILE", type=Word("FILE"), help=f"{kind} to write"
    )


def _number(name: str, default: float, help: str, metavar: str = "N") -> Option:
    text = f"{help} (default: {default})"
    return Option([name], type=type(default), default=default, metavar=metavar, help=text)


WEIGHTS = click.Argument(
    ["weights"], type=Word("DIR"), help="run folder, checkpoint, or exported backbone"
)
IMAGES = click.Argument(
    ["images"], nargs=-1, required=True, metavar="IMAGE...", type=Word("FILE"), help="image files"
)


@command(
    "losses",
    "Total, global and dense loss over the steps.",
    "densecl visualize losses runs/photos --output losses.png",
    click.Argument(
        ["run_folder"], metavar="RUN", type=Word("DIR"), help="run folder, or a metrics.csv"
    ),
    _output(),
)
def losses(run_folder: str, output: str) -> None:
    """Draws the curves of a run folder or a metrics.csv."""
    from densecl_ext.visualize import plot_losses

    print(f"wrote {plot_losses(run_folder, output)}")


@command(
    "matches",
    "Mutual nearest neighbours between two views of each image.",
    "densecl visualize matches runs/photos photos/a.jpg --output matches.png",
    WEIGHTS,
    IMAGES,
    _number("--size", 224, "side of a view"),
    _number("--threshold", 0.9, "least cosine similarity of a match", "X"),
    _output(),
)
def matches(
    weights: str, images: tuple[str, ...], size: int, threshold: float, output: str
) -> None:
    """Draws the matches."""
    from densecl_ext.visualize import plot_matches

    found = plot_matches(_backbone(weights), images, output, size=size, threshold=threshold)
    for image, drawn in zip(images, found, strict=True):
        print(f"{image}: {int(drawn.right.sum())} of {len(drawn)} matches right")
    print(f"wrote {output}")


@command(
    "features",
    "Features as colours: three principal components over all images.",
    "densecl visualize features runs/photos photos/*.jpg --output features.png",
    WEIGHTS,
    IMAGES,
    _number("--size", 320, "side of an image"),
    _output(),
)
def features(weights: str, images: tuple[str, ...], size: int, output: str) -> None:
    """Draws the components."""
    from densecl_ext.visualize import plot_features

    explained = plot_features(_backbone(weights), images, output, size=size)
    print(f"three components explain {100 * explained:.0f} % of the features' variance")
    print(f"wrote {output}")


@command(
    "pairs",
    "Mutual nearest neighbours between the first image and each other one.",
    "densecl visualize pairs runs/photos a.jpg b.jpg c.jpg --output pairs.png",
    WEIGHTS,
    IMAGES,
    _number("--size", 224, "side of an image"),
    _number("--top", 30, "lines a pair"),
    _output(),
)
def pairs(weights: str, images: tuple[str, ...], size: int, top: int, output: str) -> None:
    """Draws the pairs."""
    from densecl_ext.visualize import plot_pair_matches

    plot_pair_matches(_backbone(weights), images, output, size=size, top=top)
    print(f"wrote {output}")


@command(
    "report",
    "A run as one HTML file that opens without a network.",
    "densecl visualize report runs/photos --images photos/a.jpg photos/b.jpg --output report.html",
    click.Argument(["run_folder"], metavar="RUN", type=Word("DIR"), help="run folder"),
    Option(
        ["--images"],
        multiple=True,
        metavar="IMAGE...",
        type=Word("FILE"),
        help="files for pictures of features",
    ),
    _output("HTML"),
)
def report(run_folder: str, images: tuple[str, ...], output: str) -> None:
    """Writes the file."""
    from densecl_ext.visualize import write_report

    backbone = _backbone(run_folder) if images else None
    path = write_report(run_folder, output, backbone=backbone, images=images)
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")


def _backbone(weights: str) -> Any:
    from densecl_ext.checkpoints.exchange import load_rgb_backbone, resolve_checkpoint

    return load_rgb_backbone(resolve_checkpoint(weights), "visualize")
