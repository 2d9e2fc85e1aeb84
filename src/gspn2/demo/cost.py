"""What propagation and attention cost on this machine as the image grows.

Both are measured alone, without projections, on operands laid out as a layer's one packed projection writes
them: the same width, the same pixels, one image. Contenders take turns within a round, so that a slow moment
of the machine falls on all of them; the figure is the median over rounds. No time is kept for a wrong result.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import propagate
from ..backends import DIRECTIONS, Problem, why_not

SIDES = (16, 32, 64, 96, 128, 192, 256, 512)
WIDTH = 64
"""Channels of the layer: attention has them as one head, propagation as channels."""
PROXY = 8
"""Channels after GSPN-2's compact proxy, C / 8 as in the paper's text-to-image models."""
TOLERANCE = 1e-4
"""Largest relative L2 error against the float64 reference at which a time is kept (float32 operands)."""


class WrongResultError(RuntimeError):
    """A contender's output disagrees with its reference, so its speed means nothing."""


@dataclass(frozen=True)
class Run:
    """One contender at one size: `call` is what is timed, `error` compares an output with the reference."""

    call: Callable[[], Tensor]
    error: Callable[[Tensor], float]


@dataclass(frozen=True)
class Contender:
    """Something that mixes an image of side x side pixels.

    Args:
        name: key in the results.
        label: for people.
        prepare: makes operands of a side.
        bytes: memory of operands and result, by side.
        growth: exponent of the pixels with which its time is expected to grow; only decides when to stop.
    """

    name: str
    label: str
    prepare: Callable[[int, torch.Generator], Run]
    bytes: Callable[[int], int]
    growth: float


@dataclass(frozen=True)
class Point:
    """Median time of one contender at one size, with the quartiles of its rounds and its relative error."""

    contender: str
    side: int
    seconds: float
    quartiles: tuple[float, float]
    rounds: int
    error: float


@dataclass
class Cost:
    """The measurement: points, why contenders stopped, and what it ran on."""

    points: list[Point] = field(default_factory=list)
    stopped: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    backend: str = ""
    declined: dict[str, str] = field(default_factory=dict)
    threads: int = 0
    seconds: float = 0.0

    def of(self, contender: str) -> list[Point]:
        """Points of one contender, by size."""
        return sorted((p for p in self.points if p.contender == contender), key=lambda p: p.side)

    def fitted(self, contender: str) -> list[Point]:
        """The points an exponent is fitted to: sides from 32 on, below which calls cost more than work."""
        points = self.of(contender)
        large = [p for p in points if p.side >= 32]
        return large if len(large) >= 2 else points

    def exponent(self, contender: str) -> float:
        """Slope of log time over log pixels by least squares; nan with fewer than two sizes."""
        points = self.fitted(contender)
        if len(points) < 2:
            return math.nan
        logs = [(math.log(p.side**2), math.log(p.seconds)) for p in points]
        return statistics.linear_regression([x for x, _ in logs], [y for _, y in logs]).slope

    def ratio(self, slow: str, fast: str) -> tuple[int, float]:
        """The largest side that both measured, and how many times longer `slow` takes there."""
        times = {p.side: p.seconds for p in self.of(fast)}
        both = [p for p in self.of(slow) if p.side in times]
        if not both:
            return 0, math.nan
        return both[-1].side, both[-1].seconds / times[both[-1].side]


def measure(
    sides: Sequence[int] = SIDES,
    *,
    contenders: Sequence[Contender] | None = None,
    seconds_per_side: float = 1.0,
    longest_call: float = 2.0,
    memory: int = 2 * 2**30,
    seed: int = 0,
    on_point: Callable[[Point], None] | None = None,
) -> Cost:
    """Median forward times of all contenders at all sizes, smallest first.

    Args:
        sides: image sides in pixels of the layer's grid (tokens along a side).
        contenders: what to measure; None for attention and propagation as described in the module.
        seconds_per_side: about how long to keep repeating at one size; at least 3 rounds, at most 30.
        longest_call: a contender stops before the size where one call is expected to take longer.
        memory: a contender stops before the size where operands and result take more bytes.
        seed: of the operands.
        on_point: called with each point as soon as it is known.

    Raises:
        WrongResultError: an output is wrong.
    """
    contenders = CONTENDERS if contenders is None else tuple(contenders)
    began = time.perf_counter()
    cost = Cost(labels={c.name: c.label for c in contenders}, threads=torch.get_num_threads())
    cost.backend, cost.declined = _backend()
    with torch.inference_mode():
        for side in sorted(sides):
            runs = {}
            for contender in contenders:
                reason = _why_stop(contender, side, cost, longest_call, memory)
                if reason is None:
                    runs[contender.name] = contender.prepare(side, torch.Generator().manual_seed(seed))
                else:
                    cost.stopped.setdefault(contender.name, reason)
            for point in _measure_side(side, runs, seconds_per_side):
                cost.points.append(point)
                if on_point is not None:
                    on_point(point)
    cost.seconds = time.perf_counter() - began
    return cost


