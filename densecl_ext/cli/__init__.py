"""The command line: `densecl pretrain | export | import | evaluate | compare | visualize | info`.

Everything heavy is imported by the command that needs it. The library raises; here is where errors
become one line on standard error and exit code 2.
"""

from __future__ import annotations

import argparse
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

from densecl_ext._version import __version__
from densecl_ext.cli.comparing import add_compare
from densecl_ext.cli.evaluating import add_evaluate
from densecl_ext.cli.exchanging import add_export, add_import
from densecl_ext.cli.informing import add_info
from densecl_ext.cli.parser import EXIT_ERROR, EXIT_INTERRUPTED, Parser
from densecl_ext.cli.pretraining import add_pretrain
from densecl_ext.cli.visualizing import add_visualize


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: the words after `densecl`; None takes them from the process.

    Returns:
        The exit code: 0, 2 after an error, 130 after an interruption.
    """
    options = build_parser().parse_args(arguments)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning  # type: ignore[assignment]
        try:
            return int(options.run(options))
        except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
            if options.debug:
                traceback.print_exc()
            else:
                print(f"densecl {options.command}: error: {error}", file=sys.stderr)
            return EXIT_ERROR
        except KeyboardInterrupt:
            print(f"densecl {options.command}: interrupted", file=sys.stderr)
            return EXIT_INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = Parser(
        prog="densecl",
        description="Dense contrastive pre-training on a folder of unlabelled images.",
        epilog="example: densecl pretrain --data photos --recipe small_data",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"densecl_ext {__version__}")
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, parser_class=Parser
    )
    adders = (
        add_pretrain,
        add_export,
        add_import,
        add_evaluate,
        add_compare,
        add_visualize,
        add_info,
    )
    for add in adders:
        command = add(commands)
        command.add_argument("--debug", action="store_true", help="show tracebacks of errors")
        command.set_defaults(parser=command)
    return parser


def _show_warning(message: Any, *_: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)
