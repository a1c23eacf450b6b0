"""The one table: what is measured on which device, against whom, and what is asked of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from benchmarks.cases import Case, EmaCase, EnqueueCase, MatchCase
from benchmarks.losses import InfoNceCase
from benchmarks.step import COMPARED, VIT, StepCase, StepLossCase

MB, US = 1e6, 1e-6
M, K, D = 1568, 65536, 128  # 32 images of 7 x 7 positions, MoCo's queue, MoCo's head
GPU_M = 12544  # 256 images
SHORT = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
ATTENTION = "flash attention | cuDNN attention"
SWEEPS = ("base", "overlap", "uniform", "threshold")  # as csrc's DENSECL_CUDA_SWEEP has them
FORMULA = "normalise + matmul + max"


class Asked(NamedTuple):
    """One demand.

    Attributes:
        measure: "speed-up": the other's time over ours. "time": our time over the other's. "rate":
            our FLOP/s over the other's. "memory": peak extra bytes of ours over the other's.
            "extra": these bytes. "saved": bytes that ours takes less. "seconds": our time. "copy":
            our bytes/s over a copy's. "syncs": how often ours makes the host wait. "parts": share
            of our parts in a step. "largest": our largest batch over the other's.
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
        title: Its name for people.
        case: What ours and the baselines compute.
        baselines: Names of the case's candidates.
        beside: Other cases that ours runs in the same rounds, by label, to compare with itself.
        asked: The demands.
        isa: CPU instruction set forced on ours.
        seconds: Time for all rounds.
        memory: Candidates (or labels of `beside`) whose peak memory is measured.
    """

    id: str
    title: str
    case: Case
    baselines: tuple[str, ...] = ()
    beside: dict[str, Case] = field(default_factory=dict)
    asked: tuple[Asked, ...] = ()
    isa: str | None = None
    seconds: float = 3.0
    memory: tuple[str, ...] = ("ours",)


def faster(than: str, times: float, who: str = "ours") -> Asked:
    return Asked("speed-up", than, times, who)


def nce(id: str, case: InfoNceCase, *baselines: str, title: str = "", **named: Any) -> Row:
    """A row of the loss, as in `info_nce, M=1,568 K=65,536 D=128, float32`."""
    what = "info_nce" if case.gradient else "info_nce, loss alone"
    size = f"M={case.rows:,} K={case.queue_length:,} D={case.features}"
    return Row(id, f"{what}, {size}, {case.dtype}{title}", case, baselines, **named)


def match(
    id: str, pairs: int, dtype: str, last: str, *asked: Asked, others: int = 1, **named: Any
) -> Row:
    """A row of dense_match; `last` says channels last in the title's words, or nothing."""
    case = MatchCase(pairs, 2048, 49, dtype, channels_last=bool(last))
    title = f"dense_match, N={pairs} C=2,048 49x49, {dtype}{last}"
    return Row(id, title, case, MatchCase.names[1 : 1 + others], asked=asked, **named)


def ema(*asked: Asked, **named: Any) -> Row:
    title = "ema_update_, ResNet-50's 161 parameters"
    return Row("ema", title, EmaCase(), EmaCase.names[1:], asked=asked, **named)


def enqueue(*asked: Asked, **named: Any) -> Row:
    title, names = "enqueue_, B=256 K=65,536 D=128, float32", EnqueueCase.names
    case = EnqueueCase(256, K)
    return Row("enqueue", title, case, names[1:], asked=asked, memory=names, **named)


