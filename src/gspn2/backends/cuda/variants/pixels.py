"""Channels adjacent in memory: channels_last, and views into one packed (B, H, W, P) tensor.

A block scans a run of places of a line, some vectors of channels wide; both axes are coalesced as they are.
The kernels say how (`kernels/pixels*.cu`); here it is decided who does what:

- **roles**: with both directions of an axis, two blocks start at opposite ends and meet in the middle; with
  few blocks both axes run at the same time (four roles).
- **splits**: a line's places over several blocks, which recompute a halo of places on either side and
  exchange states every so many lines.

Both need clusters; a GPU without them runs the directions one after another, a block for each channel block.
"""

from __future__ import annotations

from ..geometry import Case, Kernel, Plan
from . import pixels_backward, pixels_forward
from .pixels_layout import operands, own_taps, taps_adjacent, vector_of


def why_not(case: Case) -> str | None:
    """Channels must be adjacent, in vectors of at least 4 bytes; a line must fit the threads of a block."""
    problem = case.problem
    if problem.channels == 1:
        return "one channel has nothing adjacent to it: planes are read line by line"
    for name in operands(case):
        if case.views[name].c != 1:
            return f"{name}: channels are not adjacent in memory (stride {case.views[name].c})"
    if own_taps(case) and not taps_adjacent(case):
        return "taps: neither the three of a channel nor the channels of a tap are adjacent in memory"
    if vector_of(case) is None:
        return "channels do not come in vectors of 4 bytes: an odd number, stride or address"
    tiling = (pixels_backward if case.backward else pixels_forward).tiling_of(case)
    if tiling is None:
        return f"a line of {max(problem.height, problem.width)} places is too long for a block's threads"
    return None


def plan(case: Case) -> Plan:
    """Launches, and why they are as they are."""
    which = pixels_backward if case.backward else pixels_forward
    tiling = which.tiling_of(case)
    assert tiling is not None
    return which.plan(case, tiling)


def representative_kernels() -> list[tuple[Kernel, bool]]:
    """Kernels that the tests compile, and whether each is hot (must not spill)."""
    return [*pixels_forward.representative_kernels(), *pixels_backward.representative_kernels()]
