"""Learning rates: each family takes the best of the same few, found in the same way."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import UserError
from .plan import Run

RATES = (5e-4, 1e-3, 2e-3)
Choice = dict[tuple[str, str], float]
"""Learning rate by task and family."""
Result = dict[str, Any]


def check(rates: Sequence[float]) -> None:
    """A UserError unless there are rates to choose from, all positive, none twice."""
    if not rates or len(set(rates)) != len(rates) or not all(rate > 0 for rate in rates):
        raise UserError(f"lr: expected at least one, above 0 and none twice, got {list(rates)}")


def trials(runs: Iterable[Run], rates: Sequence[float]) -> list[Run]:
    """What has to be trained for the choice: each task and family at every rate, once.

    The family's own model at the smallest size and with the first seed of those in `runs`; an ablation takes
    what suits GSPN-2. None where there is one rate.
    """
    check(rates)
    if len(rates) == 1:
        return []
    first: dict[tuple[str, str], Run] = {}
    for run in runs:
        key = run.task, run.family
        if key not in first or run.size < first[key].size:
            first[key] = run
    return [
        dataclasses.replace(run, contender=run.family, lr=rate) for run in first.values() for rate in rates
    ]


def choose(results: Iterable[Result]) -> Choice:
    """For each task and family the rate with the highest validation accuracy; of equal ones the lower loss.

    Of results of the family's own model at the smallest size, with the seed that most rates were tried with;
    a run that diverged is never chosen, unless there is no other.
    """
    return {key: max(found, key=_merit)["run"]["lr"] for key, found in _tried(results).items()}


def trial(results: Iterable[Result], task: str, family: str, rate: float) -> Result | None:
    """The result that `choose` has looked at; None where the rate was not tried."""
    found = _tried(results).get((task, family), [])
    return next((result for result in found if result["run"]["lr"] == rate), None)


def _tried(results: Iterable[Result]) -> dict[tuple[str, str], list[Result]]:
    tried: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        run = Run(**result["run"])
        if run.contender == run.family:
            tried.setdefault((run.task, run.family), []).append(result)
    return {key: _comparable(found) for key, found in tried.items()}


def _comparable(results: Sequence[Result]) -> list[Result]:
    groups: dict[tuple[int, int], list[Result]] = {}
    for result in results:
        groups.setdefault((result["run"]["size"], result["run"]["seed"]), []).append(result)
    size = min(size for size, _ in groups)
    return max((found for (of, _), found in groups.items() if of == size), key=len)


def _merit(result: Result) -> tuple[float, float]:
    validation = result.get("validation")
    return (-1.0, 0.0) if validation is None else (validation["accuracy"], -validation["loss"])


def settle(runs: Iterable[Run], choice: Choice) -> list[Run]:
    """The runs at the rates that were chosen for their families."""
    return [dataclasses.replace(run, lr=choice[run.task, run.family]) for run in runs]
