"""The problems that `gpu.py` times: sizes, layouts, inputs, bytes, targets, and the check before timing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import gspn2
from gspn2.backends import DIRECTIONS, Problem, reference
from gspn2.ops.propagate import _is_hidden_state

GSPN1 = json.loads(Path(__file__).with_name("gspn1.json").read_text())
PLANES, PIXELS = "planes", "channels innermost"
ROTATION = 256 * 2**20
"""Input sets are rotated through at least this many bytes, five times the second-level cache of an H200."""
MOST_SETS = 256
FLOOR_US = 6
"""No launch that does anything is expected to be faster; microseconds."""
Size = tuple[int, int, int, int]


class Operands(NamedTuple):
    """Arguments of the operator, and the gradient that comes in."""

    x: Tensor  # (B, C, H, W)
    taps: Tensor  # (B, D, G, 3, H, W)
    lam: Tensor | None  # (B, D, C, H, W)
    gate: Tensor | None  # (B, D, C, H, W)
    dy: Tensor  # (B, C, H, W)


@dataclass(frozen=True)
class Target:
    """What a number has to reach: at least `value` ("share", "factor"), or at most that ("us", "over_floor").

    A share is of copy bandwidth, a factor over GSPN-1, and the floor the larger of `FLOOR_US` and the time of
    a copy of as many bytes.
    """

    metric: str
    value: float

    def met(self, measured: float) -> bool:
        return measured >= self.value if self.metric in ("share", "factor") else measured <= self.value


@dataclass(frozen=True)
class Case:
    """One problem.

    Args:
        size: B, C, H, W.
        dtype: storage type.
        taps: "shared" or "per-channel".
        directions: names; one for `line_scan`.
        layout: `PLANES`, or `PIXELS` as a mixer makes it: taps, lam, gate are views of one (B, H, W, P).
        scan: `line_scan`: weights as given, lam, no gate. Otherwise `propagate`.
        scaled: `propagate` with lam and gate.
        passes: "forward", "backward".
        targets: by pass.
        gspn1: row in the table of GSPN-1's times.
    """

    size: Size
    dtype: torch.dtype
    taps: str
    directions: tuple[str, ...]
    layout: str = PLANES
    scan: bool = False
    scaled: bool = False
    passes: tuple[str, ...] = ("forward",)
    targets: dict[str, Target] = field(default_factory=dict)
    gspn1: int | None = None

    @property
    def name(self) -> str:
        words = ["x".join(map(str, self.size)), short(self.dtype), self.taps, "+".join(self.directions)]
        if len(self.directions) == len(DIRECTIONS):
            words[-1] = "four"
        words.append("planes" if self.layout == PLANES else "pixels")
        return " ".join([*words, *(["scaled" if self.scaled else "bare"] if not self.scan else [])])

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
        """Every input read once, every output written once."""
        inputs, image = sum(self.numbers.values()), self.numbers["x"]
        elements = inputs + image if which == "forward" else inputs + image + inputs
        return elements * self.dtype.itemsize

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
        }

    def problem(self) -> Problem:
        batch, channels, height, width = self.size
        sizes = dict(batch=batch, channels=channels, groups=self.groups, height=height, width=width)
        return Problem(self.directions, None, not self.scan, **sizes, dtype=self.dtype, device="cuda")


def short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def make_inputs(case: Case, device: torch.device) -> list[Operands]:
    """Random operands, one for each input set."""
    batch, channels, height, width = case.size
    sets, count = case.sets if device.type == "cuda" else 1, len(case.directions)
    make = dict(dtype=case.dtype, device=device)
    if case.layout == PIXELS:
        parts = [n // (batch * height * width) for n in case.numbers.values()]
        image = (sets, batch, height, width)
        x, dy = (torch.randn(*image, channels, **make).movedim(-1, 2) for _ in range(2))
        packed = torch.randn(*image, sum(parts[1:]), **make)
        lam, gate, taps = packed.split((parts[2], parts[3], parts[1]), dim=-1)
        taps = taps.unflatten(-1, (count, case.groups, 3)).permute(0, 1, 4, 5, 6, 2, 3)
        lam, gate = (
            part.unflatten(-1, (count, channels)).permute(0, 1, 4, 5, 2, 3) if part.shape[-1] else None
            for part in (lam, gate)
        )
    else:
        x, dy = (torch.randn(sets, *case.size, **make) for _ in range(2))
        taps = torch.randn(sets, batch, count, case.groups, 3, height, width, **make)
        many = (sets, batch, count, channels, height, width)
        lam = torch.randn(many, **make) if case.numbers["lam"] else None
        gate = torch.randn(many, **make) if case.numbers["gate"] else None
    if case.scan:
        taps = taps.softmax(dim=4)
    return [
        Operands(x[i], taps[i], None if lam is None else lam[i], None if gate is None else gate[i], dy[i])
        for i in range(sets)
    ]


def operator_calls(
    case: Case, inputs: list[Operands], backend: str | None
) -> dict[str, Callable[[int], Any]]:
    """The case's two passes as functions of the number of an input set."""
    indices = [DIRECTIONS.index(name) for name in case.directions]

    def forward(i: int) -> Tensor:
        x, taps, lam, gate, _ = inputs[i]
        if case.scan:
            return gspn2.line_scan(x, lam[:, 0], taps[:, 0], direction=case.directions[0], backend=backend)
        return gspn2.propagate(x, taps, lam, gate, directions=case.directions, backend=backend)

    # As autograd does it: a single scan's output is kept for its backward.
    hidden: dict[int, Tensor] = {}

    def backward(i: int) -> tuple[Tensor, ...]:
        x, taps, lam, gate, dy = inputs[i]
        if i not in hidden and _is_hidden_state(x, gate, indices):
            hidden[i] = forward(i)
        needs = [True, True, lam is not None, gate is not None]
        settings = (indices, 0, not case.scan, backend, needs, hidden.get(i))
        return torch.ops.gspn2.propagate_backward(dy, x, taps, lam, gate, *settings)

    return {"forward": forward, "backward": backward}


