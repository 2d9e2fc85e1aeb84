"""Layers that keep less for backward, for eager training on a GPU: what is cheap is made again there.

Autograd keeps the input of every linear layer, beside the input of the activation or norm that it is made
of, and float32 copies where autocast normalizes or a sum is taken of wider numbers. A compiler finds out
by itself what not to keep. The functions keep to the arithmetic of the layers they stand for.

Images are (B, H, W, C).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .eager import forward_mode, under_transforms
from .fused import active_dtype

_PIXELS = (1, 2)
_ROWS = (0, 1, 2)


def worth_it(x: Tensor) -> bool:
    """Is x, of the dtype that linear layers take, on a GPU, and eager autograd the only one to look at it?"""
    return (
        x.is_cuda
        and torch.is_grad_enabled()
        and x.dtype == active_dtype(x)
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and not under_transforms()
        and not forward_mode()
    )


def norm(x: Tensor, gain: Tensor, shift: Tensor, eps: float) -> Tensor:
    """LayerNorm of x (B, H, W, C) of 16 bits as autocast calculates it, in float32, in the dtype of x."""
    y: Tensor = _Norm.apply(x, gain, shift, eps)
    return y


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """linear(GELU(x)): (B, H, W, C) -> (B, H, W, N). x alone is kept."""
    y: Tensor = _GeluLinear.apply(x, weight, bias)
    return y


def grn_linear(
    x: Tensor,  # (B, H, W, C)
    grn: tuple[Tensor, Tensor, float],  # weight (C,), bias (C,), eps
    linear: tuple[Tensor, Tensor | None],  # weight (N, C), bias (N,)
) -> Tensor:  # (B, H, W, N)
    """linear(GRN(x)), see `gspn2.nn.GRN`. x alone is kept, and two numbers for each channel of an image."""
    y: Tensor = _GRNLinear.apply(x, *grn, *linear)
    return y


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, shift: Tensor, eps: float) -> Tensor:
        y, mean, scale = torch.native_layer_norm(x.float(), gain.shape, gain, shift, eps)
        ctx.save_for_backward(x, gain, shift, mean, scale)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, shift, mean, scale = ctx.saved_tensors
        dx, dgain, dshift = torch.ops.aten.native_layer_norm_backward(
            dy.float(), x.float(), gain.shape, mean, scale, gain, shift, ctx.needs_input_grad[:3]
        )
        return None if dx is None else dx.to(x.dtype), dgain, dshift, None


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        w, b = _cast(x, weight, bias)
        ctx.save_for_backward(x, w)
        ctx.dtype = weight.dtype
        return F.linear(F.gelu(x), w, b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        for_x, *for_linear = ctx.needs_input_grad
        dweight, dbias = _linear_gradients(dy, lambda: F.gelu(x), ctx.dtype, for_linear)
        dx = torch.ops.aten.gelu_backward(dy @ w, x) if for_x else None
        return dx, dweight, dbias


class _GRNLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor, shift: Tensor, eps: float, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        w, b = _cast(x, weight, bias)
        work = torch.promote_types(x.dtype, torch.float32)
        # One pass that squares in the wider dtype, and leaves no copy in it.
        norm = torch.linalg.vector_norm(x, dim=_PIXELS, keepdim=True, dtype=work)
        response = (norm.square() / (x.shape[1] * x.shape[2]) + eps**2).sqrt()
        mean = response.mean(-1, keepdim=True) + eps
        ctx.save_for_backward(x, gain, shift, w, response, mean)
        ctx.dtype = weight.dtype
        return F.linear(_grn(x, gain, shift, response / mean), w, b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, shift, w, response, mean = ctx.saved_tensors
        for_x, for_gain, for_shift, _, *for_linear = ctx.needs_input_grad
        relative, work = response / mean, response.dtype
        dweight, dbias = _linear_gradients(dy, lambda: _grn(x, gain, shift, relative), ctx.dtype, for_linear)
        if not (for_x or for_gain or for_shift):
            return None, None, None, None, dweight, dbias
        d = dy @ w
        dscale = (d * x).sum(_PIXELS, keepdim=True, dtype=work)
        dgain = (dscale * relative).sum(_ROWS).to(gain.dtype) if for_gain else None
        dshift = d.sum(_ROWS, dtype=work).to(shift.dtype) if for_shift else None
        dx = None
        if for_x:
            drelative = dscale * gain
            dresponse = (drelative - (drelative * relative).mean(-1, keepdim=True)) / mean
            along = dresponse / (response * (x.shape[1] * x.shape[2]))
            dx = torch.addcmul(d * (1 + relative * gain), x.to(work), along).to(x.dtype)
        return dx, dgain, dshift, None, dweight, dbias


def _grn(x: Tensor, gain: Tensor, shift: Tensor, relative: Tensor) -> Tensor:
    return torch.addcmul(shift.to(x.dtype), x, (1 + relative * gain).to(x.dtype))


def _cast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return weight.to(x.dtype), None if bias is None else bias.to(x.dtype)


def _linear_gradients(
    dy: Tensor, remake: Callable[[], Tensor], dtype: torch.dtype, wanted: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of weight and bias, as far as they are `wanted`; `remake` makes the layer's input again."""
    rows = dy.reshape(-1, dy.shape[-1])
    dweight = (rows.t() @ remake().flatten(0, 2)).to(dtype) if wanted[0] else None
    return dweight, rows.sum(0).to(dtype) if wanted[1] else None
