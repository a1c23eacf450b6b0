"""The learning rate over a run."""

from __future__ import annotations

import math


def cosine_lr(base: float, step: int, total: int, *, every: int = 1) -> float:
    """Half a cosine from `base` down to 0, without warm-up or restarts.

    base * (1 + cos(pi * t)) / 2 with t = step / total, the schedule of MoCo v2 and DenseCL.

    Args:
        base: the learning rate of step 0.
        step: 0-based index of the step about to be taken.
        total: steps in the whole run.
        every: change only at multiples of this many steps (the length of an epoch, for the paper's
            schedule).

    Returns:
        The learning rate of this step; above 0 for every step < total.
    """
    start = min(step, total) // every * every
    return base * 0.5 * (1.0 + math.cos(math.pi * start / total))
