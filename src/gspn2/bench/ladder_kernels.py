"""Plans of the ladder's rungs between the baseline and the shipped kernels (`kernels/ladder.cu`)."""

from __future__ import annotations

from ..backends import Problem
from ..backends.cuda.geometry import Launch, Plan
from .launches import kernel

MOST_THREADS = 1024
PLANES = 2
"""Planes of a 2D block."""


def fused(problem: Problem) -> Plan:
    """One launch; states in memory. Coalesced where the direction is "down"."""
    threads = _threads(problem)
    what = kernel("ladder.cu", "ladder_fused", problem.dtype, THREADS=threads)
    return Plan("fused", (Launch(what, problem.batch * problem.channels, threads, 0),))


def onchip(problem: Problem) -> Plan:
    """As `fused`, with the states of the line before in shared memory."""
    threads = _threads(problem)
    what = kernel("ladder.cu", "ladder_onchip", problem.dtype, THREADS=threads)
    shared = 2 * 4 * _places(problem)
    return Plan("onchip", (Launch(what, problem.batch * problem.channels, threads, shared),))


def blocks(problem: Problem) -> Plan:
    """2D blocks of places by planes; "down" only, with lines of a multiple of 16 bytes.

    Raises:
        ValueError: the kernel does not take the problem.
    """
    adjacent = 16 // problem.dtype.itemsize
    across = -(-problem.width // (32 * adjacent)) * 32
    planes = PLANES if problem.batch * problem.channels % PLANES == 0 else 1
    if problem.directions != ("down",) or problem.width % adjacent or across * planes > MOST_THREADS:
        raise ValueError(f"blocks: expected lines down of a multiple of 16 bytes, got {problem}")
    macros = {"THREADS": across * planes, "PLANES": planes}
    what = kernel("ladder.cu", "ladder_blocks", problem.dtype, **macros)
    grid = problem.batch * problem.channels // planes
    shared = 2 * planes * (across // 32) * 2 * 4
    return Plan("blocks", (Launch(what, grid, across * planes, shared, knobs=(across,)),))


def project(problem: Problem, channels_in: int, channels_out: int) -> Plan:
    """y = matrix x over channels: x (B, in, H, W), lam holds the matrix (1, 1, out, in), y (B, out, H, W)."""
    threads = 256
    macros = {"THREADS": threads, "CHANNELS_IN": channels_in, "CHANNELS_OUT": channels_out}
    what = kernel("ladder.cu", "ladder_project", problem.dtype, **macros)
    items = problem.batch * problem.height * problem.width * problem.dtype.itemsize // 16
    return Plan("project", (Launch(what, -(-items // threads), threads, 0),))


def _places(problem: Problem) -> int:
    """Of a line of the problem's one direction."""
    return problem.width if problem.directions[0] in ("down", "up") else problem.height


def _threads(problem: Problem) -> int:
    return min(MOST_THREADS, -(-_places(problem) // 32) * 32)
