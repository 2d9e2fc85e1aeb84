"""A whole FFN in one pass: x + linear(GELU(linear(LayerNorm(x)))), for few channels.

The hidden activations, four times as many as the input's, never leave the chip. That pays where the products
are too narrow to keep tensor cores busy, in the first stages of a backbone: with more channels every block
would read more weights than pixels.
"""

# mypy: ignore-errors
# (What is compiled by Triton has no types.)

from __future__ import annotations

import triton
import triton.language as tl

from .parts import gelu, load_channels, load_rows, normalize, product


@triton.jit
def ffn_kernel(
    x,  # (ROWS, C)
    y,  # (ROWS, C)
    gain,  # (C,), as shift
    shift,
    w1,  # (F, C)
    b1,  # (F,)
    w2,  # (C, F)
    b2,  # (C,)
    rows,
    eps,
    C: tl.constexpr,
    F: tl.constexpr,
    C0: tl.constexpr,
    C1: tl.constexpr,
    RESIDUAL: tl.constexpr,
    TILE: tl.constexpr,
    HIDDEN: tl.constexpr,  # activations at a time, a divisor of F
    STAGES: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * TILE
    x += start * C
    y += start * C
    row = tl.arange(0, TILE)
    live = row < rows - start
    dtype: tl.constexpr = y.dtype.element_ty
    n0, n1 = normalize(x, row, live, gain, shift, eps, C, C0, C1, dtype)
    first = tl.arange(0, C0)
    sum0 = tl.zeros((TILE, C0), tl.float32)
    if C1:
        second = C0 + tl.arange(0, C1)
        sum1 = tl.zeros((TILE, C1), tl.float32)
    for j in tl.range(0, F, HIDDEN, num_stages=STAGES):
        hidden = j + tl.arange(0, HIDDEN)
        h = product(n0, n1, w1, hidden, hidden < F, C, C0, C1)
        h = gelu(h + tl.load(b1 + hidden).to(tl.float32)[None, :]).to(dtype)
        sum0 = tl.dot(h, tl.trans(tl.load(w2 + first[:, None] * F + hidden[None, :])), sum0)
        if C1:
            mask = (second < C)[:, None]
            w = tl.load(w2 + second[:, None] * F + hidden[None, :], mask=mask, other=0.0)
            sum1 = tl.dot(h, tl.trans(w), sum1)
    sum0 += load_channels(b2, first, C)[None, :]
    if RESIDUAL:
        sum0 += load_rows(x, row, live, first, C)
    tl.store(y + row[:, None] * C + first[None, :], sum0.to(dtype), mask=live[:, None])
    if C1:
        sum1 += load_channels(b2, second, C)[None, :]
        if RESIDUAL:
            sum1 += load_rows(x, row, live, second, C)
        mask = live[:, None] & (second < C)[None, :]
        tl.store(y + row[:, None] * C + second[None, :], sum1.to(dtype), mask=mask)