class Wrong(Exception):
    """A result that is not what it should be; nothing is timed then."""


def check(case: Case, operands: Operands, calls: dict[str, Callable[[int], Any]]) -> dict[str, float]:
    """Every pass against the reference in float64; returns relative errors by tensor.

    Memory is filled with NaN before each run, so that an element that is not written shows, and each runs
    twice, which must give the same bits. The reference, a loop over lines, runs on the first and the last
    image, and of per-channel taps on the first and the last channel: these do not depend on the others.

    Raises:
        Wrong: an element was not written, a run differs from another, or the error is more than twice that
            of rounding the exact result, plus 1e-5 (1e-4 for gradients).
    """
    images = sorted({0, case.size[0] - 1})
    channels = sorted({0, case.size[1] - 1}) if case.taps == "per-channel" else slice(None)
    pick = {
        "x": lambda t: t[images][:, channels],
        "taps": lambda t: t[images][:, :, channels if case.taps == "per-channel" else slice(None)],
        "lam": lambda t: t[images][:, :, channels],
    }
    pick |= {"gate": pick["lam"], "dy": pick["x"], "y": pick["x"]}
    exact = {
        name: None if tensor is None else pick[name](tensor).double()
        for name, tensor in operands._asdict().items()
    }
    sizes = dict(batch=len(images), channels=exact["x"].shape[1], groups=exact["taps"].shape[2])
    problem = replace(case.problem(), **sizes, dtype=torch.float64)
    dy = exact.pop("dy")
    errors: dict[str, float] = {}
    for which in case.passes:
        found = _poisoned_twice(calls[which], which)
        if which == "forward":
            expected = {"y": reference.propagate(**exact, problem=problem)}
        else:
            needs = tuple(tensor is not None for tensor in exact.values())
            gradients = reference.propagate_backward(dy, **exact, problem=problem, needs=needs)
            expected = {name: g for name, g in zip(exact, gradients, strict=True) if g is not None}
            found = tuple(t for t, needed in zip(found, needs, strict=True) if needed)
        for (name, truth), tensor in zip(expected.items(), found, strict=True):
            label = name if which == "forward" else f"d{name}"
            errors[label] = _error(label, pick[name](tensor), truth, 1e-5 if which == "forward" else 1e-4)
    return errors


