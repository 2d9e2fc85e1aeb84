"""Checks the fused kernels in Triton's interpreter, on a CPU, in a process of its own.

The interpreter is chosen by an environment variable that Triton reads when it is imported. float16 only: its
matrix product of bfloat16 multiplies bit patterns.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.nn.functional as F
from torch import Tensor

from gspn2.backends.cuda.response import Norms
from gspn2.backends.fused import launch

EPS = 1e-6
TOLERANCE = 2e-3
"""Of the largest value. Results are rounded to 2^-11, intermediates as well."""


def draw(*shape: int, scale: float = 1.0, like: torch.dtype = torch.float16) -> Tensor:
    return (torch.randn(*shape) * scale).to(like)


def linear(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    return draw(outputs, inputs, scale=inputs**-0.5), draw(outputs)


def exactly(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, w.double(), b.double())


def check(name: str, found: Tensor, right: Tensor) -> None:
    assert found.shape == right.shape, f"{name}: {tuple(found.shape)} instead of {tuple(right.shape)}"
    off = float((found.double() - right).abs().max() / right.abs().max())
    assert off < TOLERANCE, f"{name}: off by {off:.1e}"


def check_linear(channels: int, rows: int) -> None:
    """Channels that are a power of two, and others; the last tile is not full."""
    x, (gain, shift) = draw(rows, channels), draw(2, channels, like=torch.float32)
    exact = x.double()
    normal = F.layer_norm(exact, (channels,), gain.double(), shift.double(), EPS)
    first, second = linear(4 * channels, channels), linear(channels, 4 * channels)
    branch = exactly(F.gelu(exactly(normal, *first)), *second)
    for residual in (True, False):
        found = launch.ffn(x, gain, shift, EPS, *first, *second, residual)
        check(f"ffn {channels} {residual}", found, branch + exact if residual else branch)
    wide, odd = linear(channels * 3 // 2, channels), linear(30, channels)
    check(f"norm_linear {channels}", launch.norm_linear(x, gain, shift, EPS, *wide), exactly(normal, *wide))
    check(f"narrow_linear {channels}", launch.narrow_linear(x, *odd), exactly(exact, *odd))
    check(f"linear_gelu {channels}", launch.linear_gelu(x, *first), F.gelu(exactly(exact, *first)))


def check_response(channels: int, pixels: int) -> None:
    """With statistics of several shares, with and without proxies and the linear layer."""
    x, proxies = draw(3, pixels, channels), draw(3, pixels, 2)
    wp, bp = draw(channels, 2, like=torch.float32), draw(channels, like=torch.float32)
    gain, shift, weight, bias = draw(4, channels, like=torch.float32)
    out = linear(channels * 2 // 3, channels)
    for y in (proxies, None):
        v = x.double() + (0 if y is None else exactly(y.double(), wp, bp))
        n = F.layer_norm(v, (channels,), gain.double(), shift.double(), EPS)
        r = (n.square().mean(1, keepdim=True) + EPS**2).sqrt()
        right = n * (1 + weight.double() * r / (r.mean(2, keepdim=True) + EPS)) + bias.double()
        mean, scale = v.mean(2), (v.var(2, unbiased=False) + EPS).rsqrt()
        z = (v - mean[..., None]) * scale[..., None]
        sums = [torch.stack((part.sum(1), part.square().sum(1)), 1) for part in z.split(pixels // 10, dim=1)]
        statistics = (mean.float(), scale.float(), torch.stack(sums, 1).float())
        with_proxies = (None, None, None) if y is None else (y, wp, bp)
        for last in (None, out):
            norms = Norms(gain, shift, EPS, weight, bias, EPS)
            found = launch.apply(x, with_proxies, norms, statistics, last)
            name = f"response {channels} {y is None} {last is None}"
            check(name, found, right if last is None else exactly(right, *last))


def check_normed_sum(channels: int, rows: int) -> None:
    """Of one to four proxy channels, with a bias and without."""
    x = draw(rows, channels) + 3
    for proxies in (1, 2, 4):
        y, weight = draw(rows, proxies), draw(channels, proxies, like=torch.float32)
        for bias in (draw(channels, like=torch.float32), None):
            v = x.double() + F.linear(y.double(), weight.double(), None if bias is None else bias.double())
            z, scale = launch.normed_sum(x, y, weight, bias, EPS)
            name = f"normed_sum {channels} {proxies} {bias is None}"
            check(name, z, F.layer_norm(v, (channels,), eps=EPS))
            check(f"{name}, scale", scale, (v.var(1, unbiased=False) + EPS).rsqrt())


def check_stem(channels: int, inputs: int, stride: int) -> None:
    x, w, b = draw(2, 13, 18, inputs), draw(channels, inputs, 3, 3), draw(channels)
    gain, shift = draw(2, channels, like=torch.float32)
    y = F.conv2d(x.permute(0, 3, 1, 2).double(), w.double(), b.double(), stride=stride, padding=1)
    normal = F.layer_norm(y.permute(0, 2, 3, 1), (channels,), gain.double(), shift.double(), EPS)
    windows = w.permute(0, 2, 3, 1).contiguous().flatten(1)
    check(f"stem {channels}", launch.stem(x, windows, b, stride, gain, shift, EPS), F.gelu(normal))


def main() -> None:
    torch.manual_seed(0)
    for channels, rows in ((64, 70), (40, 70)):
        check_linear(channels, rows)
        check_response(channels, rows // 2)
    for channels, rows in ((64, 200), (40, 300), (576, 20), (2048, 5)):
        check_normed_sum(channels, rows)
    check_stem(32, 3, 2)
    check_stem(40, 1, 1)
    print("all kernels agree")


if __name__ == "__main__":
    main()
