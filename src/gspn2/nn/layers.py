"""Parts of a GSPN-2 block beside the mixer. Images are (B, C, H, W) everywhere.

Every layer works in whatever layout it is given and hands the same one on; channels_last is the fast one: the
linear layers and norms then read (B, H, W, C) memory as it lies.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import fused, lean
from ..ops.depthwise import depthwise
from ..ops.eager import under_transforms


def pointwise(
    x: Tensor,  # (B, C_in, H, W)
    weight: Tensor,  # (C_out, C_in)
    bias: Tensor | None = None,  # (C_out,)
) -> Tensor:  # (B, C_out, H, W)
    """A linear map of the channels of every pixel."""
    if x.device.type == "cpu" and x.dtype == torch.float32:
        # oneDNN has the better float32 matrix product on CPUs that MKL does not favor, and 1x1 convolution is
        # the way to it.
        return F.conv2d(x, weight[:, :, None, None], bias)
    return F.linear(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)


class Pointwise(nn.Linear):
    """1x1 convolution with the weight (out, in) of a linear layer.

    Shape: (B, in_features, H, W) -> (B, out_features, H, W), channels_last kept.
    """

    def forward(self, input: Tensor) -> Tensor:
        return pointwise(input, self.weight, self.bias)


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W)."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__(dim, eps=eps)

    def forward(self, input: Tensor) -> Tensor:
        pixels = input.permute(0, 2, 3, 1)
        autocast = input.is_cuda and torch.is_autocast_enabled("cuda")
        if autocast and lean.worth_it(input):
            return lean.norm(pixels, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)
        pixels = F.layer_norm(pixels, self.normalized_shape, self.weight, self.bias, self.eps)
        if autocast:
            # Autocast normalizes in float32 and leaves it at that: twice the memory for all that follows.
            pixels = pixels.to(torch.get_autocast_dtype("cuda"))
        return pixels.permute(0, 3, 1, 2)


class Depthwise(nn.Conv2d):
    """Depthwise convolution with an odd side, as large as its input, and what comes after it.

    On a GPU in channels_last memory a kernel of gspn2's does it all in one pass. Under autocast it takes and
    returns the active dtype, the sum with its input included.

    Shape: (B, dim, H, W) -> (B, dim, H, W).
    """

    def __init__(self, dim: int, kernel_size: int) -> None:
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd number of at least 1, got {kernel_size}")
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(
        self, x: Tensor, other: Tensor | None = None, *, residual: bool = False, silu: bool = False
    ) -> Tensor:
        """conv(x); plus x if `residual`; through SiLU if `silu`. x: x + other, if that is there."""
        if not x.is_cuda or x.stride(1) != 1 or under_transforms():
            x = x if other is None else x + other
            y = super().forward(x)
            y = x + y if residual else y
            return F.silu(y) if silu else y
        if torch.is_autocast_enabled("cuda"):
            x = x.to(torch.get_autocast_dtype("cuda"))
        # With gradients the sum before the activation has to be kept anyway.
        in_kernel = silu and not torch.is_grad_enabled()
        y = depthwise(x, self.weight, self.bias, other, residual=residual, silu=in_kernel)
        return F.silu(y) if silu and not in_kernel else y


class LPU(nn.Module):
    """Local Perception Unit: x + depthwise 3x3 convolution of x (GSPN-2, arXiv 2512.07884; CMT).

    A second image is added to x first: the residual branch that ends where the LPU begins.

    Shape: (B, dim, H, W) -> (B, dim, H, W).
    """

    def __init__(self, dim: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.conv = Depthwise(dim, kernel_size)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        if other is not None and not (type(self.conv) is Depthwise and is_bare(self.conv)):
            # Whatever is there besides, a hook or an adapter's branch, is to see the whole input.
            x, other = x + other, None
        return self.conv(x, other, residual=True)


def is_bare(module: nn.Module) -> bool:
    """Is calling it no more than its class says: no hooks, no other forward put on it?

    Libraries that move, cast or gather weights for the length of a call do it in either way.
    """
    return not (
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or "forward" in module.__dict__
    )


def is_plain(*modules: nn.Module) -> bool:
    """Are these layers the ones they were made as, so that their weights are all there is to them?

    Others may have been put in their place, an adapter's, or more be done when they are called (`is_bare`).
    """
    return all((type(module) in _PLAIN or _is_gelu(module)) and is_bare(module) for module in modules)


def _is_gelu(module: nn.Module) -> bool:
    return type(module) is nn.GELU and module.approximate == "none"


def hidden_width(name: str, dim: int, ratio: float) -> int:
    """Channels inside of a branch, `dim` times a ratio.

    Raises:
        ValueError: none are left; the message calls the ratio `name`.
    """
    hidden = int(dim * ratio)
    if hidden < 1:
        raise ValueError(f"{name}: expected at least one channel, got {ratio} of {dim}")
    return hidden


def norm_of(norm: LayerNorm2d) -> tuple[Tensor, Tensor, float]:
    """Gain, shift and eps."""
    return norm.weight, norm.bias, norm.eps


class GRN(nn.Module):
    """Global response normalization (ConvNeXt V2, arXiv 2301.00808).

    With r_c the root mean square of channel c over the image, n_c = r_c / (mean of r over channels + eps)::

        y_c = weight_c * n_c * x_c + bias_c + x_c

    weight and bias start at 0, so a fresh GRN is the identity.

    Shape: (B, dim, H, W) -> (B, dim, H, W).
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        # Statistics in float32: squares overflow float16. eps under the root keeps its gradient finite at 0.
        mean_square = x.float().square().mean(dim=(2, 3), keepdim=True)
        response = (mean_square + self.eps**2).sqrt()
        relative = response / (response.mean(dim=1, keepdim=True) + self.eps)
        scale = torch.addcmul(torch.ones_like(relative), relative, self.weight.float()[:, None, None])
        return torch.addcmul(self.bias.to(x.dtype)[:, None, None], x, scale.to(x.dtype))


