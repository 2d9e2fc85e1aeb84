"""Running cases: check, then time in turn, then judge against copy bandwidth and matrix rate."""

from __future__ import annotations

import faulthandler
import gc
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .case import Absent, Case, Contender, Part, Pass
from .check import Wrong
from .measure import Work, bytes_per_ms, in_turn
from .rates import INTENSE, Probes, Rates, floor_ms, judge
from .results import Results, Row, lost
from .schedule import Clock, ordered

HANG_SECONDS = 240
"""A case that takes longer ends its process; the supervisor goes on with the next."""
LOST = 4
"""Exit code of a process whose device does not answer any more."""


@dataclass(frozen=True)
class Settings:
    """How a run measures.

    Args:
        device: where.
        rounds: samples of each number.
        seconds: for the samples of a case; then it stops at three. None for the device's usual.
        minutes: of the run; cases that would end later are left out. None for no limit.
    """

    device: torch.device
    rounds: int = 9
    seconds: float | None = None
    minutes: float | None = None


SECONDS = {"cuda": 3.0, "cpu": 1.0}
"""For the samples of a case, by device."""


class Watcher:
    """What a run tells while it goes on; this one says nothing."""

    def planned(self, cases: Sequence[Case]) -> None:
        """All cases of the run, in order."""

    def began(self, case: Case) -> None:
        """A case is being measured."""

    def ended(self, row: Row) -> None:
        """A case has been measured, or has failed."""

    def skipped(self, case: Case, why: str) -> None:
        """A case is not measured."""


