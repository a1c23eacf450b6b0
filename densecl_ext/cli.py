"""The command line: `densecl pretrain | export | import | evaluate | visualize | info`.

Options of `pretrain` are generated from `PretrainConfig`. Everything heavy is imported by the
command that needs it. The library raises; here is where errors become one line on standard error
and exit code 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from densecl_ext._version import __version__
from densecl_ext.train.config import (
    PretrainConfig,
    check_names,
    load_recipe,
    recipe_names,
)

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: the words after `densecl`; None takes them from the process.

    Returns:
        The exit code: 0, 2 after an error, 130 after an interruption.
    """
    parser = build_parser()
    options = parser.parse_args(arguments)
    warnings.formatwarning = _format_warning
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


class _Parser(argparse.ArgumentParser):
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
    import difflib

    first = unknown[0].partition("=")[0]
    known = [text for action in parser._actions for text in action.option_strings]
    near = difflib.get_close_matches(first, known, n=1)
    return f"unknown {unknown[0]!r}" + (f"; did you mean {near[0]}?" if near else "")


def _format_warning(
    message: Any, category: Any, filename: Any, lineno: Any, line: Any = None
) -> str:
    return f"warning: {message}\n"


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(
        prog="densecl",
        description="Dense contrastive pre-training on a folder of unlabelled images.",
        epilog="example: densecl pretrain --data photos --recipe small_data",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"densecl_ext {__version__}")
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, parser_class=_Parser
    )
    for add in (_add_pretrain, _add_export, _add_import, _add_info):
        command = add(commands)
        command.add_argument("--debug", action="store_true", help="show tracebacks of errors")
        command.set_defaults(parser=command)
    return parser


