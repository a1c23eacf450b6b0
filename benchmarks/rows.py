"""The one table: what is measured on which device, against whom, and what is asked of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from benchmarks.cases import (
    FOREACH,
    FORMULA,
    INDEXED,
    PUBLISHED_QUEUE,
    Case,
    dense_match,
    ema_update_,
    enqueue_,
)
from benchmarks.losses import BEFORE, CUDNN, FLASH, info_nce
from benchmarks.step import ENCODERS, GRAPH, VIT, step, step_loss

MB, US = 1e6, 1e-6
M, K = 1568, 65536  # 32 images of 7 x 7 positions, MoCo's queue
GPU_M = 12544  # 256 images
AVX2 = "ours [DENSECL_CPU_ISA=avx2]"
SHORT = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
SWEEPS = ("base", "overlap", "uniform", "threshold")  # as csrc's DENSECL_CUDA_SWEEP has them


class Asked(NamedTuple):
    """One demand.

    Attributes:
        measure: One of verdicts.DEMANDS; peak bytes: "memory", "extra" and "saved"; waits of the
            host: "syncs"; the share of our parts in a step: "parts".
        against: A baseline or label of the row; "" for none. "a | b": the faster of them.
        bound: What the value must reach, or not exceed.
        who: The candidate that it is asked of.
    """

    measure: str
    against: str
    bound: float
    who: str = "ours"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        id: Its name on the command line.
        case: What ours and the baselines compute.
        baselines: Names of the case's candidates.
        asked: The demands.
        seconds: For all rounds.
        beside: Other cases that ours runs in the same rounds, by label, to compare with itself.
        note: What the title says behind the case's own.
    """

    id: str
    case: partial[Case]
    baselines: tuple[str, ...] = ()
    asked: tuple[Asked, ...] = ()
    seconds: float = 3.0
    beside: dict[str, partial[Case]] = field(default_factory=dict)
    note: str = ""


def faster(than: str, times: float, who: str = "ours") -> Asked:
    return Asked("speed-up", than, times, who)


def cpu_rows() -> list[Row]:
    """A CPU's: the loss, other feature sizes beside D = 128, the other ops, the charts' sizes."""
    both = {t: partial(info_nce, rows=M, queue_length=K, dtype=t) for t in ("float32", "bfloat16")}
    exact, half = both.values()
    most = ("eager", "torch.compile", FLASH, "lightly")
    found = [
        Row("nce-f32", exact, most, (faster("eager", 7.0), faster(FLASH, 2.3)), 16.0),
        Row("nce-bf16", half, ("eager", "eager autocast", FLASH),
            (faster("eager", 12.0), faster(FLASH, 4.0)), 12.0),
        Row("nce-avx2-f32", exact, (AVX2, "ours [DENSECL_CPU_ISA=serial]", "eager"),
            (faster("eager", 3.0, AVX2),), 8.0, note=", by instruction set"),
        Row("nce-m32-f32", partial(exact, rows=32), ("eager", FLASH, "lightly"),
            (faster("eager", 3.0),), 6.0),
        Row("nce-m256-f32", partial(exact, rows=256), most, (faster("eager", 3.0),), 6.0),
        Row("nce-m12544-bf16", partial(half, rows=12544), (),
            (Asked("extra", "", 60 * MB), Asked("time", "M=1,568", 8 * 1.1)), 6.0,
            beside={"M=1,568": half}),
        Row("nce-k1048576-bf16", partial(half, queue_length=2**20), (),
            (Asked("time", "K=65,536", 16 * 1.1), Asked("memory", "K=65,536", 1.1)), 10.0,
            beside={"K=65,536": half}),
    ]  # fmt: skip
    for dtype, case in both.items():
        asked = (Asked("time", "loss and gradient", 0.6),)
        found.append(Row(f"nce-loss-{SHORT[dtype]}", partial(case, gradient=False),
                         ("eager",) * (case is exact), asked, 6.0,
                         beside={"loss and gradient": case}))  # fmt: skip
    for dtype, case in both.items():
        for size, other in ((64, 128), (96, 128), (192, 128), (256, 128), (100, 128), (1, 64)):
            label = f"D={other}"
            like = Asked("time", label, 2.0) if size % 32 else Asked("rate", label, 0.8)
            found.append(Row(f"nce-d{size}-{SHORT[dtype]}", partial(case, features=size), (),
                             (like,), 2.0, {label: partial(case, features=other)}))  # fmt: skip
    last = partial(dense_match, pairs=32, dtype="bfloat16", channels_last=True)
    found += [
        Row("match", partial(dense_match, pairs=32), (FORMULA, "torch.compile"),
            (faster(FORMULA, 6.0),), 4.0),
        Row("match-bf16-last", last, (FORMULA,), (), 2.0),
        Row("ema", partial(ema_update_), ("loop", *FOREACH),
            (faster("loop", 6.0), faster(FOREACH[1], 1.15)), 6.0),
        # some pages of stack; a tensor would show
        Row("enqueue", partial(enqueue_, batch=256, queue_length=K), (PUBLISHED_QUEUE, *INDEXED),
            (faster(PUBLISHED_QUEUE, 3.0), Asked("extra", "", 0.25 * MB)), 3.0),
        # A grid of 14 x 14 positions is four times a ResNet's: the formula's logits show.
        Row("step-vit", partial(step, batch=8, backbone=VIT, precision="fp32"),
            ("reference", ENCODERS), (), 3.0),
    ]  # fmt: skip
    sizes = [(6272, K, "float32"), (12544, K, "float32")]
    sizes += [(m, K, "bfloat16") for m in (32, 256, 6272)]
    sizes += [(M, k, dtype) for dtype in both for k in (4096, 16384, 262144)]
    for m, k, dtype in sizes:
        found.append(Row(f"scale-m{m}-k{k}-{SHORT[dtype]}",
                         partial(both[dtype], rows=m, queue_length=k),
                         ("eager",) * (dtype == "float32")))  # fmt: skip
    return found


