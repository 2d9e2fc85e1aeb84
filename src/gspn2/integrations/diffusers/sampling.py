"""Grids of pictures while mixers learn: the teacher's above, the student's below, from the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..images import ImageFile
from .pairs import Cache, Pair
from .vae import unscaled


class Sampler:
    """Makes grids.

    Args:
        pipe: with the teacher as its UNet; it needs no text encoders.
        student: the UNet with mixers.
        guidance, steps: of each picture.
        seed: of the noise, the same in every grid.
    """

    def __init__(self, pipe: Any, student: nn.Module, guidance: float, steps: int, seed: int) -> None:
        self.pipe, self.teacher, self.student = pipe, pipe.unet, student
        self.guidance, self.steps, self.seed = guidance, steps, seed
        self._teachers: list[NDArray[np.uint8]] | None = None

    def grid(self, path: Path, pairs: Sequence[Pair], cache: Cache) -> None:
        """Write a grid for the captions and sizes of some pairs; a column each."""
        if self._teachers is None:
            self._teachers = [self._picture(self.teacher, pair, i, cache) for i, pair in enumerate(pairs)]
        students = [self._picture(self.student, pair, i, cache) for i, pair in enumerate(pairs)]
        rows = np.concatenate([_row(self._teachers), _row(students)])
        path.parent.mkdir(parents=True, exist_ok=True)
        with ImageFile(path, rows.shape[1], rows.shape[0]) as file:
            file.write(rows)

    @torch.no_grad()
    def _picture(self, unet: nn.Module, pair: Pair, index: int, cache: Cache) -> NDArray[np.uint8]:
        device = next(unet.parameters()).device
        embeds: dict[str, Any] = {}
        for prefix, caption in (("", pair.caption), ("negative_", None)):
            for name, tensor in cache.prompt(caption).items():
                word = "pooled_prompt" if name == "pooled" else "prompt"
                key = f"negative_{word}_embeds" if prefix else f"{word}_embeds"
                embeds[key] = tensor[None].to(device)
        self.pipe.unet = unet
        try:
            latents = self.pipe(
                **embeds,
                height=pair.size[0],
                width=pair.size[1],
                num_inference_steps=self.steps,
                guidance_scale=self.guidance,
                generator=torch.Generator().manual_seed(self.seed + index),
                output_type="latent",
            ).images
        finally:
            self.pipe.unet = self.teacher
        vae = self.pipe.vae
        with torch.autocast(device.type, enabled=False):
            image = vae.decode(unscaled(latents.to(vae.dtype), vae), return_dict=False)[0]
        pixels = ((image[0].float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return pixels.permute(1, 2, 0).cpu().numpy()


def _row(pictures: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Side by side, on black where one is lower."""
    height = max(picture.shape[0] for picture in pictures)
    padded = [np.pad(p, ((0, height - p.shape[0]), (0, 0), (0, 0))) for p in pictures]
    return np.ascontiguousarray(np.concatenate(padded, axis=1))
