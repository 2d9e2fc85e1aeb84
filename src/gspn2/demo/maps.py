"""Propagation maps: where one pixel's signal goes in a mixer, and where an output pixel's comes from.

A propagation is linear in its input once taps, lam and gate are fixed, so the response to a unit impulse at
one pixel is a column of its matrix, and the gradient of one output pixel is a row of it. Both are measured
through the operator itself, not through a second implementation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .. import propagate
from ..backends import DIRECTIONS

Pixel = tuple[int, int]


class Operands(Protocol):
    """What a mixer hands to `propagate` for one image (B = 1); lam and gate may be None."""

    @property
    def x(self) -> Tensor: ...  # (1, C, H, W)
    @property
    def logits(self) -> Tensor: ...  # (1, D, G, 3, H, W)
    @property
    def lam(self) -> Tensor | None: ...  # (1, D, C, H, W)
    @property
    def gate(self) -> Tensor | None: ...  # (1, D, C, H, W)


@dataclass(frozen=True)
class PropagationMap:
    """Strength of the signal between one pixel and every other, as mean absolute response of the channels.

    Args:
        pixel: (row, column) of the chosen pixel on the mixer's grid.
        sent: for each direction and for "all" of them the map (H, W) of what the pixel sends.
        received: map (H, W) of what the output at the pixel receives, over all directions.
        spines: for each direction the (row, column) centre of the flow on every line it reaches.
    """

    pixel: Pixel
    sent: dict[str, Tensor]
    received: Tensor
    spines: dict[str, list[tuple[float, float]]]

    @property
    def coverage(self) -> float:
        """Share of the grid that gets at least 1% of the strongest response of all directions together."""
        total = self.sent["all"]
        return (total >= 0.01 * total.max()).double().mean().item() if total.max() > 0 else 0.0

    @property
    def mean_distance(self) -> float:
        """Mean distance in grid pixels, weighted by the response, of what the pixel sends."""
        total = self.sent["all"]
        if total.sum() == 0:
            return 0.0
        rows = torch.arange(total.shape[0], dtype=total.dtype) - self.pixel[0]
        columns = torch.arange(total.shape[1], dtype=total.dtype) - self.pixel[1]
        distance = torch.hypot(rows[:, None], columns[None, :])
        return ((total * distance).sum() / total.sum()).item()


def propagation_map(
    operands: Operands,
    pixel: Pixel,
    directions: Sequence[str] = DIRECTIONS,
    chunk: int | None = None,
) -> PropagationMap:
    """Both maps of one pixel in one mixer.

    Args:
        operands: the mixer's own x, logits, lam and gate for one image.
        pixel: (row, column) on the mixer's grid.
        directions, chunk: as the mixer uses them.

    Raises:
        ValueError: more than one image, or a pixel off the grid.
    """
    x, logits, lam, gate = _as_float64(operands)
    _check(x, pixel)
    each = impulse_response(x, logits, lam, gate, pixel, directions, chunk)
    sent = {name: each[d].abs().mean(0) for d, name in enumerate(directions)}
    # Summed before the absolute value: in y, directions of opposite sign cancel.
    sent["all"] = each.sum(0).abs().mean(0)
    received = sensitivity(x, logits, lam, gate, pixel, directions, chunk).abs().mean(0)
    spines = {name: spine(sent[name], pixel, name) for name in directions}
    return PropagationMap(pixel, sent, received, spines)


def impulse_response(
    x: Tensor,  # (1, C, H, W)
    logits: Tensor,  # (1, D, G, 3, H, W)
    lam: Tensor | None,  # (1, D, C, H, W)
    gate: Tensor | None,  # (1, D, C, H, W)
    pixel: Pixel,
    directions: Sequence[str] = DIRECTIONS,
    chunk: int | None = None,
) -> Tensor:  # (D, C, H, W)
    """Response of each direction's share of y to 1 added to every channel of x at `pixel`.

    Channels do not mix in a propagation, so one impulse in all of them gives each channel its own response.
    """
    impulse = torch.zeros_like(x)
    impulse[:, :, pixel[0], pixel[1]] = 1
    responses = []
    for d, direction in enumerate(directions):
        one = slice(d, d + 1)
        y = propagate(
            impulse,
            logits[:, one],
            None if lam is None else lam[:, one],
            None if gate is None else gate[:, one],
            directions=(direction,),
            chunk=chunk,
        )
        responses.append(y[0])
    return torch.stack(responses)


def sensitivity(
    x: Tensor,  # (1, C, H, W)
    logits: Tensor,  # (1, D, G, 3, H, W)
    lam: Tensor | None,  # (1, D, C, H, W)
    gate: Tensor | None,  # (1, D, C, H, W)
    pixel: Pixel,
    directions: Sequence[str] = DIRECTIONS,
    chunk: int | None = None,
) -> Tensor:  # (C, H, W)
    """Derivative of y at `pixel` in x, channel by channel, with taps, lam and gate held fixed."""
    with torch.enable_grad():
        source = x.detach().clone().requires_grad_()
        y = propagate(source, logits, lam, gate, directions=tuple(directions), chunk=chunk)
        (gradient,) = torch.autograd.grad(y[0, :, pixel[0], pixel[1]].sum(), source)
    return gradient[0]


def spine(response: Tensor, pixel: Pixel, direction: str) -> list[tuple[float, float]]:
    """Centre of mass of a response (H, W) on each line it reaches, from `pixel` on in scan order.

    Stops at the first line that gets less than 1% of the strongest line's total.
    """
    vertical = direction in ("down", "up")
    lines = response if vertical else response.T
    start = pixel[0] if vertical else pixel[1]
    step = 1 if direction in ("down", "right") else -1
    totals = lines.sum(1)
    places = torch.arange(lines.shape[1], dtype=lines.dtype)
    points: list[tuple[float, float]] = []
    for line in range(start, lines.shape[0] if step > 0 else -1, step):
        if totals[line] <= 0.01 * totals.max():
            break
        centre = ((lines[line] * places).sum() / totals[line]).item()
        points.append((float(line), centre) if vertical else (centre, float(line)))
    return points


def _as_float64(operands: Operands) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    lam, gate = operands.lam, operands.gate
    return (
        operands.x.detach().double().cpu(),
        operands.logits.detach().double().cpu(),
        None if lam is None else lam.detach().double().cpu(),
        None if gate is None else gate.detach().double().cpu(),
    )


def _check(x: Tensor, pixel: Pixel) -> None:
    if x.shape[0] != 1:
        raise ValueError(f"operands: expected one image, got a batch of {x.shape[0]}")
    height, width = x.shape[-2:]
    if not (0 <= pixel[0] < height and 0 <= pixel[1] < width):
        raise ValueError(f"pixel: expected (row, column) inside {height} x {width}, got {pixel}")
