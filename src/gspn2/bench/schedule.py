"""Which case comes next, and whether it can still end in time."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from .case import Case

MOST_PACE = 2.0
"""A machine is taken to be at most so much slower than the cases expect."""


def ordered(cases: Sequence[Case]) -> list[Case]:
    """Cases in the order in which they run.

    First what each part is known for, last what can be left out. Within these, the next case is the next one
    of the part that has had the least time so far: wherever a run ends, no part was forgotten for another.
    """
    planned = dict.fromkeys((case.bench for case in cases), 0.0)
    found = []
    for turn in sorted({case.turn for case in cases}):
        waiting = {name: [it for it in cases if (it.bench, it.turn) == (name, turn)] for name in planned}
        while any(waiting.values()):
            name = min((it for it in waiting if waiting[it]), key=planned.__getitem__)
            case = waiting[name].pop(0)
            planned[name] += case.seconds
            found.append(case)
    return found


class Clock:
    """The time of a run.

    Args:
        minutes: of the run, or None for no limit.
        began: `time.monotonic` at its start.
    """

    def __init__(self, minutes: float | None, began: float) -> None:
        self.minutes, self.began = minutes, began
        self._expected = self._taken = 0.0

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.began

    @property
    def pace(self) -> float:
        """By how much this machine is slower than expected, from what has run; never below 1."""
        return min(MOST_PACE, max(1.0, self._taken / self._expected)) if self._expected else 1.0

    def took(self, case: Case, seconds: float) -> None:
        """A case has ended. One of the host is no measure of a GPU's."""
        if not case.host:
            self._expected += case.seconds
            self._taken += seconds

    def has_room(self, case: Case) -> bool:
        """Can the case still end in time?"""
        return self.minutes is None or self.seconds + self.pace * case.seconds <= 60 * self.minutes


def left_out(keys: Iterable[str], command: str, out: str = "") -> str:
    """What there was no time for, and how to get it, or "".

    Args:
        keys: of the cases.
        command: of the run, as it is shown.
        out: folder of its results, quoted for a shell.
    """
    found = list(keys)
    if not found:
        return ""
    cases = "1 case was" if len(found) == 1 else f"{len(found)} cases were"
    where = f" --out {out}" if out else ""
    return f"{cases} left out because time was up; {command} --resume{where} goes on with them"
