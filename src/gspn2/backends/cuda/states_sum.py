"""y from the states that forward leaves for backward: the sum over directions of gate times h, one launch.

`launch.propagate_keeping` asks here; the states have been found by a scan for each direction.
"""

from __future__ import annotations

from dataclasses import replace

from ..keeping import one_direction
from .geometry import Case, Kernel, Launch, Plan, View, options

NAMES = ("x", "gate", "y")
"""Tensors of the launch: the states (B, D, C, H, W) go by the name of x."""

THREADS = 256

VECTORS = 4
"""Of a thread."""


def plan(case: Case) -> Plan:
    """As many elements at a time as all tensors allow, along channels if these are adjacent, else columns."""
    problem = case.problem
    states = case.views["x"]
    channels_fast = problem.channels > 1 and states.c < states.w
    fast = problem.channels if channels_fast else problem.width
    each = next(n for n in (16 // case.itemsize, 8 // case.itemsize, 1) if _takes(case, channels_fast, n))
    vectors = problem.batch * problem.channels * problem.height * problem.width // each
    kernel = Kernel(
        "states_sum.cu", "states_sum", (*options(case), ("SCANS", len(problem.directions)), ("EACH", each))
    )
    blocks = -(-vectors // (THREADS * VECTORS))
    launch = Launch(kernel, blocks, THREADS, 0, knobs=(int(channels_fast), fast // each))
    return Plan("states_sum", (launch,), (), (f"{each} elements at a time",))


def scans(case: Case, states: View) -> list[Case]:
    """The scans before it, one for each direction, for forward of `case` with states (B, D, C, H, W).

    What starts at a direction of its own is not aligned better than that direction is.
    """
    found = []
    for d in range(len(case.problem.directions)):
        inputs = {name: case.views[name] for name in ("x", "taps", "lam") if name in case.views}
        views = {name: _slice(view, d, case.itemsize) for name, view in (inputs | {"y": states}).items()}
        found.append(Case(one_direction(case.problem, d), case.device, views))
    return found


def _slice(view: View, d: int, itemsize: int) -> View:
    """Direction d of a tensor."""
    start = d * view.d * itemsize | 128
    return replace(view, d=0, alignment=min(view.alignment, start & -start))


def _takes(case: Case, channels_fast: bool, each: int) -> bool:
    """Do all tensors come in vectors of so many elements along the fast axis?"""
    problem = case.problem
    if each == 1:
        return True
    if (problem.channels if channels_fast else problem.width) % each:
        return False
    return all(_is_aligned(case, view, channels_fast, each) for view in case.views.values())


def _is_aligned(case: Case, view: View, channels_fast: bool, each: int) -> bool:
    problem = case.problem
    sizes = {"b": problem.batch, "d": len(problem.directions), "c": problem.channels}
    sizes |= {"h": problem.height, "w": problem.width}
    fast = "c" if channels_fast else "w"
    strides = [getattr(view, axis) for axis, size in sizes.items() if size > 1 and axis != fast]
    adjacent = getattr(view, fast) == 1
    aligned = view.alignment >= each * case.itemsize and not any(stride % each for stride in strides)
    return adjacent and aligned


def representative_kernels() -> list[tuple[Kernel, bool]]:
    """Kernels that the tests compile, and whether each is hot (must not spill)."""
    macros = (("NORMALIZE", 1), ("HAS_LAM", 0), ("HAS_GATE", 1), ("SCANS", 4))
    return [
        (Kernel("states_sum.cu", "states_sum", (("STORAGE", storage), *macros, ("EACH", each))), each > 1)
        for storage, each in ((1, 8), (0, 4), (2, 1))
    ]
