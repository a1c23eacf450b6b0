"""`densecl visualize`: loss curves, matches, features as colours, and a run's report."""

from __future__ import annotations

import argparse
from typing import Any

from densecl_ext.cli.parser import Parser, add_command


def add_visualize(commands: Any) -> argparse.ArgumentParser:
    """Adds the command with its kinds of picture."""
    command = add_command(
        commands,
        "visualize",
        "draw a run's curves, matches and features, or all of it as one HTML file",
        "densecl visualize report runs/photos --output report.html\n"
        "  densecl visualize matches runs/photos photos/a.jpg photos/b.jpg --output matches.png",
    )
    kinds = command.add_subparsers(dest="kind", metavar="KIND", required=True, parser_class=Parser)
    losses = add_command(
        kinds,
        "losses",
        "total, global and dense loss over the steps",
        "densecl visualize losses runs/photos --output losses.png",
    )
    losses.add_argument("run_folder", metavar="RUN", help="run folder, or a metrics.csv")
    losses.set_defaults(run=_losses)
    matches = add_command(
        kinds,
        "matches",
        "mutual nearest neighbours between two views of each image",
        "densecl visualize matches runs/photos photos/a.jpg --output matches.png",
    )
    matches.add_argument("weights", help="run folder, checkpoint, or exported backbone")
    matches.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    matches.add_argument(
        "--size", type=int, default=224, metavar="N", help="side of a view (default: 224)"
    )
    matches.add_argument(
        "--threshold",
        type=float,
        default=0.9,
        metavar="X",
        help="least cosine similarity of a match (default: 0.9)",
    )
    matches.set_defaults(run=_matches)
    features = add_command(
        kinds,
        "features",
        "features as colours: three principal components over all images",
        "densecl visualize features runs/photos photos/*.jpg --output features.png",
    )
    features.add_argument("weights", help="run folder, checkpoint, or exported backbone")
    features.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    features.add_argument(
        "--size", type=int, default=320, metavar="N", help="side of an image (default: 320)"
    )
    features.set_defaults(run=_features)
    pairs = add_command(
        kinds,
        "pairs",
        "mutual nearest neighbours between the first image and each other one",
        "densecl visualize pairs runs/photos a.jpg b.jpg c.jpg --output pairs.png",
    )
    pairs.add_argument("weights", help="run folder, checkpoint, or exported backbone")
    pairs.add_argument("images", nargs="+", metavar="IMAGE", help="two image files or more")
    pairs.add_argument(
        "--size", type=int, default=224, metavar="N", help="side of an image (default: 224)"
    )
    pairs.add_argument(
        "--top", type=int, default=30, metavar="N", help="lines a pair (default: 30)"
    )
    pairs.set_defaults(run=_pairs)
    report = add_command(
        kinds,
        "report",
        "a run as one HTML file that opens without a network",
        "densecl visualize report runs/photos --images photos/a.jpg photos/b.jpg "
        "--output report.html",
    )
    report.add_argument("run_folder", metavar="RUN", help="run folder")
    report.add_argument(
        "--images", nargs="+", default=[], metavar="IMAGE", help="files for pictures of features"
    )
    report.set_defaults(run=_report)
    for kind in (losses, matches, features, pairs, report):
        written = "HTML" if kind is report else "PNG"
        kind.add_argument("--output", required=True, metavar="FILE", help=f"{written} to write")
        kind.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
    return command


def _losses(options: argparse.Namespace) -> int:
    from densecl_ext.visualize import plot_losses

    print(f"wrote {plot_losses(options.run_folder, options.output)}")
    return 0


def _matches(options: argparse.Namespace) -> int:
    from densecl_ext.visualize import plot_matches

    backbone = _backbone(options.weights)
    found = plot_matches(
        backbone,
        options.images,
        options.output,
        size=options.size,
        threshold=options.threshold,
    )
    for image, matches in zip(options.images, found, strict=True):
        print(f"{image}: {int(matches.right.sum())} of {len(matches)} matches right")
    print(f"wrote {options.output}")
    return 0


def _features(options: argparse.Namespace) -> int:
    from densecl_ext.visualize import plot_features

    explained = plot_features(
        _backbone(options.weights), options.images, options.output, size=options.size
    )
    print(f"three components explain {100 * explained:.0f} % of the features' variance")
    print(f"wrote {options.output}")
    return 0


def _pairs(options: argparse.Namespace) -> int:
    from densecl_ext.visualize import plot_pair_matches

    backbone = _backbone(options.weights)
    plot_pair_matches(backbone, options.images, options.output, size=options.size, top=options.top)
    print(f"wrote {options.output}")
    return 0


def _report(options: argparse.Namespace) -> int:
    from densecl_ext.visualize import write_report

    backbone = _backbone(options.run_folder) if options.images else None
    path = write_report(
        options.run_folder, options.output, backbone=backbone, images=options.images
    )
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0


def _backbone(weights: str) -> Any:
    from densecl_ext.checkpoints import load_backbone
    from densecl_ext.checkpoints.exchange import resolve_checkpoint

    return load_backbone(resolve_checkpoint(weights))
