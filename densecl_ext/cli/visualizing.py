"""`densecl visualize`: loss curves, and matched positions of two views."""

from __future__ import annotations

import argparse
from typing import Any

from densecl_ext.cli.parser import Parser, add_command


def add_visualize(commands: Any) -> argparse.ArgumentParser:
    """Adds the command with its two kinds of picture."""
    command = add_command(
        commands,
        "visualize",
        "draw a run's loss curves, or the positions that its features match",
        "densecl visualize losses runs/photos --output losses.png\n"
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
    for kind in (losses, matches):
        kind.add_argument("--output", required=True, metavar="FILE", help="PNG to write")
        kind.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
    return command


def _losses(options: argparse.Namespace) -> int:
    from densecl_ext.visualize import plot_losses

    print(f"wrote {plot_losses(options.run_folder, options.output)}")
    return 0


def _matches(options: argparse.Namespace) -> int:
    from densecl_ext.checkpoints import load_backbone
    from densecl_ext.checkpoints.exchange import resolve_checkpoint
    from densecl_ext.visualize import plot_matches

    backbone = load_backbone(resolve_checkpoint(options.weights))
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
