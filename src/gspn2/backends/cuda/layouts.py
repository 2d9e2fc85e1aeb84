"""The two fast layouts without any memory, to plan a problem that nobody has posed yet."""

from __future__ import annotations

import torch
from torch import Tensor

from ..keeping import empty_states
from ..problem import Problem
from .geometry import Case, Device, View

LAYOUTS = ("planes", "channels")
"""Plain contiguous tensors; or, as the mixer makes them, x with its channels innermost, and lam, gate and
taps as views into one (B, H, W, P) tensor."""


def imagined(
    problem: Problem,
    layout: str,
    device: Device,
    *,
    backward: bool = False,
    lam: bool = True,
    gate: bool = True,
    keep_hidden: bool = False,
) -> Case:
    """The case of a problem with its tensors in one of `LAYOUTS`; in backward with every gradient.

    With keep_hidden backward is handed the states of all directions, as `propagate_keeping` leaves them.
    """
    inputs = _planes(problem, lam, gate) if layout == "planes" else _channels(problem, lam, gate)
    tensors = dict(inputs)
    # Outputs have memory of their own, laid out as operators do it.
    y = torch.empty_like(inputs["x"])
    if backward:
        tensors["dy"] = y
        if not gate and len(problem.directions) == 1:
            tensors["y"] = y  # the state itself, which the operator then keeps
        elif keep_hidden:
            tensors["y"] = empty_states(inputs["x"], len(problem.directions))
        tensors |= {f"d{name}": torch.empty_like(tensor) for name, tensor in inputs.items()}
    else:
        tensors["y"] = y
    views = {name: View.of(tensor) for name, tensor in tensors.items()}
    return Case(problem, device, views, backward)


def record_padding(channels: int, elements: int) -> int:
    """Elements that a mixer adds to a pixel of so many, for vectors of 16 bytes (`nn.Mixer.padding`)."""
    return -elements % 8 if channels % 8 == 0 and channels >= 16 else 0


def _shapes(problem: Problem, lam: bool, gate: bool) -> dict[str, tuple[int, ...]]:
    """By name, without (B, ..., H, W)."""
    directions = len(problem.directions)
    shapes = {"x": (problem.channels,), "taps": (directions, problem.groups, 3)}
    per_channel = (directions, problem.channels)
    return shapes | {name: per_channel for name, there in (("lam", lam), ("gate", gate)) if there}


def _planes(problem: Problem, lam: bool, gate: bool) -> dict[str, Tensor]:
    size = (problem.height, problem.width)
    return {
        name: torch.empty(problem.batch, *shape, *size, dtype=problem.dtype, device="meta")
        for name, shape in _shapes(problem, lam, gate).items()
    }


def _channels(problem: Problem, lam: bool, gate: bool) -> dict[str, Tensor]:
    shapes = _shapes(problem, lam, gate)
    # The mixer's order: the taps, whose number is no power of two, come last.
    names = [name for name in ("lam", "gate", "taps") if name in shapes]
    widths = [torch.Size(shapes[name]).numel() for name in names]
    pixels = (problem.batch, problem.height, problem.width)
    x = torch.empty(*pixels, problem.channels, dtype=problem.dtype, device="meta")
    padding = record_padding(problem.channels, sum(widths))
    packed = torch.empty(*pixels, sum(widths) + padding, dtype=problem.dtype, device="meta")
    parts = packed.split((*widths, padding), dim=3)[: len(widths)]
    return {"x": x.movedim(3, 1)} | {
        name: part.unflatten(3, shapes[name]).movedim((1, 2), (-2, -1))
        for name, part in zip(names, parts, strict=True)
    }
