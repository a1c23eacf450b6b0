"""Pre-training on 1, 8, 64 and 512 GPUs, on paper: images/s, where it bends, hours and cost.

    python -m tools.scale [--machine v100|h100|h200 [--step step.json]]

Without a measured rate the paper's own is taken for a V100, and for other GPUs a roofline estimate
that reaches the same share of its roofline as the paper's V100. Writes scale.png, prints tables.
Speeds are bytes, FLOP or images per second; times seconds; sizes bytes. docs/scale.md explains.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.verdicts import entries
from densecl_ext.backbones import build_backbone
from densecl_ext.nn.necks import DenseCLNeck

DIM, HIDDEN_DIM, QUEUE = 128, 2048, 65536
IMAGE_BYTES = 3 * 224 * 224 * 4  # float32
# Accesses of every convolution's output in one pass of an eager network with batch norm and ReLU.
# Forward: written, read by the statistics, read and written by the norm, read and written by ReLU,
# read by the next convolution. Backward: ReLU 3, batch norm 5, both products of the convolution 4.
FORWARD_ACCESSES, BACKWARD_ACCESSES = 7, 12
# What no data sheet says: the share of a link's speed that a collective reaches, seconds of one of
# its hops, the share of a step that gradients may travel behind, and a step's traffic per
# parameter (momentum update 12 bytes, SGD 20).
LINK, LATENCY, HIDDEN, FIXED_BYTES = 0.8, 5e-6, 0.5, 32.0
GPUS = (1, 8, 64, 512)
COLOURS = ("#8a8f98", "#0072b2", "#d55e00")
# Paper, table 9: 1'46'' an epoch of COCO on 8 V100, batch 256: 462 steps of 256 images.
PUBLISHED = 462 * 256 / 106 / 8
PUBLISHED_SOURCE = "published: DenseCL, table 9, 1'46'' an epoch of COCO on 8 V100, float32"
# Recipes of the paper: images, epochs, batch, and the days that its authors report for 8 V100.
RECIPES = {
    "COCO, 800 epochs": (118_287, 800, 256, 1.0),
    "ImageNet, 200 epochs": (1_281_167, 200, 256, 2.3),
}


class Network(NamedTuple):
    """An encoder with both heads at 224 pixels, per image."""

    macs: float  # multiply-adds of a forward
    activations: float  # numbers that its convolutions write
    parameters: float
    positions: int  # of the dense grid


def count() -> Network:
    """Count ResNet-50 and both heads by running them on the meta device."""
    layers: list[tuple[int, int]] = []  # numbers written, products for each of them

    def add(module: nn.Module, _: object, output: Tensor) -> None:
        assert isinstance(module, (nn.Conv2d, nn.Linear))
        layers.append((output.numel(), module.weight[0].numel()))

    with torch.device("meta"):
        network = build_backbone("resnet50")
        neck = DenseCLNeck(network.out_channels, HIDDEN_DIM, DIM)
        for module in [*network.modules(), *neck.modules()]:
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.register_forward_hook(add)
        features = network(torch.zeros(1, 3, 224, 224))
        neck(features)
    parameters = sum(p.numel() for module in (network, neck) for p in module.parameters())
    macs = sum(numbers * products for numbers, products in layers)
    return Network(macs, sum(n for n, _ in layers), parameters, features[0, 0].numel())


class Machine(NamedTuple):
    """A GPU, its links, and where the numbers come from."""

    name: str
    source: str
    flops: float  # dense, in the network's precision
    memory: float  # bytes/s
    element: int  # bytes of an activation
    local: float  # bytes/s that a GPU sends to others of its node
    remote: float  # ... and to other nodes
    price: float  # dollars a GPU-hour
    per_node: int = 8


MACHINES = {
    "v100": Machine(
        "V100", "V100 data sheet (15.7 TFLOP/s float32, 900 GB/s); EC2 p3.16xlarge: NVLink 300 "
        "GB/s both ways, 25 Gb/s for 8 GPUs, $24.48 an hour on demand",
        15.7e12, 900e9, 4, 150e9, 25e9 / 8 / 8, 24.48 / 8,
    ),
    "h100": Machine(
        "H100", "H100 SXM data sheet (989 TFLOP/s bf16 dense, 3.35 TB/s, NVLink 900 GB/s both "
        "ways); EC2 p5.48xlarge: 3,200 Gb/s for 8 GPUs, $4.916 a GPU-hour (capacity block)",
        989e12, 3.35e12, 2, 450e9, 3200e9 / 8 / 8, 4.916,
    ),
    "h200": Machine(
        "H200", "as H100, with 4.8 TB/s and $5.408 a GPU-hour (EC2 p5en.48xlarge)",
        989e12, 4.8e12, 2, 450e9, 3200e9 / 8 / 8, 5.408,
    ),
}  # fmt: skip


def roofline(network: Network, machine: Machine) -> tuple[float, float]:
    """Seconds an image needs at least: arithmetic, memory traffic; the larger one limits."""
    # Query forward and backward, key forward; 4 K D for each position and the global vector.
    flop = 4 * 2 * network.macs + 4 * (network.positions + 1) * QUEUE * DIM
    passes = 2 * FORWARD_ACCESSES + BACKWARD_ACCESSES
    traffic = passes * network.activations * machine.element
    return flop / machine.flops, traffic / machine.memory


def exchange(size: float, gpus: int, machine: Machine, kind: str) -> float:
    """Seconds to "sum" `size` bytes, or to "gather" those of each GPU: in the node and between."""
    if gpus == 1:
        return 0.0
    inside = min(gpus, machine.per_node)
    nodes = math.ceil(gpus / inside)
    if kind == "sum":
        local, remote = 2 * size * (inside - 1) / inside, 2 * size / inside * (nodes - 1) / nodes
    else:
        local, remote = size * nodes * (inside - 1), size * (nodes - 1)
    sent = local / machine.local + remote / machine.remote
    return sent / LINK + LATENCY * math.ceil(math.log2(gpus))


class Step(NamedTuple):
    """A step on G GPUs of `batch` images each; times in seconds."""

    gpus: int
    batch: float
    compute: float  # without any exchange
    gradients: float  # that they travel
    shown: float  # what of it the backward pass does not hide
    keys: float  # to gather them, which nothing hides
    shuffle: float  # that MoCo's Shuffle-BN would gather images; no part of the step here
    seconds: float
    images_per_second: float
    efficiency: float


def step_of(gpus: int, batch: float, rate: float, network: Network, machine: Machine) -> Step:
    """The step of `gpus` GPUs with `batch` images each, from one GPU's images/s."""
    compute = batch / rate + FIXED_BYTES * network.parameters / machine.memory
    gradients = exchange(4 * network.parameters, gpus, machine, "sum")
    keys = exchange(batch * 2 * DIM * 4, gpus, machine, "gather")
    # Gathered before the key encoder, and the order of rank 0 broadcast with it.
    shuffle = exchange(batch * IMAGE_BYTES, gpus, machine, "gather")
    shown = max(0.0, gradients - HIDDEN * compute)
    seconds = compute + shown + keys
    results = seconds, gpus * batch / seconds, compute / seconds
    return Step(gpus, batch, compute, gradients, shown, keys, shuffle, *results)


