"""The problems that `gpu.py` times: sizes, layouts, inputs, bytes, targets, and the check before timing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch

from gspn2.backends import DIRECTIONS
from gspn2.bench.baseline import TABLE
from gspn2.bench.check import Wrong
from gspn2.bench.operator import PIXELS, PLANES, Operands, Scan, check, make_inputs, operator_calls

__all__ = ["PIXELS", "PLANES", "Operands", "Wrong", "check", "make_inputs", "operator_calls"]

GSPN1 = json.loads(TABLE.read_text(encoding="utf-8"))
FLOOR_US = 6
"""No launch that does anything is expected to be faster; microseconds."""


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
class Case(Scan):
    """One problem, with what is asked of it.

    Args:
        targets: by pass.
        gspn1: row in the table of GSPN-1's times.
    """

    targets: dict[str, Target] = field(default_factory=dict)
    gspn1: int | None = None


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
            # Beside what it costs to compute the states again; without a target.
            yield Case(size, NARROW, "shared", DIRECTIONS, layout, scaled=True, passes=BOTH, kept=True)


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
