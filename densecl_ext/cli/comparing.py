"""`densecl compare A B ...`: several weights by one protocol, with paired intervals."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from densecl_ext.cli.parser import add_command


def add_compare(commands: Any) -> argparse.ArgumentParser:
    """Adds the command."""
    from densecl_ext.evaluate.protocols import PROTOCOLS

    command = add_command(
        commands,
        "compare",
        "measure several weights by one protocol and tell their differences with intervals",
        "densecl compare moco=runs/moco0,runs/moco1 ours=runs/ours0,runs/ours1 --data camvid\n"
        "  densecl compare random runs/photos --protocol incontext --data camvid --size 180 240",
        "Measure several weights. The first is what the others are compared with. NAME= gives an\n"
        "arm a name, commas join its seeds, in the same order for every arm. `random` is the\n"
        "second arm's network at random initialisation. Options of the protocol follow as in\n"
        "`densecl evaluate PROTOCOL --help`.",
    )
    command.add_argument("arms", nargs="+", metavar="[NAME=]WEIGHTS[,WEIGHTS...]")
    command.add_argument(
        "--protocol", default="segmentation", choices=list(PROTOCOLS), help="(default: %(default)s)"
    )
    command.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="OPTION=VALUE",
        help="options of the protocol, such as solver=lbfgs size=180,240",
    )
    command.add_argument("--data", required=True, metavar="DIR", help="data of the protocol")
    command.add_argument("--device", default="auto", metavar="auto|cpu|cuda[:N]")
    command.add_argument("--output", metavar="FILE", help="also write the numbers as JSON")
    command.add_argument("--picture", metavar="FILE", help="also draw the comparison as PNG")
    command.set_defaults(run=_compare)
    return command


def _compare(options: argparse.Namespace) -> int:
    import torch

    from densecl_ext.backbones import build_backbone
    from densecl_ext.checkpoints import load_backbone, read_backbone
    from densecl_ext.checkpoints.exchange import resolve_checkpoint
    from densecl_ext.cli.dataclass_options import dataclass_from_words
    from densecl_ext.evaluate.compare import compare_reports
    from densecl_ext.evaluate.protocols import find_protocol
    from densecl_ext.evaluate.report import Report, write_json
    from densecl_ext.train.machine import pick_device

    protocol = find_protocol(options.protocol)
    asked = dataclass_from_words(protocol.options, [f"data={options.data}", *options.set])
    device = pick_device(options.device)
    arms = dict(_arm(word) for word in options.arms)
    if len(arms) != len(options.arms):
        raise ValueError(f"compare: arms must have different names, got {list(arms)}")
    known = [path for paths in arms.values() for path in paths if path != "random"]
    if not known:
        raise ValueError("compare: one arm at least must have weights")
    reports: dict[str, list[Report]] = {}
    for name, paths in arms.items():
        for seed, path in enumerate(paths):
            print(f"{name} {seed + 1}/{len(paths)}: {path}", file=sys.stderr)
            if path == "random":
                torch.manual_seed(seed)
                network = build_backbone(read_backbone(resolve_checkpoint(known[0])).architecture)
            else:
                network = load_backbone(resolve_checkpoint(path))
            reports.setdefault(name, []).append(protocol.run(network.to(device), asked))
    comparison = compare_reports(reports)
    print(comparison.table())
    print(comparison.line)
    if options.output:
        write_json(options.output, comparison.to_dict())
    if options.picture:
        comparison.draw(Path(options.picture))
        print(f"wrote {options.picture}")
    return 0


def _arm(word: str) -> tuple[str, list[str]]:
    name, equals, paths = word.partition("=")
    listed = (paths if equals else word).split(",")
    return (name if equals else Path(listed[0]).name or listed[0]), listed
