"""`densecl pretrain`: its options are generated from `PretrainConfig`."""

from __future__ import annotations

import math
import shlex
import sys
from typing import Any

from densecl_ext.cli.command import (
    EXIT_INTERRUPTED,
    Option,
    Word,
    command,
    given,
    options_of,
)
from densecl_ext.cli.exchanging import usage
from densecl_ext.train.config import PretrainConfig
from densecl_ext.train.recipes import dump_recipe, load_recipe, recipe_names


@command(
    "pretrain",
    "Pre-train a backbone with DenseCL on a folder of unlabelled images.\n\nValues come from the "
    "defaults, then --recipe, then the options.",
    "densecl pretrain --data photos --recipe small_data --output runs/photos --epochs 200\n"
    "  densecl pretrain --output runs/photos --resume\n"
    "  densecl pretrain --data photos --output runs/photos --devices 8 --resume auto",
    Option(
        ["--recipe"],
        metavar="NAME|FILE",
        type=Word("FILE", recipe_names()),
        help=f"YAML file of options, or one of: {', '.join(recipe_names())}",
    ),
    Option(
        ["--resume"],
        is_flag=False,
        flag_value="run",
        metavar="[auto]",
        type=Word("", ["auto"]),
        help="go on with the run in --output, exactly; auto: if there is one, and else start it",
    ),
    Option(["--overwrite"], is_flag=True, help="replace the run in --output"),
    Option(
        ["--dry-run"],
        is_flag=True,
        help="check everything, print the recipe with all automatic values filled in, and stop",
    ),
    Option(
        ["--profile"],
        is_flag=False,
        flag_value="20",
        metavar="[STEPS]",
        help="measure STEPS steps (20) instead of training: a table of where the time goes, and a "
        "trace, in the folder profile inside --output; a run that is there stays as it is",
    ),
    Option(
        ["--replay"],
        metavar="FILE",
        type=Word("FILE"),
        help="take the last steps of a run that became NaN or infinite (its replay.json) again, "
        "and tell which step, images and weights it was; writes nothing",
    ),
    *options_of(PretrainConfig),
)
def pretrain(
    recipe: str | None,
    resume: str | None,
    overwrite: bool,
    dry_run: bool,
    profile: str | None,
    replay: str | None,
    **options: Any,
) -> int:
    """Trains, or profiles, or tells what it would do."""
    if profile is not None and (resume is not None or overwrite or dry_run):
        raise ValueError("--profile neither resumes nor replaces a run, and needs no --dry-run")
    if resume not in (None, "run", "auto"):
        raise ValueError(f"--resume: expected nothing or auto, got {resume!r}")
    if replay is not None:
        if resume is not None or overwrite or dry_run or profile is not None or recipe:
            raise ValueError("--replay takes a run's own options, and others beside it, alone")
        return _replay(replay, given(options))
    config = pretrain_config(recipe, resume, options)
    if dry_run:
        return _dry_run(config)
    if profile is not None:
        return _profile(config, profile)
    code = _supervised(config)
    if code is not None:
        return code

    from densecl_ext.train import pretrain
    from densecl_ext.train.progress import ConsoleProgress

    how = "auto" if resume == "auto" else resume is not None
    result = pretrain(config, resume=how, overwrite=overwrite, progress=ConsoleProgress())
    if not result.first:
        return EXIT_INTERRUPTED if result.interrupted else 0
    if result.skipped:
        print(f"skipped {len(result.skipped)} files that do not decode", file=sys.stderr)
    output = shlex.quote(str(result.output))
    go_on = f"densecl pretrain --output {output} --resume"
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
    if result.backbone is None:
        print(f"its backbone:\n  densecl export {output} --output backbone.pth")
    elif config.channels != "rgb":
        print(f"wrote {result.backbone}; {result.backbone}.md says how to load it")
    else:
        print(f"wrote {result.backbone}; {usage(result.backbone, config.backbone)}")
    return 0


def pretrain_config(
    recipe: str | None, resume: str | None, options: dict[str, Any]
) -> PretrainConfig:
    """Puts defaults, the interrupted run (with --resume), the recipe and the options together.

    Raises:
        ValueError: a name or value that does not fit.
        FileNotFoundError: nothing to resume.
    """
    values = (load_recipe(recipe) if recipe else {}) | given(options)
    if resume:
        from densecl_ext.checkpoints.run_folder import RunFolder

        output = PretrainConfig(**values).output
        if resume == "auto" and not RunFolder(output).resumable():
            return PretrainConfig(**values)
        values = (
            PretrainConfig.of_run(RunFolder(output).read()["config"]).to_mapping()
            | {"output": output}
            | values
        )
    return PretrainConfig(**values)


def _supervised(config: PretrainConfig, *, check: bool = True) -> int | None:
    """Starts the run's processes where several are wanted and nobody has; else None."""
    from densecl_ext.train.supervise import found_launcher, share_batch, supervise, this_command

    devices = 1 if config.devices == "auto" else int(config.devices)
    if devices * config.num_nodes == 1 or found_launcher().launcher:
        return None
    if check:
        share_batch(config.batch_size, devices * config.num_nodes, config.accumulate)
    return supervise(this_command(), devices, config.num_nodes)


def _replay(path: str, options: dict[str, Any]) -> int:
    from densecl_ext.train import replay
    from densecl_ext.train.progress import ConsoleProgress

    code = _supervised(PretrainConfig(**options), check=False)
    if code is not None:
        return code
    found = replay(path, options, progress=ConsoleProgress())
    if not found.first:
        return 0
    if found.finite:
        print(f"all finite up to step {found.step}: it does not happen here, or with these options")
        return 0
    wrong = [name for name, value in found.losses.items() if not math.isfinite(value)]
    print(f"step {found.step}: not finite: {', '.join(wrong + found.weights[:10]) or 'a loss'}")
    if len(found.weights) > 10:
        print(f"  and {len(found.weights) - 10} more weights")
    print("its images:", *found.images, sep="\n  ")
    return 0


def _dry_run(config: PretrainConfig) -> int:
    from densecl_ext.train.machine import pick_device
    from densecl_ext.train.run import build_run
    from densecl_ext.train.supervise import share_batch

    if not config.data:
        raise ValueError("pretrain: data must name a folder of images, got nothing (--data DIR)")
    devices = 1 if config.devices == "auto" else int(config.devices)
    share_batch(config.batch_size, devices * config.num_nodes, config.accumulate)
    run = build_run(config, pick_device(config.device))
    run.loader.close()
    print(dump_recipe(run.config), end="")
    print(
        f"{run.loader.num_images} images, {run.total_steps} steps on {run.device}; nothing written",
        file=sys.stderr,
    )
    return 0


def _profile(config: PretrainConfig, text: str) -> int:
    try:
        steps = int(text)
    except ValueError:
        raise ValueError(f"--profile: expected a number of steps, got {text!r}") from None
    if config.devices not in ("auto", 1) or config.num_nodes > 1:
        raise ValueError("--profile measures one process; leave --devices and --num-nodes out")
    from densecl_ext.train.profile import profile

    result = profile(
        config, steps=steps, message=lambda text: print(text, file=sys.stderr, flush=True)
    )
    print(f"{result.table()}\n\ntrace for https://ui.perfetto.dev: {result.folder}/trace.json.gz")
    return 0
