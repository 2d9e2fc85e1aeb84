"""Depthwise convolution as PyTorch sees it on a GPU: schema, kernel entry, fake and autograd.

The kernels of the CUDA backend run where they take the problem, PyTorch's own elsewhere; which of them is
decided inside the operator, at run time, as for `propagate`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.cuda import depthwise as kernels
from .eager import needs_gradient, plain, plain_gradient, refuse_forward_mode

_library = torch.library.Library("gspn2", "FRAGMENT")
_library.define(
    "depthwise(Tensor x, Tensor weight, Tensor? bias, Tensor? other, bool residual, bool silu) -> Tensor"
)
_library.define("depthwise_input(Tensor dy, Tensor weight, bool residual) -> Tensor")
_library.define("depthwise_weights(Tensor dy, Tensor x, Tensor? other, int side) -> (Tensor, Tensor)")


def depthwise(
    x: Tensor,  # (B, C, H, W)
    weight: Tensor,  # (C, 1, side, side), side odd
    bias: Tensor | None = None,  # (C,)
    other: Tensor | None = None,  # (B, C, H, W)
    *,
    residual: bool = False,
    silu: bool = False,
) -> Tensor:  # (B, C, H, W), channels_last
    """conv(x), as large as x; plus x if `residual`; last through x sigmoid(x) if `silu`.

    If `other` is there, all this is done with x + other in place of x.
    Sums are float32 and rounded once. With `silu` there is no gradient.
    """
    if plain(x, weight, bias, other):
        arguments = (x, weight, bias, other, residual, silu)
        return _Eager.apply(*arguments) if needs_gradient(x, weight, bias, other) else _forward(*arguments)
    refuse_forward_mode(x, weight, bias, other)
    y: Tensor = torch.ops.gspn2.depthwise(x, weight, bias, other, residual, silu)
    return y


def _on_cuda(x: Tensor) -> bool:
    """AMD's GPUs go by the same name."""
    return x.is_cuda and torch.version.cuda is not None


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    return F.conv2d(x, weight.to(x.dtype), bias, padding=weight.shape[2] // 2, groups=x.shape[1])


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor | None, residual: bool, silu: bool
) -> Tensor:
    if _on_cuda(x) and kernels.takes(x, weight, bias):
        return kernels.forward(x, weight, bias, residual=residual, silu=silu, other=other)
    x = x if other is None else x + other.to(x.dtype)
    y = _convolve(x, weight, bias)
    y = y + x if residual else y
    return _laid_out(F.silu(y) if silu else y)


def _input_gradient(dy: Tensor, weight: Tensor, residual: bool) -> Tensor:
    if _on_cuda(dy) and kernels.takes(dy, weight, None):
        return kernels.forward(dy, weight, None, residual=residual, flip=True)
    dx = _convolve(dy, weight.flip(2, 3), None)
    return _laid_out(dx + dy if residual else dx)


def _weight_gradient(dy: Tensor, x: Tensor, other: Tensor | None, side: int) -> tuple[Tensor, Tensor]:
    if _on_cuda(x) and kernels.takes_side(x, side):
        return kernels.weight_gradient(dy, x, side, other)
    x = x if other is None else x + other.to(x.dtype)
    dy = dy.to(x.dtype)
    _, dw, db = torch.ops.aten.convolution_backward(
        dy,
        x,
        x.new_empty(x.shape[1], 1, side, side),
        [x.shape[1]],
        [1, 1],
        [side // 2] * 2,
        [1, 1],
        False,
        [0, 0],
        x.shape[1],
        [False, True, True],
    )
    return dw.contiguous().float(), db.float()


def _laid_out(y: Tensor) -> Tensor:
    return torch.empty_like(y, memory_format=torch.channels_last).copy_(y)


def _fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _weights_fake(dy: Tensor, x: Tensor, other: Tensor | None, side: int) -> tuple[Tensor, Tensor]:
    channels = x.shape[1]
    return (
        x.new_empty(channels, 1, side, side, dtype=torch.float32),
        x.new_empty(channels, dtype=torch.float32),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, other, ctx.residual, ctx.silu = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.other_dtype = None if other is None else other.dtype
    ctx.save_for_backward(x, weight, other)


def _autograd(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.silu:
        raise RuntimeError("gspn2: depthwise with silu=True has no gradient: apply the activation after it")
    x, weight, other = ctx.saved_tensors
    if plain_gradient(dy, x, weight, other):
        input_gradient, weight_gradient = _input_gradient, _weight_gradient
    else:
        input_gradient = torch.ops.gspn2.depthwise_input
        weight_gradient = torch.ops.gspn2.depthwise_weights
    dx = dw = db = d_other = None
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[3]:
        dx = input_gradient(dy, weight, ctx.residual)
        d_other = dx.to(ctx.other_dtype) if ctx.needs_input_grad[3] else None
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        dw, db = weight_gradient(dy, x, other, weight.shape[2])
        dw, db = dw.to(weight.dtype), None if ctx.bias_dtype is None else db.to(ctx.bias_dtype)
    return dx, dw, db, d_other, None, None


def _refuse_second_order(ctx: Any, *_: Any) -> None:
    raise NotImplementedError("gspn2: the gradient of depthwise cannot be differentiated a second time")


class _Eager(torch.autograd.Function):
    """`depthwise` with its derivative, apart from the dispatcher (see `eager`)."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        y = _forward(*arguments)
        _setup_context(ctx, arguments, y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _autograd(ctx, dy)


_library.impl("depthwise", _forward, "CompositeExplicitAutograd")
_library.impl("depthwise_input", _input_gradient, "CompositeExplicitAutograd")
_library.impl("depthwise_weights", _weight_gradient, "CompositeExplicitAutograd")
torch.library.register_fake("gspn2::depthwise", _fake, lib=_library)
torch.library.register_fake("gspn2::depthwise_input", _fake, lib=_library)
torch.library.register_fake("gspn2::depthwise_weights", _weights_fake, lib=_library)
torch.library.register_autograd("gspn2::depthwise", _autograd, setup_context=_setup_context, lib=_library)
for _name in ("depthwise_input", "depthwise_weights"):
    torch.library.register_autograd(f"gspn2::{_name}", _refuse_second_order, lib=_library)
