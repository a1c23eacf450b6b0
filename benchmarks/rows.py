"""The one table: what is measured on which device, against whom, and what is asked of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from benchmarks.cases import Case, EmaCase, EnqueueCase, MatchCase
from benchmarks.losses import InfoNceCase
from benchmarks.step import VIT, StepCase, StepLossCase

MB, US = 1e6, 1e-6
M, K, D = 1568, 65536, 128  # 32 images of 7 x 7 positions, MoCo's queue, MoCo's head
GPU_M = 12544  # 256 images
SHORT = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
ATTENTION = "flash attention | cuDNN attention"
SWEEPS = ("base", "overlap", "uniform", "threshold")  # as csrc's DENSECL_CUDA_SWEEP has them
FORMULA = "normalise + matmul + max"
GRAPH = "CUDA graph"


class Asked(NamedTuple):
    """One demand.

    Attributes:
        measure: "speed-up": the other's time over ours. "time": our time over the other's. "rate":
            our FLOP/s over the other's. "memory": peak extra bytes of ours over the other's.
            "extra": these bytes. "saved": bytes that ours takes less. "seconds": our time. "copy":
            our bytes/s over a copy's. "syncs": how often ours makes the host wait. "parts": share
            of our parts in a step.
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
        memory: Candidates (or labels of `beside`) whose peak memory is measured.
        beside: Other cases that ours runs in the same rounds, by label, to compare with itself.
        isa: CPU instruction set forced on ours.
        note: What the title says behind the case's own.
    """

    id: str
    case: Case
    baselines: tuple[str, ...] = ()
    asked: tuple[Asked, ...] = ()
    seconds: float = 3.0
    memory: tuple[str, ...] = ("ours",)
    beside: dict[str, Case] = field(default_factory=dict)
    isa: str | None = None
    note: str = ""

    @property
    def title(self) -> str:
        return self.case.title + self.note


def faster(than: str, times: float, who: str = "ours") -> Asked:
    return Asked("speed-up", than, times, who)


def cpu_rows() -> list[Row]:
    """A CPU's: the loss, other feature sizes beside D = 128, the other ops, the charts' sizes."""
    both = {dtype: InfoNceCase(M, K, D, dtype) for dtype in ("float32", "bfloat16")}
    exact, half = both.values()
    flash, most = "flash attention", ("eager", "flash attention", "lightly")
    found = [
        Row("nce-f32", exact, ("eager", "torch.compile", flash, "lightly"),
            (faster("eager", 7.0), faster(flash, 2.3)), 16.0, ("ours", *most)),
        Row("nce-bf16", half, ("eager", "eager autocast", flash),
            (faster("eager", 12.0), faster(flash, 4.0)), 12.0, ("ours", "eager autocast", flash)),
        Row("nce-avx2-f32", exact, ("eager",), (faster("eager", 3.0),), 8.0, (), isa="avx2",
            note=", AVX2 forced"),
        Row("nce-m32-f32", replace(exact, rows=32), most, (faster("eager", 3.0),), 6.0,
            ("ours", "eager")),
        Row("nce-m256-f32", replace(exact, rows=256), ("eager", "torch.compile", flash, "lightly"),
            (faster("eager", 3.0),), 6.0, ("ours", "eager")),
        Row("nce-m12544-bf16", replace(half, rows=12544), (),
            (Asked("extra", "", 60 * MB), Asked("time", "M=1,568", 8 * 1.1)), 6.0,
            beside={"M=1,568": half}),
        Row("nce-k1048576-bf16", replace(half, queue_length=2**20), (),
            (Asked("time", "K=65,536", 16 * 1.1), Asked("memory", "K=65,536", 1.1)), 10.0,
            ("ours", "K=65,536"), {"K=65,536": half}),
    ]  # fmt: skip
    for dtype, case in both.items():
        alone, others = replace(case, gradient=False), ("eager",) if case is exact else ()
        asked = Asked("time", "loss and gradient", 0.6)
        found.append(Row(f"nce-loss-{SHORT[dtype]}", alone, others, (asked,), 6.0,
                         beside={"loss and gradient": case}))  # fmt: skip
    for dtype, case in both.items():
        for size, other in ((64, 128), (96, 128), (192, 128), (256, 128), (100, 128), (1, 64)):
            id, label = f"nce-d{size}-{SHORT[dtype]}", f"D={other}"
            like = Asked("time", label, 2.0) if size % 32 else Asked("rate", label, 0.8)
            found.append(Row(id, replace(case, features=size), (), (like,), 2.0, (),
                             {label: replace(case, features=other)}))  # fmt: skip
    found += [
        Row("match", MatchCase(32), MatchCase.names[1:], (faster(FORMULA, 6.0),), 4.0,
            ("ours", FORMULA)),
        Row("match-bf16-last", MatchCase(32, dtype="bfloat16", channels_last=True), (FORMULA,), (),
            2.0, ()),
        Row("ema", EmaCase(), EmaCase.names[1:],
            (faster("loop", 6.0), faster("_foreach_lerp_", 1.15)), 6.0, EmaCase.names),
        # some pages of stack; a tensor would show
        Row("enqueue", EnqueueCase(256, K), EnqueueCase.names[1:],
            (faster("clone + slice assignment", 3.0), Asked("extra", "", 0.25 * MB)), 3.0,
            EnqueueCase.names),
    ]  # fmt: skip
    sizes = [(6272, K, "float32"), (12544, K, "float32")]
    sizes += [(m, K, "bfloat16") for m in (32, 256, 6272)]
    sizes += [(M, k, dtype) for dtype in both for k in (4096, 16384, 262144)]
    for m, k, dtype in sizes:
        case, id = InfoNceCase(m, k, D, dtype), f"scale-m{m}-k{k}-{SHORT[dtype]}"
        others = ("eager",) if dtype == "float32" else ()
        found.append(Row(id, case, others, memory=("ours", *others)))
    return found


def gpu_rows() -> list[Row]:
    """A GPU's, in the order of what is asked of them."""
    first = InfoNceCase(GPU_M, K, D, "bfloat16")
    before, attention = "ours, before backward", ("flash attention", "cuDNN attention")
    large, portable = "M=12,544 K=65,536", "ours [DENSECL_CUDA_KERNEL=portable]"
    steps = (f"ours [DENSECL_CUDA_SWEEP={step}]" for step in SWEEPS)
    found = [
        Row("nce", first, (before, *attention, "eager", "eager TF32", "eager autocast"),
            (Asked("seconds", "", 620 * US), Asked("seconds", "", 570 * US),
             faster(ATTENTION, 1.25), faster("eager", 8.0), faster("eager autocast", 5.0),
             Asked("extra", "", 30 * MB)),
            8.0, ("ours", "flash attention", "eager", "eager autocast")),
        Row("nce-m256", replace(first, rows=256), (before, *attention, "eager autocast"),
            (Asked("seconds", "", 25 * US),), 2.0, ("ours", "eager autocast")),
        Row("enqueue", EnqueueCase(256, K), EnqueueCase.names[1:],
            (Asked("seconds", "", 6 * US), Asked("syncs", "", 0)), 1.0, EnqueueCase.names),
        Row("step-loss", StepLossCase(256, K, D), ("reference",), memory=StepLossCase.names),
        # The steps of Hopper's schedule, each with the ones before it; ours has all.
        Row("nce-sweep", first, (*steps, "ours [DENSECL_CUDA_PDL=0]", portable), (), 5.0, (),
            note=", by kernel"),
        Row("nce-large", replace(first, rows=4 * GPU_M, queue_length=2**20), (),
            (Asked("rate", large, 0.8),), beside={large: first}),
        Row("nce-f32", replace(first, dtype="float32"), ("eager", "eager TF32", attention[0]),
            (faster("eager", 2.0),), 4.0),
        Row("nce-loss", replace(first, gradient=False), (),
            (Asked("time", "loss and gradient", 0.6),), 2.0, beside={"loss and gradient": first}),
        Row("ema", EmaCase(), EmaCase.names[1:],
            (Asked("copy", "", 0.9), faster("_foreach_lerp_", 1.05), faster("loop", 10.0)),
            memory=("ours", "loop")),
    ]  # fmt: skip
    for dtype, most in (("float32", 75), ("bfloat16", 45)):
        for short, last in (("", False), ("-cl", True)):
            grids = MatchCase(256, dtype=dtype, channels_last=last)
            asked = Asked("seconds", "", most * US), faster(FORMULA, 5.0)
            found.append(Row(f"match-{SHORT[dtype]}{short}", grids, (FORMULA,), asked))
    found += [
        Row("nce-compile", first, ("torch.compile", "torch.compile autocast"),
            (faster("torch.compile | torch.compile autocast", 3.0),), 3.0, (), note=", compiled"),
        Row("nce-f16", replace(first, dtype="float16"), (portable, *attention), (), 2.0, ()),
    ]  # fmt: skip
    for size in (64, 96, 192, 256):
        case = replace(first, features=size)
        found.append(Row(f"nce-d{size}", case, (), (), 1.0, (), {"D=128": first}))
    sizes = [(32, K), (1568, K), (6272, K), (4 * GPU_M, K)]
    sizes += [(GPU_M, 4096), (GPU_M, 16384), (GPU_M, 262144), (GPU_M, 2**20)]
    for m, k in sizes:
        case, id = replace(first, rows=m, queue_length=k), f"scale-m{m}-k{k}"
        found.append(Row(id, case, ("eager",), (), 1.0, ("ours", "eager")))
    return found


def step_rows() -> list[Row]:
    """The whole step; a capture comes last, for one that fails keeps others from theirs."""
    large, small, vit = StepCase(256), StepCase(32), StepCase(256, VIT)
    return [
        Row("step-256", large, ("reference", "lambda 0", GRAPH),
            (faster("reference", 1.1), Asked("saved", "reference", 10e9),
             Asked("time", "lambda 0", 1.01), Asked("parts", "", 0.02)), 8.0, ()),
        Row("step-32", small, ("reference", GRAPH),
            (faster("reference", 1.3), faster("reference", 1.6, GRAPH)), 8.0, ()),
        Row("step-vit", vit, (), (), 8.0, ()),
        Row("step-compiled-256", large, ("compiled",), (), 8.0, (), note=", compiled"),
        Row("step-compiled-32", small, ("compiled",), (), 8.0, (), note=", compiled"),
    ]  # fmt: skip


SUITES = {"cpu": cpu_rows, "gpu": gpu_rows, "step": step_rows}


def rows(suite: str) -> list[Row]:
    """In the table's order; a run that ends early has the first."""
    return SUITES[suite]()
