"""`densecl compare A B ...`: several weights by one protocol, with paired intervals."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from densecl_ext.cli.command import Option, Word, command
from densecl_ext.options import build, properties
from densecl_ext.protocols import PROTOCOLS, find_protocol


@command(
    "compare",
    "Measure several weights by one protocol and tell their differences with intervals.\n\nThe "
    "first is what the others are compared with. NAME= gives an arm a name, commas join its seeds, "
    "in the same order for every arm. `random` is the second arm's network at random "
    "initialisation. `densecl evaluate PROTOCOL --help` lists what --set takes.",
    "densecl compare moco=runs/moco0,runs/moco1 ours=runs/ours0,runs/ours1 --data camvid\n"
    "  densecl compare random runs/photos --protocol incontext --data camvid --set size=180,240",
    click.Argument(["arms"], nargs=-1, required=True, metavar="[NAME=]WEIGHTS[,WEIGHTS...]..."),
    Option(
        ["--protocol"],
        type=click.Choice(list(PROTOCOLS)),
        default="segmentation",
        help="(default: segmentation)",
    ),
    Option(
        ["--set", "settings"],
        multiple=True,
        metavar="OPTION=VALUE...",
        help="options of the protocol, such as solver=lbfgs size=180,240",
    ),
    Option(["--data"], required=True, metavar="DIR", type=Word("DIR"), help="data of the protocol"),
    Option(["--device"], default="auto", metavar="auto|cpu|cuda[:N]", help="where to compute"),
    Option(["--output"], metavar="FILE", type=Word("FILE"), help="also write JSON"),
    Option(["--picture"], metavar="FILE", type=Word("FILE"), help="also draw a PNG"),
)
def compare(
    arms: tuple[str, ...],
    protocol: str,
    settings: tuple[str, ...],
    data: str,
    device: str,
    output: str | None,
    picture: str | None,
) -> None:
    """Measures all arms."""
    import torch
    from torch import nn

    from densecl_ext.backbones import build_backbone
    from densecl_ext.checkpoints import read_backbone
    from densecl_ext.checkpoints.exchange import load_rgb_backbone, resolve_checkpoint
    from densecl_ext.evaluate.compare import compare_reports
    from densecl_ext.evaluate.report import Report, write_json
    from densecl_ext.train.machine import pick_device

    chosen = find_protocol(protocol)
    asked = protocol_options(chosen.options, data, settings)
    place = pick_device(device)
    named = dict(_arm(word) for word in arms)
    if len(named) != len(arms):
        raise ValueError(f"compare: arms must have different names, got {list(named)}")
    known = [path for paths in named.values() for path in paths if path != "random"]
    if not known:
        raise ValueError("compare: one arm at least must have weights")
    reports: dict[str, list[Report]] = {}
    for name, paths in named.items():
        for seed, path in enumerate(paths):
            print(f"{name} {seed + 1}/{len(paths)}: {path}", file=sys.stderr)
            network: nn.Module
            if path == "random":
                torch.manual_seed(seed)
                read = read_backbone(resolve_checkpoint(known[0]))
                network = build_backbone(read.architecture, **read.options)
            else:
                network = load_rgb_backbone(resolve_checkpoint(path), "compare")
            reports.setdefault(name, []).append(chosen.run(network.to(place), asked))
    comparison = compare_reports(reports)
    print(comparison.table())
    print(comparison.line)
    if output:
        write_json(output, comparison.to_dict())
    if picture:
        comparison.draw(Path(picture))
        print(f"wrote {picture}")


def protocol_options(options: type, data: str, words: tuple[str, ...]) -> Any:
    """A protocol's options from words such as `size=180,240`.

    Raises:
        ValueError: a word that is none, or an option that does not fit.
    """
    values: dict[str, Any] = {"data": data}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise ValueError(f"compare: --set must be OPTION=VALUE, got {word!r}")
        schema = properties(options).get(name.replace("-", "_"), {})
        values[name] = text.split(",") if schema.get("type") == "array" else text
    return build(options, values, source="--set")


def _arm(word: str) -> tuple[str, list[str]]:
    name, equals, paths = word.partition("=")
    listed = (paths if equals else word).split(",")
    return (name if equals else Path(listed[0]).name or listed[0]), listed
