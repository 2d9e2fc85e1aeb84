"""Sets of samples of a model at one, two and four times the size of its training, and grids of them."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import replacing
from ..rng import derive_seed
from . import flow
from .digits import CLASSES
from .models import SIZE

USES = ("1x", "2x", "2x-dilated", "2x-enlarged", "4x", "4x-dilated", "4x-enlarged")
"""Sides over that of the training: from noise of that size, from it by a UNet whose convolutions reach as
many times as far, or from enlarged pictures of the size before."""
ROWS = {use: 4 if use == "1x" else 1 for use in USES}
"""Of ten pictures in a grid."""
AT_ONCE = 1 << 21
"""Pixels that a model is given at once, whatever their pictures' size."""


def uses(architecture: str) -> list[str]:
    """Those of an architecture ("unet" or "dit"): what has no convolutions to dilate is left out."""
    return [use for use in USES if architecture == "unet" or not use.endswith("dilated")]


def classes(count: int, device: torch.device) -> Tensor:
    """0 to 9 and again from 0."""
    return torch.arange(count, device=device) % CLASSES


def draw(
    model: flow.Velocity, use: str, before: Tensor | None, labels: Tensor, steps: int, seed: int
) -> Tensor:
    """Pictures (N, 1, H, W) of the classes (N,), float32.

    Args:
        use: out of `USES`.
        before: for the enlarged ones, those of half the side.
        steps: of the sampler.
        seed: of the noise, which is the same for all models.
    """
    scale = int(use[0])
    noise = use.removesuffix("-dilated")
    generator = torch.Generator(labels.device).manual_seed(derive_seed(seed, "samples", noise))
    at_once = max(1, AT_ONCE // (scale * SIZE) ** 2)
    parts = []
    for start in range(0, len(labels), at_once):
        some = labels[start : start + at_once]
        if use.endswith("enlarged"):
            assert before is not None, f"{use}: needs the pictures of half the side"
            small = before[start : start + at_once]
            parts.append(flow.enlarged(model, small, some, scale, steps, generator))
        else:
            parts.append(flow.direct(model, some, SIZE, scale, steps, generator))
    return torch.cat(parts)


def write_grid(path: Path, pictures: Tensor, rows: int) -> None:
    """A grey PNG, atomically: `rows` rows of ten pictures (N, 1, H, W), the first 10 * rows of them."""
    from PIL import Image

    height, width = pictures.shape[2:]
    grid = pictures[: CLASSES * rows].view(rows, CLASSES, height, width).permute(0, 2, 1, 3)
    grey = ((grid.reshape(rows * height, CLASSES * width) + 1) * 127.5).round().clamp(0, 255)
    # 32 shades are as good to look at, and a third of the file.
    few = (grey / 255 * 31).round() * (255 / 31)
    data = io.BytesIO()
    Image.fromarray(few.round().to(torch.uint8).cpu().numpy()).save(data, "png", optimize=True)
    with replacing(path) as temporary:
        temporary.write_bytes(data.getvalue())
