"""`densecl pretrain`: its options are generated from `PretrainConfig`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any

from densecl_ext.cli.parser import EXIT_INTERRUPTED, add_command
from densecl_ext.train.config import PretrainConfig, check_names, load_recipe, recipe_names


def add_pretrain(commands: Any) -> argparse.ArgumentParser:
    """Adds the command."""
    command = add_command(
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
    command.add_argument(
        "--profile",
        nargs="?",
        const=20,
        metavar="STEPS",
        help="measure STEPS steps (20) instead of training: a table of where the time goes, and a "
        "trace, in the folder profile inside --output; a run that is there stays as it is",
    )
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


def _profile(options: argparse.Namespace) -> int:
    if options.resume or options.overwrite:
        raise ValueError("densecl pretrain: --profile neither resumes nor replaces a run")
    try:
        steps = int(options.profile)
    except ValueError:
        raise ValueError(
            f"densecl pretrain: --profile: expected a number of steps, got {options.profile!r}"
        ) from None
    config = pretrain_config(options)
    from densecl_ext.train.profile import profile

    result = profile(
        config, steps=steps, message=lambda text: print(text, file=sys.stderr, flush=True)
    )
    print(f"{result.table()}\n\ntrace for https://ui.perfetto.dev: {result.folder}/trace.json.gz")
    return 0


def _pretrain(options: argparse.Namespace) -> int:
    if options.profile is not None:
        return _profile(options)
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