_PLAIN = (Pointwise, LayerNorm2d, GRN, nn.Conv2d)


class DropPath(nn.Module):
    """Stochastic depth: drops a residual branch for whole samples, and scales up what stays.

    Args:
        rate: probability that a sample loses the branch in training, in [0, 1).
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"rate: expected a probability in [0, 1), got {rate}")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1.0 - self.rate
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * mask.div_(keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"


class LayerScale(nn.Module):
    """Learned scale of every channel of (B, dim, H, W), started at `init` (CaiT, arXiv 2103.17239)."""

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.init = init
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gamma, self.init)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma[:, None, None]


def residual_branch(dim: int, layer_scale: float | None, drop_path: float) -> nn.Sequential:
    """What a residual branch ends with: layer scale and stochastic depth, as far as they are asked for."""
    tail = nn.Sequential()
    if layer_scale is not None:
        tail.add_module("scale", LayerScale(dim, layer_scale))
    if drop_path != 0.0:
        tail.add_module("drop_path", DropPath(drop_path))
    return tail


# ln Phi(-a) for a >= 0, nearly a parabola: coefficients of a^0 to a^5 (gspn2.backends.fused.parts.gelu).
_LOG_TAIL = (-0.69317329, -0.79766528, -0.31884247, -0.03592400, 0.0049106410, -0.00032807301)


def _tail(a: Tensor) -> Tensor:
    """Phi(-a) for a >= 0, as exactly as 16 bits deserve: off by 7e-7 / a at most."""
    c0, c1, c2, c3, c4, c5 = _LOG_TAIL
    return torch.exp(((((c5 * a + c4) * a + c3) * a + c2) * a + c1) * a + c0)


class _Gelu(torch.autograd.Function):
    """GELU in few instructions: the error function takes longer than its numbers' way from and to memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        v = x.float()
        a = v.abs().clamp(max=16)
        return (v.clamp(min=0) - a * _tail(a)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        v = x.float()
        tail = _tail(v.abs().clamp(max=16))
        slope = torch.where(v < 0, tail, 1 - tail) + v * torch.exp(-0.5 * v * v) * (2 * math.pi) ** -0.5
        return (dy.float() * slope).to(x.dtype)


def _gelu(x: Tensor, act: nn.Module) -> Tensor:
    """`act`, in fewer instructions where it is GELU of 16 bits, compiled for a GPU."""
    in_16_bits = x.dtype in (torch.bfloat16, torch.float16)
    if torch.compiler.is_dynamo_compiling() and x.is_cuda and in_16_bits and _is_gelu(act):
        y: Tensor = _Gelu.apply(x)
        return y
    return act(x)


class FFN(nn.Module):
    """The second half of a GSPN-2 block: x = LPU(x), then x + MLP(LayerNorm(x)).

    A second image is added to x first, as by `LPU`.

    Args:
        dim: channels.
        ratio: hidden channels over `dim`.
        layer_scale: initial layer scale of the MLP branch; None for no layer scale.
        drop_path: stochastic depth of the MLP branch.

    Shape: (B, dim, H, W) -> (B, dim, H, W).
    """

    def __init__(
        self, dim: int, ratio: float = 4.0, *, layer_scale: float | None = None, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        hidden = hidden_width("ratio", dim, ratio)
        self.lpu = LPU(dim)
        self.norm = LayerNorm2d(dim)
        self.fc1 = Pointwise(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = Pointwise(hidden, dim)
        self.tail = residual_branch(dim, layer_scale, drop_path)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        x, branch = self.halves(x, other)
        return x if branch is None else x + branch

    def halves(self, x: Tensor, other: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The two whose sum is FFN(x), or FFN(x + other): an LPU that follows adds them itself.

        None: the first one is all.
        """
        x = self.lpu(x, other)
        if fused.at_work(x) and is_plain(self.norm, self.fc1, self.fc2, self.act):
            return self._fused_halves(x)
        hidden = self.fc1(self.norm(x))
        if lean.worth_it(hidden) and is_plain(self.act, self.fc2):
            y = lean.gelu_linear(hidden.permute(0, 2, 3, 1), self.fc2.weight, self.fc2.bias)
            return x, self.tail(y.permute(0, 3, 1, 2))
        return x, self.tail(self.fc2(_gelu(hidden, self.act)))

    def _fused_halves(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """`halves` after the LPU, by operators that keep activations from memory."""
        first, second = (self.fc1.weight, self.fc1.bias), (self.fc2.weight, self.fc2.bias)
        if self.norm.normalized_shape[0] > fused.MOST_CHANNELS:
            hidden = fused.linear_gelu(self.norm(x).permute(0, 2, 3, 1), *first)
            return x, self.tail(self.fc2(hidden.permute(0, 3, 1, 2)))
        whole = all(isinstance(part, DropPath) and not part.training for part in self.tail)
        y = fused.ffn(x.permute(0, 2, 3, 1), norm_of(self.norm), first, second, whole).permute(0, 3, 1, 2)
        return (y, None) if whole else (x, self.tail(y))