def _why_stop(contender: Contender, side: int, cost: Cost, longest_call: float, memory: int) -> str | None:
    if contender.name in cost.stopped:
        return cost.stopped[contender.name]
    needed = contender.bytes(side)
    if needed > memory:
        return f"{side} x {side} needs {needed / 2**30:.1f} GiB, above the limit of {memory / 2**30:.1f} GiB"
    measured = cost.of(contender.name)
    if measured:
        expected = measured[-1].seconds * ((side / measured[-1].side) ** 2) ** contender.growth
        if expected > longest_call:
            return (
                f"one call at {side} x {side} would take about {expected:.1f} s,"
                f" above the limit of {longest_call:g} s"
            )
    return None


def _measure_side(side: int, runs: dict[str, Run], budget: float) -> list[Point]:
    errors = {}
    for name, run in runs.items():
        errors[name] = run.error(run.call())  # also the warm-up
        if not errors[name] <= TOLERANCE:
            raise WrongResultError(
                f"{name} at {side} x {side}: relative error {errors[name]:.1e} against the reference, "
                f"expected at most {TOLERANCE:.0e}; no time is reported for a wrong result"
            )
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + budget
    for done in range(30):
        if done >= 3 and time.perf_counter() > end:
            break
        for name, run in runs.items():
            began = time.perf_counter()
            run.call()
            times[name].append(time.perf_counter() - began)
    points = []
    for name, taken in times.items():
        low, median, high = statistics.quantiles(taken, n=4, method="inclusive")
        points.append(Point(name, side, median, (low, high), len(taken), errors[name]))
    return points


def _relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


def _propagation(channels: int) -> Callable[[int, torch.Generator], Run]:
    def prepare(side: int, generator: torch.Generator) -> Run:
        d = len(DIRECTIONS)
        sizes = (channels, d * 3, d * channels, d * channels)
        packed = torch.randn(1, side, side, sum(sizes), generator=generator)
        x, logits, lam, gate = (part.movedim(-1, 1) for part in packed.split(sizes, dim=-1))
        logits = logits.unflatten(1, (d, 1, 3))
        lam, gate = lam.unflatten(1, (d, channels)), gate.unflatten(1, (d, channels))

        def error(y: Tensor) -> float:
            # Two channels are enough: taps are shared, and the reference runs line by line.
            some = [0, channels - 1]
            operands = (x[:, some], logits, lam[:, :, some], gate[:, :, some])
            expected = propagate(*(t.double() for t in operands), backend="reference")
            return _relative_error(y[:, some], expected)

        return Run(lambda: propagate(x, logits, lam, gate), error)

    return prepare


def _propagation_bytes(channels: int) -> Callable[[int], int]:
    d = len(DIRECTIONS)
    return lambda side: 4 * side * side * (2 * channels + d * 3 + 2 * d * channels)


def _attention(side: int, generator: torch.Generator) -> Run:
    tokens = side * side
    packed = torch.randn(1, tokens, 3, 1, WIDTH, generator=generator)
    q, k, v = packed.permute(2, 0, 3, 1, 4)  # each (1, 1, N, WIDTH)

    def error(y: Tensor) -> float:
        # Some queries are enough: every one of them reads all keys and values.
        some = torch.linspace(0, tokens - 1, min(tokens, 64)).long()
        scores = q[:, :, some].double() @ k.double().transpose(-1, -2) / math.sqrt(WIDTH)
        return _relative_error(y[:, :, some], scores.softmax(-1) @ v.double())

    return Run(lambda: F.scaled_dot_product_attention(q, k, v), error)


def _backend() -> tuple[str, dict[str, str]]:
    """The backend that runs the measured problem, and why those before it in the table do not."""
    problem = Problem(DIRECTIONS, None, True, 1, WIDTH, 1, SIDES[0], SIDES[0], torch.float32, "cpu")
    reasons: dict[str, str | None] = why_not(problem)
    chosen = next(name for name, reason in reasons.items() if reason is None)
    return chosen, {name: reason for name, reason in reasons.items() if reason is not None}


CONTENDERS = (
    Contender(
        "attention", f"Attention (SDPA), {WIDTH} channels", _attention, lambda s: 16 * WIDTH * s * s, 2.0
    ),
    Contender(
        "propagation",
        f"Propagation, {WIDTH} channels",
        _propagation(WIDTH),
        _propagation_bytes(WIDTH),
        1.0,
    ),
    Contender(
        "proxy",
        f"Propagation, {PROXY} proxy channels",
        _propagation(PROXY),
        _propagation_bytes(PROXY),
        1.0,
    ),
)


def as_json(cost: Cost) -> dict[str, Any]:
    """Everything measured, as plain types."""
    points = [
        {
            "contender": p.contender,
            "side": p.side,
            "pixels": p.side**2,
            "median_s": p.seconds,
            "quartiles_s": list(p.quartiles),
            "rounds": p.rounds,
            "relative_error": p.error,
        }
        for p in cost.points
    ]
    return {
        "points": points,
        "exponents": {name: _finite(cost.exponent(name)) for name in cost.labels},
        "stopped": cost.stopped,
        "labels": cost.labels,
        "backend": cost.backend,
        "declined": cost.declined,
        "threads": cost.threads,
        "seconds": cost.seconds,
    }


def _finite(value: float) -> float | None:
    """JSON has no nan."""
    return value if math.isfinite(value) else None
