"""Placeholder until the kernel lands."""

from ..problem import Problem


def why_not(problem: Problem) -> str | None:
    return "not built yet"
