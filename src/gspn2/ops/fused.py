"""Passages of a block as one operator each, for inference on a GPU: schema, kernel entry, fake.

What a compiler puts between matrix products are passes over activations; these operators leave them out.
Where there is no kernel for a problem they are the functions of PyTorch that the layers are without them.
They have no gradient: the layers take them only where none is asked for (`at_work`).

Images are (B, H, W, C) here, dense.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .eager import forward_mode, under_transforms

MOST_CHANNELS = 128
"""Rows of so many channels fit in registers, with all that an FFN makes of them."""
MOST_OUTPUTS = 64
"""Of `narrow_linear`."""
MOST_INPUTS = 4
"""Channels of an image that `stem` takes."""
MOST_PROXIES = 4
"""Of `response`."""

_library = torch.library.Library("gspn2", "FRAGMENT")
_library.define(
    "fused_ffn(Tensor x, Tensor gain, Tensor shift, float eps, Tensor w1, Tensor b1, Tensor w2, Tensor b2,"
    " bool residual) -> Tensor"
)
_library.define(
    "fused_norm_linear(Tensor x, Tensor gain, Tensor shift, float eps, Tensor w, Tensor b) -> Tensor"
)
_library.define("fused_narrow_linear(Tensor x, Tensor w, Tensor b) -> Tensor")
_library.define("fused_linear_gelu(Tensor x, Tensor w, Tensor b) -> Tensor")
_library.define(
    "fused_response(Tensor x, Tensor? y, Tensor? wp, Tensor? bp, Tensor gain, Tensor shift, float norm_eps,"
    " Tensor weight, Tensor bias, float eps, Tensor w, Tensor b) -> Tensor"
)
_library.define(
    "fused_stem(Tensor x, Tensor w, Tensor b, int stride, Tensor gain, Tensor shift, float eps) -> Tensor"
)


def at_work(x: Tensor) -> bool:
    """May a layer call these operators: on a GPU, channels_last, in 16 bits, without gradients?

    x: (B, C, H, W). An exported program keeps to operators that its readers know.
    """
    return (
        x.is_cuda
        and torch.version.cuda is not None
        and not torch.is_grad_enabled()
        and x.stride(1) == 1
        and active_dtype(x) in (torch.bfloat16, torch.float16)
        and (torch.compiler.is_dynamo_compiling() or not torch.compiler.is_compiling())
        and not under_transforms()
        and not forward_mode()
    )


def active_dtype(x: Tensor) -> torch.dtype:
    """That of x, or autocast's where that is on."""
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype


def ffn(
    x: Tensor,  # (B, H, W, C)
    norm: tuple[Tensor, Tensor, float],  # gain (C,), shift (C,), eps
    first: tuple[Tensor, Tensor],  # weight (F, C), bias (F,)
    second: tuple[Tensor, Tensor],  # weight (C, F), bias (C,)
    residual: bool,
) -> Tensor:  # (B, H, W, C)
    """linear(GELU(linear(LayerNorm(x)))), plus x if `residual`."""
    x = x.to(active_dtype(x))
    y: Tensor = torch.ops.gspn2.fused_ffn(x, *norm, *_cast(x, *first, *second), residual)
    return y


def norm_linear(x: Tensor, norm: tuple[Tensor, Tensor, float], w: Tensor, b: Tensor) -> Tensor:
    """linear(LayerNorm(x)): (B, H, W, C) -> (B, H, W, N)."""
    x = x.to(active_dtype(x))
    y: Tensor = torch.ops.gspn2.fused_norm_linear(x, *norm, *_cast(x, w, b))
    return y


