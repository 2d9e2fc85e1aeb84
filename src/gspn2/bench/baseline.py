"""GSPN-1 as its paper describes it: one launch a line, a flat grid, states in memory in the storage type.

Own code, written from the description. The bench checks its times against those measured from the released
kernel on the same kind of GPU, so that no speedup rests on a straw man. Without a GPU a loop over lines in
PyTorch stands in, and says so.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import Problem
from ..backends.cuda.geometry import Kernel, Launch, Plan
from .launches import kernel

THREADS = 512


class Measured(NamedTuple):
    """Median milliseconds of the released kernel at one size."""

    size: tuple[int, int, int, int]
    float32: tuple[float, float]
    bfloat16: tuple[float, float]


SOURCE = (
    "measured from the released kernel on one NVIDIA H200 with PyTorch 2.11 and CUDA 13.0, copy bandwidth 4.25 "
    "to 4.27 TB/s; planes with W contiguous, scanned along W, per-channel taps, one direction"
)
DEVICE = "NVIDIA H200"

RELEASED = (
    Measured((16, 8, 1024, 1024), (33.66, 80.64), (33.09, 79.14)),
    Measured((256, 1, 1024, 1024), (72.76, 171.3), (71.66, 164.2)),
    Measured((1, 128, 512, 512), (6.35, 19.46), (6.04, 18.81)),
    Measured((8, 64, 256, 256), (8.03, 19.59), (7.29, 17.87)),
    Measured((1, 64, 256, 256), (1.30, 2.25), (1.28, 2.39)),
    Measured((1, 32, 128, 128), (0.627, 1.08), (0.623, 1.18)),
    Measured((1, 32, 64, 64), (0.312, 0.541), (0.311, 0.590)),
    Measured((32, 196, 32, 32), (1.055, 2.40), (0.747, 1.50)),
    Measured((1, 1152, 64, 64), (0.951, 2.47), (0.838, 1.97)),
    Measured((1, 8, 1024, 1024), (5.11, 8.84), (5.09, 9.52)),
)


def released(size: tuple[int, ...], dtype: torch.dtype, backward: bool) -> float | None:
    """Milliseconds of the released kernel on an H200, or None where it was not measured."""
    for row in RELEASED:
        if row.size == tuple(size):
            times = {torch.float32: row.float32, torch.bfloat16: row.bfloat16}.get(dtype)
            return None if times is None else times[backward]
    return None


def _kernel(problem: Problem, backward: bool) -> Kernel:
    return kernel("gspn1.cu", "gspn1_backward" if backward else "gspn1_forward", problem.dtype)


def plan(problem: Problem, backward: bool) -> Plan:
    """All launches of one pass: x, lam, y (B, C, H, W) and taps (B, 1, C, 3, H, W), contiguous, to the right.

    Backward finds h as y, and reads nothing else of the forward pass.
    """
    places = problem.batch * problem.channels * problem.height
    grid = -(-places // THREADS)
    columns = range(problem.width)
    launches = tuple(
        Launch(_kernel(problem, backward), grid, THREADS, 0, knobs=(column,))
        for column in (reversed(columns) if backward else columns)
    )
    scratch = (places * problem.width * problem.dtype.itemsize,) if backward else ()
    return Plan("gspn1", launches, scratch)


def loop(x: Tensor, lam: Tensor | None, w: Tensor) -> Tensor:
    """The stand-in without a GPU: the same recurrence to the right, a line at a time in PyTorch.

    Args:
        x, lam: (B, C, H, W).
        w: (B, G, 3, H, W), as given; a missing neighbour counts as 0.
    """
    u = x if lam is None else x * lam
    groups = w.shape[1]
    u = u.unflatten(1, (groups, -1))
    h: list[Tensor] = [u[..., 0]]
    for column in range(1, x.shape[3]):
        taps = w[..., column].unsqueeze(2)  # (B, G, 1, 3, H)
        before = torch.nn.functional.pad(h[-1], (1, 1))
        state = taps[..., 0, :] * before[..., :-2] + taps[..., 1, :] * before[..., 1:-1]
        h.append(state + taps[..., 2, :] * before[..., 2:] + u[..., column])
    return torch.stack(h, dim=-1).flatten(1, 2)
