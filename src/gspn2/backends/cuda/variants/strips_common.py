"""What `strips`, `strips_vertical` and `strips_column` can run, whether others are faster or not."""

from __future__ import annotations

from ..geometry import Case
from .planes_layout import VECTOR_BYTES, alignment_of


def cannot(case: Case, capability: tuple[int, int], directions: tuple[str, str]) -> str | None:
    """Forward: one direction of these two, given weights, no gate, rows aligned to vectors; else a reason."""
    if case.device.capability < capability:
        return "it needs compute capability {}.{}".format(*capability)
    if case.backward:
        return "it has no backward"
    problem = case.problem
    if problem.normalize or len(problem.directions) > 1 or problem.directions[0] not in directions:
        return f"it scans one direction, {' or '.join(directions)}, with weights as given"
    if "gate" in case.views:
        return "it has no gate"
    for name, view in case.views.items():
        if view.w != 1:
            return f"columns of {name} are {view.w} elements apart, not adjacent"
    if alignment_of(case) < VECTOR_BYTES or problem.width * case.itemsize % VECTOR_BYTES:
        return f"rows do not start and end at multiples of {VECTOR_BYTES} bytes"
    return None
