"""Two result files side by side: what became slower, what faster, what is no longer right."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from .results import broken, differences, timed

Key = tuple[str, str, str, str]


@dataclass(frozen=True)
class Change:
    """One timed pass in both files.

    Args:
        key: part, case, contender, pass.
        before, after: milliseconds.
        noise: half the quartile distances of both, as a fraction: less than that is no change.
    """

    key: Key
    before: float
    after: float
    noise: float

    @property
    def ratio(self) -> float:
        return self.after / self.before


@dataclass(frozen=True)
class Comparison:
    """All that two files have to say about each other.

    Args:
        changes: passes that both have, slowest change first.
        lost: problems of the second file where the first had times.
        only_before, only_after: cases, and passes of cases that both have, that one file has times of.
        warning: why the two may not be comparable, or "".
    """

    changes: list[Change]
    lost: list[str]
    only_before: list[str]
    only_after: list[str]
    warning: str

    def slower(self, tolerance: float) -> list[Change]:
        return [it for it in self.changes if it.ratio > 1 + max(tolerance, it.noise)]

    def faster(self, tolerance: float) -> list[Change]:
        return [it for it in reversed(self.changes) if it.ratio < 1 - max(tolerance, it.noise)]


def compare(before: dict[str, Any], after: dict[str, Any]) -> Comparison:
    """Compare two contents of result files (`results.load`)."""
    old, new = _times(before), _times(after)
    changes = [
        Change(key, old[key]["ms"], new[key]["ms"], _noise(old[key]) + _noise(new[key]))
        for key in old
        if key in new
    ]
    return Comparison(
        sorted(changes, key=lambda it: -it.ratio),
        _lost(old, after),
        _missing(old, new, after),
        _missing(new, old, before),
        _warning(before["machine"], after["machine"]),
    )


def lines(it: Comparison, tolerance: float) -> list[str]:
    """The comparison for a terminal."""
    found = [f"note: {it.warning}"] if it.warning else []
    slower, faster = it.slower(tolerance), it.faster(tolerance)
    same = len(it.changes) - len(slower) - len(faster)
    found.append(
        f"{len(it.changes)} times in both: {len(slower)} slower, {len(faster)} faster, {same} within "
        f"{100 * tolerance:.0f}% or their own spread"
    )
    for title, changes in (("slower", slower), ("faster", faster)):
        for change in changes:
            what = f"{change.key[0]}: {change.key[1]}: {change.key[2]}, {change.key[3]}"
            found.append(
                f"{title}  {change.ratio:6.2f}x  {change.before:.4g} -> {change.after:.4g} ms  {what}"
            )
    found += [f"no longer right  {text}" for text in it.lost]
    for title, missing in (("only in the first", it.only_before), ("only in the second", it.only_after)):
        found += [f"{title}  {text}" for text in missing]
    return found


def _times(content: dict[str, Any]) -> dict[Key, dict[str, Any]]:
    return {
        (row["bench"], row["case"], it["name"], it["pass"]): it
        for row in content["cases"]
        for it in timed(row)
    }


def _lost(old: dict[Key, dict[str, Any]], after: dict[str, Any]) -> list[str]:
    """What had times in the first file, and has failed or is wrong in the second."""
    cases, names = {key[:2] for key in old}, {key[:3] for key in old}
    found = []
    for row in after["cases"]:
        key = (row["bench"], row["case"])
        if key in cases:
            # One that could not even be made has no pass.
            had = [
                it
                for it in row.get("contenders", [])
                if ((*key, it["name"], it["pass"]) in old if "pass" in it else (*key, it["name"]) in names)
            ]
            found += [f"{key[0]}: {key[1]}: {it}" for it in broken({**row, "contenders": had})]
    return found


def _missing(
    found: dict[Key, dict[str, Any]], other: dict[Key, dict[str, Any]], content: dict[str, Any]
) -> list[str]:
    """What only `found` has times of: whole cases, and single passes with why `content` has none of them."""
    there = {key[:2] for key in other}
    cases = Counter(f"{key[0]}: {key[1]}" for key in found if key[:2] not in there)
    why = {
        (row["bench"], row["case"], it["name"], it.get("pass")): it.get("absent") or it["wrong"]
        for row in content["cases"]
        for it in row.get("contenders", [])
        if "ms" not in it
    }
    passes = []
    for key in found:
        if key not in other and key[:2] in there:
            part, case, name, which = key
            # One that could not even be made has no pass.
            reason = why.get(key) or why.get((part, case, name, None), "no such pass")
            passes.append(f"{part}: {case}: {name}, {which}: {reason}")
    return [f"{case} ({count} times)" for case, count in cases.items()] + passes


def _noise(it: dict[str, Any]) -> float:
    low, high = it["quartiles"]
    return (high - low) / 2 / it["ms"]


def _warning(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Machines and versions that differ."""
    differ = differences(before, after)
    return f"the two differ in more than the code: {differ}" if differ else ""
