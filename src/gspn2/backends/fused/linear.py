"""Linear layers with what stands before or after them."""

# mypy: ignore-errors
# (What is compiled by Triton has no types.)

from __future__ import annotations

import triton
import triton.language as tl

from .parts import gelu, normalize, product


@triton.jit
def norm_linear_kernel(
    x,  # (ROWS, C)
    y,  # (ROWS, N)
    gain,  # (C,), as shift
    shift,
    w,  # (N, C)
    b,  # (N,)
    rows,
    eps,
    C: tl.constexpr,
    N: tl.constexpr,
    C0: tl.constexpr,
    C1: tl.constexpr,
    TILE: tl.constexpr,
    OUTPUTS: tl.constexpr,  # at a time
    STAGES: tl.constexpr,
):
    """linear(LayerNorm(x)) for few channels, whose rows fit in registers."""
    start = tl.program_id(0).to(tl.int64) * TILE
    x += start * C
    y += start * N
    row = tl.arange(0, TILE)
    live = row < rows - start
    dtype: tl.constexpr = y.dtype.element_ty
    n0, n1 = normalize(x, row, live, gain, shift, eps, C, C0, C1, dtype)
    for j in tl.range(0, N, OUTPUTS, num_stages=STAGES):
        output = j + tl.arange(0, OUTPUTS)
        sums = product(n0, n1, w, output, output < N, C, C0, C1)
        sums += tl.load(b + output, mask=output < N, other=0.0).to(tl.float32)[None, :]
        mask = live[:, None] & (output < N)[None, :]
        tl.store(y + row[:, None] * N + output[None, :], sums.to(dtype), mask=mask)


@triton.jit
def narrow_linear_kernel(
    x,  # (ROWS, C)
    y,  # (ROWS, N)
    w,  # (N, C)
    b,  # (N,)
    rows,
    C: tl.constexpr,
    N: tl.constexpr,
    TILE: tl.constexpr,
    INPUTS: tl.constexpr,  # at a time
    OUTPUTS: tl.constexpr,  # N rounded up to a power of two
    STAGES: tl.constexpr,
):
    """linear(x) for few outputs, of any number: rows of y need not be whole vectors."""
    start = tl.program_id(0).to(tl.int64) * TILE
    row, output = tl.arange(0, TILE), tl.arange(0, OUTPUTS)
    live, wanted = row < rows - start, output < N
    x += start * C
    sums = tl.zeros((TILE, OUTPUTS), tl.float32)
    for k in tl.range(0, C, INPUTS, num_stages=STAGES):
        column = k + tl.arange(0, INPUTS)
        there = (column < C)[None, :]
        a = tl.load(x + row[:, None] * C + column[None, :], mask=live[:, None] & there, other=0.0)
        part = tl.load(w + output[:, None] * C + column[None, :], mask=wanted[:, None] & there, other=0.0)
        sums = tl.dot(a, tl.trans(part), sums)
    sums += tl.load(b + output, mask=wanted, other=0.0).to(tl.float32)[None, :]
    to = y + start * N + row[:, None] * N + output[None, :]
    tl.store(to, sums.to(y.dtype.element_ty), mask=live[:, None] & wanted[None, :])


@triton.jit
def linear_gelu_kernel(
    x,  # descriptors: (ROWS, C), tiles of (TILE, INPUTS)
    w,  # (N, C), (OUTPUTS, INPUTS)
    y,  # (ROWS, N), (TILE, OUTPUTS)
    b,  # (N,)
    C: tl.constexpr,
    N: tl.constexpr,
    TILE: tl.constexpr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """GELU(linear(x)). Blocks of the same rows are neighbours: they read them from the cache."""
    across: tl.constexpr = (N + OUTPUTS - 1) // OUTPUTS
    number = tl.program_id(0)
    row, output = number // across * TILE, number % across * OUTPUTS
    sums = tl.zeros((TILE, OUTPUTS), tl.float32)
    for k in tl.range(0, C, INPUTS, num_stages=STAGES):
        sums = tl.dot(x.load([row, k]), w.load([output, k]).T, sums)
    column = output + tl.arange(0, OUTPUTS)
    sums += tl.load(b + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    y.store([row, output], gelu(sums).to(y.dtype))