def _poisoned_twice(call: Callable[[int], Any], which: str) -> tuple[Tensor, ...]:
    """The outputs of two runs on memory full of NaN.

    Raises:
        Wrong: they are not finite everywhere, or not the same.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        first, second = (call(0) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(before)
    pair = ((first,), (second,)) if isinstance(first, Tensor) else (first, second)
    for one, other in zip(*pair, strict=True):
        if not one.isfinite().all():
            raise Wrong(f"{which}: {int((~one.isfinite()).sum())} of {one.numel()} numbers are not finite")
        if not torch.equal(one, other):
            raise Wrong(f"{which}: two runs differ")
    return pair[0]


def _error(name: str, found: Tensor, truth: Tensor, floor: float) -> float:
    norm = truth.norm()
    error = float((found.double() - truth).norm() / norm)
    rounding = float((truth.to(found.dtype).double() - truth).norm() / norm)
    if not error <= 2 * rounding + floor:
        raise Wrong(f"{name}: relative error {error:.2e}, {rounding:.2e} of it from rounding")
    return error


LARGE = [(16, 8, 1024, 1024), (256, 1, 1024, 1024), (1, 128, 512, 512), (8, 64, 256, 256)]
IMAGES = [(16, 8, 1024, 1024), (1, 80, 1024, 1024)]
MODELS = [(256, 2, 56, 56), (256, 2, 28, 28), (256, 2, 14, 14), (256, 2, 7, 7), (32, 64, 64, 64)]
WIDE, NARROW = torch.float32, torch.bfloat16
BOTH = ("forward", "backward")


def line_scan() -> Iterator[Case]:
    """One direction at a time, all four, the large sizes of the table of GSPN-1."""
    for size in LARGE:
        for dtype in (WIDE, NARROW):
            for taps in ("per-channel", "shared"):
                for direction in DIRECTIONS:
                    share = 0.88 if taps == "shared" else 0.95 if direction in ("down", "up") else 0.92
                    target = {"forward": Target("share", share)}
                    yield Case(size, dtype, taps, (direction,), scan=True, targets=target)


def gspn1() -> Iterator[Case]:
    """The problems of the table of GSPN-1, which scans to the right, and the same scanned down."""
    for row, (size, *_) in enumerate(GSPN1["rows"]):
        for dtype in (NARROW, WIDE):
            for direction in ("down", "right"):
                first = row == 0 and dtype == NARROW
                factors = dict(zip(BOTH, (85, 95) if first else (20, 20), strict=True))
                targets = {which: Target("factor", factor) for which, factor in factors.items()}
                yield Case(
                    tuple(size), dtype, "per-channel", (direction,), scan=True, passes=BOTH, targets=targets,
                    gspn1=row,
                )  # fmt: skip


def propagate() -> Iterator[Case]:
    """Four directions at once, large images, both layouts."""
    for size in IMAGES:
        for layout in (PLANES, PIXELS):
            for taps in ("shared", "per-channel"):
                for scaled in (True, False):
                    shares = (0.70, 0.60) if taps == "shared" else (0.80, 0.70)
                    targets = {w: Target("share", s) for w, s in zip(BOTH, shares, strict=True)}
                    yield Case(
                        size, NARROW, taps, DIRECTIONS, layout, scaled=scaled, passes=BOTH, targets=targets
                    )


def few_planes() -> Iterator[Case]:
    """Too few planes for bandwidth to matter: time for each line."""
    for size, most in (((1, 8, 1024, 1024), 100), ((1, 32, 128, 128), 12), ((1, 32, 64, 64), 7)):
        for dtype in (NARROW, WIDE):
            for direction in ("down", "right"):
                target = {"forward": Target("us", most)}
                yield Case(size, dtype, "per-channel", (direction,), scan=True, passes=BOTH, targets=target)
    for layout in (PLANES, PIXELS):
        for dtype in (NARROW, WIDE):
            yield Case(
                (1, 8, 64, 64), dtype, "shared", DIRECTIONS, layout, scaled=True, passes=BOTH,
                targets={"forward": Target("us", 10)},
            )  # fmt: skip


def models() -> Iterator[Case]:
    """What the mixers of a backbone ask for."""
    targets = {which: Target("over_floor", 1.5) for which in BOTH}
    for size in MODELS:
        yield Case(size, NARROW, "shared", DIRECTIONS, PIXELS, scaled=True, passes=BOTH, targets=targets)


SECTIONS: dict[str, Callable[[], Iterator[Case]]] = {
    "line_scan": line_scan,
    "gspn1": gspn1,
    "propagate": propagate,
    "few_planes": few_planes,
    "models": models,
}


def shrunk(case: Case) -> Case:
    """The same on a few pixels, for a try without a GPU."""
    batch, channels, height, width = case.size
    return replace(case, size=(min(batch, 2), min(channels, 4), min(height, 20), min(width, 24)))