class Runner:
    """Runs cases on one device.

    Args:
        settings: how.
        mark: told what is under way, and what ended it if the device was lost in it (`Results.mark`).
    """

    def __init__(
        self, settings: Settings, mark: Callable[[str, str | None], None] = lambda doing, lost: None
    ) -> None:
        self.settings = settings
        self.mark = mark
        self.doing = ""
        self.device = settings.device
        self.seconds = SECONDS[self.device.type] if settings.seconds is None else settings.seconds
        self.probes = Probes(self.device)
        torch.manual_seed(time.time_ns() % 2**32)

    def rates(self) -> Rates:
        """How fast this device copies, reads and multiplies, now."""
        return self.probes.start(max(5, self.settings.rounds), self.seconds, self._timing)

    def run(self, case: Case, rates: Rates) -> Row:
        """Measure a case; the rates are raised where it shows faster ones.

        Everything that goes wrong with one contender is told in its row, and the others go on.
        """
        found: list[Row] = []
        passes: dict[tuple[str, str], Pass] = {}
        self._now("listing its contenders")
        for contender in case.contenders(self.device):
            found += self._prepared(contender, passes)
        times = self._timed(passes, case.rounds or self.settings.rounds)
        self._now("judging its times")
        bandwidth = bytes_per_ms(times["copy"], self.device) if "copy" in times else None
        self.probes.note(times, rates)
        for row in found:
            key = (row["name"], row.get("pass", ""))
            if key not in passes:
                continue
            if isinstance(times[key], str):
                row["wrong"] = times[key]
                continue
            row |= self._judged(passes[key], times[key], bandwidth, rates)
        passes.clear()
        return {
            "device": self.device.type,
            "copy_gb_per_s": None if bandwidth is None else bandwidth / 1e6,
            # What follows from measured rows is what they are compared with: attention of large pictures.
            "contenders": case.derive(found) + found,
        }

    def _prepared(self, contender: Contender, passes: dict[tuple[str, str], Pass]) -> list[Row]:
        """Make and check the passes; those that are right go into `passes`."""
        rows: list[Row] = []
        self._now(f"making {contender.name}")
        try:
            made = contender.make()
            self._settle()
        except Absent as why:
            return [{"name": contender.name, "absent": str(why)}]
        except Exception as error:
            self._tell(error)
            return [{"name": contender.name, "wrong": first_line(error)}]
        for which, it in made.items():
            row: Row = {"name": contender.name, "pass": which}
            self._now(f"checking {contender.name}, {which}")
            try:
                row["error_of"] = it.check()
                self._settle()
            except Absent as why:
                row = {"name": contender.name, "pass": which, "absent": str(why)}
            except Exception as error:
                self._tell(error)
                row["wrong"] = first_line(error)
            else:
                passes[contender.name, which] = it
            rows.append(row)
        return rows

    def _timed(self, passes: dict[tuple[str, str], Pass], rounds: int) -> dict[Any, Any]:
        """Times in turn with the copy; for a pass that cannot be run with the others, why."""
        works: dict[Any, Work] = {key: it.work for key, it in passes.items()}
        if not works:
            return {}
        seconds = self.seconds
        computes = any(it.flops > INTENSE * it.bytes for it in passes.values())
        beside = self.probes.beside(computes)
        try:
            return in_turn({**beside, **works}, self.device, rounds, seconds, doing=self._timing)
        except Exception as error:
            self._tell(error)
        # One of them fails; each alone says which, at the price that they are not in turn.
        times: dict[Any, Any] = {}
        for key, work in works.items():
            try:
                times |= in_turn({**beside, key: work}, self.device, rounds, seconds, doing=self._timing)
            except Exception as error:
                self._tell(error)
                times[key] = first_line(error)
        return times

    def _judged(self, it: Pass, times: dict[str, Any], bandwidth: float | None, rates: Rates) -> Row:
        seconds = times["ms"] / 1e3
        copied = it.bytes / bandwidth if bandwidth else 0.0
        floor = floor_ms(it.bytes, it.flops, rates)
        cache = cache_bytes(self.device)
        return {
            **times,
            "bytes": it.bytes,
            "flops": it.flops,
            "gb_per_s": it.bytes / seconds / 1e9,
            "share": copied / times["ms"],
            "tflop_per_s": it.flops / seconds / 1e12,
            "floor_ms": floor,
            "over_floor": times["ms"] / floor if floor else None,
            **({"fits_in_cache": it.bytes <= cache} if cache else {}),
            **it.facts,
        }

    def _tell(self, error: Exception) -> None:
        """The traceback for whoever looks into it; a device that is lost ends the process."""
        if not isinstance(error, Wrong) and os.environ.get("GSPN2_BENCH_TRACEBACKS"):
            traceback.print_exception(error)
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                why = first_line(error)
                self.mark(self.doing, why)
                print(f"gspn2 bench: {lost(self.doing, why)}", file=sys.stderr, flush=True)
                os._exit(LOST)

    def _settle(self) -> None:
        """Wait for the device: what a contender has launched must not fail in the next one's name."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _now(self, doing: str) -> None:
        """What begins: if it ends the process, the next one knows what it was."""
        self.doing = doing
        self.mark(doing, None)

    def _timing(self, key: Any) -> None:
        """A contender's pass, or one of the probes beside it, is prepared or timed."""
        self._now(f"timing {key if isinstance(key, str) else ', '.join(map(str, key))}")

    def clear(self) -> None:
        """Give memory back between cases."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def run(cases: Sequence[Case], settings: Settings, results: Results, watcher: Watcher, began: float) -> None:
    """Run the cases that the results do not hold yet, in the order of `schedule.ordered`.

    Args:
        cases: as the results list them.
        settings: how.
        results: written after every case.
        watcher: told what goes on.
        began: `time.monotonic` at the start of the run, for the limit on its time.
    """
    order = ordered(cases)
    watcher.planned(order)
    runners: dict[str, Runner] = {}
    rates = results.content["rates"]
    clock = Clock(settings.minutes, began)
    left: list[str] = []
    for case in order:
        if results.holds(case.bench, case.name):
            watcher.skipped(case, "measured before")
            continue
        if not clock.has_room(case):
            left.append(case.key)
            watcher.skipped(case, f"{settings.minutes:g} minutes are not enough")
            continue
        results.begin(case.bench, case.name, case.facts)
        watcher.began(case)
        device = torch.device("cpu") if case.host else settings.device
        runner = runners.setdefault(device.type, Runner(replace(settings, device=device), results.mark))
        if device.type not in rates:
            rates[device.type] = runner.rates()
        try:
            row = results.end(_guarded(runner, case, rates[device.type]))
        except KeyboardInterrupt:
            results.forget()
            raise
        clock.took(case, row["seconds"])
        judge(results.rows, rates)
        watcher.ended(row)
        runner.clear()
    results.finish([(case.bench, case.name) for case in cases], seconds=clock.seconds, left_out=left)


def _guarded(runner: Runner, case: Case, rates: Rates) -> Row:
    """A case's row, also if it cannot be run at all."""
    begin = time.monotonic()
    if runner.device.type == "cuda":
        faulthandler.dump_traceback_later(max(HANG_SECONDS, 2 * case.seconds), exit=True)
    try:
        found = runner.run(case, rates)
    except Exception as error:
        runner._tell(error)
        found = {"failed": first_line(error), "contenders": []}
    finally:
        faulthandler.cancel_dump_traceback_later()
    return {**found, "seconds": time.monotonic() - begin}


def chosen(
    parts: dict[str, Part], names: Sequence[str], device: torch.device, only: Callable[[str], Any]
) -> Iterator[Case]:
    """The cases of the named parts whose key `only` lets through."""
    for name in names:
        for case in parts[name].cases(device):
            if only(case.key):
                yield case


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    return text if isinstance(error, Wrong) or not lines else f"{type(error).__name__}: {text}"[:300]


def cache_bytes(device: torch.device) -> int:
    """Of a GPU's second-level cache; 0 where it is not known."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).L2_cache_size
