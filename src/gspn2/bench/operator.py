"""The operator as the bench poses it: a problem, its inputs, bytes and calls, and the check before timing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

import gspn2

from ..backends import DIRECTIONS, Problem, reference
from ..backends.cuda.layouts import record_padding
from ..ops.propagate import _is_hidden_state
from .check import poisoned_twice, refuse_if_far

PLANES, PIXELS = "planes", "channels innermost"
ROTATION = 256 * 2**20
"""Input sets are rotated through at least this many bytes, four times the second-level cache of an H200."""
MOST_SETS = 4096
"""Enough for the smallest problem of the sweep, which has 72 KiB."""
Size = tuple[int, int, int, int]


class Operands(NamedTuple):
    """Arguments of the operator, and the gradient that comes in."""

    x: Tensor  # (B, C, H, W)
    taps: Tensor  # (B, D, G, 3, H, W)
    lam: Tensor | None  # (B, D, C, H, W)
    gate: Tensor | None  # (B, D, C, H, W)
    dy: Tensor  # (B, C, H, W)


@dataclass(frozen=True)
class Scan:
    """One problem of the operator.

    Args:
        size: B, C, H, W.
        dtype: storage type.
        taps: "shared" or "per-channel".
        directions: names; one for `line_scan`.
        layout: `PLANES`, or `PIXELS` as a mixer makes it: taps, lam, gate are views of one (B, H, W, P).
        scan: `line_scan`: weights as given, lam, no gate. Otherwise `propagate`.
        scaled: `propagate` with lam and gate.
        passes: "forward", "backward".
        chunk: lines between restarts, or None.
        kept: forward keeps the states of all directions, and backward reads them.
    """

    size: Size
    dtype: torch.dtype
    taps: str
    directions: tuple[str, ...]
    layout: str = PLANES
    scan: bool = False
    scaled: bool = False
    passes: tuple[str, ...] = ("forward",)
    chunk: int | None = None
    kept: bool = False

    @property
    def name(self) -> str:
        words = ["x".join(map(str, self.size)), short(self.dtype), self.taps, "+".join(self.directions)]
        if len(self.directions) == len(DIRECTIONS):
            words[-1] = "four"
        words.append("planes" if self.layout == PLANES else "pixels")
        if not self.scan:
            words.append("scaled" if self.scaled else "bare")
        words += [f"chunk {self.chunk}"] if self.chunk else []
        return " ".join([*words, *(["kept"] if self.kept else [])])

    @property
    def groups(self) -> int:
        return 1 if self.taps == "shared" else self.size[1]

    @property
    def family(self) -> tuple[Any, ...]:
        """What its inputs depend on."""
        return (self.size, self.dtype, self.taps, len(self.directions), self.layout, self.scan, self.scaled)

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Elements of each operand."""
        batch, channels, height, width = self.size
        pixels, count = batch * height * width, len(self.directions)
        per_channel = count * channels * pixels
        return {
            "x": channels * pixels,
            "taps": 3 * count * self.groups * pixels,
            "lam": per_channel if self.scan or self.scaled else 0,
            "gate": per_channel if self.scaled else 0,
        }

    def bytes(self, which: str) -> int:
        """Every input read once, every output written once; states that are kept are neither."""
        inputs, image = sum(self.numbers.values()), self.numbers["x"]
        elements = inputs + image if which == "forward" else inputs + image + inputs
        return elements * self.dtype.itemsize

    def flops(self, which: str) -> int:
        """Two for each of three taps, and of lam and gate that are there; three times that for gradients."""
        states = len(self.directions) * self.numbers["x"]
        products = 3 + bool(self.numbers["lam"]) + bool(self.numbers["gate"])
        return 2 * products * states * (1 if which == "forward" else 3)

    @property
    def sets(self) -> int:
        return max(1, min(MOST_SETS, -(-ROTATION // self.bytes("forward"))))

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "size": list(self.size),
            "dtype": str(self.dtype).removeprefix("torch."),
            "taps": self.taps,
            "directions": list(self.directions),
            "layout": self.layout,
            "operator": "line_scan" if self.scan else "propagate",
            "lam_and_gate": self.scaled,
            "input_sets": self.sets,
            **({"chunk": self.chunk} if self.chunk else {}),
            **({"kept_states": True} if self.kept else {}),
        }

    def problem(self) -> Problem:
        batch, channels, height, width = self.size
        sizes = dict(batch=batch, channels=channels, groups=self.groups, height=height, width=width)
        return Problem(self.directions, self.chunk, not self.scan, **sizes, dtype=self.dtype, device="cuda")


def short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def make_inputs(scan: Scan, device: torch.device, most: int | None = None) -> list[Operands]:
    """Random operands, one for each input set, at most `most` (without a GPU one, unless asked for)."""
    batch, channels, height, width = scan.size
    sets = min(scan.sets, most) if most else scan.sets if device.type == "cuda" else 1
    count = len(scan.directions)
    make: dict[str, Any] = dict(dtype=scan.dtype, device=device)
    lam: Tensor | None
    gate: Tensor | None
    if scan.layout == PIXELS:
        parts = [n // (batch * height * width) for n in scan.numbers.values()]
        image = (sets, batch, height, width)
        x, dy = (torch.randn(*image, channels, **make).movedim(-1, 2) for _ in range(2))
        padding = record_padding(channels, sum(parts[1:]))
        packed = torch.randn(*image, sum(parts[1:]) + padding, **make)
        lam, gate, taps, _ = packed.split((parts[2], parts[3], parts[1], padding), dim=-1)
        taps = taps.unflatten(-1, (count, scan.groups, 3)).permute(0, 1, 4, 5, 6, 2, 3)
        lam, gate = (
            part.unflatten(-1, (count, channels)).permute(0, 1, 4, 5, 2, 3) if part.shape[-1] else None
            for part in (lam, gate)
        )
    else:
        x, dy = (torch.randn(sets, *scan.size, **make) for _ in range(2))
        taps = torch.randn(sets, batch, count, scan.groups, 3, height, width, **make)
        many = (sets, batch, count, channels, height, width)
        lam = torch.randn(many, **make) if scan.numbers["lam"] else None
        gate = torch.randn(many, **make) if scan.numbers["gate"] else None
    if scan.scan:
        taps = taps.softmax(dim=4)
    return [
        Operands(x[i], taps[i], None if lam is None else lam[i], None if gate is None else gate[i], dy[i])
        for i in range(sets)
    ]


def operator_calls(
    scan: Scan, inputs: list[Operands], backend: str | None
) -> dict[str, Callable[[int], Any]]:
    """The case's two passes as functions of the number of an input set."""
    options: dict[str, Any] = {"chunk": scan.chunk, "backend": backend}
    indices = [DIRECTIONS.index(name) for name in scan.directions]

    def forward(i: int) -> Tensor:
        x, taps, lam, gate, _ = inputs[i]
        if scan.scan:
            assert lam is not None
            return gspn2.line_scan(x, lam[:, 0], taps[:, 0], **options, direction=scan.directions[0])
        if scan.kept:
            return keeping(i)[0]
        return gspn2.propagate(x, taps, lam, gate, **options, directions=scan.directions)

    def keeping(i: int) -> tuple[Tensor, Tensor]:
        settings = (indices, scan.chunk or 0, True, backend)
        return torch.ops.gspn2.propagate_keeping(*inputs[i][:4], *settings)

    # As autograd does it: a single scan's output is kept for its backward.
    hidden: dict[int, Tensor] = {}

    def backward(i: int) -> tuple[Tensor, ...]:
        x, taps, lam, gate, dy = inputs[i]
        if i not in hidden and _is_hidden_state(x, gate, indices):
            hidden[i] = forward(i)
        if i not in hidden and scan.kept:
            hidden[i] = keeping(i)[1]
        needs = [True, True, lam is not None, gate is not None]
        settings = (indices, scan.chunk or 0, not scan.scan, backend, needs, hidden.get(i))
        return torch.ops.gspn2.propagate_backward(dy, x, taps, lam, gate, *settings)

    return {"forward": forward, "backward": backward}


def check(
    scan: Scan,
    operands: Operands,
    calls: dict[str, Callable[[int], Any]],
    slack: float | None = None,
) -> dict[str, float]:
    """Every pass against the reference in float64; returns relative errors by tensor.

    Memory is filled with NaN before each run, so that an element that is not written shows, and each runs
    twice, which must give the same bits. The reference, a loop over lines, runs on the first and the last
    image, and of per-channel taps on the first and the last channel: these do not depend on the others.

    Args:
        scan, operands, calls: what is checked.
        slack: relative error that is allowed beyond rounding of the result; see below for the default.

    Raises:
        Wrong: an element was not written, a run differs from another, or the error is more than twice that
            of rounding the exact result, plus 1e-5 (1e-4 for gradients; the dtype's epsilon where they are
            made from states that forward has rounded), or plus `slack`.
    """
    images = sorted({0, scan.size[0] - 1})
    channels = sorted({0, scan.size[1] - 1}) if scan.taps == "per-channel" else slice(None)
    pick = {
        "x": lambda t: t[images][:, channels],
        "taps": lambda t: t[images][:, :, channels if scan.taps == "per-channel" else slice(None)],
        "lam": lambda t: t[images][:, :, channels],
    }
    pick |= {"gate": pick["lam"], "dy": pick["x"], "y": pick["x"]}
    exact: dict[str, Any] = {
        name: None if tensor is None else pick[name](tensor).double()
        for name, tensor in operands._asdict().items()
    }
    sizes = dict(batch=len(images), channels=exact["x"].shape[1], groups=exact["taps"].shape[2])
    problem = replace(scan.problem(), **sizes, dtype=torch.float64)
    dy = exact.pop("dy")
    errors: dict[str, float] = {}
    for which in scan.passes:
        found = poisoned_twice(calls[which], which)
        if which == "forward":
            expected = {"y": reference.propagate(**exact, problem=problem)}
        else:
            needs: Any = tuple(tensor is not None for tensor in exact.values())
            gradients = reference.propagate_backward(dy, **exact, problem=problem, needs=needs)
            expected = {name: g for name, g in zip(exact, gradients, strict=True) if g is not None}
            found = tuple(t for t, needed in zip(found, needs, strict=True) if needed)
        for (name, truth), tensor in zip(expected.items(), found, strict=True):
            label = name if which == "forward" else f"d{name}"
            least = torch.finfo(tensor.dtype).eps if scan.kept else 1e-4
            floor = slack or (1e-5 if which == "forward" else max(least, 1e-4))
            errors[label] = refuse_if_far(label, pick[name](tensor), truth, floor)
    return errors
