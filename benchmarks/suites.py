"""The rows: which case runs against which baselines, and beside which other sizes of ours."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.cases import Case, EmaCase, EnqueueCase, MatchCase
from benchmarks.loss_cases import InfoNceCase, StepLossCase

M, K, D = 1568, 65536, 128  # 32 images of 7 x 7 positions, MoCo's queue, MoCo's head
SHORT = {"float32": "f32", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        id: Its name in thresholds.py.
        title: Its name for people.
        case: What ours and the baselines compute.
        baselines: Names of the case's candidates.
        beside: Other cases that ours runs in the same rounds, by label, to compare with itself.
        isa: CPU instruction set forced on ours.
        seconds: Time for all rounds.
        memory: Candidates (or labels of `beside`) whose peak memory is measured.
    """

    id: str
    title: str
    case: Case
    baselines: tuple[str, ...] = ()
    beside: dict[str, Case] = field(default_factory=dict)
    isa: str | None = None
    seconds: float = 6.0
    memory: tuple[str, ...] = ("ours",)


def rows() -> list[Row]:
    """All of them, in the table's order."""
    return [*loss_rows(), *feature_rows(), *other_rows(), *scaling_rows()]


def loss_rows() -> list[Row]:
    """The loss at the sizes that something is asked of."""
    both = {dtype: InfoNceCase(M, K, D, dtype) for dtype in SHORT}
    everybody = ("eager", "torch.compile", "flash attention", "lightly")
    found = [
        Row(
            "nce-f32",
            title(both["float32"]),
            both["float32"],
            everybody,
            seconds=16.0,
            memory=("ours", "eager", "flash attention", "lightly"),
        ),
        Row(
            "nce-bf16",
            title(both["bfloat16"]),
            both["bfloat16"],
            ("eager", "eager autocast", "flash attention"),
            seconds=12.0,
            memory=("ours", "eager autocast", "flash attention"),
        ),
        Row(
            "nce-avx2-f32",
            title(both["float32"]) + ", AVX2 forced",
            both["float32"],
            ("eager",),
            isa="avx2",
            seconds=8.0,
            memory=(),
        ),
    ]
    for count in (32, 256):
        case = InfoNceCase(count, K, D)
        baselines = everybody if count == 256 else ("eager", "flash attention", "lightly")
        memory = ("ours", "eager")
        found.append(Row(f"nce-m{count}-f32", title(case), case, baselines, memory=memory))
    many, long = InfoNceCase(12544, K, D, "bfloat16"), InfoNceCase(M, 2**20, D, "bfloat16")
    found += [
        Row("nce-m12544-bf16", title(many), many, beside={"M=1,568": both["bfloat16"]}),
        Row(
            "nce-k1048576-bf16",
            title(long),
            long,
            beside={"K=65,536": both["bfloat16"]},
            seconds=10.0,
            memory=("ours", "K=65,536"),
        ),
    ]
    for dtype, short in SHORT.items():
        alone = InfoNceCase(M, K, D, dtype, gradient=False)
        beside: dict[str, Case] = {"loss and gradient": both[dtype]}
        others = ("eager",) if dtype == "float32" else ()
        found.append(Row(f"nce-loss-{short}", title(alone), alone, others, beside))
    return found


def feature_rows() -> list[Row]:
    """Other feature sizes beside D = 128, or beside the next larger one that is looked after."""
    found = []
    for dtype, short in SHORT.items():
        for features, other in ((64, 128), (96, 128), (192, 128), (256, 128), (100, 128), (1, 64)):
            case = InfoNceCase(M, K, features, dtype)
            beside: dict[str, Case] = {f"D={other}": InfoNceCase(M, K, other, dtype)}
            name = f"nce-d{features}-{short}"
            found.append(Row(name, title(case), case, (), beside, seconds=2.0, memory=()))
    return found


def other_rows() -> list[Row]:
    """Matching, momentum update, queue."""
    match = MatchCase(32, 2048, 49)
    ema, enqueue = EmaCase(), EnqueueCase(256, K)
    return [
        Row(
            "match",
            "dense_match, N=32 C=2,048 49x49, float32",
            match,
            MatchCase.names[1:],
            seconds=4.0,
            memory=("ours", "normalise + matmul + max"),
        ),
        Row(
            "match-bf16-last",
            "dense_match, N=32 C=2,048 49x49, bfloat16, channels last",
            MatchCase(32, 2048, 49, "bfloat16", channels_last=True),
            ("normalise + matmul + max",),
            seconds=2.0,
            memory=(),
        ),
        Row("ema", "ema_update_, ResNet-50's 161 parameters", ema, EmaCase.names[1:],
            memory=EmaCase.names),
        Row("enqueue", "enqueue_, B=256 K=65,536 D=128, float32", enqueue, EnqueueCase.names[1:],
            seconds=3.0, memory=EnqueueCase.names),
    ]  # fmt: skip


def scaling_rows() -> list[Row]:
    """What the charts over M and K need beyond the rows above."""
    sizes = [(6272, K, "float32"), (12544, K, "float32")]
    sizes += [(m, K, "bfloat16") for m in (32, 256, 6272)]
    sizes += [(M, k, "float32") for k in (4096, 16384, 262144)]
    sizes += [(M, k, "bfloat16") for k in (4096, 16384, 262144)]
    found = []
    for m, k, dtype in sizes:
        case = InfoNceCase(m, k, D, dtype)
        baselines = ("eager",) if dtype == "float32" else ()
        name = f"scale-m{m}-k{k}-{SHORT[dtype]}"
        memory = ("ours", *baselines)
        found.append(Row(name, title(case), case, baselines, seconds=3.0, memory=memory))
    return found


def title(case: InfoNceCase) -> str:
    """As in `info_nce, M=1,568 K=65,536 D=128, float32`."""
    what = "info_nce" if case.gradient else "info_nce, loss alone"
    return f"{what}, M={case.rows:,} K={case.queue_length:,} D={case.features}, {case.dtype}"


def from_message(message: dict[str, Any]) -> Case:
    """The case that Case.message described."""
    classes = (InfoNceCase, StepLossCase, MatchCase, EmaCase, EnqueueCase)
    kinds = {kind.__name__: kind for kind in classes}
    values = {key: value for key, value in message.items() if key != "kind"}
    return kinds[message["kind"]](**values)
