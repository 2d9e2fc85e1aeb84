"""The result file: JSON with a schema, written after every case, read back to resume, compare and report."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from .measure import rounded

SCHEMA = 1
"""Of the file. Raised when a reader of the old one would misread the new one."""

PLACES = ("device", "processor", "threads", "torch", "driver")
"""Of what a file says of its machine: where these differ, times tell of more than the code."""

MOST_TRIES = 2
"""After so many beginnings without an end a case is not begun again."""
MARK_BYTES = 2048
"""Of the file that tells what is under way: more than it ever needs, so that each mark covers the last."""
FLOOR_TOLERANCE = 0.03
"""By how much a time may be below its floor before that is remarked on."""

Row = dict[str, Any]


class ResultsError(Exception):
    """A result file that cannot be used; the message says why."""


class Foreign(ResultsError):
    """It was written by something else than the bench."""


class Results:
    """A run's result file.

    ::

        {"schema": 1, "machine": {...}, "run": {...}, "rates": {...}, "cases": [
            {"bench": ..., "case": ..., "facts": {...}, "commit": ..., "seconds": ...,
             "device": "cuda" or "cpu", "copy_gb_per_s": ..., "contenders": [
                {"name": ..., "pass": ..., "ms": ..., "quartiles": [...], "range": [...], "runs": ...,
                 "bytes": ..., "flops": ..., "gb_per_s": ..., "share": ..., "floor_ms": ...,
                 "error_of": {...}}
                or {"name": ..., "absent": why} or {"name": ..., "pass": ..., "wrong": why}]}
            or {..., "failed": why}]}
    """

    def __init__(self, path: Path, machine: dict[str, Any], run: dict[str, Any]) -> None:
        self.path = path
        self._seconds = 0.0
        self._tries: dict[tuple[str, str], int] = {}
        self.content: dict[str, Any] = {
            "schema": SCHEMA,
            "machine": machine,
            "run": {**run, "complete": False},
            "rates": {},
            "cases": [],
        }

    @property
    def rows(self) -> list[Row]:
        return self.content["cases"]

    def resume(self) -> str:
        """Take over what the file holds of the same commit and machine.

        A case that only began is measured again, in case the run was ended from outside; if that happens
        twice it is taken to have ended the process. Returns why cases are dropped, those of other commits
        and of other machines, or "".
        """
        if not self.path.exists():
            return ""
        old, here = load(self.path), self.content["machine"]
        if old["cases"] and (differ := differences(old["machine"], here)):
            return f"{_counted(len(old['cases']))} measured elsewhere ({differ}): not kept"
        for row in old["cases"]:
            if row.get("commit") != here["commit"]:
                continue
            tries = int(row.get("began", 0))
            if 0 < tries < MOST_TRIES:
                self._tries[row["bench"], row["case"]] = tries
                continue
            self.rows.append(_failed(row, self.path) if tries else row)
        if self.rows:
            self.content["rates"] = old["rates"]
            self._seconds = self._seconds_before(old["run"])
        dropped = sum(row.get("commit") != here["commit"] for row in old["cases"])
        return f"{_counted(dropped)} of another commit than {here['commit']}: not kept" if dropped else ""

    def _seconds_before(self, old: dict[str, Any]) -> float:
        """Of the runs that this one goes on with, from what the file says of the last."""
        if "began" in old and old["began"] == self.content["run"].get("began"):
            # A process of this very run, which has died: the run's clock has not stopped.
            return float(old["before"])
        return float(old.get("seconds") or sum(row.get("seconds", 0.0) for row in self.rows))

    def holds(self, bench: str, case: str) -> bool:
        """Has the case been run?"""
        return any(row["bench"] == bench and row["case"] == case for row in self.rows)

    def begin(self, bench: str, case: str, facts: dict[str, Any]) -> None:
        """Note that a case begins."""
        commit = self.content["machine"]["commit"]
        self.content["run"]["before"] = self._seconds
        tries = 1 + self._tries.get((bench, case), 0)
        self.rows.append({"bench": bench, "case": case, "facts": facts, "commit": commit, "began": tries})
        self.save()
        _mark(self.path).unlink(missing_ok=True)

    def mark(self, doing: str, lost: str | None = None) -> None:
        """Note what of the case is under way, in a file of its own: writing all results takes too long.

        Args:
            doing: for whoever finds that the process has ended.
            lost: the error with which the device was lost in it.
        """
        row = self.rows[-1]
        told = {"bench": row["bench"], "case": row["case"], "doing": doing, "lost": lost}
        with suppress(OSError):  # a full disk is no fault of the contender: saving the results tells of it
            # Before every sample, so it is written over what is there: to empty it first takes milliseconds.
            file = os.open(_mark(self.path), os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.write(file, json.dumps(told).ljust(MARK_BYTES).encode())
            finally:
                os.close(file)

    def forget(self) -> None:
        """The case that began was interrupted."""
        self.rows.pop()
        self.save()
        _mark(self.path).unlink(missing_ok=True)

    def end(self, found: Row) -> Row:
        """Put what was found in the place of what began; the row as it is written."""
        row = self.rows[-1]
        row.pop("began", None)
        row.update(rounded(found))
        self.save()
        return row

    def finish(self, order: Sequence[tuple[str, str]], seconds: float, left_out: Sequence[str]) -> None:
        """The run has ended.

        Args:
            order: parts and names of cases, as the file is to list them; others stay where they are.
            seconds: of this run; those of the runs that it goes on with are added.
            left_out: cases for which there was no time.
        """
        places = {key: i for i, key in enumerate(order)}
        self.rows.sort(key=lambda row: places.get((row["bench"], row["case"]), -1))
        told = {"seconds": self._seconds + seconds, "left_out": list(left_out), "complete": True}
        self.content["run"] |= rounded(told)
        for name in ("began", "before"):
            self.content["run"].pop(name, None)
        self.save()
        _mark(self.path).unlink(missing_ok=True)

    def save(self) -> None:
        """Write the file anew, as a whole."""
        _write(self.content, self.path)


def differences(before: dict[str, Any], after: dict[str, Any]) -> str:
    """How two machines differ, in words, or "". What could not be found out is no difference."""
    pairs = {name: (before.get(name), after.get(name)) for name in PLACES}
    return ", ".join(
        f"{name} {old} and {new}"
        for name, (old, new) in pairs.items()
        if old != new and "unknown" not in (old, new)
    )


def load(path: Path) -> dict[str, Any]:
    """A result file.

    Raises:
        ResultsError: it is missing, no JSON, no result file, of another schema, or parts of it are missing.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultsError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:  # no JSON, or no text
        raise ResultsError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or "schema" not in content:
        raise Foreign(f"{path}: expected a result file of gspn2 bench, which names its schema")
    if content["schema"] != SCHEMA:
        raise ResultsError(f"{path}: expected schema {SCHEMA}, got {content['schema']!r}; measure again")
    for flaw in _flaws(content):
        raise ResultsError(f"{path} is damaged: {flaw}")
    return content


