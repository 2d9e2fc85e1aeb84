"""Tensors as the kernels see them, and a direction as strides.

A kernel never flips or transposes: scanning another way is the same walk with other strides.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .jit import jit


class Operand(NamedTuple):
    """A tensor: address of its first element (0: absent) and a stride, in elements, for every axis.

    Axes it lacks have stride 0. `c` is the channel axis; for the taps it is the group axis.
    """

    address: int
    b: int
    d: int
    c: int
    k: int
    h: int
    w: int


class Lines(NamedTuple):
    """One image of an operand in scan order: address of line 0, place 0; strides of channel, line, place."""

    address: int
    c: int
    i: int
    j: int


@jit
def is_vertical(direction: int) -> Any:
    """Down and up scan rows; right and left scan columns. Directions are indices into `DIRECTIONS`."""
    return direction < 2


@jit
def lines_of(operand: Any, itemsize: int, b: int, d: int, direction: int, height: int, width: int) -> Any:
    """Image (b, d) of an operand, in the scan order of `direction`."""
    lines, stride_i, stride_j = height, operand.h, operand.w
    if not is_vertical(direction):
        lines, stride_i, stride_j = width, operand.w, operand.h
    if operand.address == 0:
        return Lines(0, 0, 0, 0)
    offset = b * operand.b + d * operand.d
    if direction % 2 == 1:
        offset += (lines - 1) * stride_i
        stride_i = -stride_i
    return Lines(operand.address + itemsize * offset, operand.c, stride_i, stride_j)
