"""`densecl info`."""

from __future__ import annotations

import json as json_format

import click

from densecl_ext.cli.command import command


@command(
    "info",
    "Tell versions, what was built, what this machine can do, and what is missing.",
    "densecl info --json",
    click.Option(["--json"], is_flag=True, help="as JSON"),
)
def info(json: bool) -> None:
    """Prints it."""
    from densecl_ext.info import collect, format_info

    told = collect()
    print(json_format.dumps(told, indent=2) if json else format_info(told))
