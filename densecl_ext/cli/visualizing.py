"""`densecl visualize`: loss curves, and matched positions of two views."""

from __future__ import annotations

import click

from densecl_ext.cli.command import Commands, Word, command

OUTPUT = click.Option(
    ["--output"], required=True, metavar="FILE", type=Word("FILE"), help="PNG to write"
)

visualize = Commands(
    "visualize",
    {
        "losses": (f"{__name__}:losses", "total, global and dense loss over the steps"),
        "matches": (f"{__name__}:matches", "mutual nearest neighbours between two views"),
    },
    help="Draw a run's loss curves, or the positions that its features match.",
    epilog="densecl visualize losses runs/photos --output losses.png\n"
    "  densecl visualize matches runs/photos photos/a.jpg photos/b.jpg --output matches.png",
)


@command(
    "losses",
    "Total, global and dense loss over the steps.",
    "densecl visualize losses runs/photos --output losses.png",
    click.Argument(
        ["run_folder"], metavar="RUN", type=Word("DIR"), help="run folder, or a metrics.csv"
    ),
    OUTPUT,
)
def losses(run_folder: str, output: str) -> None:
    """Draws the curves of a run folder or a metrics.csv."""
    from densecl_ext.visualize import plot_losses

    print(f"wrote {plot_losses(run_folder, output)}")


@command(
    "matches",
    "Mutual nearest neighbours between two views of each image.",
    "densecl visualize matches runs/photos photos/a.jpg --output matches.png",
    click.Argument(
        ["weights"], type=Word("DIR"), help="run folder, checkpoint, or exported backbone"
    ),
    click.Argument(
        ["images"],
        nargs=-1,
        required=True,
        metavar="IMAGE...",
        type=Word("FILE"),
        help="image files",
    ),
    click.Option(
        ["--size"], type=int, default=224, metavar="N", help="side of a view (default: 224)"
    ),
    click.Option(
        ["--threshold"],
        type=float,
        default=0.9,
        metavar="X",
        help="least cosine similarity of a match (default: 0.9)",
    ),
    OUTPUT,
)
def matches(
    weights: str, images: tuple[str, ...], size: int, threshold: float, output: str
) -> None:
    """Draws the matches."""
    from densecl_ext.checkpoints import load_backbone
    from densecl_ext.checkpoints.exchange import resolve_checkpoint
    from densecl_ext.visualize import plot_matches

    backbone = load_backbone(resolve_checkpoint(weights))
    found = plot_matches(backbone, images, output, size=size, threshold=threshold)
    for image, drawn in zip(images, found, strict=True):
        print(f"{image}: {int(drawn.right.sum())} of {len(drawn)} matches right")
    print(f"wrote {output}")
