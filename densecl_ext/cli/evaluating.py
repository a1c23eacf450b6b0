"""`densecl evaluate PROTOCOL`: measure what a network has learned."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from densecl_ext.cli.parser import Parser, add_command

if TYPE_CHECKING:
    from torch import nn

    from densecl_ext.evaluate.protocols import Protocol
    from densecl_ext.evaluate.report import Report

CALIBRATION_IMAGES = 256
DEFAULT_PROTOCOL = "segmentation"
LISTS = ("-h", "--help")
EXAMPLES = {
    "segmentation": "--data camvid --size 180 240 --solver lbfgs --recalibrate 128",
    "incontext": "--data camvid --size 180 240",
    "correspondence": "--data photos",
}


def add_evaluate(commands: Any) -> argparse.ArgumentParser:
    """Adds the command with one subcommand a protocol."""
    from densecl_ext.evaluate.protocols import PROTOCOLS, find_protocol

    command = add_command(
        commands,
        "evaluate",
        "measure what a network has learned, by one of several protocols",
        "densecl evaluate segmentation runs/photos --data camvid --val-split test",
        "Measure a network. Every result comes with its protocol line: all settings that decide "
        "it.\nWithout PROTOCOL: segmentation.",
    )
    kinds = command.add_subparsers(
        dest="protocol", metavar="PROTOCOL", required=True, parser_class=Parser
    )
    for name in PROTOCOLS:
        _add_protocol(kinds, find_protocol(name))
    plain: Callable[..., Any] = command.parse_known_args

    def with_protocol(args: Any = None, namespace: Any = None) -> Any:
        words = list(args or ())
        if words and words[0] not in PROTOCOLS and words[0] not in LISTS:
            near = difflib.get_close_matches(words[0], PROTOCOLS, n=1, cutoff=0.75)
            if near and not Path(words[0]).exists():
                command.error(f"there is no protocol {words[0]!r}; did you mean {near[0]}?")
            words = [DEFAULT_PROTOCOL, *words]
        return plain(words, namespace)

    command.parse_known_args = with_protocol  # type: ignore[method-assign]
    return command


def _add_protocol(kinds: Any, protocol: Protocol) -> None:
    from densecl_ext.cli.dataclass_options import add_dataclass

    example = f"densecl evaluate {protocol.name} runs/photos {EXAMPLES.get(protocol.name, '')}"
    command = add_command(kinds, protocol.name, protocol.help, example.rstrip())
    command.add_argument("weights", help="run folder, checkpoint, or exported backbone")
    add_dataclass(command, protocol.options, "data")
    command.add_argument(
        "--device", default="auto", metavar="auto|cpu|cuda[:N]", help="(default: auto)"
    )
    command.add_argument(
        "--compare-random",
        action="store_true",
        help="measure the same network at random initialisation too; both then get batch-norm "
        f"statistics from {CALIBRATION_IMAGES} training images, unless --recalibrate says so",
    )
    command.add_argument("--output", metavar="FILE", help="also write the numbers as JSON")
    command.add_argument("--picture", metavar="FILE", help="also draw the result as PNG")
    command.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )
    command.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace) -> int:
    import dataclasses

    import torch

    from densecl_ext.backbones import build_backbone
    from densecl_ext.checkpoints import load_backbone, read_backbone
    from densecl_ext.checkpoints.exchange import resolve_checkpoint
    from densecl_ext.cli.dataclass_options import dataclass_of
    from densecl_ext.evaluate.correspondence import load_dense_head
    from densecl_ext.evaluate.protocols import find_protocol
    from densecl_ext.evaluate.report import reports_table, write_json
    from densecl_ext.train.machine import pick_device

    protocol = find_protocol(options.protocol)
    asked = dataclass_of(protocol.options, options)
    path = resolve_checkpoint(options.weights)
    networks: dict[str, nn.Module] = {"pre-trained": load_backbone(path)}
    if options.compare_random:
        torch.manual_seed(asked.seed)
        networks = {"random": build_backbone(read_backbone(path).architecture), **networks}
        if getattr(asked, "recalibrate", None) == 0:
            asked = dataclasses.replace(asked, recalibrate=CALIBRATION_IMAGES)
    device = pick_device(options.device)
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
    if options.output:
        write_json(options.output, {name: report.to_dict() for name, report in reports.items()})
    if options.picture:
        if last.draw is None:
            raise ValueError(f"evaluate: {protocol.name} has no picture; leave --picture out")
        last.draw(Path(options.picture))
        print(f"wrote {options.picture}")
    return 0
