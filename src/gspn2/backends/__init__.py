"""One table of implementations, and the choice between them.

A backend is a module with four functions: `why_not(problem)`, a sentence saying why it declines a problem or
None, and `propagate`, `propagate_keeping` and `propagate_backward` with the signatures of `reference`. The
table is in order of preference.
"""

from __future__ import annotations

import warnings
from types import ModuleType

from . import cpu, cuda, reference
from .problem import DIRECTIONS, Problem, accumulation_dtype

BACKENDS: dict[str, ModuleType] = {"cuda": cuda, "cpu": cpu, "reference": reference}

_warned: set[str] = set()


def select(problem: Problem, name: str | None = None) -> ModuleType:
    """The backend called `name`, or the first that takes the problem.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: the backend asked for declines the problem; the message is its reason.
    """
    if name is not None:
        if name not in BACKENDS:
            raise ValueError(f"backend: expected one of {', '.join(BACKENDS)} or None, got {name!r}")
        reason = BACKENDS[name].why_not(problem)
        if reason is not None:
            raise RuntimeError(f"backend={name!r} cannot run this problem: {reason}")
        return BACKENDS[name]
    chosen = next(name for name, backend in BACKENDS.items() if backend.why_not(problem) is None)
    if chosen == "reference":
        _warn_slow(why_not(problem))
    return BACKENDS[chosen]


def why_not(problem: Problem) -> dict[str, str | None]:
    """For each backend the reason it declines the problem, or None."""
    return {name: backend.why_not(problem) for name, backend in BACKENDS.items()}


def _warn_slow(declined: dict[str, str | None]) -> None:
    """Say once for each set of reasons that the slow path was taken, and why."""
    reasons = "; ".join(f"{name}: {reason}" for name, reason in declined.items() if reason is not None)
    if reasons not in _warned:
        _warned.add(reasons)
        warnings.warn(f"gspn2 runs the slow reference implementation ({reasons})", UserWarning, stacklevel=3)


__all__ = ["BACKENDS", "DIRECTIONS", "Problem", "accumulation_dtype", "select", "why_not"]
