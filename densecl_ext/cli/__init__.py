"""The command line: `densecl pretrain`, `export`, `evaluate` and more; see COMMANDS.

Everything heavy is imported by the command that needs it. The library raises; here is where errors
become one line on standard error and exit code 2.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

import click
from click.shell_completion import get_completion_class, shell_complete

from densecl_ext._version import __version__
from densecl_ext.cli.command import EXIT_BROKEN_PIPE, EXIT_ERROR, EXIT_INTERRUPTED, Commands

COMPLETE = "_DENSECL_COMPLETE"  # what a shell's completion sets

COMMANDS = {
    "pretrain": ("pretraining:pretrain", "pre-train a backbone on a folder of images"),
    "check": (
        "checking:check",
        "look at images before training: what they are, what is wrong, which recipe",
    ),
    "export": ("exchanging:export", "write a run's backbone so that other libraries load it"),
    "import": ("exchanging:import_", "turn another project's checkpoint into a backbone file"),
    "evaluate": (
        "evaluating:evaluate",
        "measure what a network has learned, by one of several protocols",
    ),
    "compare": ("comparing:compare", "measure several weights by one protocol, with intervals"),
    "visualize": (
        "visualizing:visualize",
        "draw a run's curves, matches and features, or all of it as one HTML file",
    ),
    "ablate": ("ablating:ablate", "compare values of one option over seeds, on your own images"),
    "info": (
        "informing:info",
        "tell versions, what was built, what this machine can do, and what is missing",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: the words after `densecl`; None takes them from the process.

    Returns:
        The exit code: 0, 2 after an error, 130 after an interruption, 141 when a reader has gone.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = f"densecl {words[0]}" if words and words[0] in COMMANDS else "densecl"
    if os.environ.get(COMPLETE):
        return shell_complete(densecl, {}, "densecl", COMPLETE, os.environ[COMPLETE])
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning  # type: ignore[assignment]
        try:
            with densecl.make_context("densecl", [*words]) as context:
                code = int(densecl.invoke(context) or 0)
            sys.stdout.flush()  # a reader that has gone shows here, not when Python ends
            return code
        except click.UsageError as error:
            path = error.ctx.command_path if error.ctx else command
            _say(f"{path}: error: {one_line(error.format_message())}\ntry: {path} --help")
            raise SystemExit(EXIT_ERROR) from None
        except click.exceptions.Exit as stop:
            raise SystemExit(stop.exit_code) from None
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return EXIT_BROKEN_PIPE
        except KeyboardInterrupt:
            _say(f"{command}: interrupted")
            return EXIT_INTERRUPTED
        except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
            if "--debug" in words:
                traceback.print_exc()
            elif not getattr(error, "told", False):  # by another process of the run
                _say(f"{command}: error: {one_line(error)}")
            return EXIT_ERROR


def one_line(error: object) -> str:
    """An error in one line; a package that is missing with how to get it."""
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("densecl_ext"):
        return f"needs {error.name}, which is not installed: pip install 'densecl_ext[train]'"
    told = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    return told.removeprefix("PretrainConfig: ")


def _print_completion(context: click.Context, _: click.Parameter, shell: str | None) -> None:
    if shell:
        form = get_completion_class(shell)
        assert form is not None
        click.echo(form(densecl, {}, "densecl", COMPLETE).source())
        context.exit()


densecl = Commands(
    "densecl",
    COMMANDS,
    help="Dense contrastive pre-training on a folder of unlabelled images.",
    epilog="densecl pretrain --data photos --recipe small_data",
    context_settings={"help_option_names": ["-h", "--help"]},
    params=[
        click.Option(
            ["--print-completion"],
            type=click.Choice(["bash", "zsh", "fish"]),
            is_eager=True,
            expose_value=False,
            callback=_print_completion,
            help="print what makes this shell complete options: add it to the shell's start file",
        )
    ],
)
click.version_option(__version__, prog_name="densecl_ext", message="%(prog)s %(version)s")(densecl)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _show_warning(message: Any, *_: Any) -> None:
    _say(f"warning: {message}")
