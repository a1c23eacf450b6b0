"""What is asked of the CPU's rows, in one place; of a GPU's: gpu_thresholds.py."""

from __future__ import annotations

from dataclasses import dataclass

MB = 1e6


@dataclass(frozen=True)
class Asked:
    """One demand.

    Attributes:
        row: id of a row in suites.py or gpu_suites.py.
        measure: "speed-up": the other's time over ours. "time": our time over the other's. "rate":
            our FLOP/s over the other's. "memory": peak extra bytes of ours, over the other's where
            one is named. On a GPU too "seconds": our time. "copy": our bytes/s over a copy's.
            "syncs": how often ours made the host wait.
        against: A baseline or label of the row; "" for none. "a | b": the faster of them.
        at_least, at_most: The bound on it, one of them.
    """

    row: str
    measure: str
    against: str
    at_least: float | None = None
    at_most: float | None = None

    def met(self, value: float) -> bool:
        """Whether the measured value will do."""
        if self.at_least is not None:
            return value >= self.at_least
        return self.at_most is not None and value <= self.at_most


ASKED: tuple[Asked, ...] = (
    Asked("nce-f32", "speed-up", "eager", at_least=7.0),
    Asked("nce-f32", "speed-up", "flash attention", at_least=2.3),
    Asked("nce-bf16", "speed-up", "eager", at_least=12.0),
    Asked("nce-bf16", "speed-up", "flash attention", at_least=4.0),
    Asked("nce-avx2-f32", "speed-up", "eager", at_least=3.0),
    Asked("nce-m32-f32", "speed-up", "eager", at_least=3.0),
    Asked("nce-m256-f32", "speed-up", "eager", at_least=3.0),
    Asked("nce-m12544-bf16", "memory", "", at_most=60 * MB),
    Asked("nce-m12544-bf16", "time", "M=1,568", at_most=8 * 1.1),
    Asked("nce-k1048576-bf16", "time", "K=65,536", at_most=16 * 1.1),
    Asked("nce-k1048576-bf16", "memory", "K=65,536", at_most=1.1),
    Asked("nce-loss-f32", "time", "loss and gradient", at_most=0.6),
    Asked("nce-loss-bf16", "time", "loss and gradient", at_most=0.6),
    *(
        Asked(f"nce-d{features}-{dtype}", "rate", "D=128", at_least=0.8)
        for dtype in ("f32", "bf16")
        for features in (64, 96, 192, 256)
    ),
    *(Asked(f"nce-d100-{dtype}", "time", "D=128", at_most=2.0) for dtype in ("f32", "bf16")),
    *(Asked(f"nce-d1-{dtype}", "time", "D=64", at_most=2.0) for dtype in ("f32", "bf16")),
    Asked("match", "speed-up", "normalise + matmul + max", at_least=6.0),
    Asked("ema", "speed-up", "loop", at_least=6.0),
    Asked("ema", "speed-up", "_foreach_lerp_", at_least=1.15),
    Asked("enqueue", "speed-up", "clone + slice assignment", at_least=3.0),
    Asked("enqueue", "memory", "", at_most=0.25 * MB),  # some pages of stack; a tensor shows
)
