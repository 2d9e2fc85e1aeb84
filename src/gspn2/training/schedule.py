"""The learning rate as a function of the step: nothing to store, nothing to restore."""

from __future__ import annotations

import math


def learning_rate(step: int, total: int, warmup: int, peak: float, floor: float) -> float:
    """Linear warm-up over `warmup` steps, then half a cosine from `peak` to `floor` at the last step.

    Args:
        step: counted from 0; the first step of the warm-up already moves.
        total: steps of the run.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    span = max(1, total - 1 - warmup)
    share = min(1.0, (step - warmup) / span)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * share))