def cpu_rows() -> list[Row]:
    """A CPU's: the loss, other feature sizes beside D = 128, the other ops, the charts' sizes."""
    both = {dtype: InfoNceCase(M, K, D, dtype) for dtype in ("float32", "bfloat16")}
    exact, half = both.values()
    most = ("eager", "flash attention", "lightly")
    found = [
        nce("nce-f32", exact, "eager", "torch.compile", *most[1:], seconds=16.0,
            memory=("ours", *most),
            asked=(faster("eager", 7.0), faster("flash attention", 2.3))),
        nce("nce-bf16", half, "eager", "eager autocast", "flash attention", seconds=12.0,
            memory=("ours", "eager autocast", "flash attention"),
            asked=(faster("eager", 12.0), faster("flash attention", 4.0))),
        nce("nce-avx2-f32", exact, "eager", title=", AVX2 forced", isa="avx2", seconds=8.0,
            memory=(), asked=(faster("eager", 3.0),)),
        nce("nce-m32-f32", InfoNceCase(32, K, D), *most, seconds=6.0, memory=("ours", "eager"),
            asked=(faster("eager", 3.0),)),
        nce("nce-m256-f32", InfoNceCase(256, K, D), "eager", "torch.compile", *most[1:],
            seconds=6.0, memory=("ours", "eager"), asked=(faster("eager", 3.0),)),
        nce("nce-m12544-bf16", InfoNceCase(12544, K, D, "bfloat16"), beside={"M=1,568": half},
            seconds=6.0,
            asked=(Asked("extra", "", 60 * MB), Asked("time", "M=1,568", 8 * 1.1))),
        nce("nce-k1048576-bf16", InfoNceCase(M, 2**20, D, "bfloat16"), beside={"K=65,536": half},
            seconds=10.0, memory=("ours", "K=65,536"),
            asked=(Asked("time", "K=65,536", 16 * 1.1), Asked("memory", "K=65,536", 1.1))),
    ]  # fmt: skip
    for dtype, case in both.items():
        found.append(
            nce(f"nce-loss-{SHORT[dtype]}", replace(case, gradient=False),
                *(("eager",) if case is exact else ()), beside={"loss and gradient": case},
                seconds=6.0, asked=(Asked("time", "loss and gradient", 0.6),))
        )  # fmt: skip
    for dtype, case in both.items():
        for size, other in ((64, 128), (96, 128), (192, 128), (256, 128), (100, 128), (1, 64)):
            label = f"D={other}"
            like = Asked("time", label, 2.0) if size % 32 else Asked("rate", label, 0.8)
            found.append(
                nce(f"nce-d{size}-{SHORT[dtype]}", replace(case, features=size), asked=(like,),
                    beside={label: replace(case, features=other)}, seconds=2.0, memory=())
            )  # fmt: skip
    found += [
        match("match", 32, "float32", "", faster(FORMULA, 6.0), others=2, seconds=4.0,
              memory=("ours", FORMULA)),
        match("match-bf16-last", 32, "bfloat16", ", channels last", seconds=2.0, memory=()),
        ema(faster("loop", 6.0), faster("_foreach_lerp_", 1.15), seconds=6.0,
            memory=EmaCase.names),
        # some pages of stack; a tensor would show
        enqueue(faster("clone + slice assignment", 3.0), Asked("extra", "", 0.25 * MB)),
    ]  # fmt: skip
    sizes = [(6272, K, "float32"), (12544, K, "float32")]
    sizes += [(m, K, "bfloat16") for m in (32, 256, 6272)]
    sizes += [(M, k, dtype) for dtype in both for k in (4096, 16384, 262144)]
    for m, k, dtype in sizes:
        others = ("eager",) if dtype == "float32" else ()
        case, id = InfoNceCase(m, k, D, dtype), f"scale-m{m}-k{k}-{SHORT[dtype]}"
        found.append(nce(id, case, *others, memory=("ours", *others)))
    return found


