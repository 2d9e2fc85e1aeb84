"""What the operator's tests share: problems, layouts, an eager yardstick and measures of error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

import gspn2
from gspn2.backends import BACKENDS, DIRECTIONS, Problem

INPUTS = ("x", "logits", "lam", "gate")
DIRECTION_SUBSETS = tuple(
    subset for size in range(1, len(DIRECTIONS) + 1) for subset in combinations(DIRECTIONS, size)
)


@dataclass(frozen=True)
class Case:
    """One problem: the arguments of `gspn2.propagate` and the gradient dy that comes back."""

    x: Tensor  # (B, C, H, W)
    logits: Tensor  # (B, D, G, 3, H, W)
    lam: Tensor | None  # (B, D, C, H, W)
    gate: Tensor | None  # (B, D, C, H, W)
    dy: Tensor  # (B, C, H, W)
    directions: tuple[str, ...] = DIRECTIONS
    chunk: int | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The tensor arguments that are there, by name."""
        return {name: getattr(self, name) for name in INPUTS if getattr(self, name) is not None}

    def map(self, change: Callable[[Tensor], Tensor]) -> Case:
        """The same problem with every tensor, dy included, passed through `change`."""
        changed = {name: change(tensor) for name, tensor in self.tensors().items()}
        return replace(self, dy=change(self.dy), **changed)

    def to(self, dtype: torch.dtype) -> Case:
        return self.map(lambda tensor: tensor.to(dtype))


