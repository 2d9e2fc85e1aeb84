"""Planes: columns are adjacent in memory, the layout of plain contiguous tensors.

A block, or a cluster of blocks that share its lines, scans a plane in one direction after another. How lines
are cut over blocks and warps, and when these exchange their states: `kernels/planes.cuh`.
"""

from __future__ import annotations

from ..geometry import Case, Kernel, Launch, Plan
from . import planes_backward
from .planes_layout import LANES, Layout, alignment_of, best_layout, up


def why_not(case: Case) -> str | None:
    """It needs rows of adjacent elements, aligned to 4 bytes, and lines that a cluster can hold."""
    if case.backward:
        return planes_backward.why_not(case)
    for name, view in case.views.items():
        if view.w != 1 and case.problem.width > 1:
            return f"columns of {name} are {view.w} elements apart, not adjacent"
    if alignment_of(case) < 4:
        return "rows do not start at multiples of 4 bytes"
    if best_layout(case) is None:
        return (
            f"lines of {max(case.problem.height, case.problem.width)} places do not fit "
            f"{case.device.shared_memory} bytes of shared memory"
        )
    return None


def plan(case: Case) -> Plan:
    """A cluster of blocks for each plane, or one block for each."""
    if case.backward:
        return planes_backward.plan(case)
    layout = best_layout(case)
    assert layout is not None
    return plan_of(layout)


def representative_kernels() -> list[tuple[Kernel, bool]]:
    """Kernels that the tests compile, and whether each is hot (must not spill)."""
    kernels: list[tuple[Kernel, bool]] = list(planes_backward.representative_kernels())
    for storage, each in ((1, 8), (0, 4)):
        plain: tuple[tuple[str, int], ...] = (
            ("STORAGE", storage),
            ("HAS_LAM", 1),
            ("STAGES", 3),
            ("CLUSTER", 0),
            ("RAGGED", 0),
        )
        plain += (("ALIGNMENT", 16), ("BLOCKS", 1), ("BULK", 0), ("SPAN", 64))
        scan = (("NORMALIZE", 0), ("HAS_GATE", 0), ("SUMS", 0), ("THREADS", 512))
        four = (("NORMALIZE", 1), ("HAS_GATE", 1), ("SUMS", 1), ("THREADS", 256))
        kernels += [
            (_kernel((*plain, *scan, ("VERTICAL", each), ("HORIZONTAL", 0))), True),
            (_kernel((*plain, *scan, ("VERTICAL", 0), ("HORIZONTAL", 2))), True),
            (_kernel((*plain, *four, ("VERTICAL", each), ("HORIZONTAL", 2))), True),
        ]
    return kernels


def plan_of(layout: Layout) -> Plan:
    """The plan of a way of cutting."""
    facts, problem = layout.facts, layout.facts.problem
    vertical, horizontal = layout.vertical, layout.horizontal
    ragged = any(
        places % cut.each
        for places, cut in ((problem.width, vertical), (problem.height, horizontal))
        if cut is not None
    )
    kernel = _kernel(
        (
            *facts.options,
            ("THREADS", layout.threads),
            ("BLOCKS", layout.resident),
            ("STAGES", layout.stages),
            ("SUMS", int(facts.sums)),
            ("CLUSTER", int(layout.blocks > 1)),
            ("RAGGED", int(ragged)),
            ("ALIGNMENT", facts.alignment),
            ("VERTICAL", vertical.each if vertical else 0),
            ("HORIZONTAL", horizontal.each if horizontal else 0),
            ("BULK", int(layout.bulk)),
            ("SPAN", layout.span),
        )
    )
    knobs = (
        layout.blocks,
        layout.channels,
        layout.warps // layout.channels,
        facts.segments,
        facts.segment,
        *(vertical.knobs if vertical else (0,) * 6),
        *(horizontal.knobs if horizontal else (0,) * 6),
    )
    launch = Launch(
        kernel, layout.grid, LANES * layout.warps, layout.shared, cluster=layout.blocks, knobs=knobs
    )
    elements = problem.batch * problem.channels * problem.height * up(problem.width, 4)
    scratch = 4 * elements if facts.sums and facts.itemsize < 4 else 0
    return Plan("planes", (launch,), (scratch,), _reasons(layout))


def _reasons(layout: Layout) -> tuple[str, ...]:
    shared = "a block" if layout.blocks == 1 else f"{layout.blocks} blocks"
    return (
        "rows are contiguous",
        f"{shared} for the lines of {layout.channels} planes, {layout.warps} warps each",
        f"{layout.stages} stages in {layout.shared} bytes of shared memory",
    )


def _kernel(defines: tuple[tuple[str, int], ...]) -> Kernel:
    return Kernel("planes_forward.cu", "planes_forward", defines)