def gpu_rows() -> list[Row]:
    """A GPU's, in the order of what is asked of them."""
    first = InfoNceCase(GPU_M, K, D, "bfloat16")
    before, attention = "ours, before backward", ("flash attention", "cuDNN attention")
    large, portable = "M=12,544 K=65,536", "ours [DENSECL_CUDA_KERNEL=portable]"
    found = [
        nce("nce", first, before, *attention, "eager", "eager TF32", "eager autocast",
            seconds=8.0, memory=("ours", "flash attention", "eager", "eager autocast"),
            asked=(Asked("seconds", "", 620 * US), Asked("seconds", "", 570 * US),
                   faster(ATTENTION, 1.25), faster("eager", 8.0), faster("eager autocast", 5.0),
                   Asked("extra", "", 30 * MB))),
        # The steps of Hopper's schedule, each with the ones before it; ours has all.
        nce("nce-sweep", first, *(f"ours [DENSECL_CUDA_SWEEP={step}]" for step in SWEEPS),
            "ours [DENSECL_CUDA_PDL=0]", portable, title=", by kernel", seconds=5.0, memory=()),
        nce("nce-m256", replace(first, rows=256), before, *attention, "eager autocast",
            seconds=2.0, memory=("ours", "eager autocast"),
            asked=(Asked("seconds", "", 25 * US),)),
        nce("nce-large", replace(first, rows=4 * GPU_M, queue_length=2**20), beside={large: first},
            asked=(Asked("rate", large, 0.8),)),
        nce("nce-f32", replace(first, dtype="float32"), "eager", "eager TF32", "flash attention",
            seconds=4.0, asked=(faster("eager", 2.0),)),
        nce("nce-loss", replace(first, gradient=False), beside={"loss and gradient": first},
            seconds=2.0, asked=(Asked("time", "loss and gradient", 0.6),)),
        ema(Asked("copy", "", 0.9), faster("_foreach_lerp_", 1.05), faster("loop", 10.0),
            memory=("ours", "loop")),
        enqueue(Asked("seconds", "", 6 * US), Asked("syncs", "", 0), seconds=1.0),
    ]  # fmt: skip
    for dtype, most in (("float32", 75), ("bfloat16", 45)):
        for short, last in (("", ""), ("-cl", ", channels-last")):
            asked = Asked("seconds", "", most * US), faster(FORMULA, 5.0)
            found.append(match(f"match-{SHORT[dtype]}{short}", 256, dtype, last, *asked))
    step, half = StepLossCase(256, K, D), replace(first, dtype="float16")
    found += [
        Row("step-loss", "matching and both losses, N=256 K=65,536, bfloat16", step,
            StepLossCase.names[1:], memory=StepLossCase.names),
        nce("nce-compile", first, "torch.compile", "torch.compile autocast", title=", compiled",
            memory=(), asked=(faster("torch.compile | torch.compile autocast", 3.0),)),
        nce("nce-f16", half, portable, *attention, seconds=2.0, memory=()),
    ]  # fmt: skip
    for size in (64, 96, 192, 256):
        found.append(nce(f"nce-d{size}", replace(first, features=size), beside={"D=128": first},
                         seconds=1.0, memory=()))  # fmt: skip
    sizes = [(32, K), (1568, K), (6272, K), (4 * GPU_M, K)]
    sizes += [(GPU_M, 4096), (GPU_M, 16384), (GPU_M, 262144), (GPU_M, 2**20)]
    for m, k in sizes:
        case, id = replace(first, rows=m, queue_length=k), f"scale-m{m}-k{k}"
        found.append(nce(id, case, "eager", seconds=1.0, memory=("ours", "eager")))
    return found


def step_rows() -> list[Row]:
    """The whole step; a capture comes last, for one that fails keeps others from theirs."""
    graph = "CUDA graph"

    def row(id: str, title: str, batch: int, *others: str, **named: Any) -> Row:
        given = {"backbone": named.pop("backbone")} if "backbone" in named else {}
        case = StepCase(batch, **given)
        return Row(id, f"training step, {title}", case, others, memory=(), seconds=8.0, **named)

    return [
        row("step-256", "ResNet-50, batch 256", 256, "reference", "lambda 0", graph,
            asked=(faster("reference", 1.1), Asked("saved", "reference", 10e9),
                   Asked("time", "lambda 0", 1.01), Asked("parts", "", 0.02))),
        row("step-32", "ResNet-50, batch 32", 32, "reference", graph,
            asked=(faster("reference", 1.3), faster("reference", 1.6, graph))),
        row("step-vit", "ViT-S/16, batch 256", 256, backbone=VIT),
        row("step-largest", "ResNet-50, the largest batch that fits", 0, *COMPARED[1:],
            asked=(Asked("largest", "reference", 1.3),)),
        row("step-compiled-256", "ResNet-50, batch 256, compiled", 256, "compiled"),
        row("step-compiled-32", "ResNet-50, batch 32, compiled", 32, "compiled"),
    ]  # fmt: skip


SUITES = {"cpu": cpu_rows, "gpu": gpu_rows, "step": step_rows}


def rows(suite: str) -> list[Row]:
    """In the table's order; a run that ends early has the first."""
    return SUITES[suite]()