def gpu_rows() -> list[Row]:
    """A GPU's, in the order of what is asked of them."""
    first = partial(info_nce, rows=GPU_M, queue_length=K, dtype="bfloat16")
    attention, compiled = (FLASH, CUDNN), ("torch.compile", "torch.compile autocast")
    large, portable = "M=12,544 K=65,536", "ours [DENSECL_CUDA_KERNEL=portable]"
    # The steps of Hopper's schedule, each with the ones before it; ours has all.
    kernels = *(f"ours [DENSECL_CUDA_SWEEP={name}]" for name in SWEEPS), "ours [DENSECL_CUDA_PDL=0]"
    found = [
        Row("nce", first, (BEFORE, *attention, "eager", "eager TF32", "eager autocast"),
            (Asked("seconds", "", 620 * US), Asked("seconds", "", 570 * US),
             faster(" | ".join(attention), 1.25), faster("eager", 8.0),
             faster("eager autocast", 5.0), Asked("extra", "", 30 * MB)), 8.0),
        Row("nce-m256", partial(first, rows=256), (BEFORE, *attention, "eager autocast"),
            (Asked("seconds", "", 25 * US),), 2.0),
        Row("enqueue", partial(enqueue_, batch=256, queue_length=K), (PUBLISHED_QUEUE, *INDEXED),
            (Asked("seconds", "", 6 * US), Asked("syncs", "", 0)), 1.0),
        Row("step-loss", partial(step_loss, pairs=256), ("reference",)),
        Row("nce-sweep", first, (*kernels, portable), (), 5.0, note=", by kernel"),
        Row("nce-large", partial(first, rows=4 * GPU_M, queue_length=2**20), (),
            (Asked("rate", large, 0.8),), beside={large: first}),
        Row("nce-f32", partial(first, dtype="float32"), ("eager", "eager TF32", FLASH),
            (faster("eager", 2.0),), 4.0),
        Row("nce-loss", partial(first, gradient=False), (),
            (Asked("time", "loss and gradient", 0.6),), 2.0, beside={"loss and gradient": first}),
        Row("ema", partial(ema_update_), ("loop", *FOREACH),
            (Asked("copy", "", 0.9), faster(FOREACH[1], 1.05), faster("loop", 10.0))),
    ]  # fmt: skip
    for dtype, most in (("float32", 75), ("bfloat16", 45)):
        for short, last in (("", False), ("-cl", True)):
            grids = partial(dense_match, pairs=256, dtype=dtype, channels_last=last)
            asked = Asked("seconds", "", most * US), faster(FORMULA, 5.0)
            found.append(Row(f"match-{SHORT[dtype]}{short}", grids, (FORMULA,), asked))
    found += [
        Row("nce-compile", first, compiled, (faster(" | ".join(compiled), 3.0),),
            note=", compiled"),
        Row("nce-f16", partial(first, dtype="float16"), (portable, *attention), (), 2.0),
    ]  # fmt: skip
    for size in (64, 96, 192, 256):
        case = partial(first, features=size)
        found.append(Row(f"nce-d{size}", case, seconds=1.0, beside={"D=128": first}))
    sizes = [(32, K), (1568, K), (6272, K), (4 * GPU_M, K)]
    sizes += [(GPU_M, 4096), (GPU_M, 16384), (GPU_M, 262144), (GPU_M, 2**20)]
    for m, k in sizes:
        case = partial(first, rows=m, queue_length=k)
        found.append(Row(f"scale-m{m}-k{k}", case, ("eager",), seconds=1.0))
    return found


def step_rows() -> list[Row]:
    """The whole step; a capture comes last, for one that fails keeps others from theirs."""
    large, small = partial(step, batch=256), partial(step, batch=32)
    compiled = [Row(f"step-compiled-{case.keywords['batch']}", case, ("compiled",), (), 8.0,
                    note=", compiled") for case in (large, small)]  # fmt: skip
    return [
        Row("step-256", large, ("reference", "lambda 0", GRAPH),
            (faster("reference", 1.1), Asked("saved", "reference", 10e9),
             Asked("time", "lambda 0", 1.01), Asked("parts", "", 0.02)), 8.0),
        Row("step-32", small, ("reference", GRAPH),
            (faster("reference", 1.3), faster("reference", 1.6, GRAPH)), 8.0),
        Row("step-vit", partial(large, backbone=VIT), seconds=8.0),
        *compiled,
    ]  # fmt: skip


SUITES = {"cpu": cpu_rows, "gpu": gpu_rows, "step": step_rows}


def rows(suite: str) -> list[Row]:
    """In the table's order; a run that ends early has the first."""
    return SUITES[suite]()
