"""Counting: parameters, and multiply-accumulates with the propagation operator included."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from ..ops import depthwise, fused, normed_sum, packed  # noqa: F401  (registers them)

# One state element takes three taps and lam * x, and its contribution to the output one gate.
_PROPAGATE_MACS = 5


@register_flop_formula([torch.ops.gspn2.propagate, torch.ops.gspn2.propagate_keeping])
def _propagate_flops(
    x_shape: Any, taps_shape: Any, lam: Any, gate: Any, directions: Any, *args: Any, **kwargs: Any
) -> int:
    batch, channels, height, width = x_shape
    return 2 * _PROPAGATE_MACS * len(directions) * batch * channels * height * width


@register_flop_formula(torch.ops.gspn2.propagate_packed)
def _packed_flops(
    packed_shape: Any, channels: int, groups: int, directions: Any, *args: Any, **kwargs: Any
) -> int:
    return 2 * _PROPAGATE_MACS * len(directions) * math.prod(packed_shape[:3]) * channels


@register_flop_formula(torch.ops.gspn2.propagate_packed_backward)
def _packed_backward_flops(dy_shape: Any, packed_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 3 * _packed_flops(packed_shape, *args)


@register_flop_formula(torch.ops.gspn2.propagate_backward)
def _propagate_backward_flops(dy_shape: Any, *args: Any, **kwargs: Any) -> int:
    """The scan again, its adjoint, and the gradients of taps, lam, gate and x.

    States that were kept are no exception: that they are not computed again is the kernels' matter.
    """
    x_shape, taps_shape, lam, gate, directions = args[:5]
    return 3 * _propagate_flops(x_shape, taps_shape, lam, gate, directions)


@register_flop_formula([torch.ops.gspn2.depthwise, torch.ops.gspn2.depthwise_input])
def _depthwise_flops(x_shape: Any, weight_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(x_shape) * weight_shape[-1] ** 2


@register_flop_formula(torch.ops.gspn2.depthwise_weights)
def _depthwise_weights_flops(
    dy_shape: Any, x_shape: Any, other: Any, side: int, *args: Any, **kwargs: Any
) -> int:
    return 2 * math.prod(x_shape) * side**2


@register_flop_formula(torch.ops.gspn2.fused_ffn)
def _ffn_flops(
    x_shape: Any, gain: Any, shift: Any, eps: float, w1_shape: Any, *args: Any, **kwargs: Any
) -> int:
    return 4 * math.prod(x_shape) * w1_shape[0]


@register_flop_formula(torch.ops.gspn2.fused_norm_linear)
def _norm_linear_flops(
    x_shape: Any, gain: Any, shift: Any, eps: float, w_shape: Any, *args: Any, **kwargs: Any
) -> int:
    return 2 * math.prod(x_shape) * w_shape[0]


@register_flop_formula([torch.ops.gspn2.fused_narrow_linear, torch.ops.gspn2.fused_linear_gelu])
def _linear_flops(x_shape: Any, w_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(x_shape) * w_shape[0]


@register_flop_formula(torch.ops.gspn2.fused_stem)
def _stem_flops(
    x_shape: Any, w_shape: Any, b: Any, stride: int, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    return 2 * math.prod(out_shape) * math.prod(w_shape[1:])


@register_flop_formula(torch.ops.gspn2.fused_response)
def _response_flops(x_shape: Any, y_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    proxies = 0 if y_shape is None else y_shape[-1]
    return 2 * math.prod(x_shape) * (out_shape[-1] + proxies)


@register_flop_formula(torch.ops.gspn2.normed_sum)
def _normed_sum_flops(x_shape: Any, y_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(x_shape) * y_shape[-1]


def count_parameters(model: nn.Module) -> int:
    """Learned numbers of `model`."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, size: tuple[int, int, int] = (3, 224, 224)) -> int:
    """Multiply-accumulates of one forward pass for one image (C, H, W).

    Counted by `torch.utils.flop_counter` on a copy of the model without memory (meta tensors): convolutions,
    matrix products and propagation (per direction and proxy channel three taps, lam and gate); no norms or
    activations, as is the custom of the tables in this field.
    """
    meta = copy.deepcopy(model).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        meta(torch.empty(1, *size, device="meta"))
    return int(counter.get_total_flops()) // 2