def _command(
    commands: Any, name: str, help: str, example: str, description: str = ""
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=description or help[0].upper() + help[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    return command


# ---------------------------------------------------------------- pretrain


def _add_pretrain(commands: Any) -> argparse.ArgumentParser:
    command = _command(
        commands,
        "pretrain",
        "pre-train a backbone on a folder of images",
        "densecl pretrain --data photos --recipe small_data --output runs/photos --epochs 200\n"
        "  densecl pretrain --output runs/photos --resume",
        "Pre-train a backbone with DenseCL on a folder of unlabelled images.\n\n"
        "Values come from the defaults, then --recipe, then the options.",
    )
    command.add_argument(
        "--recipe",
        metavar="NAME|FILE",
        help=f"YAML file of options, or one of: {', '.join(recipe_names())}",
    )
    command.add_argument(
        "--resume", action="store_true", help="go on with the run in --output, exactly"
    )
    command.add_argument("--overwrite", action="store_true", help="replace the run in --output")
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(PretrainConfig):
        title = field.metadata["group"]
        if title not in groups:
            groups[title] = command.add_argument_group(title)
        flag = f"--{field.name.replace('_', '-')}"
        default = field.default
        help = field.metadata["help"]
        if default != "":
            help += f" (default: {str(default).lower() if isinstance(default, bool) else default})"
        if isinstance(default, bool):
            groups[title].add_argument(
                flag,
                action=argparse.BooleanOptionalAction,
                default=argparse.SUPPRESS,
                help=help.replace("%", "%%"),
            )
        else:
            groups[title].add_argument(
                flag,
                metavar=field.metadata["parser"].metavar,
                default=argparse.SUPPRESS,
                help=help.replace("%", "%%"),
            )
    command.set_defaults(run=_pretrain)
    return command


def pretrain_config(options: argparse.Namespace) -> PretrainConfig:
    """Puts defaults, the interrupted run (with --resume), the recipe and the options together.

    Raises:
        ValueError: a name or value that does not fit.
        FileNotFoundError: nothing to resume.
    """
    names = {field.name for field in dataclasses.fields(PretrainConfig)}
    given = {name: value for name, value in vars(options).items() if name in names}
    values = load_recipe(options.recipe) if options.recipe else {}
    values |= given
    if options.resume:
        from densecl_ext.train.run_folder import RunFolder

        output = PretrainConfig(**values).output
        values = RunFolder(output).stored_config().to_mapping() | {"output": output} | values
    return PretrainConfig(**check_names(values, source="densecl pretrain"))


def _pretrain(options: argparse.Namespace) -> int:
    config = pretrain_config(options)
    from densecl_ext.train import pretrain
    from densecl_ext.train.progress import ConsoleProgress

    result = pretrain(
        config, resume=options.resume, overwrite=options.overwrite, progress=ConsoleProgress()
    )
    if result.skipped:
        print(f"skipped {len(result.skipped)} files that do not decode", file=sys.stderr)
    go_on = f"densecl pretrain --output {result.output} --resume"
    if result.interrupted:
        print(
            f"stopped at step {result.step} of {result.total_steps}, saved in {result.checkpoint}; "
            f"go on with:\n  {go_on}"
        )
        return EXIT_INTERRUPTED
    loss = result.metrics.get("loss")
    told = "" if loss is None else f", loss {loss:.4f}"
    print(f"step {result.step} of {result.total_steps}{told}, saved in {result.checkpoint}")
    if result.step < result.total_steps:
        print(f"the rest of the schedule:\n  {go_on} --max-steps none")
    print(f"use it:\n  densecl export {result.output} --output backbone.pth")
    return 0


# ---------------------------------------------------------------- export, import


def _add_export(commands: Any) -> argparse.ArgumentParser:
    command = _command(
        commands,
        "export",
        "write a run's backbone so that other libraries load it",
        "densecl export runs/photos --output backbone.pth --to torchvision",
        "Write a run's backbone so that other libraries load it. The weights are loaded strictly\n"
        "into torchvision's model and its features compared before the file is kept.",
    )
    command.add_argument("checkpoint", help="run folder, or a checkpoint file")
    command.add_argument("--output", required=True, metavar="FILE", help="file to write")
    command.add_argument(
        "--to",
        choices=("torchvision", "backbone"),
        default="torchvision",
        help="torchvision: a state_dict that torchvision's model takes strictly; "
        "backbone: without fc (default: torchvision)",
    )
    command.add_argument(
        "--no-fc",
        action="store_true",
        help="leave out fc.weight and fc.bias, which are torchvision's random initialisation",
    )
    command.set_defaults(run=_export)
    return command


def _export(options: argparse.Namespace) -> int:
    from densecl_ext.checkpoints import export_backbone

    written = export_backbone(options.checkpoint, options.output, options.to, fc=not options.no_fc)
    print(
        f"wrote {written.path}: {written.architecture}, {len(written.tensors)} tensors; "
        "loaded strictly into torchvision's model, features equal"
    )
    for note in written.notes:
        print(f"note: {note}")
    if options.to == "torchvision" and not options.no_fc:
        print(
            f"use it:\n  model = torchvision.models.{written.architecture}()\n"
            f"  model.load_state_dict(torch.load({str(written.path)!r}))"
        )
    return 0


def _add_import(commands: Any) -> argparse.ArgumentParser:
    command = _command(
        commands,
        "import",
        "turn another project's checkpoint into a backbone file",
        "densecl import moco_v2_800ep_pretrain.pth.tar --output moco.pth\n"
        "  densecl pretrain --data photos --weights moco.pth",
        "Turn another project's checkpoint (MoCo, official DenseCL / OpenSelfSup, mmselfsup,\n"
        "mmpretrain, torchvision) into a backbone file to start from or to evaluate.",
    )
    command.add_argument("source", help="the checkpoint")
    command.add_argument("--output", required=True, metavar="FILE", help="file to write")
    command.add_argument(
        "--backbone", metavar="NAME", help="the architecture it must have (resnet50); default: any"
    )
    command.add_argument(
        "--trusted",
        action="store_true",
        help="accept pickled Python objects, which can run code: only for files whose origin you "
        "trust",
    )
    command.set_defaults(run=_import)
    return command


def _import(options: argparse.Namespace) -> int:
    from densecl_ext.checkpoints import import_backbone

    written = import_backbone(
        options.source, options.output, architecture=options.backbone, trusted=options.trusted
    )
    print(
        f"wrote {written.path}: {written.architecture}, {len(written.tensors)} tensors, "
        f"recognised as {written.form}"
    )
    if written.left_out:
        print(f"left out as heads: {', '.join(written.left_out)}")
    return 0


# ---------------------------------------------------------------- info


def _add_info(commands: Any) -> argparse.ArgumentParser:
    command = _command(
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
