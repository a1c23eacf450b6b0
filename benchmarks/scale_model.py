"""What a pre-training step costs on G GPUs: arithmetic alone, every assumption a named field.

Speeds are bytes, FLOP or images per second; times seconds; sizes bytes. docs/scale.md uses it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

DIM, HIDDEN, QUEUE = 128, 2048, 65536
IMAGE_BYTES = 3 * 224 * 224 * 4  # float32
# Accesses of every convolution's output in one pass of an eager network with batch norm and ReLU.
# Forward: written, read by the statistics, read and written by the norm, read and written by ReLU,
# read by the next convolution. Backward: ReLU 3, batch norm 5, both products of the convolution 4.
FORWARD_ACCESSES, BACKWARD_ACCESSES = 7, 12


@dataclass(frozen=True)
class Network:
    """An encoder at 224 pixels, per image; see :func:`count`.

    Attributes:
        macs: multiply-adds of a forward, heads included.
        activations: numbers that its convolutions write.
        parameters: trainable weights, both heads included.
        positions: of the dense grid.
    """

    macs: float
    activations: float
    parameters: float
    positions: int


def count(backbone: str = "resnet50") -> Network:
    """Count an encoder by running it on the meta device."""
    import torch
    from torch import Tensor, nn

    from densecl_ext.backbones import build_backbone
    from densecl_ext.nn.necks import DenseCLNeck

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


@dataclass(frozen=True)
class Machine:
    """A GPU, its links, and where the numbers come from.

    Attributes:
        name: as people say it.
        source: of the numbers.
        flops: dense FLOP/s in the network's precision.
        memory: bytes/s.
        element: bytes of an activation.
        local: bytes/s that a GPU sends to others of its node (one direction).
        remote: bytes/s that a GPU sends to other nodes, its share of the node's network.
        per_node: GPUs of a node.
        price: of a GPU-hour, in dollars.
    """

    name: str
    source: str
    flops: float
    memory: float
    element: int
    local: float
    remote: float
    per_node: int
    price: float


MACHINES = {
    "v100": Machine(
        "V100", "V100 data sheet (15.7 TFLOP/s float32, 900 GB/s); EC2 p3.16xlarge: NVLink 300 "
        "GB/s both ways, 25 Gb/s for 8 GPUs, $24.48 an hour on demand",
        15.7e12, 900e9, 4, 150e9, 25e9 / 8 / 8, 8, 24.48 / 8,
    ),
    "h100": Machine(
        "H100", "H100 SXM data sheet (989 TFLOP/s bf16 dense, 3.35 TB/s, NVLink 900 GB/s both "
        "ways); EC2 p5.48xlarge: 3,200 Gb/s for 8 GPUs, $4.916 a GPU-hour (capacity block)",
        989e12, 3.35e12, 2, 450e9, 3200e9 / 8 / 8, 8, 4.916,
    ),
    "h200": Machine(
        "H200", "as H100, with 4.8 TB/s and $5.408 a GPU-hour (EC2 p5en.48xlarge)",
        989e12, 4.8e12, 2, 450e9, 3200e9 / 8 / 8, 8, 5.408,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Assumptions:
    """What no data sheet says.

    Attributes:
        link: share of a link's speed that a collective reaches.
        latency: seconds of one hop of a collective.
        hidden: share of the step (the query's backward pass) that gradients may travel behind.
        fixed_bytes: memory traffic of a step whatever its batch, per parameter: momentum update 12,
            SGD 20 (reads of weight, gradient and momentum, writes of weight and momentum).
    """

    link: float = 0.8
    latency: float = 5e-6
    hidden: float = 0.5
    fixed_bytes: float = 32.0


def roofline(network: Network, machine: Machine) -> tuple[float, float]:
    """Seconds an image needs at least: arithmetic, memory traffic; the larger one limits.

    Query forward and backward and key forward: 4 forwards of arithmetic. The losses: 4 K D FLOP for
    each of the positions and the global vector.
    """
    flop = 4 * 2 * network.macs + 4 * (network.positions + 1) * QUEUE * DIM
    passes = 2 * FORWARD_ACCESSES + BACKWARD_ACCESSES
    traffic = passes * network.activations * machine.element
    return flop / machine.flops, traffic / machine.memory


def estimated_rate(network: Network, machine: Machine, share: float) -> float:
    """Images/s of one GPU that reaches such a share of its roofline."""
    return share / max(roofline(network, machine))


def split(gpus: int, machine: Machine) -> tuple[int, int]:
    """GPUs of a node that take part, and nodes."""
    inside = min(gpus, machine.per_node)
    return inside, math.ceil(gpus / inside)


def all_reduce(size: float, gpus: int, machine: Machine, a: Assumptions) -> float:
    """Seconds to sum `size` bytes: scatter within the node, sum over nodes, gather within."""
    inside, nodes = split(gpus, machine)
    local = 2 * size * (inside - 1) / inside / (machine.local * a.link)
    remote = 2 * size / inside * (nodes - 1) / nodes / (machine.remote * a.link)
    return local + remote + _hops(gpus, a)


def all_gather(size: float, gpus: int, machine: Machine, a: Assumptions) -> float:
    """Seconds until every GPU has the `size` bytes of each: over nodes first, then within."""
    inside, nodes = split(gpus, machine)
    remote = size * (nodes - 1) / (machine.remote * a.link)
    local = size * nodes * (inside - 1) / (machine.local * a.link)
    return local + remote + _hops(gpus, a)


def _hops(gpus: int, a: Assumptions) -> float:
    return a.latency * math.ceil(math.log2(gpus)) if gpus > 1 else 0.0


@dataclass(frozen=True)
class Step:
    """A step on G GPUs.

    Attributes:
        gpus: G.
        batch: images a GPU.
        compute: seconds without any exchange.
        gradients: seconds that gradients travel.
        gradients_shown: what of it the backward pass does not hide.
        keys: seconds to gather keys, which nothing hides.
        shuffle: seconds that MoCo's Shuffle-BN would gather images; not part of the step here.
        seconds: the step.
    """

    gpus: int
    batch: float
    compute: float
    gradients: float
    gradients_shown: float
    keys: float
    shuffle: float
    seconds: float

    @property
    def images_per_second(self) -> float:
        """Of all GPUs together."""
        return self.gpus * self.batch / self.seconds

    @property
    def shuffled_images_per_second(self) -> float:
        """The same with the gathered images of MoCo's Shuffle-BN."""
        return self.gpus * self.batch / (self.seconds + self.shuffle)

    @property
    def efficiency(self) -> float:
        """Share of what G separate GPUs would reach."""
        return self.compute / self.seconds


def step(
    gpus: int, batch: float, rate: float, network: Network, machine: Machine, a: Assumptions
) -> Step:
    """The step of `gpus` GPUs with `batch` images each, from one GPU's images/s."""
    compute = batch / rate + a.fixed_bytes * network.parameters / machine.memory
    gradients = all_reduce(4 * network.parameters, gpus, machine, a) if gpus > 1 else 0.0
    shown = max(0.0, gradients - a.hidden * compute)
    keys = all_gather(batch * 2 * DIM * 4, gpus, machine, a) if gpus > 1 else 0.0
    # Gathered before the key encoder, and the order of rank 0 broadcast with it.
    shuffle = all_gather(batch * IMAGE_BYTES, gpus, machine, a) if gpus > 1 else 0.0
    seconds = compute + shown + keys
    return Step(gpus, batch, compute, gradients, shown, keys, shuffle, seconds)


@dataclass(frozen=True)
class Recipe:
    """A run of the paper, and what its authors report for 8 V100 (days)."""

    name: str
    images: int
    epochs: int
    batch: int
    published_days: float


RECIPES = (
    Recipe("COCO, 800 epochs", 118_287, 800, 256, 1.0),
    Recipe("ImageNet, 200 epochs", 1_281_167, 200, 256, 2.3),
)


def hours(recipe: Recipe, images_per_second: float) -> float:
    """Hours of a recipe; whole batches only, as the trainer drops the last."""
    images = recipe.images // recipe.batch * recipe.batch
    return images * recipe.epochs / images_per_second / 3600
