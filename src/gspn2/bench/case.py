"""What the bench is made of: cases, their contenders, and the table of all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from .measure import Work


class Absent(Exception):
    """A contender cannot take part here; the message says why, in words for the report."""


@dataclass
class Pass:
    """One pass of a contender, ready to be checked and timed.

    Args:
        work: the timed call.
        check: finds the result right or raises `check.Wrong`; relative errors by name. Runs first.
        bytes: the least that has to move: every input read once, every output written once.
        flops: floating-point operations.
        facts: more about it for the results: plans, peak memory, images.
    """

    work: Work
    check: Callable[[], dict[str, float]]
    bytes: int
    flops: int
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Contender:
    """One way to do what a case asks for.

    Args:
        name: in the table.
        make: its passes by name ("forward", "backward", "train" ...). Raises `Absent`.
    """

    name: str
    make: Callable[[], dict[str, Pass]]


@dataclass(frozen=True)
class Case:
    """A problem and those who compete on it.

    Args:
        bench: the part of the bench that it belongs to.
        name: unique in there.
        facts: sizes and what else defines the problem, for the results.
        contenders: made when the case is run; memory is allocated then.
        first: what its part is known for: measured before everything else.
        extra: can be left out when time is short.
        rounds: samples of each number, or None for the run's.
        seconds: about what it takes on an H200: a run with a limit does not begin what it cannot end.
        host: measured on the CPU, whatever the run's device is.
        compiled: its contenders go through torch.compile, which takes them long enough to be done ahead.
        derive: contenders' rows that follow from the measured ones, which it is given.
    """

    bench: str
    name: str
    facts: dict[str, Any]
    contenders: Callable[[torch.device], list[Contender]]
    first: bool = False
    extra: bool = False
    rounds: int | None = None
    seconds: float = 10.0
    host: bool = False
    compiled: bool = False
    derive: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] = lambda rows: []

    @property
    def key(self) -> str:
        return f"{self.bench}: {self.name}"

    @property
    def turn(self) -> int:
        """0 for what comes first, 2 for what comes last."""
        return 0 if self.first else 2 if self.extra else 1


@dataclass(frozen=True)
class Part:
    """A part of the bench: `gspn2 bench NAME`.

    Args:
        name: on the command line.
        title: in the report.
        about: what is measured against what, in a sentence or two.
        cases: for a CUDA device, or the small ones for a CPU.
    """

    name: str
    title: str
    about: str
    cases: Callable[[torch.device], Iterator[Case]]


def parts() -> dict[str, Part]:
    """All parts, in the order in which they run."""
    from . import attention, cpu, ladder, models, sweep, t2i, throughput

    return {it.PART.name: it.PART for it in (ladder, throughput, sweep, cpu, attention, models, t2i)}
