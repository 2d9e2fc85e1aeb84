"""States that forward leaves for backward: the memory they take, and how they are found one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

from torch import Tensor

from .problem import Problem

Propagate = Callable[[Tensor, Tensor, Tensor | None, Tensor | None, Problem], Tensor]


def empty_states(x: Tensor, directions: int) -> Tensor:
    """Memory for the states of so many directions, (B, D, C, H, W), dense, for x (B, C, H, W).

    As planes; or with the channels of a pixel adjacent, if x has them so.
    """
    batch, channels, height, width = x.shape
    if channels > 1 and x.stride(1) == 1 and x.stride(3) != 1:
        return x.new_empty((batch, directions, height, width, channels)).permute(0, 1, 4, 2, 3)
    return x.new_empty((batch, directions, channels, height, width))


@lru_cache(maxsize=1024)
def one_direction(problem: Problem, index: int) -> Problem:
    """The scan with this index alone: equal problems are one object, as the operator's own are."""
    return replace(problem, directions=problem.directions[index : index + 1])


def states_of(propagate: Propagate, x: Tensor, taps: Tensor, lam: Tensor | None, problem: Problem) -> Tensor:
    """h (B, D, C, H, W), rounded to storage, by a backend's `propagate`: a single scan without gate is h."""
    h = empty_states(x, len(problem.directions))
    for d in range(len(problem.directions)):
        lam_d = None if lam is None else lam[:, d : d + 1]
        h[:, d] = propagate(x, taps[:, d : d + 1], lam_d, None, one_direction(problem, d))
    return h
