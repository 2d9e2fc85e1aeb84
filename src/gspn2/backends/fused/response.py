"""The end of a GSPN module: linear(GRN(LayerNorm(x + what the proxies bring))), not kept in between.

GRN needs the mean square of every normalized channel over the image before it can do anything. The image is
read for that by `backends/cuda/response.py`. The kernels here read it once more, with gain and shift of every
channel of the image (LayerNorm's and GRN's, put together) and mean and scale of every pixel at hand.
"""

# mypy: ignore-errors
# (What is compiled by Triton has no types.)

from __future__ import annotations

import triton
import triton.language as tl

from .parts import load_channels, load_rows, product, scaled


@triton.jit
def mixed(x, y, wp, bp, rows, live, columns, C: tl.constexpr, PROXIES: tl.constexpr):
    """x + from_proxy(y) of a part of the channels, float32; 0 beyond the last channel."""
    v = load_rows(x, rows, live, columns, C)
    if PROXIES:
        v += load_channels(bp, columns, C)[None, :]
        for p in tl.static_range(PROXIES):
            weight = tl.load(wp + columns * PROXIES + p, mask=columns < C, other=0.0).to(tl.float32)
            v += (
                tl.load(y + rows * PROXIES + p, mask=live, other=0.0).to(tl.float32)[:, None]
                * weight[None, :]
            )
    return v


@triton.jit
def fold_kernel(
    sums,  # (B, SHARES, 2, C): of normalized channels before gain and shift, and of their squares
    gain,  # (C,), as all that follow
    shift,
    weight,
    bias,
    gains,  # (B, C), float32, as shifts
    shifts,
    shares,
    pixels,
    eps,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,  # C rounded up to a power of two
    TILE: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    sums += image * shares * 2 * C
    column, number = tl.arange(0, CHANNELS), tl.arange(0, TILE)
    first, second = tl.zeros((CHANNELS,), tl.float32), tl.zeros((CHANNELS,), tl.float32)
    for s in tl.range(0, shares, TILE):
        mask = (s + number < shares)[:, None] & (column < C)[None, :]
        to = sums + (s + number)[:, None] * 2 * C + column[None, :]
        first += tl.sum(tl.load(to, mask=mask, other=0.0), 0)
        second += tl.sum(tl.load(to + C, mask=mask, other=0.0), 0)
    g, h = load_channels(gain, column, C), load_channels(shift, column, C)
    mean_square = (g * g * second + 2 * g * h * first) / pixels + h * h
    r = tl.where(column < C, tl.sqrt(tl.maximum(mean_square, 0.0) + eps * eps), 0.0)
    scale = 1.0 + load_channels(weight, column, C) * r / (tl.sum(r, 0) / C + eps)
    tl.store(gains + image * C + column, g * scale, mask=column < C)
    tl.store(shifts + image * C + column, h * scale + load_channels(bias, column, C), mask=column < C)


@triton.jit
def apply_kernel(
    x,  # (B, PIXELS, C)
    y,  # (B, PIXELS, PROXIES)
    wp,  # (C, PROXIES)
    bp,  # (C,)
    means,  # (B, PIXELS), as scales
    scales,
    gains,  # (B, C), as shifts
    shifts,
    w,  # (N, C)
    b,  # (N,)
    to,  # (B, PIXELS, N), or (B, PIXELS, C) without a linear layer
    pixels,
    C: tl.constexpr,
    C0: tl.constexpr,
    C1: tl.constexpr,
    N: tl.constexpr,  # 0: no linear layer
    PROXIES: tl.constexpr,
    TILE: tl.constexpr,
    OUTPUTS: tl.constexpr,  # at a time
):
    """GRN(LayerNorm(...)), for few channels with the linear layer after it."""
    image = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * TILE
    place = image * pixels + start
    x += place * C
    y += place * PROXIES
    row = tl.arange(0, TILE)
    live = row < pixels - start
    dtype: tl.constexpr = to.dtype.element_ty
    mean = tl.load(means + place + row, mask=live, other=0.0)[:, None]
    scale = tl.load(scales + place + row, mask=live, other=0.0)
    gains += image * C
    shifts += image * C
    first = tl.arange(0, C0)
    v0 = mixed(x, y, wp, bp, row, live, first, C, PROXIES) - mean
    n0 = scaled(v0, scale, gains, shifts, first, C).to(dtype)
    n1 = n0
    if C1:
        second = C0 + tl.arange(0, C1)
        v1 = mixed(x, y, wp, bp, row, live, second, C, PROXIES) - mean
        n1 = scaled(v1, scale, gains, shifts, second, C).to(dtype)
    if N:
        to += place * N
        for j in tl.range(0, N, OUTPUTS):
            output = j + tl.arange(0, OUTPUTS)
            sums = product(n0, n1, w, output, output < N, C, C0, C1)
            sums += tl.load(b + output, mask=output < N, other=0.0).to(tl.float32)[None, :]
            mask = live[:, None] & (output < N)[None, :]
            tl.store(to + row[:, None] * N + output[None, :], sums.to(dtype), mask=mask)
    else:
        to += place * C
        tl.store(to + row[:, None] * C + first[None, :], n0, mask=live[:, None])
        if C1:
            mask = live[:, None] & (second < C)[None, :]
            tl.store(to + row[:, None] * C + second[None, :], n1, mask=mask)