def hours(recipe: str, images_per_second: float) -> float:
    """Hours of a recipe; whole batches only, as the trainer drops the last."""
    images, epochs, batch, _ = RECIPES[recipe]
    return images // batch * batch * epochs / images_per_second / 3600


def measured(path: Path) -> tuple[float, int, str]:
    """Images/s, batch and name of the fastest candidate of ours in step.json.

    Raises:
        ValueError: the file has none with a rate.
    """
    rates = [
        (found["images"] / row.seconds(who), found["images"], f"{row.id}, {who}")
        for row in entries(json.loads(path.read_text(encoding="utf-8")))
        for who, found in row.found.items()
        if who != "reference"
    ]
    if not rates:
        raise ValueError(f"scale: {path} has no measured step of ours: run the step suite first")
    return max(rates)


def ms(seconds: float) -> str:
    """Milliseconds, as many digits as matter."""
    return f"{seconds * 1e3:.3g}" if seconds < 0.0995 else f"{seconds * 1e3:,.0f}"


def lines_of(header: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """Of a Markdown table."""
    return ["| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *cells]]


def markdown(rate: float, batch: int, source: str, network: Network, machine: Machine) -> str:
    """The tables."""
    arithmetic, traffic = roofline(network, machine)
    steps = [step_of(gpus, batch, rate, network, machine) for gpus in GPUS]
    cells = [
        [
            f"{s.gpus}", f"{s.images_per_second:,.0f}", f"{s.efficiency:.1%}", ms(s.seconds),
            f"{ms(s.gradients)} ({ms(s.shown)})", ms(s.keys), f"{s.gpus * s.batch:,.0f}",
            f"{QUEUE / (s.gpus * s.batch):.3g}", ms(s.shuffle),
            f"{s.gpus * s.batch / (s.seconds + s.shuffle):,.0f}",
        ]
        for s in steps
    ]  # fmt: skip
    header = ("GPUs", "images/s", "efficiency", "step", "gradients (not hidden)", "keys",
              "global batch", "steps that fill the queue", "Shuffle-BN by gathered images",
              "images/s with it")  # fmt: skip
    lines = [
        f"## {machine.name}: {rate:,.0f} images/s a GPU", "",
        f"Rate: {source}. Machine: {machine.source}.",
        f"Roofline an image: arithmetic {arithmetic * 1e6:.0f} us, memory {traffic * 1e6:.0f} us: "
        f"at most {1 / max(arithmetic, traffic):,.0f} images/s.",
        "", f"{batch} images a GPU, times in ms:", "", *lines_of(header, cells),
        "", "The paper's batch of 256 over all GPUs:", "",
    ]  # fmt: skip
    cells = []
    for s in (step_of(gpus, 256 / gpus, rate, network, machine) for gpus in GPUS[:-1]):
        line = [f"{s.gpus}", f"{s.batch:g}", f"{s.images_per_second:,.0f}", f"{s.efficiency:.1%}"]
        for recipe in RECIPES:
            needed = hours(recipe, s.images_per_second)
            line += [f"{needed:,.1f}", f"${needed * s.gpus * machine.price:,.0f}"]
        cells.append(line)
    words = [word for name in RECIPES for word in (f"{name}: hours", "cost")]
    lines += lines_of(["GPUs", "images a GPU", "images/s", "efficiency", *words], cells)
    reported = "; ".join(f"{name}, {24 * days:.0f} hours" for name, (*_, days) in RECIPES.items())
    return "\n".join([*lines, "", f"The paper's authors report, on 8 V100: {reported}.", ""])


def draw(found: Sequence[tuple[float, int, str, Network, Machine]], png: Path) -> None:
    """Images/s over GPUs, and how much of the GPUs the exchanges leave."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), dpi=110, layout="constrained")
    total, share = figure.subplots(1, 2)
    counts = [2**power for power in range(10)]
    for (rate, batch, source, network, machine), colour in zip(found, COLOURS, strict=False):
        steps = [step_of(gpus, batch, rate, network, machine) for gpus in counts]
        few = [step_of(gpus, 256 / gpus, rate, network, machine) for gpus in counts[:9]]
        label = f"{machine.name} ({source.partition(':')[0].partition(',')[0]})"
        total.plot(counts, [s.images_per_second for s in steps], color=colour, lw=2.2, label=label)
        shuffled = [s.gpus * s.batch / (s.seconds + s.shuffle) for s in steps]
        total.plot(counts, shuffled, "--", color=colour)
        share.plot(counts, [s.efficiency for s in steps], color=colour, lw=2.2)
        share.plot(counts, [s.compute / (s.seconds + s.shuffle) for s in steps], "--", color=colour)
        share.plot(counts[:9], [s.efficiency for s in few], ":", color=colour, lw=2.2)
    for style, label in (
        ("-", f"{found[0][1]} images a GPU"),
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
    parser = argparse.ArgumentParser(prog="python -m tools.scale", description=__doc__)
    parser.add_argument("--machine", nargs="+", choices=MACHINES, default=list(MACHINES))
    parser.add_argument("--step", type=Path, help="step.json of the step benchmark on one machine")
    parser.add_argument("--out", type=Path, default=Path("build/scale"))
    options = parser.parse_args(arguments)
    if options.step and len(options.machine) != 1:
        parser.error("a measured rate is that of one --machine")
    network = count()
    share = PUBLISHED * max(roofline(network, MACHINES["v100"]))
    found = []
    for name in options.machine:
        machine = MACHINES[name]
        rate, batch = share / max(roofline(network, machine)), 32
        source = f"an estimate, not a measurement: {share:.0%} of its roofline"
        if options.step:
            rate, batch, label = measured(options.step)
            source = f"measured: {label}"
        elif name == "v100":
            rate, source = PUBLISHED, PUBLISHED_SOURCE
        found.append((rate, batch, source, network, machine))
    options.out.mkdir(parents=True, exist_ok=True)
    draw(found, options.out / "scale.png")
    print("\n".join(markdown(*one) for one in found))
    print(f"wrote {options.out / 'scale.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
