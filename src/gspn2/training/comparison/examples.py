"""A picture of what the tasks look like."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..tasks import Task, generate
from .images import Source, digits

COLUMNS, SIDE, GAP = 8, 128, 6


def draw(path: Path) -> None:
    """A PNG: a row of examples of each task; on the left marks are apart, on the right joined."""
    from PIL import Image

    rows = []
    for kind, size in (("pathfinder", 64), ("maze", 64), ("pathfinder", 128), ("maze", 128)):
        pixels, labels = generate(Task(kind, size, size), 32, seed=1)
        half = COLUMNS // 2
        rows.append([*pixels[labels == 0][:half], *pixels[labels == 1][:half]])
    pixels, labels = digits(Source(Task("digits", 32, 32), "train", 64), 64, 3)
    rows.append([pixels[np.flatnonzero(labels == digit)[0]] for digit in range(COLUMNS)])
    page = np.full((len(rows) * (SIDE + GAP) - GAP, COLUMNS * (SIDE + GAP) - GAP), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            times = SIDE // len(image)
            top, left = i * (SIDE + GAP), j * (SIDE + GAP)
            page[top : top + SIDE, left : left + SIDE] = image.repeat(times, 0).repeat(times, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(page).save(path, optimize=True)
