"""Pre-training on 1, 8, 64 and 512 GPUs, on paper: images/s, where it bends, hours and cost.

    python -m benchmarks.scale [--machine v100|h100|h200] [--images-per-second X | --step step.json]

Without a measured rate the paper's own is taken for a V100, and for other GPUs a roofline estimate
that reaches the same share of its roofline as the paper's V100. Writes scale.md and scale.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from benchmarks import scale_model as model
from benchmarks.scale_model import Assumptions, Machine, Network, Step

GPUS = (1, 8, 64, 512)
COLOURS = ("#8a8f98", "#0072b2", "#d55e00")
Found = tuple[Machine, float, int, str]  # a machine, one GPU's images/s, its batch, whence
# Paper, table 9: 1'46'' an epoch of COCO on 8 V100, batch 256: 462 steps of 256 images.
PUBLISHED = 462 * 256 / 106 / 8
PUBLISHED_SOURCE = "published: DenseCL, table 9, 1'46'' an epoch of COCO on 8 V100, float32"


def rate_of(
    options: argparse.Namespace, network: Network, machine: Machine
) -> tuple[float, int, str]:
    """One GPU's images/s, its batch, and where both come from."""
    if options.step:
        rate, batch, name = measured(options.step, options.config)
        return rate, options.batch or batch, f"measured: {name}"
    batch = options.batch or 32
    if options.images_per_second:
        return options.images_per_second, batch, "given on the command line"
    if machine.name == "V100":
        return PUBLISHED, batch, PUBLISHED_SOURCE
    share = PUBLISHED * max(model.roofline(network, model.MACHINES["v100"]))
    rate = model.estimated_rate(network, machine, share)
    return rate, batch, f"an estimate, not a measurement: {share:.0%} of its roofline"


def measured(path: Path, name: str | None) -> tuple[float, int, str]:
    """Images/s, batch and name of a configuration in step.json; the fastest where none is named.

    Raises:
        ValueError: the file has no such configuration with a rate.
    """
    configs = json.loads(path.read_text(encoding="utf-8"))["configs"]
    rates = {
        key: statistics.median(found["images_per_second"])
        for key, found in configs.items()
        if found.get("images_per_second") and found.get("batch")
    }
    if name is not None:
        rates = {key: rate for key, rate in rates.items() if key == name}
    if not rates:
        raise ValueError(f"scale: {path} has no measured configuration {name or ''}".rstrip())
    best = max(rates, key=rates.__getitem__)
    return rates[best], int(configs[best]["batch"]), best


def weak(rate: float, batch: int, n: Network, m: Machine, a: Assumptions) -> list[Step]:
    """The same batch on every GPU."""
    return [model.step(gpus, batch, rate, n, m, a) for gpus in GPUS]