def _flaws(content: dict[str, Any]) -> Iterator[str]:
    """What is not as `Results` describes it, in words."""
    parts = {"machine": dict, "run": dict, "rates": dict, "cases": list}
    yield from _lacks("the file", content, parts)
    for number, row in enumerate(content["cases"], 1):
        yield from _lacks(f"case {number}", row, {"bench": str, "case": str, "facts": dict})
        if "began" in row:
            continue
        name = f"{row['bench']}: {row['case']}"
        yield from _lacks(name, row, {"contenders": list})
        for it in row["contenders"]:
            yield from _lacks(f"a contender of {name}", it, {"name": str})
            if "ms" in it:
                yield from _lacks(
                    f"{it['name']} of {name}", it, {"pass": str, "ms": (int, float), "quartiles": list}
                )
            elif not {"absent", "wrong"} & set(it):
                yield f"{it['name']} of {name} has no time, and nothing says why"


def _lacks(what: str, found: Any, wanted: dict[str, Any]) -> Iterator[str]:
    if not isinstance(found, dict):
        yield f"{what} is {found!r:.60}, expected an object"
        return
    for name, kind in wanted.items():
        if not isinstance(found.get(name), kind):
            yield f"{name!r} of {what} is {found.get(name)!r:.60}, expected {_KINDS[kind]}"


