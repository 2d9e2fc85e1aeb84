"""A picture of what the tasks look like."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..tasks import ALIGNED, BLOCK, CLASSES, Task, answered
from .images import Source, digits

COLUMNS, SIDE, GAP = 8, 128, 6


def draw(path: Path) -> None:
    """A PNG: a row of examples of each task and size.

    Marks are apart on the left and joined on the right; of aligned ones an image has several.
    """
    from PIL import Image

    rows: list[list[NDArray[np.uint8]]] = []
    half = COLUMNS // 2
    for size in (64, 128):
        for kind in CLASSES:
            pixels, classes = answered(Task(kind, size, size), half * BLOCK, seed=1)
            # Of every block, which has contours of a length and cells of a size, the first of either kind.
            found = classes.max((1, 2)).reshape(half, BLOCK)
            chosen = [n * BLOCK + int(np.argmax(found[n] == it)) for it in (1, 2) for n in range(half)]
            rows.append([pixels[n] for n in chosen])
        rows.append(list(answered(Task(ALIGNED, size, size), COLUMNS, seed=1)[0]))
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
