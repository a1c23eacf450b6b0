"""Argument parsers with one-line errors, suggestions and an example in every help."""

from __future__ import annotations

import argparse
import difflib
import sys
from typing import Any, NoReturn

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class Parser(argparse.ArgumentParser):
    """argparse that suggests the nearest option for one it does not know."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in argparse, with `did you mean` for unknown options."""
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            command: argparse.ArgumentParser = getattr(options, "parser", self)
            command.error(_unrecognised(unknown, command))
        return options

    def error(self, message: str) -> NoReturn:
        """Prints one line and how to get help."""
        print(f"{self.prog}: error: {message}\ntry: {self.prog} --help", file=sys.stderr)
        sys.exit(EXIT_ERROR)


def _unrecognised(unknown: list[str], parser: argparse.ArgumentParser) -> str:
    first = unknown[0].partition("=")[0]
    known = [text for action in parser._actions for text in action.option_strings]
    near = difflib.get_close_matches(first, known, n=1)
    return f"unknown {unknown[0]!r}" + (f"; did you mean {near[0]}?" if near else "")


def add_command(
    commands: Any, name: str, help: str, example: str, description: str = ""
) -> argparse.ArgumentParser:
    """Adds a subcommand.

    Args:
        commands: what `add_subparsers` returned.
        name: of the subcommand.
        help: one clause for the list of commands.
        example: shown below its own help.
        description: shown above; None makes a sentence of `help`.
    """
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=description or help[0].upper() + help[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    return command
