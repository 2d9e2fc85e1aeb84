"""Two small generative models, a UNet and a DiT, each with self-attention or with GSPN-2 for its mixers.

Both predict a velocity (B, 1, H, W) from a noisy picture, its time and its class. What mixes tokens is the
only difference between two models of a kind: the FFN behind a mixer is as wide as makes the block's
parameters those of self-attention. Norms are modulated by time and class, and residual branches start closed
(adaLN-Zero of DiT, arXiv 2212.09748).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gspn2.nn import LayerNorm2d, Mixer, Pointwise

from ..rng import seeded
from ..state import count_parameters
from .digits import CLASSES

HEAD_DIM = 32
PROXY_RATIO = 4
"""Channels over propagated ones. C / 8, as in large UNets, would leave 8 of the 64 channels here."""
FFN_RATIO = 4
UNET_DIMS = (32, 64, 128)
DIT_DIM, DIT_DEPTH, PATCH = 128, 6, 2
SIZE = 32
"""Side of the pictures that models are trained on."""


class SelfAttention(nn.Module):
    """Multi-head self-attention between all pixels: (B, dim, H, W) -> (B, dim, H, W)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.heads = dim // HEAD_DIM
        self.to_qkv = Pointwise(dim, 3 * dim)
        self.to_out = Pointwise(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        # (B, 3 dim, H, W) in channels_last memory -> 3 x (B, heads, N, HEAD_DIM), views.
        tokens = self.to_qkv(x).permute(0, 2, 3, 1).flatten(1, 2)
        q, k, v = tokens.unflatten(2, (3, self.heads, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.to_out(mixed.unflatten(1, (height, width)).permute(0, 3, 1, 2))


def make_mixer(kind: str, dim: int) -> nn.Module:
    """Self-attention ("attention") or a GSPN-2 mixer ("gspn2") of `dim` channels."""
    if kind == "attention":
        return SelfAttention(dim)
    # A gate that starts closed follows, so the mixer may start at full strength.
    return Mixer(dim, dim // PROXY_RATIO, operands_from="input", gain=1.0)


class Block(nn.Module):
    """x + a mixer, then x + an FFN, with norms, scales and gates that follow the condition.

    Shape: (B, dim, H, W) and the condition (B, cond) -> (B, dim, H, W).

    Args:
        kind: of the mixer.
        hidden: channels inside of the FFN; None for as many as give the block the parameters that it has with
            self-attention and FFN_RATIO.
    """

    def __init__(self, dim: int, cond: int, kind: str, hidden: int | None = None) -> None:
        super().__init__()
        self.norm1, self.norm2 = LayerNorm2d(dim), LayerNorm2d(dim)
        self.mixer = make_mixer(kind, dim)
        hidden = _equal_width(dim, self.mixer) if hidden is None else hidden
        self.fc1, self.fc2 = Pointwise(dim, hidden), Pointwise(hidden, dim)
        self.modulation = nn.Linear(cond, 6 * dim)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        parts = self.modulation(cond)[:, :, None, None].chunk(6, dim=1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        x = x + gate1 * self.mixer(torch.addcmul(shift1, self.norm1(x), 1 + scale1))
        inner = self.fc1(torch.addcmul(shift2, self.norm2(x), 1 + scale2))
        return x + gate2 * self.fc2(F.gelu(inner))


def _equal_width(dim: int, mixer: nn.Module) -> int:
    """Width of the FFN that makes up for the parameters a mixer has less, or more, than self-attention."""
    # Four (dim, dim) matrices with biases, as in `SelfAttention`; the FFN has 2 dim + 1 for a hidden channel.
    saved = 4 * dim * (dim + 1) - count_parameters(mixer)
    return FFN_RATIO * dim + round(saved / (2 * dim + 1))


class Condition(nn.Module):
    """Times (B,) from 0, picture, to 1, noise, and classes (B,) to one vector (B, dim)."""

    frequencies: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        frequencies = torch.exp(torch.linspace(0, math.log(1000.0), dim // 2))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.time = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label = nn.Embedding(CLASSES, dim)

    def forward(self, t: Tensor, labels: Tensor) -> Tensor:
        angles = t[:, None] * self.frequencies
        waves = torch.cat([angles.sin(), angles.cos()], dim=1)
        return F.silu(self.time(waves) + self.label(labels))


class ResBlock(nn.Module):
    """Two 3x3 convolutions with group norms, the second modulated: (B, dim, H, W) -> (B, out, H, W)."""

    def __init__(self, dim: int, out: int, cond: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, dim), nn.GroupNorm(8, out)
        self.conv1 = nn.Conv2d(dim, out, 3, padding=1)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.modulation = nn.Linear(cond, 2 * out)
        self.skip = nn.Identity() if dim == out else nn.Conv2d(dim, out, 1)
        for layer in (self.conv2, self.modulation):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        shift, scale = self.modulation(cond)[:, :, None, None].chunk(2, dim=1)
        inner = self.conv1(F.silu(self.norm1(x)))
        inner = F.silu(torch.addcmul(shift, self.norm2(inner), 1 + scale))
        return self.skip(x) + self.conv2(inner)


class UNet(nn.Module):
    """Convolutions at full size, convolutions and blocks at a half and a quarter of it, and back.

    No positions anywhere: any H and W that 4 divides.
    """

    INNER = ("down2", "down3", "up3", "grow2", "up2", "grow1")
    """What lies between the residual blocks at full size: there strokes are known, outside of it pixels."""

    def __init__(self, kind: str, hidden: Sequence[int | None] = (None, None)) -> None:
        super().__init__()
        low, middle, high = UNET_DIMS
        cond = high
        self.condition = Condition(cond)
        self.stem = nn.Conv2d(1, low, 3, padding=1)
        self.down1 = ResBlock(low, low, cond)
        self.shrink1 = nn.Conv2d(low, middle, 3, stride=2, padding=1)
        self.down2 = ResBlock(middle, middle, cond)
        self.mix2 = Block(middle, cond, kind, hidden[0])
        self.shrink2 = nn.Conv2d(middle, high, 3, stride=2, padding=1)
        self.down3 = ResBlock(high, high, cond)
        self.mix3 = Block(high, cond, kind, hidden[1])
        self.up3 = ResBlock(high, high, cond)
        self.grow2 = nn.Conv2d(high, middle, 3, padding=1)
        self.up2 = ResBlock(2 * middle, middle, cond)
        self.mix2_up = Block(middle, cond, kind, hidden[0])
        self.grow1 = nn.Conv2d(middle, low, 3, padding=1)
        self.up1 = ResBlock(2 * low, low, cond)
        self.norm = nn.GroupNorm(8, low)
        self.head = nn.Conv2d(low, 1, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        cond = self.condition(t, labels)
        full = self.down1(self.stem(x.contiguous(memory_format=torch.channels_last)), cond)
        half = self.mix2(self.down2(self.shrink1(full), cond), cond)
        quarter = self.mix3(self.down3(self.shrink2(half), cond), cond)
        quarter = self.up3(quarter, cond)
        x = torch.cat([self.grow2(_doubled(quarter)), half], dim=1)
        x = self.mix2_up(self.up2(x, cond), cond)
        x = self.up1(torch.cat([self.grow1(_doubled(x)), full], dim=1), cond)
        return self.head(F.silu(self.norm(x)))


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


@contextmanager
def dilated(model: nn.Module, factor: int) -> Iterator[None]:
    """Within the context the inner 3x3 convolutions of a UNet reach `factor` times as far.

    A picture of so many times the side then has strokes as wide, and as far from each other, as those that
    they have learnt (re-dilation, ScaleCrafter, arXiv 2310.07702). The outer ones go on to see single pixels,
    whose noise is the same at every size. A DiT has no such convolutions, and stays as it is.
    """
    inner = [model.get_submodule(name) for name in (model.INNER if isinstance(model, UNet) else ())]
    found = [
        it
        for part in inner
        for it in part.modules()
        if isinstance(it, nn.Conv2d) and it.kernel_size == (3, 3)
    ]
    try:
        for convolution in found:
            convolution.dilation = convolution.padding = (factor, factor)
        yield
    finally:
        for convolution in found:
            convolution.dilation = convolution.padding = (1, 1)


class DiT(nn.Module):
    """Patches of 2 x 2 pixels, six blocks, and back; any H and W that 2 divides.

    Self-attention cannot tell where a token lies, so it gets sines and cosines of its place, stretched for a
    picture larger than those of the training. GSPN-2 gets none: a scan begins at the picture's edge.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        dim = DIT_DIM
        self.positions = kind == "attention"
        self.condition = Condition(dim)
        self.stem = nn.Conv2d(1, dim, PATCH, stride=PATCH)
        self.blocks = nn.ModuleList(Block(dim, dim, kind) for _ in range(DIT_DEPTH))
        self.norm = LayerNorm2d(dim)
        self.modulation = nn.Linear(dim, 2 * dim)
        self.head = Pointwise(dim, PATCH * PATCH)
        for layer in (self.modulation, self.head):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        cond = self.condition(t, labels)
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        if self.positions:
            x = x + _places(x)
        for block in self.blocks:
            x = block(x, cond)
        shift, scale = self.modulation(cond)[:, :, None, None].chunk(2, dim=1)
        x = self.head(torch.addcmul(shift, self.norm(x), 1 + scale))
        return F.pixel_shuffle(x, PATCH)


def _places(x: Tensor) -> Tensor:
    """Sines and cosines (1, C, H, W) of rows and columns, measured in tokens of the training's size."""
    dim, height, width = x.shape[1:]
    frequencies = torch.exp(torch.linspace(0, -math.log(1000.0), dim // 4, device=x.device))
    waves = []
    for length, shape in ((height, (-1, 1)), (width, (1, -1))):
        place = (torch.arange(length, device=x.device) + 0.5) * (SIZE // PATCH / length)
        angles = frequencies[:, None, None] * place.view(shape)
        waves += [wave.expand(-1, height, width) for wave in (angles.sin(), angles.cos())]
    return torch.cat(waves)[None].to(x.dtype)


def build(architecture: str, kind: str, seed: int) -> nn.Module:
    """A fresh model, channels_last.

    Args:
        architecture: "unet" or "dit".
        kind: of its mixers, "attention" or "gspn2".
        seed: of its weights.
    """
    with seeded(seed):
        model: nn.Module = UNet(kind) if architecture == "unet" else DiT(kind)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def build_student(teacher: nn.Module, seed: int) -> nn.Module:
    """A UNet with the weights of a trained one, but GSPN-2 mixers: only those learn, and they start at 0."""
    with seeded(seed):
        student = UNet("gspn2", [FFN_RATIO * dim for dim in UNET_DIMS[1:]])
    own = {name for name, _ in student.named_parameters() if ".mixer." in name}
    kept = {name: it for name, it in teacher.state_dict().items() if ".mixer." not in name}
    missing, unexpected = student.load_state_dict(kept, strict=False)
    assert set(missing) == own, f"weights that nothing sets: {sorted(set(missing) - own)}"
    assert not unexpected, f"weights of the teacher that have no place: {unexpected}"
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in own)
    for mixer in mixers_of(student).values():
        assert isinstance(mixer, Mixer)
        nn.init.zeros_(mixer.from_proxy.weight)
    return student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def mixers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The mixers of a model by name, in the order of the model."""
    return {name: it.mixer for name, it in model.named_modules() if isinstance(it, Block)}