def narrow_linear(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """linear(x), for any small number of outputs: (B, H, W, C) -> (B, H, W, N), dense."""
    x = x.to(active_dtype(x))
    y: Tensor = torch.ops.gspn2.fused_narrow_linear(x, *_cast(x, w, b))
    return y


def linear_gelu(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """GELU(linear(x)): (B, H, W, C) -> (B, H, W, N)."""
    x = x.to(active_dtype(x))
    y: Tensor = torch.ops.gspn2.fused_linear_gelu(x, *_cast(x, w, b))
    return y


def stem(
    x: Tensor,  # (B, H, W, inputs)
    convolution: tuple[Tensor, Tensor],  # weight (C, inputs, 3, 3), bias (C,)
    stride: int,
    norm: tuple[Tensor, Tensor, float],  # gain (C,), shift (C,), eps
) -> Tensor:  # (B, ceil(H / stride), ceil(W / stride), C)
    """GELU(LayerNorm(convolution(x))), with a border of one zero."""
    x = x.to(active_dtype(x))
    w, b = _cast(x, *convolution)
    y: Tensor = torch.ops.gspn2.fused_stem(x, w, b, stride, *norm)
    return y


def response(
    x: Tensor,  # (B, H, W, C)
    proxies: tuple[Tensor, Tensor, Tensor | None] | None,  # y (B, H, W, P), weight (C, P), bias (C,)
    norm: tuple[Tensor, Tensor, float],  # gain (C,), shift (C,), eps
    grn: tuple[Tensor, Tensor, float],  # weight (C,), bias (C,), eps
    linear: tuple[Tensor, Tensor],  # weight (N, C), bias (N,)
) -> Tensor:  # (B, H, W, N)
    """linear(GRN(LayerNorm(x + linear(y)))): the end of a GSPN module (`gspn2.nn.GRN`)."""
    x = x.to(active_dtype(x))
    y, wp, bp = (None, None, None) if proxies is None else proxies
    y = None if y is None else y.to(x.dtype)
    w, b = _cast(x, *linear)
    result: Tensor = torch.ops.gspn2.fused_response(x, y, wp, bp, *norm, *grn, w, b)
    return result


def _cast(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    return tuple(parameter.to(x.dtype) for parameter in parameters)


def _rows(x: Tensor) -> Tensor:
    return x.contiguous().view(-1, x.shape[-1])


def _layer_norm(x: Tensor, gain: Tensor, shift: Tensor, eps: float) -> Tensor:
    # Autocast would return float32.
    return F.layer_norm(x, x.shape[-1:], gain.to(x.dtype), shift.to(x.dtype), eps).to(x.dtype)


def _ffn(
    x: Tensor,
    gain: Tensor,
    shift: Tensor,
    eps: float,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    residual: bool,
) -> Tensor:
    if _takes(x, *w1.shape) and x.shape[-1] <= MOST_CHANNELS and w1.shape[0] % 32 == 0:
        from ..backends.fused import launch

        w1, w2 = w1.contiguous(), w2.contiguous()
        return launch.ffn(_rows(x), gain, shift, eps, w1, b1, w2, b2, residual).view(x.shape)
    y = F.linear(F.gelu(F.linear(_layer_norm(x, gain, shift, eps), w1, b1)), w2, b2)
    return (x + y if residual else y).contiguous()


def _norm_linear(x: Tensor, gain: Tensor, shift: Tensor, eps: float, w: Tensor, b: Tensor) -> Tensor:
    if _takes(x, *w.shape) and x.shape[-1] <= MOST_CHANNELS:
        from ..backends.fused import launch

        y = launch.norm_linear(_rows(x), gain, shift, eps, w.contiguous(), b)
        return y.view(*x.shape[:-1], -1)
    return F.linear(_layer_norm(x, gain, shift, eps), w, b).contiguous()


def _narrow_linear(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    if _takes(x, w.shape[1]) and w.shape[0] <= MOST_OUTPUTS:
        from ..backends.fused import launch

        return launch.narrow_linear(_rows(x), w.contiguous(), b).view(*x.shape[:-1], -1)
    return F.linear(x, w, b).contiguous()


def _linear_gelu(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    if _takes(x, *w.shape, bulk=True):
        from ..backends.fused import launch

        return launch.linear_gelu(_rows(x), w.contiguous(), b).view(*x.shape[:-1], -1)
    return F.gelu(F.linear(x, w, b)).contiguous()


def _stem(x: Tensor, w: Tensor, b: Tensor, stride: int, gain: Tensor, shift: Tensor, eps: float) -> Tensor:
    if _takes(x, w.shape[0]) and x.shape[-1] <= MOST_INPUTS:
        from ..backends.fused import launch

        windows = w.permute(0, 2, 3, 1).contiguous().flatten(1)
        return launch.stem(x.contiguous(), windows, b, stride, gain, shift, eps)
    y = F.conv2d(x.permute(0, 3, 1, 2), w, b, stride=stride, padding=1).permute(0, 2, 3, 1)
    return F.gelu(_layer_norm(y, gain, shift, eps)).contiguous()


def _response(
    x: Tensor,
    y: Tensor | None,
    wp: Tensor | None,
    bp: Tensor | None,
    gain: Tensor,
    shift: Tensor,
    norm_eps: float,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    w: Tensor,
    b: Tensor,
) -> Tensor:
    batch, height, width, channels = x.shape
    if _takes(x, *w.shape, sources=True) and (y is None or y.shape[-1] <= MOST_PROXIES):
        from ..backends.cuda.response import Norms
        from ..backends.fused import launch

        few = channels <= MOST_CHANNELS * 3 // 2
        y = None if y is None else y.contiguous().view(batch, height * width, -1)
        (gain, shift, weight, bias), (wp, bp) = _of_one_dtype((gain, shift, weight, bias), (wp, bp))
        result = launch.response(
            x.contiguous().view(batch, height * width, channels),
            (y, wp, bp),
            Norms(gain, shift, norm_eps, weight, bias, eps),
            (w.contiguous(), b) if few else None,
        )
        result = result if few else F.linear(result, w, b)
        return result.view(batch, height, width, -1)
    if y is not None and wp is not None:
        x = x + F.linear(y, wp.to(y.dtype), None if bp is None else bp.to(y.dtype))
    n = _layer_norm(x, gain, shift, norm_eps)
    r = (n.float().square().mean((1, 2), keepdim=True) + eps**2).sqrt()
    scale = 1 + weight.float() * r / (r.mean(-1, keepdim=True) + eps)
    return F.linear(torch.addcmul(bias.to(n.dtype), n, scale.to(n.dtype)), w, b).contiguous()


def _of_one_dtype(*groups: tuple[Tensor | None, ...]) -> Any:
    """Dense parameters, all as they are or all in float32."""
    dtypes = {it.dtype for group in groups for it in group if it is not None}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return [tuple(None if it is None else it.to(dtype).contiguous() for it in group) for group in groups]


def _takes(x: Tensor, *channels: int, bulk: bool = False, sources: bool = False) -> bool:
    if not x.is_cuda:
        return False
    from ..backends import fused

    return fused.takes(x, *channels, bulk=bulk, sources=sources)


def _ffn_fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _norm_linear_fake(x: Tensor, gain: Tensor, shift: Tensor, eps: float, w: Tensor, b: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], w.shape[0])


def _linear_fake(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], w.shape[0])


def _stem_fake(x: Tensor, w: Tensor, b: Tensor, stride: int, *_: Any) -> Tensor:
    batch, height, width, _inputs = x.shape
    return x.new_empty(batch, -(-height // stride), -(-width // stride), w.shape[0])


def _response_fake(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], rest[-2].shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pass


def _refuse_gradient(ctx: Any, *_: Any) -> None:
    raise RuntimeError("gspn2: fused operators have no gradient: call them under torch.no_grad()")


for _name, _implementation, _fake in (
    ("fused_ffn", _ffn, _ffn_fake),
    ("fused_norm_linear", _norm_linear, _norm_linear_fake),
    ("fused_narrow_linear", _narrow_linear, _linear_fake),
    ("fused_linear_gelu", _linear_gelu, _linear_fake),
    ("fused_stem", _stem, _stem_fake),
    ("fused_response", _response, _response_fake),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gspn2::{_name}", _fake, lib=_library)
    torch.library.register_autograd(
        f"gspn2::{_name}", _refuse_gradient, setup_context=_setup_context, lib=_library
    )
