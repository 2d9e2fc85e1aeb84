"""Between tensors of any strides and storage type, and the kernel's scratch.

Scratch holds channels of lines of places in the arithmetic type: element (c, i, j) at c * channel + i *
line + j, every line starting on its own row, with room to LANES places beyond the last. The tensor side is
three strides, for channel, line and place. Whichever of the three is 1 decides how memory is walked:
consecutive places are copied, consecutive lines or channels are transposed in registers block by block, so
that whole cache lines are used, and what has no unit stride goes one element at a time.
"""

from __future__ import annotations

from typing import Any

from .jit import jit
from .simd import (
    LANES,
    add_block_transposed,
    add_part_transposed,
    advance,
    copy_block_transposed,
    copy_part_to_scratch,
    copy_part_transposed,
    load,
    load_as,
    load_first,
    load_one,
    store,
    store_as,
    store_first,
    store_one,
)

# Below this many consecutive channels a transposed block is mostly empty.
FEWEST_CHANNELS_TO_TRANSPOSE = 4


@jit
def copy_transposed(
    source: Any, source_row: int, rows: int, columns: int, target: Any, target_row: int
) -> None:
    """target[c * target_row + r] = source[r * source_row + c]."""
    for r in range(0, rows, LANES):
        for c in range(0, columns, LANES):
            src = advance(source, r * source_row + c)
            dst = advance(target, c * target_row + r)
            if rows - r >= LANES and columns - c >= LANES:
                copy_block_transposed(src, source_row, LANES, LANES, dst, target_row)
            else:
                copy_part_transposed(
                    src, source_row, min(rows - r, LANES), min(columns - c, LANES), dst, target_row
                )


@jit
def stage_transposed(
    source: Any, source_row: int, rows: int, columns: int, target: Any, target_row: int
) -> None:
    """`copy_transposed` into rows of scratch, which are filled up with 0 to their last vector."""
    for r in range(0, rows, LANES):
        for c in range(0, columns, LANES):
            src = advance(source, r * source_row + c)
            dst = advance(target, c * target_row + r)
            if rows - r >= LANES and columns - c >= LANES:
                copy_block_transposed(src, source_row, LANES, LANES, dst, target_row)
            else:
                copy_part_to_scratch(
                    src, source_row, min(rows - r, LANES), min(columns - c, LANES), dst, target_row
                )


@jit
def add_transposed(
    source: Any, source_row: int, rows: int, columns: int, target: Any, target_row: int
) -> None:
    """target[c * target_row + r] += source[r * source_row + c]."""
    for r in range(0, rows, LANES):
        for c in range(0, columns, LANES):
            src = advance(source, r * source_row + c)
            dst = advance(target, c * target_row + r)
            if rows - r >= LANES and columns - c >= LANES:
                add_block_transposed(src, source_row, LANES, LANES, dst, target_row)
            else:
                add_part_transposed(
                    src, source_row, min(rows - r, LANES), min(columns - c, LANES), dst, target_row
                )


@jit
def read_row(scratch: Any, tensor: Any, places: int, like: Any) -> None:
    """Consecutive elements to a row, which is filled up with 0 to its last vector."""
    whole = places // LANES * LANES
    for j in range(0, whole, LANES):
        store(scratch, j, load_as(tensor, j, like))
    if whole < places:
        store(scratch, whole, load_first(tensor, whole, places - whole, like))


@jit
def write_row(tensor: Any, scratch: Any, places: int) -> None:
    """A row to consecutive elements."""
    whole = places // LANES * LANES
    for j in range(0, whole, LANES):
        store_as(tensor, j, load(scratch, j))
    if whole < places:
        store_first(tensor, whole, places - whole, load(scratch, whole))


@jit
def add_row(tensor: Any, scratch: Any, places: int, like: Any) -> None:
    """A row added to consecutive elements."""
    whole = places // LANES * LANES
    for j in range(0, whole, LANES):
        store_as(tensor, j, load_as(tensor, j, like) + load(scratch, j))
    if whole < places:
        left = places - whole
        store_first(tensor, whole, left, load_first(tensor, whole, left, like) + load(scratch, whole))


