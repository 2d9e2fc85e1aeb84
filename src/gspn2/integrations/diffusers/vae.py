"""Encoding and decoding of any size in tiles, without seams.

Overlapping tiles that are blended hide a disagreement; here there is none. Two things in the autoencoder
look at the whole picture: the statistics of GroupNorm, and the attention in its middle. Both are taken from
a *survey* first, crops spread evenly over the whole picture and looked at together, and held fixed then:
GroupNorm becomes a scale and shift for each channel, and every place attends to the same keys. What is left
is a stack of convolutions, and a tile with a margin of their reach is exactly a part of the whole. So the
result does not depend on how it is cut, and where the survey covers everything (pictures up to
2048 x 2048, attention up to 1024 x 1024) it is the untiled one.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from .execution import fused, norms_before_silu, replacing
from .fused import scale_shift, takes

SURVEY_AREA = 256 * 256
"""Places of the latent picture that a survey looks at, at most."""
SURVEY_CROP, SURVEY_MARGIN = 32, 8
"""Side of a crop, and what of it is too near to the cut to be counted, in latent places."""
SURVEY_KEYS = 128 * 128
"""Keys of the attention, at most."""


@dataclass(frozen=True)
class Box:
    """A part of the latent picture, rows [top, bottom) and columns [left, right)."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.bottom - self.top, self.right - self.left

    def grown(self, margin: int, height: int, width: int) -> Box:
        """With a margin, as far as there is a picture."""
        return Box(
            max(0, self.top - margin),
            max(0, self.left - margin),
            min(height, self.bottom + margin),
            min(width, self.right + margin),
        )

    def cut(self, image: Tensor, scale: int = 1) -> Tensor:
        """That part of a picture with `scale` pixels a place."""
        rows = slice(self.top * scale, self.bottom * scale)
        return image[..., rows, self.left * scale : self.right * scale]

    def inside(self, other: Box) -> Box:
        """The same part, counted from the corner of `other`."""
        return Box(
            self.top - other.top, self.left - other.left, self.bottom - other.top, self.right - other.left
        )


@dataclass
class _Survey:
    """What the whole picture says, layer by layer; filled by the first pass and used by the others."""

    crops: list[Box]
    counted: list[Box]
    moments: dict[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict)
    keys: dict[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict)
    filling: bool = True

    def interiors(self, x: Tensor) -> Iterator[Tensor]:
        """The counted part of every crop of x (crops, C, h, w): (C, h', w')."""
        for image, crop, counted in zip(x, self.crops, self.counted, strict=True):
            # A layer's resolution is a multiple of the latent one, on both ways.
            scale = image.shape[-1] // (crop.right - crop.left)
            yield counted.inside(crop).cut(image, scale)


class TiledVae:
    """An autoencoder that takes pictures of any size.

    Args:
        vae: of a diffusers pipeline; its weights stay as they are. A VAE that says it overflows in float16
            runs in float32.
        tile: side of a tile without its margin, in latent places.
        progress: called with the tiles done and all tiles.

    Raises:
        ValueError: the VAE has parts that this tiling does not know.
    """

    def __init__(
        self, vae: AutoencoderKL, tile: int = 256, progress: Callable[[int, int], None] | None = None
    ) -> None:
        if tile < 1:
            raise ValueError(f"tile: expected at least 1, got {tile}")
        self.vae, self.tile = vae, tile
        self.progress = progress or (lambda done, total: None)
        self.scale = 2 ** (len(vae.config.block_out_channels) - 1)
        self.reach = {"encoder": _encoder_reach(vae.encoder), "decoder": _decoder_reach(vae.decoder)}
        for name, module in vae.named_modules():
            if isinstance(module, nn.BatchNorm2d) or getattr(module, "spatial_norm", None) is not None:
                raise ValueError(f"vae: cannot tile {name}, a {type(module).__name__}: it looks at the whole")

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        """Pixels of latents (1, C, h, w) as the UNet knows them, in strips from top to bottom.

        Yields:
            (1, 3, rows, w * scale), values about [-1, 1], in the dtype of the VAE.
        """
        vae = self.vae
        with _safe_dtype(vae) as dtype:
            latents = unscaled(latents.to(vae.device, dtype), vae)

            def network(part: Tensor) -> Tensor:
                return vae.decoder(part if vae.post_quant_conv is None else vae.post_quant_conv(part))

            yield from self._run(network, latents, "decoder", 1, self.scale)

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Latents (1, C, h, w) as the UNet knows them (the mode) of pixels (1, 3, h * scale, w * scale).

        The picture may be on another device than the VAE.
        """
        if image.shape[-2] % self.scale or image.shape[-1] % self.scale:
            raise ValueError(f"image: expected multiples of {self.scale} pixels, got {tuple(image.shape)}")
        vae = self.vae
        with _safe_dtype(vae) as dtype:

            def network(part: Tensor) -> Tensor:
                hidden = vae.encoder(part.to(vae.device, dtype))
                moments = hidden if vae.quant_conv is None else vae.quant_conv(hidden)
                return moments.chunk(2, dim=1)[0]

            strips = list(self._run(network, image, "encoder", self.scale, 1))
            return scaled(torch.cat(strips, dim=2), vae)

    def _run(
        self, network: Callable[[Tensor], Tensor], x: Tensor, part: str, in_scale: int, out_scale: int
    ) -> Iterator[Tensor]:
        """The network over x in tiles; strips from top to bottom.

        Without data only memory counts, and tiles of one size take the same. Then the network runs for the
        last of them, when most is kept beside it; the others are no more than as large as they would be.
        """
        height, width = x.shape[2] // in_scale, x.shape[3] // in_scale
        tops, lefts = range(0, height, self.tile), range(0, width, self.tile)
        total, done = len(tops) * len(lefts), 0
        if total == 1 and height * width <= SURVEY_KEYS:
            with fused(getattr(self.vae, part)):
                whole = network(x)
            yield whole
            self.progress(1, 1)
            return
        survey = _Survey(*_survey_crops(height, width))
        with _surveyed(getattr(self.vae, part), survey):
            looked = network(torch.cat([crop.cut(x, in_scale) for crop in survey.crops]))
            channels, dtype = looked.shape[1], looked.dtype
            del looked
            survey.filling = False
            margin = self.reach[part]
            last_tops, last_lefts = _last_cuts(tops, height, margin), _last_cuts(lefts, width, margin)

            def empty(rows: int, columns: int) -> Tensor:
                return x.new_empty(1, channels, rows * out_scale, columns * out_scale, dtype=dtype)

            for top in tops:
                bottom = min(height, top + self.tile)
                if x.is_meta and top not in last_tops:
                    yield empty(bottom - top, width)
                    continue
                parts = []
                for left in lefts:
                    box = Box(top, left, bottom, min(width, left + self.tile))
                    if x.is_meta and left not in last_lefts:
                        parts.append(empty(*box.size))
                    else:
                        seen = box.grown(margin, height, width)
                        parts.append(box.inside(seen).cut(network(seen.cut(x, in_scale)), out_scale).clone())
                    done += 1
                    self.progress(done, total)
                yield torch.cat(parts, dim=3)


def _last_cuts(starts: range, side: int, margin: int) -> set[int]:
    """Which of the cuts of a side are the last of their length, a margin and the side's ends considered."""
    lengths = {min(side, start + starts.step + margin) - max(0, start - margin): start for start in starts}
    return set(lengths.values())


