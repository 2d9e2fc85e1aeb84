"""What the fused kernels share: rows of channels in registers, their LayerNorm, GELU.

Triton's tiles have sides that are powers of two, and few numbers of channels are one. A row is therefore held
in two parts: C0 channels, the largest power of two up to C, and the rest in C1, a power of two (0: there is
none) whose lanes beyond C are masked. 576 channels are 512 + 64 that way, instead of 1024.
"""

# mypy: ignore-errors
# (What is compiled by Triton has no types.)

from __future__ import annotations

import triton
import triton.language as tl

# log2 Phi(-a) as a polynomial: coefficients of a^0 to a^5.
P0 = tl.constexpr(-1.000037670135498)
P1 = tl.constexpr(-1.1507878303527832)
P2 = tl.constexpr(-0.4599924385547638)
P3 = tl.constexpr(-0.051827382296323776)
P4 = tl.constexpr(0.007084557320922613)
P5 = tl.constexpr(-0.00047330930829048157)


def split(channels: int) -> tuple[int, int]:
    """(C0, C1) of so many channels."""
    first = 1 << (channels.bit_length() - 1)
    rest = channels - first
    return first, max(16, triton.next_power_of_2(rest)) if rest else 0


@triton.jit
def gelu(v):
    """v Phi(v), off by 7e-7 at most: max(v, 0) - |v| Phi(-|v|), where log2 Phi(-a) is nearly a parabola.

    The polynomial of degree 5 is fitted to the error of the product and falls beyond its interval.
    """
    a = tl.minimum(tl.abs(v), 16.0)
    p = ((((P5 * a + P4) * a + P3) * a + P2) * a + P1) * a + P0
    return tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL) - a * tl.exp2(p)


@triton.jit
def load_rows(x, rows, live, columns, C: tl.constexpr):
    """Rows and columns of an (any, C) matrix in float32; zeros where there is none."""
    mask = live[:, None] & (columns < C)[None, :]
    return tl.load(x + rows[:, None] * C + columns[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_channels(p, columns, C: tl.constexpr):
    """A parameter of every channel, in float32."""
    return tl.load(p + columns, mask=columns < C, other=0.0).to(tl.float32)


@triton.jit
def scaled(d, scale, gain, shift, columns, C: tl.constexpr):
    """Centered rows through a scale of their own and a gain and a shift of every channel."""
    g, s = load_channels(gain, columns, C), load_channels(shift, columns, C)
    return d * scale[:, None] * g[None, :] + s[None, :]


@triton.jit
def normalize(
    x, rows, live, gain, shift, eps, C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, TO: tl.constexpr
):
    """LayerNorm of rows, rounded to the dtype TO, in two parts (the second is the first if there is none)."""
    first = tl.arange(0, C0)
    v0 = load_rows(x, rows, live, first, C)
    total = tl.sum(v0, 1)
    if C1:
        second = C0 + tl.arange(0, C1)
        v1 = load_rows(x, rows, live, second, C)
        total += tl.sum(v1, 1)
    mean = total / C
    d0 = v0 - mean[:, None]
    squares = tl.sum(d0 * d0, 1)
    if C1:
        d1 = tl.where((second < C)[None, :], v1 - mean[:, None], 0.0)
        squares += tl.sum(d1 * d1, 1)
    scale = tl.rsqrt(squares / C + eps)
    n0 = scaled(d0, scale, gain, shift, first, C).to(TO)
    n1 = n0
    if C1:
        n1 = (
            d1 * scale[:, None] * load_channels(gain, second, C)[None, :]
            + load_channels(shift, second, C)[None, :]
        )
        n1 = n1.to(TO)
    return n0, n1


@triton.jit
def product(n0, n1, w, outputs, live, C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr):
    """Rows times the transposed rows `outputs` of a weight (any, C)."""
    first = tl.arange(0, C0)
    to = w + outputs[:, None] * C
    sums = tl.dot(n0, tl.trans(tl.load(to + first[None, :], mask=live[:, None], other=0.0)))
    if C1:
        second = C0 + tl.arange(0, C1)
        mask = live[:, None] & (second < C)[None, :]
        sums = tl.dot(n1, tl.trans(tl.load(to + second[None, :], mask=mask, other=0.0)), sums)
    return sums