def strong(rate: float, total: int, n: Network, m: Machine, a: Assumptions) -> list[Step]:
    """The paper's batch over all GPUs, where each has an image."""
    return [model.step(gpus, total / gpus, rate, n, m, a) for gpus in GPUS if gpus <= total]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a markdown table."""
    return ["| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]]


def ms(seconds: float) -> str:
    """Milliseconds, as many digits as matter."""
    return f"{seconds * 1e3:.3g}" if seconds < 0.0995 else f"{seconds * 1e3:,.0f}"


def markdown(rate: float, batch: int, source: str, n: Network, m: Machine, a: Assumptions) -> str:
    """The tables."""
    arithmetic, traffic = model.roofline(n, m)
    lines = [
        f"## {m.name}: {rate:,.0f} images/s a GPU",
        "",
        f"Rate: {source}. Machine: {m.source}.",
        f"Roofline an image: arithmetic {arithmetic * 1e6:.0f} us, memory {traffic * 1e6:.0f} us: "
        f"at most {1 / max(arithmetic, traffic):,.0f} images/s.",
        "",
        f"{batch} images a GPU, times in ms:",
        "",
    ]
    rows = [
        [
            f"{s.gpus}", f"{s.images_per_second:,.0f}", f"{s.efficiency:.1%}", ms(s.seconds),
            f"{ms(s.gradients)} ({ms(s.gradients_shown)})", ms(s.keys),
            f"{s.gpus * s.batch:,.0f}", f"{model.QUEUE / (s.gpus * s.batch):.3g}",
            ms(s.shuffle), f"{s.shuffled_images_per_second:,.0f}",
        ]
        for s in weak(rate, batch, n, m, a)
    ]  # fmt: skip
    header = ("GPUs", "images/s", "efficiency", "step", "gradients (shown)", "keys",
              "global batch", "steps that fill the queue", "Shuffle-BN by gathered images",
              "images/s with it")  # fmt: skip
    lines += [*table(header, rows), "", "The paper's batch of 256 over all GPUs:", ""]
    steps = strong(rate, 256, n, m, a)
    rows = [
        [
            f"{s.gpus}", f"{s.batch:g}", f"{s.images_per_second:,.0f}", f"{s.efficiency:.1%}",
            *(cell for recipe in model.RECIPES for cell in _cost(recipe, s, m)),
        ]
        for s in steps
    ]  # fmt: skip
    recipes = [word for recipe in model.RECIPES for word in (f"{recipe.name}: hours", "cost")]
    lines += table(["GPUs", "images a GPU", "images/s", "efficiency", *recipes], rows)
    reported = "; ".join(f"{r.name}, {24 * r.published_days:.0f} hours" for r in model.RECIPES)
    return "\n".join([*lines, "", f"The paper's authors report, on 8 V100: {reported}.", ""])


def _cost(recipe: model.Recipe, step: Step, machine: Machine) -> tuple[str, str]:
    hours = model.hours(recipe, step.images_per_second)
    return f"{hours:,.1f}", f"${hours * step.gpus * machine.price:,.0f}"


def draw(found: Sequence[Found], n: Network, a: Assumptions, png: Path) -> None:
    """Images/s over GPUs, and how much of the GPUs the exchanges leave."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), dpi=110, layout="constrained")
    total, share = figure.subplots(1, 2)
    counts = [2**power for power in range(10)]
    for (machine, rate, batch, source), colour in zip(found, COLOURS, strict=False):
        steps = [model.step(gpus, batch, rate, n, machine, a) for gpus in counts]
        kind = source.partition(":")[0].partition(",")[0]
        total.plot(
            counts, [s.images_per_second for s in steps], color=colour, lw=2.2,
            label=f"{machine.name} ({kind})",
        )  # fmt: skip
        gathered = [s.shuffled_images_per_second for s in steps]
        total.plot(counts, gathered, color=colour, ls="--")
        share.plot(counts, [s.efficiency for s in steps], color=colour, lw=2.2)
        share.plot(counts, [s.compute / (s.seconds + s.shuffle) for s in steps], "--", color=colour)
        fewer = [model.step(gpus, 256 / gpus, rate, n, machine, a) for gpus in counts[:9]]
        share.plot(counts[:9], [s.efficiency for s in fewer], ":", color=colour, lw=2.2)
    for style, label in (
        ("-", f"{found[0][2]} images a GPU"),
        ("--", "the same with MoCo's Shuffle-BN (images gathered)"),
        (":", "256 images over all GPUs"),
    ):
        share.plot([], [], style, color="#22262b", label=label)
    total.set_yscale("log")
    total.set_title("Images/s, all GPUs together", loc="left", fontweight="bold")
    share.set_ylim(0.0, 1.45)
    share.set_yticks([0.0, 0.25, 0.5, 0.75, 1.0], ["0", "25 %", "50 %", "75 %", "100 %"])
    share.set_title("Share of time spent computing", loc="left", fontweight="bold")
    for axes in (total, share):
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(gpus) for gpus in counts])
        axes.set_xlabel("GPUs")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="upper left", fontsize=9)
    figure.savefig(png)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument(
        "--machine", nargs="+", choices=model.MACHINES, default=["v100", "h100", "h200"]
    )
    parser.add_argument("--backbone", default="resnet50", help="torchvision's name")
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--images-per-second", type=float, help="of one GPU")
    given.add_argument("--step", type=Path, help="step.json of the step benchmark")
    parser.add_argument("--config", help="which configuration of it; default: the fastest")
    parser.add_argument("--batch", type=int, help="images a GPU; default: the measured, or 32")
    parser.add_argument("--price", type=float, help="dollars a GPU-hour")
    names = [field.name for field in fields(Assumptions)]
    for name in names:
        flag, default = f"--{name.replace('_', '-')}", getattr(Assumptions, name)
        parser.add_argument(flag, type=float, default=default, help="see Assumptions")
    parser.add_argument("--out", type=Path, default=Path("build/scale"))
    options = parser.parse_args(arguments)
    if (options.step or options.images_per_second) and len(options.machine) != 1:
        parser.error("a given rate is that of one --machine")
    assumed = Assumptions(
        **{field.name: getattr(options, field.name) for field in fields(Assumptions)}
    )
    network = model.count(options.backbone)
    found: list[Found] = []
    texts = []
    for name in options.machine:
        machine = model.MACHINES[name]
        if options.price is not None:
            machine = replace(machine, price=options.price)
        rate, batch, source = rate_of(options, network, machine)
        texts.append(markdown(rate, batch, source, network, machine, assumed))
        found.append((machine, rate, batch, source))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "scale.md").write_text("\n".join(texts), encoding="utf-8")
    draw(found, network, assumed, options.out / "scale.png")
    print("\n".join(texts))
    print(f"wrote scale.md and scale.png in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
