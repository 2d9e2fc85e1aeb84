"""The first convolution of a stem with LayerNorm and GELU after it: few input channels, 3 x 3, any stride.

A matrix product of windows that are never written: a block gathers its windows from the image. Written is the
result alone, which is larger than the image many times.
"""

# mypy: ignore-errors
# (What is compiled by Triton has no types.)

from __future__ import annotations

import triton
import triton.language as tl

from .parts import gelu, load_channels, scaled


@triton.jit
def stem_kernel(
    x,  # (B, HEIGHT, WIDTH, INPUTS)
    y,  # (B, DOWN, ACROSS, C)
    w,  # (C, 9 INPUTS): row, column, input channel
    b,  # (C,), as gain and shift
    gain,
    shift,
    rows,  # B * DOWN * ACROSS
    height,
    width,
    down,
    across,
    eps,
    INPUTS: tl.constexpr,
    STRIDE: tl.constexpr,
    C: tl.constexpr,
    C0: tl.constexpr,
    C1: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,  # 9 INPUTS rounded up to a power of two
):
    start = tl.program_id(0).to(tl.int64) * TILE
    row = tl.arange(0, TILE)
    number = start + row
    live = number < rows
    line = number // across
    image = line // down
    k = tl.arange(0, WINDOW)
    top = (line - image * down).to(tl.int32) * STRIDE - 1
    left = (number - line * across).to(tl.int32) * STRIDE - 1
    i = top[:, None] + (k // (3 * INPUTS))[None, :]
    j = left[:, None] + (k // INPUTS % 3)[None, :]
    inside = (i >= 0) & (i < height) & (j >= 0) & (j < width) & (k < 9 * INPUTS)[None, :] & live[:, None]
    at = (image * height * width)[:, None] + (i * width + j)
    window = tl.load(x + at * INPUTS + (k % INPUTS)[None, :], mask=inside, other=0.0)
    to = y + start * C + row[:, None] * C
    first = tl.arange(0, C0)
    d0 = convolved(window, w, b, first, k, C, 9 * INPUTS)
    total = tl.sum(d0, 1)
    if C1:
        second = C0 + tl.arange(0, C1)
        d1 = convolved(window, w, b, second, k, C, 9 * INPUTS)
        total += tl.sum(d1, 1)
    mean = total / C
    d0 -= mean[:, None]
    squares = tl.sum(d0 * d0, 1)
    if C1:
        d1 = tl.where((second < C)[None, :], d1 - mean[:, None], 0.0)
        squares += tl.sum(d1 * d1, 1)
    scale = tl.rsqrt(squares / C + eps)
    dtype: tl.constexpr = y.dtype.element_ty
    tl.store(
        to + first[None, :], gelu(scaled(d0, scale, gain, shift, first, C)).to(dtype), mask=live[:, None]
    )
    if C1:
        n1 = gelu(scaled(d1, scale, gain, shift, second, C)).to(dtype)
        tl.store(to + second[None, :], n1, mask=live[:, None] & (second < C)[None, :])


@triton.jit
def convolved(window, w, b, columns, k, C: tl.constexpr, SIZE: tl.constexpr):
    """Windows times some rows of the weight, and the bias; 0 beyond the last channel."""
    mask = (columns < C)[:, None] & (k < SIZE)[None, :]
    part = tl.load(w + columns[:, None] * SIZE + k[None, :], mask=mask, other=0.0)
    return tl.dot(window, tl.trans(part)) + load_channels(b, columns, C)[None, :]
