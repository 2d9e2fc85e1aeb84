"""GSPN-1 as its paper describes it: one launch a line, a flat grid, states in memory in the storage type.

Own code, written from the description. The bench checks its times against those measured from the released
kernel on the same kind of GPU, so that no speedup rests on a straw man. Without a GPU a loop over lines in
PyTorch stands in, and says so.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..backends import Problem
from ..backends.cuda.geometry import Kernel, Launch, Plan
from .launches import kernel

THREADS = 512


TABLE = Path(__file__).with_name("gspn1.json")
"""Median milliseconds of the released kernel, and how they were measured."""
DEVICE = "NVIDIA H200"
"""Where."""


@cache
def measured() -> dict[tuple[int, ...], dict[str, tuple[float, float]]]:
    """Milliseconds of the released kernel by size (B, C, H, W) and dtype: forward, backward."""
    rows = json.loads(TABLE.read_text(encoding="utf-8"))["rows"]
    return {tuple(size): {"float32": (a, b), "bfloat16": (c, d)} for size, a, b, c, d in rows}


def released(size: Sequence[int], dtype: torch.dtype, backward: bool) -> float | None:
    """Milliseconds of the released kernel on an H200, or None where it was not measured."""
    times = measured().get(tuple(size), {}).get(str(dtype).removeprefix("torch."))
    return None if times is None else times[backward]


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
    # Taken apart at once: autograd would fill a whole tensor for the gradient of every slice.
    lines = u.unflatten(1, (groups, -1)).unbind(-1)
    lines_w = w.unsqueeze(2).unbind(-1)  # (B, G, 1, 3, H) each
    h: list[Tensor] = [lines[0]]
    for line, taps in zip(lines[1:], lines_w[1:], strict=True):
        before = torch.nn.functional.pad(h[-1], (1, 1))
        above, here, below = taps.unbind(3)
        h.append(above * before[..., :-2] + here * before[..., 1:-1] + below * before[..., 2:] + line)
    return torch.stack(h, dim=-1).flatten(1, 2)
