"""Pre-training on 1, 8, 64 and 512 GPUs, on paper: images/s, where it bends, hours and cost.

    python -m benchmarks.scale [--machine v100|h100|h200] [--images-per-second X | --step step.json]

Without a measured rate the paper's own is taken for a V100, and for other GPUs a roofline estimate
that reaches the same share of its roofline as the paper's V100. Writes scale.md and scale.png.
Speeds are bytes, FLOP or images per second; times seconds; sizes bytes. docs/scale.md explains.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from densecl_ext.backbones import build_backbone
from densecl_ext.nn.necks import DenseCLNeck

DIM, HIDDEN, QUEUE = 128, 2048, 65536
IMAGE_BYTES = 3 * 224 * 224 * 4  # float32
# Accesses of every convolution's output in one pass of an eager network with batch norm and ReLU.
# Forward: written, read by the statistics, read and written by the norm, read and written by ReLU,
# read by the next convolution. Backward: ReLU 3, batch norm 5, both products of the convolution 4.
FORWARD_ACCESSES, BACKWARD_ACCESSES = 7, 12
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


def count(backbone: str = "resnet50") -> Network:
    """Count an encoder by running it on the meta device."""
    macs = activations = 0.0

    def add(module: nn.Module, _: object, output: Tensor) -> None:
        nonlocal macs, activations
        assert isinstance(module, (nn.Conv2d, nn.Linear))
        macs += output.numel() * module.weight[0].numel()
        activations += output.numel()

    with torch.device("meta"):
        network = build_backbone(backbone)
        neck = DenseCLNeck(network.out_channels, HIDDEN, DIM)
        for module in [*network.modules(), *neck.modules()]:
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.register_forward_hook(add)
        features = network(torch.zeros(1, 3, 224, 224))
        neck(features)
    parameters = sum(p.numel() for module in (network, neck) for p in module.parameters())
    return Network(macs, activations, parameters, features.shape[2] * features.shape[3])


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


class Assumptions(NamedTuple):
    """What no data sheet says."""

    link: float = 0.8  # share of a link's speed that a collective reaches
    latency: float = 5e-6  # seconds of one hop of a collective
    hidden: float = 0.5  # share of the step that gradients may travel behind
    fixed_bytes: float = 32.0  # a step's traffic per parameter: momentum update 12, SGD 20


def roofline(network: Network, machine: Machine) -> tuple[float, float]:
    """Seconds an image needs at least: arithmetic, memory traffic; the larger one limits."""
    # Query forward and backward, key forward; 4 K D for each position and the global vector.
    flop = 4 * 2 * network.macs + 4 * (network.positions + 1) * QUEUE * DIM
    passes = 2 * FORWARD_ACCESSES + BACKWARD_ACCESSES
    traffic = passes * network.activations * machine.element
    return flop / machine.flops, traffic / machine.memory


def exchange(size: float, gpus: int, machine: Machine, a: Assumptions, kind: str) -> float:
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
    return sent / a.link + a.latency * math.ceil(math.log2(gpus))


class Step(NamedTuple):
    """A step on G GPUs of `batch` images each; times in seconds."""

    gpus: int
    batch: float
    compute: float  # without any exchange
    gradients: float  # that they travel
    shown: float  # what of it the backward pass does not hide
    keys: float  # to gather them, which nothing hides
    shuffle: float  # that MoCo's Shuffle-BN would gather images; no part of the step here

    @property
    def seconds(self) -> float:
        return self.compute + self.shown + self.keys

    @property
    def images_per_second(self) -> float:
        return self.gpus * self.batch / self.seconds

    @property
    def shuffled_images_per_second(self) -> float:
        return self.gpus * self.batch / (self.seconds + self.shuffle)

    @property
    def efficiency(self) -> float:
        return self.compute / self.seconds


def step_of(
    gpus: int, batch: float, rate: float, network: Network, machine: Machine, a: Assumptions
) -> Step:
    """The step of `gpus` GPUs with `batch` images each, from one GPU's images/s."""
    compute = batch / rate + a.fixed_bytes * network.parameters / machine.memory
    gradients = exchange(4 * network.parameters, gpus, machine, a, "sum")
    keys = exchange(batch * 2 * DIM * 4, gpus, machine, a, "gather")
    # Gathered before the key encoder, and the order of rank 0 broadcast with it.
    shuffle = exchange(batch * IMAGE_BYTES, gpus, machine, a, "gather")
    shown = max(0.0, gradients - a.hidden * compute)
    return Step(gpus, batch, compute, gradients, shown, keys, shuffle)


def hours(recipe: str, images_per_second: float) -> float:
    """Hours of a recipe; whole batches only, as the trainer drops the last."""
    images, epochs, batch, _ = RECIPES[recipe]
    return images // batch * batch * epochs / images_per_second / 3600


def measured(path: Path, name: str | None) -> tuple[float, int, str]:
    """Images/s, batch and name of a row's candidate in step.json; the fastest where none is named.

    Raises:
        ValueError: the file has no such candidate with a rate.
    """
    rates = {}
    for benchmark in json.loads(path.read_text(encoding="utf-8"))["benchmarks"]:
        info = benchmark["extra_info"]
        for who, found in info["candidates"].items():
            rate = found["images"] / statistics.median(found["seconds"])
            if (label := f"{info['row']}, {who}") == (name or label) and "reference" not in who:
                rates[rate] = (rate, int(found["images"]), label)
    if not rates:
        raise ValueError(f"scale: {path} has no measured configuration {name or ''}".rstrip())
    return rates[max(rates)]


