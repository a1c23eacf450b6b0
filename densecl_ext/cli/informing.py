"""`densecl info`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from densecl_ext.cli.parser import add_command


def add_info(commands: Any) -> argparse.ArgumentParser:
    """Adds the command."""
    command = add_command(
        commands,
        "info",
        "tell versions, what was built, what this machine can do, and what is missing",
        "densecl info --json",
    )
    command.add_argument("--json", action="store_true", help="as JSON")
    command.set_defaults(run=_info)
    return command


def _info(options: argparse.Namespace) -> int:
    from densecl_ext.info import collect, format_info

    info = collect()
    print(json.dumps(info, indent=2) if options.json else format_info(info))
    return 0
