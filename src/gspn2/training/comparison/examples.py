"""A picture of what the tasks look like."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..tasks import BLOCK, Task, answered
from .images import Source, digits

COLUMNS, SIDE, GAP = 8, 128, 6


def draw(path: Path) -> None:
    """A PNG: a row of examples of each task and size.

    Of pathfinder, marks that are apart on the left and joined on the right; mazes beside their classes.
    """
    from PIL import Image

    rows: list[list[NDArray[np.uint8]]] = []
    half = COLUMNS // 2
    for size in (64, 128):
        pixels, classes = answered(Task("pathfinder", size, size), 32, seed=1)
        joined = classes.max((1, 2)) == 2
        rows.append([*pixels[~joined][:half], *pixels[joined][:half]])
        # A block has cells of one size.
        pixels, classes = answered(Task("flood", size, size), half * BLOCK, seed=1)
        rows.append(
            [it[n] for n in range(0, half * BLOCK, BLOCK) for it in (pixels, classes * np.uint8(127))]
        )
    pixels, numbers = digits(Source(Task("digits", 32, 32), "train", 64), 64, 3)
    rows.append([pixels[np.flatnonzero(numbers == digit)[0]] for digit in range(COLUMNS)])
    page = np.full((len(rows) * (SIDE + GAP) - GAP, COLUMNS * (SIDE + GAP) - GAP), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            times = SIDE // len(image)
            top, left = i * (SIDE + GAP), j * (SIDE + GAP)
            page[top : top + SIDE, left : left + SIDE] = image.repeat(times, 0).repeat(times, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(page).save(path, optimize=True)
