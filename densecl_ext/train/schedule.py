"""Learning rate and key momentum over a run."""

from __future__ import annotations

import math


def cosine_lr(base: float, step: int, total: int, *, every: int = 1, warmup: int = 0) -> float:
    """Half a cosine from `base` down to 0, after a linear rise where there is one.

    base * (1 + cos(pi * t)) / 2 with t = step / total, the schedule of MoCo v2 and DenseCL, times
    (step + 1) / warmup before that is 1.

    Args:
        base: the learning rate of step 0.
        step: 0-based index of the step about to be taken.
        total: steps in the whole run.
        every: change only at multiples of this many steps (the length of an epoch, for the paper's
            schedule).
        warmup: steps in which the rate rises.

    Returns:
        The learning rate of this step; above 0 for every step < total.
    """
    start = min(step, total) // every * every
    base *= min(1.0, (step + 1) / warmup) if warmup else 1.0
    return base * 0.5 * (1.0 + math.cos(math.pi * start / total))


def cosine_momentum(base: float, step: int, total: int) -> float:
    """Half a cosine from `base` up to 1.

    1 - (1 - base) * (1 + cos(pi * t)) / 2 with t = step / total: the key encoder comes to rest as
    the query encoder does (BYOL, Grill et al., NeurIPS 2020, section 3.2; also PixPro's).

    Args:
        base: the momentum of step 0, in [0, 1].
        step: 0-based index of the step about to be taken.
        total: steps in the whole run.

    Returns:
        The momentum of this step.
    """
    return 1.0 - (1.0 - base) * 0.5 * (1.0 + math.cos(math.pi * min(step, total) / total))


def duration_in_steps(value: int | str, steps_per_epoch: int) -> int:
    """Converts a duration into steps, rounded to the nearest.

    Args:
        value: steps as an int, or epochs as a string such as "0.5ep".
        steps_per_epoch: length of an epoch in steps.
    """
    if isinstance(value, int):
        return value
    return round(float(value[:-2]) * steps_per_epoch)