@jit
def read(
    scratch: Any,
    channel: int,
    line: int,
    tensor: Any,
    channels: int,
    lines: int,
    places: int,
    stride_c: int,
    stride_i: int,
    stride_j: int,
    like: Any,
) -> None:
    """scratch[c, i, j] = tensor[c * stride_c + i * stride_i + j * stride_j]."""
    if stride_j == 1:
        for c in range(channels):
            for i in range(lines):
                src = advance(tensor, c * stride_c + i * stride_i)
                dst = advance(scratch, c * channel + i * line)
                read_row(dst, src, places, like)
    elif stride_i == 1:
        for c in range(channels):
            src = advance(tensor, c * stride_c)
            stage_transposed(src, stride_j, places, lines, advance(scratch, c * channel), line)
    elif stride_i == -1:
        for c in range(channels):
            src = advance(tensor, c * stride_c - (lines - 1))
            dst = advance(scratch, c * channel + (lines - 1) * line)
            stage_transposed(src, stride_j, places, lines, dst, -line)
    elif stride_c == 1 and channels >= FEWEST_CHANNELS_TO_TRANSPOSE:
        # Block by block of places, so that a walk along columns stays within a few rows of the image.
        for j in range(0, places, LANES):
            for i in range(lines):
                src = advance(tensor, i * stride_i + j * stride_j)
                dst = advance(scratch, i * line + j)
                stage_transposed(src, stride_j, min(places - j, LANES), channels, dst, channel)
    elif abs(stride_i) < abs(stride_j):
        for j in range(places):
            for c in range(channels):
                for i in range(lines):
                    value = load_one(tensor, c * stride_c + i * stride_i + j * stride_j, like)
                    store_one(scratch, c * channel + i * line + j, value)
    else:
        for i in range(lines):
            for c in range(channels):
                for j in range(places):
                    value = load_one(tensor, c * stride_c + i * stride_i + j * stride_j, like)
                    store_one(scratch, c * channel + i * line + j, value)


@jit
def write(
    scratch: Any,
    channel: int,
    line: int,
    tensor: Any,
    channels: int,
    lines: int,
    places: int,
    stride_c: int,
    stride_i: int,
    stride_j: int,
    like: Any,
) -> None:
    """tensor[c * stride_c + i * stride_i + j * stride_j] = scratch[c, i, j], rounded once."""
    if stride_j == 1:
        for c in range(channels):
            for i in range(lines):
                src = advance(scratch, c * channel + i * line)
                dst = advance(tensor, c * stride_c + i * stride_i)
                write_row(dst, src, places)
    elif stride_i == 1:
        for c in range(channels):
            dst = advance(tensor, c * stride_c)
            copy_transposed(advance(scratch, c * channel), line, lines, places, dst, stride_j)
    elif stride_i == -1:
        for c in range(channels):
            src = advance(scratch, c * channel + (lines - 1) * line)
            dst = advance(tensor, c * stride_c - (lines - 1))
            copy_transposed(src, -line, lines, places, dst, stride_j)
    elif stride_c == 1 and channels >= FEWEST_CHANNELS_TO_TRANSPOSE:
        for j in range(0, places, LANES):
            for i in range(lines):
                src = advance(scratch, i * line + j)
                dst = advance(tensor, i * stride_i + j * stride_j)
                copy_transposed(src, channel, channels, min(places - j, LANES), dst, stride_j)
    elif abs(stride_i) < abs(stride_j):
        for j in range(places):
            for c in range(channels):
                for i in range(lines):
                    value = load_one(scratch, c * channel + i * line + j, like)
                    store_one(tensor, c * stride_c + i * stride_i + j * stride_j, value)
    else:
        for i in range(lines):
            for c in range(channels):
                for j in range(places):
                    value = load_one(scratch, c * channel + i * line + j, like)
                    store_one(tensor, c * stride_c + i * stride_i + j * stride_j, value)


@jit
def add(
    scratch: Any,
    channel: int,
    line: int,
    tensor: Any,
    channels: int,
    lines: int,
    places: int,
    stride_c: int,
    stride_i: int,
    stride_j: int,
    like: Any,
) -> None:
    """tensor[c * stride_c + i * stride_i + j * stride_j] += scratch[c, i, j]; both in the arithmetic type."""
    if stride_j == 1:
        for c in range(channels):
            for i in range(lines):
                src = advance(scratch, c * channel + i * line)
                dst = advance(tensor, c * stride_c + i * stride_i)
                add_row(dst, src, places, like)
    elif stride_i == 1:
        for c in range(channels):
            dst = advance(tensor, c * stride_c)
            add_transposed(advance(scratch, c * channel), line, lines, places, dst, stride_j)
    elif stride_i == -1:
        for c in range(channels):
            src = advance(scratch, c * channel + (lines - 1) * line)
            dst = advance(tensor, c * stride_c - (lines - 1))
            add_transposed(src, -line, lines, places, dst, stride_j)
    elif stride_c == 1 and channels >= FEWEST_CHANNELS_TO_TRANSPOSE:
        for j in range(0, places, LANES):
            for i in range(lines):
                src = advance(scratch, i * line + j)
                dst = advance(tensor, i * stride_i + j * stride_j)
                add_transposed(src, channel, channels, min(places - j, LANES), dst, stride_j)
    elif abs(stride_i) < abs(stride_j):
        for j in range(places):
            for c in range(channels):
                for i in range(lines):
                    at = c * stride_c + i * stride_i + j * stride_j
                    value = load_one(scratch, c * channel + i * line + j, like)
                    store_one(tensor, at, load_one(tensor, at, like) + value)
    else:
        for i in range(lines):
            for c in range(channels):
                for j in range(places):
                    at = c * stride_c + i * stride_i + j * stride_j
                    value = load_one(scratch, c * channel + i * line + j, like)
                    store_one(tensor, at, load_one(tensor, at, like) + value)
