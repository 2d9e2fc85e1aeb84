"""x + what few proxy channels bring, normalized: rows stay in registers between reading and writing."""

# mypy: ignore-errors
# (What is compiled by Triton has no types.)

from __future__ import annotations

import triton
import triton.language as tl

from .response import mixed


@triton.jit
def normed_sum_kernel(
    x,  # (ROWS, C)
    y,  # (ROWS, PROXIES)
    wp,  # (C, PROXIES)
    bp,  # (C,)
    z,  # (ROWS, C)
    scales,  # (ROWS,), float32
    rows,
    eps,
    C: tl.constexpr,
    C0: tl.constexpr,
    C1: tl.constexpr,
    PROXIES: tl.constexpr,
    TILE: tl.constexpr,
):
    """LayerNorm(x + from_proxy(y)) before gain and shift, and the scale of every row."""
    start = tl.program_id(0).to(tl.int64) * TILE
    x += start * C
    y += start * PROXIES
    z += start * C
    row = tl.arange(0, TILE)
    live = row < rows - start
    first = tl.arange(0, C0)
    v0 = mixed(x, y, wp, bp, row, live, first, C, PROXIES)
    total = tl.sum(v0, 1)
    if C1:
        second = C0 + tl.arange(0, C1)
        v1 = mixed(x, y, wp, bp, row, live, second, C, PROXIES)
        total += tl.sum(v1, 1)
    mean = total / C
    d0 = v0 - mean[:, None]
    squares = tl.sum(d0 * d0, 1)
    if C1:
        d1 = tl.where((second < C)[None, :], v1 - mean[:, None], 0.0)
        squares += tl.sum(d1 * d1, 1)
    scale = tl.rsqrt(squares / C + eps)
    dtype: tl.constexpr = z.dtype.element_ty
    tl.store(scales + start + row, scale, mask=live)
    tl.store(z + row[:, None] * C + first[None, :], (d0 * scale[:, None]).to(dtype), mask=live[:, None])
    if C1:
        mask = live[:, None] & (second < C)[None, :]
        tl.store(z + row[:, None] * C + second[None, :], (d1 * scale[:, None]).to(dtype), mask=mask)
