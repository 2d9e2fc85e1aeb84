"""The sizes on the way to a large picture, and how strongly each is painted over."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

FIRST_STRENGTH, LAST_STRENGTH = 0.42, 0.28
"""Of the passes at 2x and at 16x the base size: the range that GSPN-1 (arXiv 2501.12381) published."""
_FALLING_OVER = 3
# A stage that is nearly as large as the next one is not worth its time.
_WORTHWHILE = 1.2


@dataclass(frozen=True)
class Stage:
    """One pass.

    Args:
        height, width: in pixels.
        steps: of the scheduler for a whole denoising.
        strength: the share of them that this pass runs, from the picture before with noise; 1 starts from
            noise alone.
    """

    height: int
    width: int
    steps: int
    strength: float

    @property
    def evaluations(self) -> int:
        """Steps that are run."""
        return min(self.steps, int(self.steps * self.strength))


def direct(height: int, width: int, steps: int) -> list[Stage]:
    """One pass at the full size."""
    return [Stage(height, width, steps, 1.0)]


def progressive(
    height: int,
    width: int,
    steps: int,
    *,
    base: int,
    strengths: Sequence[float] | None = None,
    multiple: int = 8,
) -> list[Stage]:
    """Passes from the base size, doubling, to the size asked for; the aspect ratio stays.

    Args:
        height, width: of the last stage, multiples of `multiple`.
        steps: of the scheduler, for each stage.
        base: the side of a square picture that the model was trained on.
        strengths: of the passes after the first; None for a fall from 0.42 (2x) to 0.28 (16x and more).

    Raises:
        ValueError: another number of strengths than passes, one that is out of (0, 1], or one so small that
            no step of its pass would be run.
    """
    scale = min(1.0, base / math.sqrt(height * width))
    sizes: list[tuple[int, int]] = []
    while scale * _WORTHWHILE <= 1:
        sizes.append((_rounded(height * scale, multiple), _rounded(width * scale, multiple)))
        scale *= 2
    sizes.append((height, width))
    passes = len(sizes) - 1
    if strengths is None:
        fall = (FIRST_STRENGTH - LAST_STRENGTH) / _FALLING_OVER
        strengths = [round(max(LAST_STRENGTH, FIRST_STRENGTH - fall * i), 3) for i in range(passes)]
    if len(strengths) != passes:
        raise ValueError(
            f"strengths: expected {passes}, one for each pass after the first, got {len(strengths)}"
        )
    stages = [
        Stage(size[0], size[1], steps, strength)
        for size, strength in zip(sizes, (1.0, *strengths), strict=True)
    ]
    for stage in stages:
        if not 0 < stage.strength <= 1:
            raise ValueError(f"strengths: expected more than 0 and at most 1, got {stage.strength}")
        if stage.evaluations < 1:
            raise ValueError(
                f"strengths: {stage.strength} of {steps} steps is less than one; take more steps or strength"
            )
    return stages


def _rounded(side: float, multiple: int) -> int:
    return max(multiple, round(side / multiple) * multiple)
