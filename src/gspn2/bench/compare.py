"""Two result files side by side: what became slower, what faster, what is no longer right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .results import broken, timed

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
        only_before, only_after: passes that one file has.
        warning: why the two may not be comparable, or "".
    """

    changes: list[Change]
    lost: list[str]
    only_before: list[Key]
    only_after: list[Key]
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
    had = {key[:2] for key in old}
    lost = [
        f"{row['bench']}: {row['case']}: {text}"
        for row in after["cases"]
        if (row["bench"], row["case"]) in had
        for text in broken(row)
    ]
    return Comparison(
        sorted(changes, key=lambda it: -it.ratio),
        lost,
        [key for key in old if key not in new],
        [key for key in new if key not in old],
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
    for title, keys in (("only in the first", it.only_before), ("only in the second", it.only_after)):
        if keys:
            found.append(f"{title}: {len(keys)}")
    return found


def _times(content: dict[str, Any]) -> dict[Key, dict[str, Any]]:
    return {
        (row["bench"], row["case"], it["name"], it["pass"]): it
        for row in content["cases"]
        for it in timed(row)
    }


def _noise(it: dict[str, Any]) -> float:
    low, high = it["quartiles"]
    return (high - low) / 2 / it["ms"]


def _warning(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Machines and versions that differ."""
    names = ("device", "processor", "threads", "torch", "driver")
    differ = [
        f"{name} {before.get(name)} and {after.get(name)}"
        for name in names
        if before.get(name) != after.get(name)
    ]
    return f"the two differ in more than the code: {', '.join(differ)}" if differ else ""
