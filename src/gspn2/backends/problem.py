"""What a backend is asked to do, apart from the tensors themselves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DIRECTIONS = ("down", "up", "right", "left")
"""Every scan direction, in image coordinates. An operator stores a direction as its index here."""


@dataclass(frozen=True)
class Problem:
    """Semantics and sizes of one propagation.

    Args:
        directions: names out of `DIRECTIONS`, in the order of the D axis of taps, lam and gate.
        chunk: lines between restarts of the state, counted from where each direction starts; None never
            restarts.
        normalize: taps are logits, to be turned into row-stochastic weights; otherwise used as given.
        batch, channels, groups, height, width: sizes of x (B, C, H, W) and of the taps' G axis.
        dtype: storage type of every tensor.
        device: `torch.device.type` of every tensor.
    """

    directions: tuple[str, ...]
    chunk: int | None
    normalize: bool
    batch: int
    channels: int
    groups: int
    height: int
    width: int
    dtype: torch.dtype
    device: str

    @staticmethod
    def of(
        x: Tensor, taps: Tensor, directions: tuple[str, ...], chunk: int | None, normalize: bool
    ) -> Problem:
        """The problem posed by x (B, C, H, W) and taps (B, D, G, 3, H, W)."""
        batch, channels, height, width = x.shape
        return Problem(
            directions=directions,
            chunk=chunk,
            normalize=normalize,
            batch=batch,
            channels=channels,
            groups=taps.shape[2],
            height=height,
            width=width,
            dtype=x.dtype,
            device=x.device.type,
        )


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of the running state and of all sums for tensors stored as `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32
