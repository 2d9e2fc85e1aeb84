"""Aligned marks: every grey mark asks whether the one other mark in its row or column is bright or dark.

What is asked for lies half of the image away or more and nothing leads there, so nothing short of looking
that far answers it; where marks lie says nothing at all. A scan can do it by carrying a mark along its line,
and that is what the task is for: it tells whether states get anywhere.
"""

from __future__ import annotations

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

_SIDE = 4
"""Of a mark, in units."""
_APART = 8
"""Units between the same edges of two marks that do not share a row, and likewise of columns."""
_NEAREST = 8
_GROUND, _DARK, _GREY, _BRIGHT = 64, 0, 128, 255
_TRIES, _ATTEMPTS = 40, 100


def aligned(
    rng: Generator, count: int, canvas: int, scale: int, level: float | None
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images (count, side, side), and what is asked of their pixels: 0 nothing, 1 dark, 2 bright.

    Args:
        canvas: side of the scene in units; there is a pair of marks for every 32 of them, at least two.
        scale: pixels of a unit.
        level: pairs are up to `level` of the scene apart, any distance from 8 units on equally often; None
            for tests, where all are half of it or more apart.
    """
    if level is None:
        reach = (canvas // 2, canvas - _SIDE)
    else:
        reach = (_NEAREST, max(_NEAREST, round(level * (canvas - _SIDE))))
    marks = _pairs(rng, count, canvas, max(2, canvas // 32), reach)
    bright = rng.random(marks.shape[:2]) < 0.5
    images = np.full((count, canvas, canvas), _GROUND, np.uint8)
    classes = np.zeros_like(images)
    n = np.arange(count)[:, None]
    y, x = np.moveaxis(marks, -1, 0)
    for dy in range(_SIDE):
        for dx in range(_SIDE):
            images[n, y[..., 0] + dy, x[..., 0] + dx] = _GREY
            classes[n, y[..., 0] + dy, x[..., 0] + dx] = 1 + bright
            images[n, y[..., 1] + dy, x[..., 1] + dx] = np.where(bright, _BRIGHT, _DARK)
    images, classes = (it.repeat(scale, axis=1).repeat(scale, axis=2) for it in (images, classes))
    return images, classes


def _pairs(rng: Generator, count: int, canvas: int, pairs: int, reach: tuple[int, int]) -> NDArray[np.int64]:
    """Top left corners (count, pairs, 2, 2) of marks as (y, x), two of a pair in the same rows or columns."""
    chosen = np.zeros((count, pairs, 2, 2), np.int64)
    waiting = np.arange(count)
    # All pairs of an image anew where one finds no place: the last ones would otherwise favor short ways.
    for _ in range(_ATTEMPTS):
        drawn, fits = _propose(rng, len(waiting), canvas, pairs, reach)
        chosen[waiting[fits]] = drawn[fits]
        waiting = waiting[~fits]
        if not len(waiting):
            return chosen
    raise RuntimeError(f"no place for {pairs} pairs on {canvas} x {canvas} after {_ATTEMPTS} attempts")


def _propose(
    rng: Generator, count: int, canvas: int, pairs: int, reach: tuple[int, int]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Pairs of marks (count, pairs, 2, 2), each where the others leave room; and whether all found some."""
    marks = np.zeros((count, pairs, 2, 2), np.int64)
    room = canvas - _SIDE + 1
    # Rows and columns at which an upper or left edge would come too near to another: (count, axis, places).
    taken = np.zeros((count, 2, room), bool)
    n = np.arange(count)
    fits = np.ones(count, bool)
    for k in range(pairs):
        distance = rng.integers(reach[0], reach[1] + 1, count)
        axis = rng.integers(0, 2, count)
        found = np.zeros(count, bool)
        for _ in range(_TRIES):
            first = (rng.random(count) * (room - distance)).astype(np.int64)
            shared = rng.integers(0, room, count)
            ends = np.stack((first, first + distance), axis=1)
            clear = ~(taken[n, axis, shared] | taken[n[:, None], 1 - axis[:, None], ends].any(1))
            new = clear & ~found
            marks[n[new, None], k, :, axis[new, None]] = shared[new, None, None]
            marks[n[new], k, :, 1 - axis[new]] = ends[new]
            found |= clear
        fits &= found
        for axis_ in range(2):
            for mark in range(2):
                near = np.abs(np.arange(room) - marks[:, k, mark, axis_, None]) < _APART
                taken[:, axis_] |= near
    swapped = rng.random((count, pairs, 1, 1)) < 0.5
    return np.where(swapped, marks[:, :, ::-1], marks), fits
