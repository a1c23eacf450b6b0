"""The rows that a GPU is measured on, in the order of what is asked of them.

Sizes of a batch of 256: M = 256 x 49 = 12,544 rows. Ids are those of gpu_thresholds.py.
"""

from __future__ import annotations

from benchmarks.cases import Case, EmaCase, EnqueueCase, MatchCase
from benchmarks.loss_cases import InfoNceCase, StepLossCase
from benchmarks.suites import SHORT, D, K, Row, title

M, IMAGES = 12544, 256
FIRST = InfoNceCase(M, K, D, "bfloat16")


def rows() -> list[Row]:
    """All of them; a run that ends early has measured the first."""
    return [*asked_loss_rows(), *other_rows(), *more_loss_rows(), *scaling_rows()]


def asked_loss_rows() -> list[Row]:
    """The loss at the sizes that something is asked of."""
    few, large = InfoNceCase(256, K, D, "bfloat16"), InfoNceCase(4 * M, 2**20, D, "bfloat16")
    exact = InfoNceCase(M, K, D, "float32")
    alone = InfoNceCase(M, K, D, "bfloat16", gradient=False)
    return [
        Row(
            "nce",
            title(FIRST),
            FIRST,
            ("ours, before backward", "flash attention", "cuDNN attention", "eager", "eager TF32",
             "eager autocast"),
            seconds=8.0,
            memory=("ours", "flash attention", "eager", "eager autocast"),
        ),
        Row("nce-m256", title(few), few,
            ("ours, before backward", "flash attention", "cuDNN attention", "eager autocast"),
            seconds=2.0, memory=("ours", "eager autocast")),
        Row("nce-large", title(large), large, (), {"M=12,544 K=65,536": FIRST}, seconds=3.0),
        Row("nce-f32", title(exact), exact, ("eager", "eager TF32", "flash attention"),
            seconds=4.0),
        Row("nce-loss", title(alone), alone, (), {"loss and gradient": FIRST}, seconds=2.0),
    ]  # fmt: skip


def other_rows() -> list[Row]:
    """Momentum update, queue, matching, and both terms of a step together."""
    step = StepLossCase(IMAGES, K, D)
    found = [
        Row("ema", "ema_update_, ResNet-50's 161 parameters", EmaCase(), EmaCase.names[1:],
            seconds=3.0, memory=("ours", "loop")),
        Row("enqueue", "enqueue_, B=256 K=65,536 D=128, float32", EnqueueCase(IMAGES, K),
            EnqueueCase.names[1:], seconds=1.0, memory=EnqueueCase.names),
    ]  # fmt: skip
    for dtype, short in SHORT.items():
        for last in (False, True):
            case = MatchCase(IMAGES, 2048, 49, dtype, channels_last=last)
            name = f"match-{short}{'-cl' if last else ''}"
            layout = ", channels-last" if last else ""
            found.append(
                Row(name, f"dense_match, N=256 C=2,048 49x49, {dtype}{layout}", case,
                    MatchCase.names[1:2], seconds=2.0)
            )  # fmt: skip
    what = "matching and both losses, N=256 K=65,536, bfloat16"
    memory = StepLossCase.names
    found.append(Row("step-loss", what, step, StepLossCase.names[1:], seconds=3.0, memory=memory))
    return found


def more_loss_rows() -> list[Row]:
    """What takes long to set up, and what nothing is asked of."""
    half = InfoNceCase(M, K, D, "float16")
    found = [
        Row("nce-compile", title(FIRST) + ", compiled", FIRST,
            ("torch.compile", "torch.compile autocast"), seconds=3.0, memory=()),
        Row("nce-kernels", title(FIRST) + ", by kernel", FIRST, ("portable kernel",), seconds=2.0,
            memory=()),
        Row("nce-f16", title(half), half, ("portable kernel", "flash attention", "cuDNN attention"),
            seconds=2.0, memory=()),
    ]  # fmt: skip
    for features in (64, 96, 192, 256):
        case = InfoNceCase(M, K, features, "bfloat16")
        beside: dict[str, Case] = {"D=128": FIRST}
        found.append(Row(f"nce-d{features}", title(case), case, (), beside, seconds=1.0, memory=()))
    return found


def scaling_rows() -> list[Row]:
    """What the charts over M and K need beyond the rows above."""
    sizes = [(32, K), (1568, K), (6272, K), (4 * M, K)]
    sizes += [(M, 4096), (M, 16384), (M, 262144), (M, 2**20)]
    found = []
    for m, k in sizes:
        case = InfoNceCase(m, k, D, "bfloat16")
        found.append(
            Row(f"scale-m{m}-k{k}", title(case), case, ("eager",), seconds=1.0,
                memory=("ours", "eager"))
        )  # fmt: skip
    return found
