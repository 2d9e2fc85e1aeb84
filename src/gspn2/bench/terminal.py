"""What a run shows: a table for every case as it ends, and below it, on a terminal, how far the run is."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .case import Case
from .results import Row, beats_floor
from .runner import Watcher

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

COLUMNS = ("", "pass", "ms", "spread", "GB/s", "of copy", "of floor", "faster")
COMPUTES = 200
"""Operations a byte from which on bandwidth says nothing about a pass."""


class Terminal(Watcher):
    """Use as a context so that the terminal is left as it was."""

    def __init__(self) -> None:
        self._live: Progress | None = None
        self._task: TaskID | None = None
        self._count = self._done = 0

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def planned(self, cases: Sequence[Case]) -> None:
        self._count = len(cases)
        self._live = _bar()
        if self._live is not None:
            self._task = self._live.add_task("", total=len(cases))
            self._live.start()

    def began(self, case: Case) -> None:
        self._update(case.key)

    def ended(self, row: Row) -> None:
        self._done += 1
        head = f"{row['bench']}: {row['case']}"
        self.say("")
        self.say(f"[{self._done}/{self._count}] {head}  ({row['seconds']:.1f} s)")
        for line in table(row):
            self.say(f"  {line}")
        self._update("")

    def skipped(self, case: Case, why: str) -> None:
        self._done += 1
        self.say(f"[{self._done}/{self._count}] {case.key}: not measured, {why}")
        self._update("")

    def say(self, text: str) -> None:
        """A line above the progress."""
        if self._live is not None:
            self._live.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def _update(self, text: str) -> None:
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=self._done, description=text)


def table(row: Row) -> list[str]:
    """A case's contenders as aligned lines; without a speed where the result is wrong."""
    if "failed" in row:
        return [f"FAILED: {row['failed']}"]
    contenders = row.get("contenders", [])
    first = first_times(contenders)
    lines = [list(COLUMNS)]
    notes = []
    for it in contenders:
        if "ms" in it:
            lines.append(cells(it, first))
            if beats_floor(it):
                notes.append(
                    f"{it['name']} {it['pass']}: faster than its floor, which is none: measured while slow?"
                )
        elif "absent" in it:
            notes.append(f"{it['name']}: {it['absent']}")
        else:
            notes.append(f"{it['name']} {it.get('pass', '')}: WRONG, no speed: {it.get('wrong')}")
    if len(lines) == 1:
        return notes
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    aligned = [
        "  ".join(cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(line, widths, strict=True)) for line in lines)
    ]
    return [line.rstrip() for line in aligned] + notes


Kind = tuple[str, str]
KINDS = ("sub-layer", "block")
"""What contenders of an attention case may be more than: these are compared among themselves."""


def first_times(contenders: Sequence[Row]) -> dict[Kind, float]:
    """By kind the time of the first contender, which the others are compared with."""
    first: dict[Kind, float] = {}
    for it in contenders:
        if "ms" in it:
            first.setdefault(_kind(it), it["ms"])
    return first


def _kind(it: Row) -> Kind:
    """Its pass, and how much of a network it is."""
    what = it["name"].rpartition(", ")[2]
    return it["pass"], what if what in KINDS else ""


def cells(it: Row, first: dict[Kind, float]) -> list[str]:
    """A timed pass by `COLUMNS`; without what was not counted.

    Args:
        it: of results.
        first: `first_times` of its case.
    """
    low, high = it["quartiles"]
    computes = it["flops"] > COMPUTES * it["bytes"]
    rival = first[_kind(it)]
    return [
        it["name"],
        it["pass"],
        milliseconds(it["ms"]),
        f"{50 * (high - low) / it['ms']:.1f}%",
        digits(it["gb_per_s"]) if it["bytes"] else "-",
        "-" if computes or not it["bytes"] else f"{100 * it['share']:.1f}%",
        share_of_floor(it),
        "" if rival == it["ms"] else f"{rival / it['ms']:.2f}x",
    ]


def share_of_floor(it: Row) -> str:
    """In percent; marked where the floor was beaten, and so is none."""
    if not it["over_floor"]:
        return "-"
    return f"{100 / it['over_floor']:.1f}%{'!' if beats_floor(it) else ''}"


def milliseconds(value: float) -> str:
    """Three digits at least."""
    digits = 4 if value < 0.1 else 3 if value < 10 else 2 if value < 100 else 1
    return f"{value:.{digits}f}"


def digits(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _bar() -> Any:
    """Progress on a terminal that rich can draw on; otherwise None."""
    if not sys.stdout.isatty():
        return None
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ModuleNotFoundError:
        return None
    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
        transient=True,
    )
