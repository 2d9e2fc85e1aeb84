"""Parts of a GSPN-2 block beside the mixer. Images are (B, C, H, W) everywhere.

Every layer works in whatever layout it is given and hands the same one on; channels_last is the fast one: the
linear layers and norms then read (B, H, W, C) memory as it lies.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.depthwise import depthwise, under_transforms


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
        pixels = F.layer_norm(pixels, self.normalized_shape, self.weight, self.bias, self.eps)
        if input.is_cuda and torch.is_autocast_enabled("cuda"):
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
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, input: Tensor) -> Tensor:
        return self.apply_to(input)

    def apply_to(
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
        return self.conv.apply_to(x, other, residual=True)


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

    def forward(self, x: Tensor) -> Tensor:
        # Statistics in float32: squares overflow float16. eps under the root keeps its gradient finite at 0.
        mean_square = x.float().square().mean(dim=(2, 3), keepdim=True)
        response = (mean_square + self.eps**2).sqrt()
        relative = response / (response.mean(dim=1, keepdim=True) + self.eps)
        scale = torch.addcmul(torch.ones_like(relative), relative, self.weight.float()[:, None, None])
        return torch.addcmul(self.bias.to(x.dtype)[:, None, None], x, scale.to(x.dtype))


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
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma[:, None, None]


def residual_branch(dim: int, layer_scale: float | None, drop_path: float) -> nn.Sequential:
    """What a residual branch ends with: layer scale and stochastic depth, as far as they are asked for."""
    tail = nn.Sequential()
    if layer_scale is not None:
        tail.add_module("scale", LayerScale(dim, layer_scale))
    if drop_path > 0.0:
        tail.add_module("drop_path", DropPath(drop_path))
    return tail


def _gelu(x: Tensor, act: nn.Module) -> Tensor:
    """GELU, with an error function of fewer instructions where it is compiled for a GPU.

    Abramowitz and Stegun 7.1.26, off by at most 1.5e-7: the usual one takes longer than its numbers' way from
    and to memory.
    """
    if (
        not (torch.compiler.is_compiling() and x.is_cuda)
        or torch.is_grad_enabled()
        or x.dtype == torch.float64
    ):
        return act(x)
    v = x.float()
    z = v.abs() * 0.5**0.5
    t = 1 / (1 + 0.3275911 * z)
    series = (((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592
    tail = 0.5 * series * t * torch.exp(-z * z)  # Phi(-|v|)
    return (v * torch.where(v < 0, tail, 1 - tail)).to(x.dtype)


class FFN(nn.Module):
    """The second half of a GSPN-2 block: x = LPU(x), then x + MLP(LayerNorm(x)).

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
        hidden = int(dim * ratio)
        self.lpu = LPU(dim)
        self.norm = LayerNorm2d(dim)
        self.fc1 = Pointwise(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = Pointwise(hidden, dim)
        self.tail = residual_branch(dim, layer_scale, drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x, branch = self.halves(x)
        return x + branch

    def halves(self, x: Tensor, other: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The two whose sum is FFN(x), or FFN(x + other): an LPU that follows adds them itself."""
        x = self.lpu(x, other)
        return x, self.tail(self.fc2(_gelu(self.fc1(self.norm(x)), self.act)))
