"""What a GSPN-2 backbone is made of: the mixing branch, a block, the stem, a stage (arXiv 2512.07884).

Tensors are (B, C, H, W) in channels_last memory from the stem on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.models import checkpoint_seq, register_notrace_module
from torch import Tensor, nn

from ..nn import FFN, GRN, LPU, LayerNorm2d, Mixer, Pointwise
from ..nn.layers import Depthwise, hidden_width, is_bare, is_plain, norm_of, residual_branch
from ..ops import fused, lean
from ..ops.eager import under_transforms
from ..ops.normed_sum import normed_sum, worth_it


class GSPNModule(nn.Module):
    """The mixing branch of a block: (B, dim, H, W) -> (B, dim, H, W), without the residual.

    LayerNorm, linear to ratio * dim, depthwise 7x7, SiLU, propagation, LayerNorm, GRN, linear back.
    Propagation adds to what it is given: two proxy channels alone could not carry what a pixel knows of
    itself.

    Args:
        dim: channels.
        ratio: inner channels over `dim`.
        kernel_size: of the depthwise convolution.
        mixer: options of `gspn2.nn.Mixer`.
    """

    def __init__(self, dim: int, ratio: float, kernel_size: int, **mixer: Any) -> None:
        super().__init__()
        hidden = hidden_width("expand_ratio", dim, ratio)
        self.norm1 = LayerNorm2d(dim)
        self.fc1 = Pointwise(dim, hidden)
        self.conv = Depthwise(hidden, kernel_size)
        # A norm follows, so the mixer may start at full strength.
        self.mixer = Mixer(hidden, gain=1.0, **mixer)
        self.norm2 = LayerNorm2d(hidden)
        self.grn = GRN(hidden)
        self.fc2 = Pointwise(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        if fused.at_work(x) and is_plain(self.norm1, self.fc1, self.norm2, self.grn, self.fc2):
            return self._fused(x)
        x = self.conv(self.fc1(self.norm1(x)), silu=True)
        if worth_it(x) and self._from_few() and is_plain(self.norm2):
            n = normed_sum(x.permute(0, 2, 3, 1), self._proxies(x), norm_of(self.norm2))
            return self.fc2(self.grn(n.permute(0, 3, 1, 2)))
        x = self.norm2(x + self.mixer(x))
        if lean.worth_it(x) and is_plain(self.grn, self.fc2):
            y = lean.grn_linear(x.permute(0, 2, 3, 1), self._response(), (self.fc2.weight, self.fc2.bias))
            return y.permute(0, 3, 1, 2)
        return self.fc2(self.grn(x))

    def _from_few(self) -> bool:
        """May the mixer's way back be part of the pass that takes its sum with x?"""
        mixer = self.mixer
        plain = type(mixer) is Mixer and is_bare(mixer) and is_plain(mixer.from_proxy)
        return plain and mixer.proxy_dim <= fused.MOST_PROXIES

    def _proxies(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the mixer makes of x (B, H, W, proxy_dim), weight and bias of its way back."""
        back = self.mixer.from_proxy
        return self.mixer.mixed(x).permute(0, 2, 3, 1), back.weight, back.bias

    def _response(self) -> tuple[Tensor, Tensor, float]:
        """Weight, bias and eps of the response normalization."""
        return self.grn.weight, self.grn.bias, self.grn.eps

    def _fused(self, x: Tensor) -> Tensor:
        """The same by operators that leave out passes over activations; see `gspn2.ops.fused`."""
        if self.fc1.in_features <= fused.MOST_CHANNELS:
            pixels = x.permute(0, 2, 3, 1)
            x = fused.norm_linear(pixels, norm_of(self.norm1), self.fc1.weight, self.fc1.bias)
            x = x.permute(0, 3, 1, 2)
        else:
            x = self.fc1(self.norm1(x))
        x = self.conv(x, silu=True)
        proxies = self._proxies(x) if self._from_few() else None
        if proxies is None:
            x = x + self.mixer(x)
        y = fused.response(
            x.permute(0, 2, 3, 1),
            proxies,
            norm_of(self.norm2),
            self._response(),
            (self.fc2.weight, self.fc2.bias),
        )
        return y.permute(0, 3, 1, 2)


class GSPN2Block(nn.Module):
    """LPU, x + GSPN module, FFN (which begins with its own LPU): (B, dim, H, W) -> (B, dim, H, W)."""

    def __init__(
        self,
        dim: int,
        *,
        ratio: float,
        kernel_size: int,
        mlp_ratio: float,
        layer_scale: float | None,
        drop_path: float,
        mixer: dict[str, Any],
    ) -> None:
        super().__init__()
        self.lpu = LPU(dim)
        self.gspn = GSPNModule(dim, ratio, kernel_size, **mixer)
        self.tail = residual_branch(dim, layer_scale, drop_path)
        self.ffn = FFN(dim, mlp_ratio, layer_scale=layer_scale, drop_path=drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lpu(x)
        y: Tensor = self.ffn(x, self.tail(self.gspn(x)))
        return y

    def halves(self, x: Tensor, other: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The two whose sum is the block's output, for the input x or x + other (see `FFN.halves`).

        Past the calls of the block and its FFN, and so of their hooks.
        """
        x = self.lpu(x, other)
        halves: tuple[Tensor, Tensor | None] = self.ffn.halves(x, self.tail(self.gspn(x)))
        return halves


@register_notrace_module
class Stem(nn.Module):
    """Two 3x3 convolutions that divide height and width by `stride` (1, 2 or 4); makes channels_last."""

    def __init__(self, in_chans: int, dim: int, stride: int) -> None:
        super().__init__()
        if stride not in (1, 2, 4):
            raise ValueError(f"stem_stride: expected 1, 2 or 4, got {stride}")
        middle = max(dim // 2, 1)
        self.conv1 = nn.Conv2d(in_chans, middle, 3, stride=2 if stride > 1 else 1, padding=1)
        self.norm1 = LayerNorm2d(middle)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(middle, dim, 3, stride=2 if stride > 2 else 1, padding=1)
        self.norm2 = LayerNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        if not under_transforms():  # vmap knows no channels_last
            x = x.contiguous(memory_format=torch.channels_last)
        bias = self.conv1.bias
        if fused.at_work(x) and is_plain(self.conv1, self.norm1, self.act) and bias is not None:
            first = (self.conv1.weight, bias)
            y = fused.stem(x.permute(0, 2, 3, 1), first, self.conv1.stride[0], norm_of(self.norm1))
            return self.norm2(self.conv2(y.permute(0, 3, 1, 2)))
        x = self.act(self.norm1(self._first(x)))
        return self.norm2(self.conv2(x))

    def _first(self, x: Tensor) -> Tensor:
        """conv1; compiled for a GPU as a matrix product: one of 3 channels does not use tensor cores."""
        conv, channels = self.conv1, x.shape[1]
        if not (torch.compiler.is_compiling() and x.is_cuda and channels <= 4 and is_plain(conv)):
            return conv(x)
        stride, used = conv.stride[0], 9 * channels
        padded = F.pad(x, (1, 1, 1, 1)).permute(0, 2, 3, 1)
        windows = padded.unfold(1, 3, stride).unfold(2, 3, stride).permute(0, 1, 2, 4, 5, 3)
        # Whole vectors of 16 bytes.
        windows = F.pad(windows.flatten(3), (0, -used % 8))
        weight = F.pad(conv.weight.permute(0, 2, 3, 1).flatten(1), (0, -used % 8))
        return F.linear(windows, weight, conv.bias).permute(0, 3, 1, 2)


@register_notrace_module
class GSPN2Stage(nn.Module):
    """Downsampling (LayerNorm, 3x3 convolution with stride 2) except in the first stage, then blocks.

    Args:
        initial_taps: those of each block's mixer.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        downsample: bool,
        drop_path: Sequence[float],
        initial_taps: Sequence[str],
        mixer: dict[str, Any],
        **block: Any,
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample: nn.Module = nn.Identity()
        if downsample:
            convolution = nn.Conv2d(in_dim, dim, 3, stride=2, padding=1)
            self.downsample = nn.Sequential(LayerNorm2d(in_dim), convolution)
        self.blocks = nn.Sequential()
        for rate, taps in zip(drop_path, initial_taps, strict=True):
            own = {**mixer, "initial_taps": taps}
            self.blocks.append(GSPN2Block(dim, drop_path=rate, mixer=own, **block))

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        if self.grad_checkpointing:
            return checkpoint_seq(self.blocks, x)
        if not (torch.compiler.is_dynamo_compiling() and self._is_plain()):
            return self.blocks(x)
        # Compiled, a sum between blocks would be a pass over memory of its own.
        branch: Tensor | None = None
        for block in cast(list[GSPN2Block], list(self.blocks)):
            x, branch = block.halves(x, branch)
        return x if branch is None else x + branch

    def _is_plain(self) -> bool:
        """Are the blocks the ones they were made as, with nothing around them?"""
        return is_bare(self.blocks) and all(
            type(block) is GSPN2Block and is_bare(block) and type(block.ffn) is FFN and is_bare(block.ffn)
            for block in self.blocks
        )
