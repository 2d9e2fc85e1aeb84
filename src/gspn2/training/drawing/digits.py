"""Handwritten digits as pictures of any size, each turned, scaled and shifted at random."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..folders import find_digits
from ..samples import stratified_split

CLASSES = 10
HELD_OUT = 0.2
TURN, GROW, SHIFT = math.radians(10), 0.1, 0.08
"""Largest rotation, relative change of size, and shift as a share of half the picture."""
MARGIN = 1.15
"""Side of the picture over that of the scan, which the strokes fill from edge to edge."""
EDGE, MIDDLE = 6.0, 0.45
"""Steepness of a stroke's edge and the grey value it runs through: enlarged 8 x 8 pixels alone are a blur."""


class Digits(NamedTuple):
    """Scans (N, 1, 8, 8), from 0 to 1, and their classes (N,), on a device."""

    scans: Tensor
    labels: Tensor


def load(device: torch.device) -> tuple[Digits, Digits]:
    """scikit-learn's digits: four fifths to learn from, and one fifth of every class that is held out."""
    whole = find_digits().whole
    assert whole is not None, "the digits bring no split"
    scans = np.stack([np.asarray(image) for image in whole.sources]).astype(np.float32) / 255
    labels = torch.tensor(whole.labels)
    return tuple(  # type: ignore[return-value]
        Digits(torch.from_numpy(scans[chosen])[:, None].to(device), labels[chosen].to(device))
        for chosen in stratified_split(whole.labels, HELD_OUT, 0)
    )


def pictures(scans: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Scans (N, 1, 8, 8) to pictures (N, 1, size, size) from -1, paper, to 1, ink.

    One bicubic resampling turns, scales, shifts and enlarges; a picture of another size is the same scene.

    Args:
        generator: of the device of the scans.
    """
    draws = 2 * torch.rand(4, len(scans), device=scans.device, generator=generator) - 1
    angle, scale = TURN * draws[0], MARGIN * (1 + GROW * draws[1])
    rows = [
        torch.stack([scale * angle.cos(), -scale * angle.sin(), SHIFT * draws[2]], 1),
        torch.stack([scale * angle.sin(), scale * angle.cos(), SHIFT * draws[3]], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), [len(scans), 1, size, size], align_corners=False)
    grey = F.grid_sample(scans, grid, mode="bicubic", padding_mode="zeros", align_corners=False)
    return torch.tanh(EDGE * (grey - MIDDLE))


def sample(digits: Digits, count: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` pictures and their classes, drawn with replacement.

    Args:
        generator: of the device of the digits; the same state gives the same pictures.
    """
    device = digits.scans.device
    chosen = torch.randint(len(digits.labels), (count,), device=device, generator=generator)
    return pictures(digits.scans[chosen], size, generator), digits.labels[chosen]