def make_case(
    batch: int = 2,
    channels: int = 4,
    height: int = 5,
    width: int = 6,
    groups: int = 1,
    directions: Sequence[str] = DIRECTIONS,
    chunk: int | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    lam: bool = True,
    gate: bool = True,
) -> Case:
    """A random problem; made in float64 and rounded, so that every dtype poses the same one."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    places = (height, width)
    d = len(directions)
    return Case(
        x=normal(batch, channels, *places),
        logits=normal(batch, d, groups, 3, *places, scale=2.0),
        lam=normal(batch, d, channels, *places) if lam else None,
        gate=normal(batch, d, channels, *places) if gate else None,
        dy=normal(batch, channels, *places),
        directions=tuple(directions),
        chunk=chunk,
    )


def run(case: Case, propagate: Callable[..., Tensor] = gspn2.propagate, **options: Any) -> dict[str, Tensor]:
    """Forward and backward: y and the gradients dx, dlogits, dlam, dgate of sum(y dy)."""
    inputs = {name: tensor.detach().requires_grad_() for name, tensor in case.tensors().items()}
    y = propagate(**inputs, directions=case.directions, chunk=case.chunk, **options)
    gradients = torch.autograd.grad(y, tuple(inputs.values()), case.dy)
    return {"y": y.detach()} | {f"d{name}": g for name, g in zip(inputs, gradients, strict=True)}


def truth(case: Case) -> dict[str, Tensor]:
    """What the results should be: the reference in float64, on the inputs as they were rounded."""
    return run(case.to(torch.float64), backend="reference")


# The yardstick of accuracy: what a user would write, every operation in the dtype of the inputs.


def eager_scan(u: Tensor, w: Tensor, direction: str, chunk: int | None) -> Tensor:
    """h (B, C, H, W) from u (B, C, H, W) and taps w (B, C, 3, H, W), line after line in image coordinates."""
    axis = 2 if direction in ("down", "up") else 3
    # Taken apart once: the gradient of every single `select` would be as large as the image.
    sources, taps = u.unbind(axis), w.unbind(axis + 1)
    lines = len(sources)
    order = range(lines) if direction in ("down", "right") else range(lines - 1, -1, -1)
    scanned: dict[int, Tensor] = {}
    h = torch.zeros_like(u.select(axis, 0))
    for count, i in enumerate(order):
        if chunk is not None and count % chunk == 0:
            h = torch.zeros_like(h)
        before, here, after = taps[i].unbind(2)
        h = (
            torch.cat((torch.zeros_like(h[..., :1]), before[..., 1:] * h[..., :-1]), -1)
            + here * h
            + torch.cat((after[..., :-1] * h[..., 1:], torch.zeros_like(h[..., :1])), -1)
            + sources[i]
        )
        scanned[i] = h
    return torch.stack([scanned[i] for i in range(lines)], axis)


def eager_weights(logits: Tensor, direction: str) -> Tensor:
    """Taps (B, G, 3, H, W) from logits, by the equation: sigmoids over the sum of those that exist."""
    exists = torch.ones_like(logits)
    places = exists if direction in ("down", "up") else exists.transpose(-2, -1)
    places[:, :, 0, :, 0] = 0
    places[:, :, 2, :, -1] = 0
    share = torch.sigmoid(logits) * exists
    return share / share.sum(2, keepdim=True)


def eager_propagate(
    x: Tensor,
    logits: Tensor,
    lam: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    directions: Sequence[str],
    chunk: int | None,
) -> Tensor:
    y = torch.zeros_like(x)
    for d, direction in enumerate(directions):
        w = eager_weights(logits[:, d], direction)
        w = w.repeat_interleave(x.shape[1] // w.shape[1], dim=1)
        h = eager_scan(x if lam is None else lam[:, d] * x, w, direction, chunk)
        y = y + (h if gate is None else gate[:, d] * h)
    return y


# Layouts: the same values, other memory. What lies between the values is NaN, so that a stray read shows.


def planes(case: Case) -> Case:
    return case.map(lambda tensor: tensor.contiguous())


def channel_innermost(case: Case) -> Case:
    """Views into one packed (B, H, W, P) tensor, as a single projection writes it."""
    tensors = case.tensors() | {"dy": case.dy}
    flat = {name: t.movedim((-2, -1), (1, 2)).flatten(3) for name, t in tensors.items()}
    packed = torch.cat(list(flat.values()), dim=3)
    views = packed.split([t.shape[3] for t in flat.values()], dim=3)
    unpacked = {
        name: view.unflatten(3, tensors[name].shape[1:-2]).movedim((1, 2), (-2, -1))
        for name, view in zip(flat, views, strict=True)
    }
    return replace(case, **unpacked)


def strided(case: Case) -> Case:
    """Every tensor in its own unusual memory: steps, offsets, transposed and reversed orders of the axes."""
    changed = {
        "x": in_memory(case.x, order=(0, 1, 2, 3), step=3),
        "logits": in_memory(case.logits, order=(5, 4, 3, 2, 1, 0), step=1),
        "dy": in_memory(case.dy, order=(1, 0, 3, 2), step=1),
    }
    if case.lam is not None:
        changed["lam"] = in_memory(case.lam, order=(0, 2, 1, 4, 3), step=2)
    if case.gate is not None:
        changed["gate"] = in_memory(case.gate, order=(2, 0, 1, 3, 4), step=1)
    return replace(case, **changed)


def in_memory(tensor: Tensor, order: Sequence[int], step: int) -> Tensor:
    """A view equal to `tensor` with its axes in memory in `order`, every `step`-th, in a field of NaN."""
    turned = tensor.permute(*order)
    field = turned.new_full([step * size + 2 for size in turned.shape], torch.nan)
    window = tuple(slice(1, 1 + step * size, step) for size in turned.shape)
    field[window] = turned
    inverse = sorted(range(len(order)), key=lambda axis: order[axis])
    return field[window].permute(*inverse)


LAYOUTS: dict[str, Callable[[Case], Case]] = {
    "planes": planes,
    "channel_innermost": channel_innermost,
    "strided": strided,
}


# Measures


def relative_l2(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| in float64; NaN when either has a NaN, which fails every comparison."""
    error = torch.linalg.vector_norm(found.double() - expected.double())
    size = torch.linalg.vector_norm(expected.double())
    return (error / size).item() if size > 0 else error.item()


def max_error(found: Tensor, expected: Tensor) -> float:
    """max |found - expected| / max(1, max |expected|): absolute for small values, relative for large ones."""
    if expected.numel() == 0:
        return 0.0
    error = (found.double() - expected.double()).abs().max()
    return (error / expected.double().abs().max().clamp(min=1)).item()


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    """Same names and shapes, and `max_error` within the tolerance."""
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.shape == expected[name].shape, name
        assert max_error(tensor, expected[name]) <= tolerance, name


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


# Backends


def reason_against(backend: str, case: Case) -> str | None:
    """The sentence with which a backend declines the case, or None."""
    problem = Problem.of(case.x, case.logits, case.directions, case.chunk, normalize=True)
    return BACKENDS[backend].why_not(problem)


CPU_BACKENDS = tuple(name for name in BACKENDS if reason_against(name, make_case()) is None)
"""Those that run on the CPU; `test_backends` fails if the native one is missing from it."""
