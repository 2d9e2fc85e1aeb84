"""LayerNorm of x + what few proxy channels bring, in one pass over x: for compiled models that are trained.

A compiler takes a looping reduction for it, which reads x again and again: proxies are the same for a whole
row. The operator returns the normalized sum before gain and shift, and that and one scale a pixel are all
that backward needs. Gain and shift are left to the compiler, for whoever reads next, forward and backward. So
is the gradient of x: it is made of PyTorch's own functions, to be fused with what surrounds it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import fused
from .eager import forward_mode

MOST_CHANNELS = 2048
"""Rows of so many fit in registers."""

_PIXELS = (0, 1, 2)

_library = torch.library.Library("gspn2", "FRAGMENT")
_library.define("normed_sum(Tensor x, Tensor y, Tensor weight, Tensor? bias, float eps) -> (Tensor, Tensor)")


def worth_it(x: Tensor) -> bool:
    """Is x (B, C, H, W) of 16 bits and channels_last, in a model that is compiled for training on a GPU?"""
    return (
        torch.compiler.is_dynamo_compiling()
        and x.is_cuda
        and torch.version.cuda is not None
        and torch.is_grad_enabled()
        and x.dtype in (torch.bfloat16, torch.float16)
        and x.stride(1) == 1
        and x.shape[1] % 8 == 0
        and x.shape[1] <= MOST_CHANNELS
        and not forward_mode()
    )


def normed_sum(
    x: Tensor,  # (B, H, W, C)
    proxies: tuple[Tensor, Tensor, Tensor | None],  # y (B, H, W, P), weight (C, P), bias (C,)
    norm: tuple[Tensor, Tensor, float],  # gain (C,), shift (C,), eps
) -> Tensor:  # (B, H, W, C)
    """LayerNorm(x + linear(y)), in the dtype of x."""
    (y, weight, bias), (gain, shift, eps) = proxies, norm
    z, _scale = torch.ops.gspn2.normed_sum(x, y.to(x.dtype), weight, bias, eps)
    n: Tensor = _Affine.apply(z, gain, shift)
    return n


class _Affine(torch.autograd.Function):
    """z * gain + shift in the dtype of z, whose gradient a compiler keeps in 16 bits, too."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
        ctx.save_for_backward(z, gain)
        ctx.shift_dtype = shift.dtype
        work = _working(z)
        return (z * gain.to(work) + shift.to(work)).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, dn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, gain = ctx.saved_tensors
        work = _working(z)
        dgain = (dn * z).sum(_PIXELS, dtype=work).to(gain.dtype)
        dshift = dn.sum(_PIXELS, dtype=work).to(ctx.shift_dtype)
        return (dn * gain.to(work)).to(z.dtype), dgain, dshift


def _working(x: Tensor) -> torch.dtype:
    """What to calculate in."""
    return torch.promote_types(x.dtype, torch.float32)


def _forward(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Normalized pixels, of the dtype of x, and by what they were multiplied, (B, H, W, 1)."""
    few = x.shape[-1] <= MOST_CHANNELS and y.shape[-1] <= fused.MOST_PROXIES
    if few and y.dtype == x.dtype and fused._takes(x, x.shape[-1]):
        from ..backends.fused import launch

        z, scale = launch.normed_sum(fused._rows(x), fused._rows(y), weight.contiguous(), bias, eps)
        return z.view(x.shape), scale.view(*x.shape[:-1], 1)
    work = _working(x)
    v = x.to(work) if bias is None else x.to(work) + bias.to(work)
    # No matrix product: autocast would round.
    for p in range(y.shape[-1]):
        v = v + y[..., p : p + 1].to(work) * weight[:, p].to(work)
    v = v - v.mean(-1, keepdim=True)
    scale = (v.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (v * scale).to(x.dtype).contiguous(), scale.contiguous()


def _fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(*x.shape[:-1], 1, dtype=_working(x))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _x, y, weight, bias, _eps = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(y, weight, *output)
    ctx.mark_non_differentiable(output[1])


@once_differentiable
def _autograd(ctx: Any, dz: Tensor, _dscale: Tensor) -> tuple[Tensor | None, ...]:
    y, weight, z, scale = ctx.saved_tensors
    work, proxies = scale.dtype, y.shape[-1]
    d, v = dz.to(work), z.to(work)
    along = (d * v).mean(-1, keepdim=True)
    dx = (scale * (d - d.mean(-1, keepdim=True) - v * along)).to(z.dtype)
    # Sums over channels, too, would become a looping reduction.
    dy = torch.ops.gspn2.fused_narrow_linear(dx, weight.t().to(dx.dtype), dx.new_zeros(proxies))
    # Products of 16 bits, not of numbers made wider first: a compiler would write the wide ones.
    dweight = torch.stack([(dx * y[..., p : p + 1]).sum(_PIXELS, dtype=work) for p in range(proxies)], -1)
    dbias = None if ctx.bias_dtype is None else dx.sum(_PIXELS, dtype=work).to(ctx.bias_dtype)
    return dx, dy.to(y.dtype), dweight.to(weight.dtype), dbias, None


_library.impl("normed_sum", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("gspn2::normed_sum", _fake, lib=_library)
torch.library.register_autograd("gspn2::normed_sum", _autograd, setup_context=_setup_context, lib=_library)