def _survey_crops(height: int, width: int) -> tuple[list[Box], list[Box]]:
    """Crops of one size to look at together, and what of each is counted."""
    if height * width <= SURVEY_AREA:
        everything = Box(0, 0, height, width)
        return [everything], [everything]
    side_y, side_x = min(SURVEY_CROP, height), min(SURVEY_CROP, width)
    number = SURVEY_AREA // (side_y * side_x)
    rows = min(max(1, round(math.sqrt(number * height / width))), height // side_y, number)
    columns = min(number // rows, width // side_x)
    crops, counted = [], []
    for row in range(rows):
        for column in range(columns):
            top = (2 * row + 1) * height // (2 * rows) - side_y // 2
            left = (2 * column + 1) * width // (2 * columns) - side_x // 2
            top, left = min(max(top, 0), height - side_y), min(max(left, 0), width - side_x)
            crops.append(Box(top, left, top + side_y, left + side_x))
            # A cut that is the picture's own edge needs no margin.
            counted.append(
                Box(
                    top + SURVEY_MARGIN * (top > 0),
                    left + SURVEY_MARGIN * (left > 0),
                    top + side_y - SURVEY_MARGIN * (top + side_y < height),
                    left + side_x - SURVEY_MARGIN * (left + side_x < width),
                )
            )
    return crops, counted


@contextlib.contextmanager
def _surveyed(network: nn.Module, survey: _Survey) -> Iterator[None]:
    """Within the context what looks at the whole picture looks at the survey."""
    with replacing() as replace:
        after: dict[nn.GroupNorm, bool] = {}
        for module in network.modules():
            if isinstance(module, ResnetBlock2D) and norms_before_silu(module):
                after |= dict.fromkeys(norms_before_silu(module), True)
                replace(module.nonlinearity, _identity)
            elif isinstance(module, nn.GroupNorm):
                after.setdefault(module, False)
            elif isinstance(module, Attention):
                replace(module, _attention(module, survey))
        for norm, silu in after.items():
            replace(norm, _norm(norm, survey, silu))
        yield


def _identity(x: Tensor) -> Tensor:
    """The SiLU of a residual block whose norms have done it."""
    return x


def _norm(norm: nn.GroupNorm, survey: _Survey, silu: bool) -> Callable[[Tensor], Tensor]:
    """GroupNorm with the survey's statistics, then SiLU if asked for."""

    def forward(x: Tensor) -> Tensor:
        if survey.filling:
            # Without data the first is enough: it is the largest, and what they are joined to has no size.
            parts = islice(survey.interiors(x), 1 if x.is_meta else None)
            survey.moments[norm] = _moments(parts, norm.num_groups)
        mean, variance = (
            moment.repeat_interleave(x.shape[1] // norm.num_groups) for moment in survey.moments[norm]
        )
        weight = torch.ones_like(mean) if norm.weight is None else norm.weight.to(mean.dtype)
        bias = torch.zeros_like(mean) if norm.bias is None else norm.bias.to(mean.dtype)
        if takes(x):
            scale = weight * (variance + norm.eps).rsqrt()
            affine = torch.stack([scale, bias - mean * scale], dim=1).expand(x.shape[0], -1, -1)
            return scale_shift(x, affine.contiguous(), silu)
        # What inference does in a batch norm: in float32 inside, rounded once.
        normed = F.batch_norm(x, mean, variance, weight, bias, False, 0.0, norm.eps)
        return F.silu(normed) if silu else normed

    return forward


def _moments(parts: Iterator[Tensor], groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of every group over all parts (C, h, w), joined by Chan's update."""
    mean = variance = torch.zeros(())
    count = 0
    for part in parts:
        values = part.reshape(groups, -1)
        values = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
        new_variance, new_mean = torch.var_mean(values, dim=1, correction=0)
        if count == 0:
            mean, variance, count = new_mean, new_variance, values.shape[1]
            continue
        share = values.shape[1] / (count + values.shape[1])
        delta = new_mean - mean
        variance = variance + share * (new_variance - variance) + share * (1 - share) * delta.square()
        mean, count = mean + share * delta, count + values.shape[1]
    return mean, variance


def _attention(attention: Attention, survey: _Survey) -> Callable[..., Tensor]:
    """The attention of an autoencoder with the survey's keys."""

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (attention.heads, -1)).transpose(1, 2)

    def forward(hidden_states: Tensor, **unused: Any) -> Tensor:
        x = hidden_states
        normed = x if attention.group_norm is None else attention.group_norm(x)
        if survey.filling:
            pixels = torch.cat([part.flatten(1).T for part in survey.interiors(normed)])
            kept = torch.linspace(0, len(pixels) - 1, min(len(pixels), SURVEY_KEYS), device=x.device)
            pixels = pixels[kept.round().long()][None]
            survey.keys[attention] = heads(attention.to_k(pixels)), heads(attention.to_v(pixels))
        keys, values = survey.keys[attention]
        queries = heads(attention.to_q(normed.flatten(2).transpose(1, 2)))
        size = (queries.shape[0], -1, -1, -1)
        mixed = F.scaled_dot_product_attention(
            queries, keys.expand(size), values.expand(size), scale=attention.scale
        )
        mixed = attention.to_out[0](mixed.transpose(1, 2).flatten(2))
        mixed = mixed.transpose(1, 2).reshape(x.shape)
        if attention.residual_connection:
            mixed = mixed + x
        return mixed / attention.rescale_output_factor

    return forward


def _decoder_reach(decoder: Any) -> int:
    """How far a pixel of the decoder looks, in latent places: 3x3 convolutions, two a residual block."""
    reach, place = 1.0 + 2 * len(decoder.mid_block.resnets), 1.0
    for block in decoder.up_blocks:
        reach += 2 * len(block.resnets) * place
        if block.upsamplers is not None:
            place /= 2
            reach += place
    return math.ceil(reach + place) + 1


def _encoder_reach(encoder: Any) -> int:
    """How far a latent place of the encoder looks, in latent places."""
    place = 1.0 / 2 ** (len(encoder.down_blocks) - 1)
    reach = place
    for block in encoder.down_blocks:
        reach += 2 * len(block.resnets) * place
        if block.downsamplers is not None:
            reach += 2 * place
            place *= 2
    return math.ceil(reach + 2 * len(encoder.mid_block.resnets) * place + place) + 1


@contextlib.contextmanager
def _safe_dtype(vae: AutoencoderKL) -> Iterator[torch.dtype]:
    """float32 within the context, for a VAE whose activations overflow in float16."""
    before = vae.dtype
    upcast = before == torch.float16 and vae.config.force_upcast
    if upcast:
        nn.Module.to(vae, torch.float32)
    try:
        yield vae.dtype
    finally:
        if upcast:
            nn.Module.to(vae, before)


def _statistics(vae: AutoencoderKL, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """Mean and deviation of the latents, where the VAE's config tells them."""
    mean, deviation = getattr(vae.config, "latents_mean", None), getattr(vae.config, "latents_std", None)
    if mean is None or deviation is None:
        return getattr(vae.config, "shift_factor", None) or 0.0, 1.0
    return like.new_tensor(mean)[:, None, None], like.new_tensor(deviation)[:, None, None]


def scaled(latents: Tensor, vae: AutoencoderKL) -> Tensor:
    """Latents (..., C, h, w) of the VAE, as the UNet knows them."""
    mean, deviation = _statistics(vae, latents)
    return (latents - mean) * vae.config.scaling_factor / deviation


def unscaled(latents: Tensor, vae: AutoencoderKL) -> Tensor:
    """Latents (..., C, h, w) as the UNet knows them, for the VAE."""
    mean, deviation = _statistics(vae, latents)
    return latents * deviation / vae.config.scaling_factor + mean
