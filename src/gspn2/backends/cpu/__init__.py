"""The native CPU backend: vectorised, threaded kernels that Numba compiles at first use.

All four directions in one call, forward and backward, any strides; no compiler on the user's machine. How
it works, and why Numba: `docs/cpu.md`.
"""

from __future__ import annotations

from importlib.util import find_spec

from torch import Tensor

from ..keeping import states_of
from ..problem import Problem
from ..reference import Gradients

_HAS_NUMBA = find_spec("numba") is not None


def why_not(problem: Problem) -> str | None:
    """Why this backend declines the problem, or None."""
    if problem.device != "cpu":
        return f"it runs on the CPU, and the tensors are on {problem.device}"
    if not _HAS_NUMBA:
        return "it needs Numba, which is not installed (pip install numba)"
    return None


def propagate(x: Tensor, taps: Tensor, lam: Tensor | None, gate: Tensor | None, problem: Problem) -> Tensor:
    """As `reference.propagate`."""
    # Numba takes a good part of a second to import; whoever never runs a kernel never waits for it.
    from . import launch

    return launch.propagate(x, taps, lam, gate, problem)


def propagate_keeping(
    x: Tensor, taps: Tensor, lam: Tensor | None, gate: Tensor | None, problem: Problem
) -> tuple[Tensor, Tensor]:
    """As `reference.propagate_keeping`; y is that of `propagate`, and nothing is faster for it."""
    return propagate(x, taps, lam, gate, problem), states_of(propagate, x, taps, lam, problem)


def propagate_backward(
    dy: Tensor,
    x: Tensor,
    taps: Tensor,
    lam: Tensor | None,
    gate: Tensor | None,
    problem: Problem,
    needs: tuple[bool, bool, bool, bool],
    hidden: Tensor | None = None,
) -> Gradients:
    """As `reference.propagate_backward`."""
    from . import launch

    return launch.propagate_backward(dy, x, taps, lam, gate, problem, needs)
