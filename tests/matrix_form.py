"""The recurrence as a linear system over all pixels, built from the definition without any scan."""

from __future__ import annotations

import torch
from torch import Tensor

# For each direction the step back to the previous line and the step to the next place, as (rows, columns).
STEPS = {
    "down": ((-1, 0), (0, 1)),
    "up": ((1, 0), (0, 1)),
    "right": ((0, -1), (1, 0)),
    "left": ((0, 1), (1, 0)),
}


def line_number(row: int, column: int, height: int, width: int, direction: str) -> int:
    numbers = {"down": row, "up": height - 1 - row, "right": column, "left": width - 1 - column}
    return numbers[direction]


def propagation_matrix(w: Tensor, direction: str, chunk: int | None) -> Tensor:
    """The (HW, HW) matrix A with h = A h + u for taps w (3, H, W): a row for each pixel."""
    _, height, width = w.shape
    (back_row, back_column), (row_step, column_step) = STEPS[direction]
    matrix = torch.zeros(height * width, height * width, dtype=w.dtype)
    for row in range(height):
        for column in range(width):
            line = line_number(row, column, height, width, direction)
            if line == 0 or (chunk is not None and line % chunk == 0):
                continue
            for tap, k in enumerate((-1, 0, 1)):
                from_row = row + back_row + k * row_step
                from_column = column + back_column + k * column_step
                if 0 <= from_row < height and 0 <= from_column < width:
                    here, there = row * width + column, from_row * width + from_column
                    matrix[here, there] = w[tap, row, column]
    return matrix


def scan_axis(direction: str) -> tuple[int, int]:
    """The image axis that counts lines, from the end of a shape, and the index of the first line on it."""
    return (-2 if direction in ("down", "up") else -1), (0 if direction in ("down", "right") else -1)


def reach(pixels: Tensor, direction: str, chunk: int | None) -> Tensor:
    """Which pixels (H, W) a set of pixels (H, W) can influence: the matrix form with all taps 1."""
    height, width = pixels.shape
    matrix = propagation_matrix(torch.ones(3, height, width, dtype=torch.float64), direction, chunk)
    paths = torch.linalg.inv(torch.eye(height * width, dtype=torch.float64) - matrix)
    return ((paths @ pixels.double().flatten()) > 0.5).view(height, width)
