"""`densecl evaluate PROTOCOL`: measure what a network has learned."""

from __future__ import annotations

import dataclasses
import difflib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from densecl_ext.cli.command import Command, Commands, Option, Word, command, given, options_of
from densecl_ext.options import build
from densecl_ext.protocols import PROTOCOLS, Protocol, find_protocol

if TYPE_CHECKING:
    from torch import nn

    from densecl_ext.evaluate.report import Report

CALIBRATION_IMAGES = 256
DEFAULT_PROTOCOL = "segmentation"
EXAMPLES = {
    "segmentation": "--data camvid --size 180 240 --solver lbfgs --recalibrate 128",
    "incontext": "--data camvid --size 180 240",
    "correspondence": "--data photos",
}
RANDOM = (
    "measure the same network at random initialisation too; both then get batch-norm statistics "
    f"from {CALIBRATION_IMAGES} training images, unless --recalibrate says so"
)


class Protocols(Commands):
    """A command for each protocol; words that begin with none of them are segmentation's."""

    def get_command(self, ctx: click.Context, name: str) -> click.Command:
        """The protocol's command."""
        return protocol_command(find_protocol(name))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Puts the default protocol before what is no protocol."""
        if args[0] not in PROTOCOLS:
            near = difflib.get_close_matches(args[0], PROTOCOLS, n=1, cutoff=0.75)
            if near and not Path(args[0]).exists():
                ctx.fail(f"there is no protocol {args[0]!r}; did you mean {near[0]}?")
            args = [DEFAULT_PROTOCOL, *args]
        return super().resolve_command(ctx, args)


evaluate = Protocols(
    "evaluate",
    {name: ("", help) for name, (_, help) in PROTOCOLS.items()},
    help="Measure what a network has learned. Every result comes with its protocol line: all "
    "settings that decide it. Without PROTOCOL: segmentation.",
    epilog="densecl evaluate segmentation runs/photos --data camvid --val-split test",
    context_settings={"ignore_unknown_options": True},
)


def protocol_command(protocol: Protocol) -> Command:
    """`densecl evaluate` with one protocol, its options made from the protocol's dataclass."""

    @command(
        protocol.name,
        f"{protocol.help[0].upper()}{protocol.help[1:]}.",
        f"densecl evaluate {protocol.name} runs/photos {EXAMPLES.get(protocol.name, '')}".rstrip(),
        click.Argument(
            ["weights"], type=Word("DIR"), help="run folder, checkpoint, or exported backbone"
        ),
        *options_of(protocol.options),
        Option(["--device"], metavar="auto|cpu|cuda[:N]", default="auto", help="where to compute"),
        Option(["--compare-random"], is_flag=True, help=RANDOM),
        Option(["--output"], metavar="FILE", type=Word("FILE"), help="also write JSON"),
        Option(["--picture"], metavar="FILE", type=Word("FILE"), help="also draw a PNG"),
    )
    def run(
        weights: str,
        device: str,
        compare_random: bool,
        output: str | None,
        picture: str | None,
        **values: Any,
    ) -> None:
        asked: Any = build(protocol.options, given(values), source=protocol.name)
        _evaluate(protocol, asked, weights, device, compare_random, output, picture)

    return run


def _evaluate(
    protocol: Protocol,
    asked: Any,
    weights: str,
    on: str,
    compare_random: bool,
    output: str | None,
    picture: str | None,
) -> None:
    import torch

    from densecl_ext.backbones import build_backbone
    from densecl_ext.checkpoints import read_backbone
    from densecl_ext.checkpoints.exchange import load_rgb_backbone, resolve_checkpoint
    from densecl_ext.evaluate.correspondence import load_dense_head
    from densecl_ext.evaluate.report import reports_table, write_json
    from densecl_ext.train.machine import pick_device

    path = resolve_checkpoint(weights)
    networks: dict[str, nn.Module] = {"pre-trained": load_rgb_backbone(path, "evaluate")}
    if compare_random:
        torch.manual_seed(asked.seed)
        read = read_backbone(path)
        networks = {"random": build_backbone(read.architecture, **read.options), **networks}
        if getattr(asked, "recalibrate", None) == 0:
            asked = dataclasses.replace(asked, recalibrate=CALIBRATION_IMAGES)
    device = pick_device(on)
    reports: dict[str, Report] = {}
    for name, network in networks.items():
        print(f"{name}: {protocol.name} on {device}", file=sys.stderr)
        extra: dict[str, Any] = {}
        if protocol.name == "correspondence" and name == "pre-trained":
            head = load_dense_head(path)
            extra["dense_head"] = head.to(device) if head is not None else None
        reports[name] = protocol.run(network.to(device), asked, **extra)
    last = reports["pre-trained"]
    print(reports_table(reports))
    print(last.line)
    if output:
        write_json(output, {name: report.to_dict() for name, report in reports.items()})
    if picture:
        if last.draw is None:
            raise ValueError(f"evaluate: {protocol.name} has no picture; leave --picture out")
        last.draw(Path(picture))
        print(f"wrote {picture}")
