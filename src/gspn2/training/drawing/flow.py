"""Flow matching: a straight way from a picture (time 0) to noise (time 1), and back along learnt velocities.

x_t = (1 - t) x_0 + t noise, whose velocity is noise - x_0 (arXiv 2210.02747; times drawn as in 2403.03206).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Noisy pictures (B, 1, H, W), times (B,) and classes (B,) to velocities (B, 1, H, W)."""

STRENGTHS = {2: 0.42, 4: 0.35}
"""Time from which a picture that was enlarged to so many times its side is painted anew: the range that
GSPN-1 published for its progressive pictures."""


def noisy(pictures: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures on their way to noise, their times (B,), logit-normal, and the velocities to learn."""
    device = pictures.device
    t = torch.randn(len(pictures), device=device, generator=generator).sigmoid()
    noise = torch.randn(pictures.shape, device=device, generator=generator)
    return torch.lerp(pictures, noise, t[:, None, None, None]), t, noise - pictures


def times(steps: int, scale: int, start: float = 1.0) -> list[float]:
    """Times from `start` to 0.

    Args:
        steps: between them.
        scale: side of the picture over that of the training. More pixels of one stroke average out more
            noise, so times are shifted towards noise: the signal-to-noise ratio of a stroke stays
            (arXiv 2403.03206).
    """
    even = [start * (1 - i / steps) for i in range(steps + 1)]
    return [scale * t / (1 + (scale - 1) * t) for t in even]


@torch.no_grad()
def integrate(model: Velocity, x: Tensor, labels: Tensor, ways: list[float]) -> Tensor:
    """From x at the first time to a picture at the last, by Heun's method."""
    for t, after in pairwise(ways):
        first = model(x, x.new_full((len(x),), t), labels)
        ahead = x + (after - t) * first
        if after > 0:
            first = 0.5 * (first + model(ahead, x.new_full((len(x),), after), labels))
            x = x + (after - t) * first
        else:
            x = ahead
    return x.clamp(-1, 1)


def direct(
    model: Velocity, labels: Tensor, size: int, scale: int, steps: int, generator: torch.Generator
) -> Tensor:
    """Pictures (N, 1, scale * size, scale * size) of the classes (N,), from noise of that size."""
    side = scale * size
    x = torch.randn(len(labels), 1, side, side, device=labels.device, generator=generator)
    return integrate(model, x, labels, times(steps, scale))


def enlarged(
    model: Velocity, pictures: Tensor, labels: Tensor, scale: int, steps: int, generator: torch.Generator
) -> Tensor:
    """Pictures of twice the side: enlarged, noised up to a time, and painted over from there.

    Args:
        pictures: of scale / 2 times the side of the training.
        scale: 2 or 4.
        steps: of a whole way; this one is shorter.
    """
    large = F.interpolate(pictures, scale_factor=2.0, mode="bicubic", align_corners=False)
    strength = STRENGTHS[scale]
    ways = times(max(1, int(steps * strength)), scale, strength)
    noise = torch.randn(large.shape, device=large.device, generator=generator)
    return integrate(model, torch.lerp(large, noise, ways[0]), labels, ways)