def ms(seconds: float) -> str:
    """Milliseconds, as many digits as matter."""
    return f"{seconds * 1e3:.3g}" if seconds < 0.0995 else f"{seconds * 1e3:,.0f}"


def lines_of(header: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """Of a Markdown table."""
    return ["| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *cells]]


def markdown(rate: float, batch: int, source: str, n: Network, m: Machine, a: Assumptions) -> str:
    """The tables."""
    arithmetic, traffic = roofline(n, m)
    cells = [
        [
            f"{s.gpus}", f"{s.images_per_second:,.0f}", f"{s.efficiency:.1%}", ms(s.seconds),
            f"{ms(s.gradients)} ({ms(s.shown)})", ms(s.keys), f"{s.gpus * s.batch:,.0f}",
            f"{QUEUE / (s.gpus * s.batch):.3g}", ms(s.shuffle),
            f"{s.shuffled_images_per_second:,.0f}",
        ]
        for s in (step_of(gpus, batch, rate, n, m, a) for gpus in GPUS)
    ]  # fmt: skip
    header = ("GPUs", "images/s", "efficiency", "step", "gradients (not hidden)", "keys",
              "global batch", "steps that fill the queue", "Shuffle-BN by gathered images",
              "images/s with it")  # fmt: skip
    lines = [
        f"## {m.name}: {rate:,.0f} images/s a GPU", "", f"Rate: {source}. Machine: {m.source}.",
        f"Roofline an image: arithmetic {arithmetic * 1e6:.0f} us, memory {traffic * 1e6:.0f} us: "
        f"at most {1 / max(arithmetic, traffic):,.0f} images/s.",
        "", f"{batch} images a GPU, times in ms:", "", *lines_of(header, cells),
        "", "The paper's batch of 256 over all GPUs:", "",
    ]  # fmt: skip
    cells = []
    for s in (step_of(gpus, 256 / gpus, rate, n, m, a) for gpus in GPUS if gpus <= 256):
        line = [f"{s.gpus}", f"{s.batch:g}", f"{s.images_per_second:,.0f}", f"{s.efficiency:.1%}"]
        for recipe in RECIPES:
            needed = hours(recipe, s.images_per_second)
            line += [f"{needed:,.1f}", f"${needed * s.gpus * m.price:,.0f}"]
        cells.append(line)
    words = [word for name in RECIPES for word in (f"{name}: hours", "cost")]
    lines += lines_of(["GPUs", "images a GPU", "images/s", "efficiency", *words], cells)
    reported = "; ".join(f"{name}, {24 * days:.0f} hours" for name, (*_, days) in RECIPES.items())
    return "\n".join([*lines, "", f"The paper's authors report, on 8 V100: {reported}.", ""])


def draw(
    found: Sequence[tuple[Machine, float, int, str]], n: Network, a: Assumptions, png: Path
) -> None:
    """Images/s over GPUs, and how much of the GPUs the exchanges leave."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), dpi=110, layout="constrained")
    total, share = figure.subplots(1, 2)
    counts = [2**power for power in range(10)]
    for (machine, rate, batch, source), colour in zip(found, COLOURS, strict=False):
        steps = [step_of(gpus, batch, rate, n, machine, a) for gpus in counts]
        few = [step_of(gpus, 256 / gpus, rate, n, machine, a) for gpus in counts[:9]]
        label = f"{machine.name} ({source.partition(':')[0].partition(',')[0]})"
        total.plot(counts, [s.images_per_second for s in steps], color=colour, lw=2.2, label=label)
        total.plot(counts, [s.shuffled_images_per_second for s in steps], "--", color=colour)
        share.plot(counts, [s.efficiency for s in steps], color=colour, lw=2.2)
        share.plot(counts, [s.compute / (s.seconds + s.shuffle) for s in steps], "--", color=colour)
        share.plot(counts[:9], [s.efficiency for s in few], ":", color=colour, lw=2.2)
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
    names = ["v100", "h100", "h200"]
    parser.add_argument("--machine", nargs="+", choices=MACHINES, default=names)
    parser.add_argument("--backbone", default="resnet50", help="torchvision's name")
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--images-per-second", type=float, help="of one GPU")
    given.add_argument("--step", type=Path, help="step.json of the step benchmark")
    parser.add_argument("--config", help='which of it, as in "step-256, CUDA graph"')
    parser.add_argument("--batch", type=int, help="images a GPU; default: the measured, or 32")
    parser.add_argument("--price", type=float, help="dollars a GPU-hour")
    for name, value in Assumptions()._asdict().items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=float, default=value, help="see Assumptions")
    parser.add_argument("--out", type=Path, default=Path("build/scale"))
    options = parser.parse_args(arguments)
    if (options.step or options.images_per_second) and len(options.machine) != 1:
        parser.error("a given rate is that of one --machine")
    assumed = Assumptions(*(getattr(options, name) for name in Assumptions._fields))
    network = count(options.backbone)
    share = PUBLISHED * max(roofline(network, MACHINES["v100"]))
    found, texts = [], []
    for name in options.machine:
        machine, batch = MACHINES[name], options.batch or 32
        rate = share / max(roofline(network, machine))
        source = f"an estimate, not a measurement: {share:.0%} of its roofline"
        if options.step:
            rate, batch, label = measured(options.step, options.config)
            batch, source = options.batch or batch, f"measured: {label}"
        elif options.images_per_second:
            rate, source = options.images_per_second, "given on the command line"
        elif name == "v100":
            rate, source = PUBLISHED, PUBLISHED_SOURCE
        if options.price is not None:
            machine = machine._replace(price=options.price)
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
