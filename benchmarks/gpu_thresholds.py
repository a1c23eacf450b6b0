"""What is asked of the GPU's rows, on an H200."""

from __future__ import annotations

from benchmarks.thresholds import MB, Asked

US = 1e-6
ATTENTION = "flash attention | cuDNN attention"
FORMULA = "normalise + matmul + max"

ASKED_GPU: tuple[Asked, ...] = (
    Asked("nce", "seconds", "", at_most=620 * US),
    Asked("nce", "seconds", "", at_most=570 * US),
    Asked("nce", "speed-up", ATTENTION, at_least=1.25),
    Asked("nce", "speed-up", "eager", at_least=8.0),
    Asked("nce", "speed-up", "eager autocast", at_least=5.0),
    Asked("nce-compile", "speed-up", "torch.compile | torch.compile autocast", at_least=3.0),
    Asked("nce", "memory", "", at_most=30 * MB),
    Asked("nce-m256", "seconds", "", at_most=25 * US),
    Asked("nce-large", "rate", "M=12,544 K=65,536", at_least=0.8),
    Asked("nce-f32", "speed-up", "eager", at_least=2.0),
    Asked("nce-loss", "time", "loss and gradient", at_most=0.6),
    Asked("ema", "copy", "", at_least=0.9),
    Asked("ema", "speed-up", "_foreach_lerp_", at_least=1.05),
    Asked("ema", "speed-up", "loop", at_least=10.0),
    *(
        Asked(f"match-{dtype}{layout}", "seconds", "", at_most=limit * US)
        for dtype, limit in (("f32", 75), ("bf16", 45))
        for layout in ("", "-cl")
    ),
    *(
        Asked(f"match-{dtype}{layout}", "speed-up", FORMULA, at_least=5.0)
        for dtype in ("f32", "bf16")
        for layout in ("", "-cl")
    ),
    Asked("enqueue", "seconds", "", at_most=6 * US),
    Asked("enqueue", "syncs", "", at_most=0),
)