_KINDS: dict[Any, str] = {
    dict: "an object",
    list: "an array",
    str: "a string",
    (int, float): "a number",
}
"""As JSON calls them."""


def give_up(path: Path) -> list[str]:
    """The case that began in this file has ended its process: no other is to try it again.

    Returns the case and what it was doing, in words; nothing if none had begun.
    """
    content = load(path)
    given_up = [i for i, row in enumerate(content["cases"]) if "began" in row]
    for i in given_up:
        content["cases"][i] = _failed(content["cases"][i], path)
    _write(content, path)
    rows = [content["cases"][i] for i in given_up]
    return [f"{row['bench']}: {row['case']}: {row['failed']}" for row in rows]


def _counted(cases: int) -> str:
    return "1 case" if cases == 1 else f"{cases} cases"


def _failed(row: Row, path: Path) -> Row:
    """A case that began and did not end, with what the mark beside the results says that it was doing."""
    found = {key: value for key, value in row.items() if key != "began"}
    try:
        mark = json.loads(_mark(path).read_text(encoding="utf-8"))
        known = (mark["bench"], mark["case"]) == (row["bench"], row["case"])
        doing, why = (mark["doing"], mark["lost"]) if known else ("", None)
    except (OSError, ValueError, KeyError, TypeError):  # there is none, or the process died while writing it
        doing, why = "", None
    failed = lost(doing, why) if why else f"hung, or ended the process{f', {doing}' if doing else ''}"
    return {**found, "failed": failed, "contenders": []}


def lost(doing: str, why: str) -> str:
    """That the device does not answer any more, in words: what was under way, and the error."""
    return f"the device was lost{f', {doing}' if doing else ''}: {why}"


def _mark(path: Path) -> Path:
    """The file beside the results that tells what is under way."""
    return path.with_suffix(".now")


def timed(row: Row) -> list[Row]:
    """The contenders of a case that have a time."""
    return [it for it in row.get("contenders", []) if "ms" in it]


def broken(row: Row) -> list[str]:
    """What is wrong with a case: its own failure, and wrong contenders. Absent ones are fine."""
    found = [row["failed"]] if "failed" in row else []
    wrong = [it for it in row.get("contenders", []) if "wrong" in it]
    found += [f"{it['name']}{' ' + it['pass'] if 'pass' in it else ''}: {it['wrong']}" for it in wrong]
    return found


def beats_floor(it: Row) -> bool:
    """Is a timed pass faster than anything should be, by more than clocks differ?"""
    return bool(it.get("over_floor")) and it["over_floor"] < 1 / (1 + FLOOR_TOLERANCE)


def beaten_floors(rows: Sequence[Row]) -> list[str]:
    """The passes that are faster than their floors."""
    return [
        f"{row['bench']}: {row['case']}: {it['name']}, {it['pass']} ({100 / it['over_floor']:.0f}%)"
        for row in rows
        for it in timed(row)
        if beats_floor(it)
    ]


def find(row: Row, name: str, which: str) -> Row | None:
    """A contender's timed pass."""
    return next((it for it in timed(row) if it["name"] == name and it["pass"] == which), None)


def _write(content: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(compact(content) + "\n", encoding="utf-8")
    os.replace(partial, path)


def compact(content: dict[str, Any]) -> str:
    """JSON with one line for a list of numbers or words."""
    text = json.dumps(content, indent=1)
    return re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text)
