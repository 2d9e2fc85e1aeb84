"""Which sizes the fused kernels run with, and how they are called. Tensors are dense, of 16 bits, on a GPU.

The tables are small on purpose: widths of backbones, measured on an H200.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..cuda import driver
from ..cuda.response import Norms, Problem, in_one_block, statistics, whole
from .ffn import ffn_kernel
from .linear import linear_gelu_kernel, narrow_linear_kernel, norm_linear_kernel
from .normed_sum import normed_sum_kernel
from .parts import split
from .response import apply_kernel, fold_kernel
from .stem import stem_kernel

_Result = TypeVar("_Result")


def _where_it_lies(function: Callable[..., _Result]) -> Callable[..., _Result]:
    """With the device of the first argument as the current one, where Triton launches."""

    @wraps(function)
    def launch(x: Tensor, *rest: Any) -> _Result:
        index = x.get_device()
        if index < 0 or index == torch.cuda.current_device():
            return function(x, *rest)
        with torch.cuda.device(index):
            return function(x, *rest)

    return launch


@_where_it_lies
def ffn(
    x: Tensor,  # (rows, C)
    gain: Tensor,
    shift: Tensor,
    eps: float,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    residual: bool,
) -> Tensor:  # (rows, C)
    """[x +] linear(GELU(linear(LayerNorm(x))))."""
    rows, channels = x.shape
    y = torch.empty_like(x)
    tile, hidden, warps, stages = FFN[channels > 64]
    hidden = hidden if w1.shape[0] % hidden == 0 else HIDDEN
    first, second = split(channels)
    ffn_kernel[(triton.cdiv(rows, tile),)](
        x, y, gain, shift, w1, b1, w2, b2, rows, eps,
        C=channels, F=w1.shape[0], C0=first, C1=second, RESIDUAL=residual,
        TILE=tile, HIDDEN=hidden, STAGES=stages, num_warps=warps,
    )  # fmt: skip
    return y


FFN = {False: (64, 64, 4, 1), True: (64, 64, 4, 2)}
"""Rows and hidden activations of a tile, warps and stages, for up to 64 channels and for more."""


HIDDEN = 32
"""Of which the hidden activations are a multiple."""


@_where_it_lies
def norm_linear(x: Tensor, gain: Tensor, shift: Tensor, eps: float, w: Tensor, b: Tensor) -> Tensor:
    """linear(LayerNorm(x)): (rows, C) -> (rows, N)."""
    (rows, channels), outputs = x.shape, w.shape[0]
    y = x.new_empty(rows, outputs)
    first, second = split(channels)
    tile, warps, stages = NORM_LINEAR
    norm_linear_kernel[(triton.cdiv(rows, tile),)](
        x, y, gain, shift, w, b, rows, eps,
        C=channels, N=outputs, C0=first, C1=second,
        TILE=tile, OUTPUTS=64 if outputs % 64 == 0 else 32, STAGES=stages, num_warps=warps,
    )  # fmt: skip
    return y


NORM_LINEAR = (64, 4, 1)


@_where_it_lies
def narrow_linear(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """linear(x): (rows, C) -> (rows, N), N at most 64."""
    (rows, channels), outputs = x.shape, w.shape[0]
    y = x.new_empty(rows, outputs)
    tile, warps, stages = NARROW
    narrow_linear_kernel[(triton.cdiv(rows, tile),)](
        x, y, w, b, rows,
        C=channels, N=outputs, TILE=tile, INPUTS=next((k for k in (64, 32) if channels % k == 0), 64),
        OUTPUTS=max(16, triton.next_power_of_2(outputs)), STAGES=stages, num_warps=warps,
    )  # fmt: skip
    return y


NARROW = (128, 4, 3)


@_where_it_lies
def linear_gelu(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """GELU(linear(x)): (rows, C) -> (rows, N)."""
    (rows, channels), outputs = x.shape, w.shape[0]
    y = x.new_empty(rows, outputs)
    tile, across, inputs, warps, stages = LINEAR_GELU
    blocks = triton.cdiv(rows, tile) * triton.cdiv(outputs, across)
    linear_gelu_kernel[(blocks,)](
        TensorDescriptor.from_tensor(x, [tile, inputs]),
        TensorDescriptor.from_tensor(w, [across, inputs]),
        TensorDescriptor.from_tensor(y, [tile, across]),
        b,
        C=channels, N=outputs, TILE=tile, INPUTS=inputs, OUTPUTS=across, STAGES=stages, num_warps=warps,
    )  # fmt: skip
    return y


LINEAR_GELU = (128, 128, 64, 4, 3)


@_where_it_lies
def stem(
    x: Tensor,  # (B, H, W, inputs)
    w: Tensor,  # (C, 9 * inputs): row, column, input channel
    b: Tensor,
    stride: int,
    gain: Tensor,
    shift: Tensor,
    eps: float,
) -> Tensor:  # (B, ceil(H / stride), ceil(W / stride), C)
    """GELU(LayerNorm(conv(x))), the convolution 3 x 3 with a border of one zero."""
    (batch, height, width, inputs), channels = x.shape, w.shape[0]
    down, across = triton.cdiv(height, stride), triton.cdiv(width, stride)
    y = x.new_empty(batch, down, across, channels)
    first, second = split(channels)
    tile, warps = STEM
    rows = batch * down * across
    stem_kernel[(triton.cdiv(rows, tile),)](
        x, y, w, b, gain, shift, rows, height, width, down, across, eps,
        INPUTS=inputs, STRIDE=stride, C=channels, C0=first, C1=second,
        TILE=tile, WINDOW=max(16, triton.next_power_of_2(9 * inputs)), num_warps=warps,
    )  # fmt: skip
    return y


STEM = (128, 4)


@_where_it_lies
def response(
    x: Tensor,  # (B, pixels, C)
    proxies: tuple[Tensor | None, Tensor | None, Tensor | None],  # y (B, pixels, P), weight (C, P), bias (C,)
    norms: Norms,
    linear: tuple[Tensor, Tensor] | None,  # (N, C), (N,)
) -> Tensor:  # (B, pixels, N or C)
    """linear(GRN(LayerNorm(x + y weight^T + bias))); parameters but those of `linear` share a dtype."""
    y = proxies[0]
    batch, pixels, channels = x.shape
    count = 0 if y is None else y.shape[2]
    problem = Problem(batch, pixels, channels, count, x.dtype, norms.gain.dtype)
    if linear is None and in_one_block(problem, driver.device(x.get_device())):
        return whole(x, proxies, norms)
    means, scales, sums = statistics(x, proxies, norms)
    return apply(x, proxies, norms, (means, scales, sums), linear)


def apply(
    x: Tensor,
    proxies: tuple[Tensor | None, Tensor | None, Tensor | None],
    norms: Norms,
    statistics: tuple[Tensor, Tensor, Tensor],
    linear: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """`response` with the statistics at hand (`backends.cuda.response.statistics`)."""
    (batch, pixels, channels), (means, scales, sums) = x.shape, statistics
    gains, shifts = x.new_empty(2, batch, channels, dtype=torch.float32)
    fold_kernel[(batch,)](
        sums, norms.gain, norms.shift, norms.weight, norms.bias, gains, shifts,
        sums.shape[1], pixels, norms.eps,
        C=channels, CHANNELS=triton.next_power_of_2(channels), TILE=8, num_warps=4,
    )  # fmt: skip
    y, weight, bias = proxies
    count = 0 if y is None else y.shape[2]
    # What is not there is not read, but has to be some pointer.
    y, weight = (x, x) if y is None else (y, weight)
    bias = norms.gain.new_zeros(channels) if bias is None and count else bias
    outputs = 0 if linear is None else linear[0].shape[0]
    w, b = (x, x) if linear is None else linear
    to = x.new_empty(batch, pixels, outputs or channels)
    first, second = split(channels)
    tile, warps = APPLY if outputs else APPLY_ALONE
    apply_kernel[(triton.cdiv(pixels, tile), batch)](
        x, y, weight, x if bias is None else bias, means, scales, gains, shifts, w, b, to, pixels,
        C=channels, C0=first, C1=second, N=outputs, PROXIES=count,
        TILE=tile, OUTPUTS=64 if outputs % 64 == 0 else 32, num_warps=warps,
    )  # fmt: skip
    return to


APPLY = (64, 4)
APPLY_ALONE = (16, 8)


@_where_it_lies
def normed_sum(
    x: Tensor,  # (rows, C)
    y: Tensor,  # (rows, P)
    weight: Tensor,  # (C, P)
    bias: Tensor | None,  # (C,)
    eps: float,
) -> tuple[Tensor, Tensor]:  # (rows, C), (rows,)
    """LayerNorm(x + y weight^T + bias) without gain and shift, and by what it multiplies each row."""
    rows, channels = x.shape
    bias = weight.new_zeros(channels) if bias is None else bias
    z, scales = torch.empty_like(x), x.new_empty(rows, dtype=torch.float32)
    first, second = split(channels)
    held, warps = NORMED_SUM
    tile = held // first
    normed_sum_kernel[(triton.cdiv(rows, tile),)](
        x, y, weight, bias, z, scales, rows, eps,
        C=channels, C0=first, C1=second, PROXIES=y.shape[1], TILE=tile, num_warps=warps,
    )  # fmt: skip
    return z, scales


NORMED_SUM = (8192, 8)
"""Numbers that a tile holds, the smaller part of a row (`parts.split`) not counted, and warps."""
