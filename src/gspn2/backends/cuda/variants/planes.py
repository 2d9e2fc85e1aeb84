"""Planes: columns are adjacent in memory, the layout of plain contiguous tensors.

A block, or a cluster of blocks that share its lines, scans a plane in one direction after another. How lines
are cut over blocks and warps, and when these exchange their states: `kernels/planes.cuh`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from ..geometry import Case, Kernel, Launch, Plan, View, options

LANES = 32
MOST_WARPS = 32
CLUSTER = 8
"""Blocks that may run as a cluster on every device that has clusters."""

STATES_ALIGNMENT = 128


@dataclass(frozen=True)
class Cut:
    """How the lines of vertical or of horizontal scans are cut; `Cut` and its macros in `kernels/planes.cuh`.

    Args:
        each: places of a thread.
        stage: lines that are in shared memory together.
        run: lines between exchanges of warps.
        own: places of a block.
        window: places of a warp.
        lanes: lanes that hold places beyond these, on either side.
        warps: of a channel.
        pitch: floats of a line of states.
        tile: bytes of one tensor's part of a stage, in its storage type.
    """

    each: int
    stage: int
    run: int
    own: int
    window: int
    lanes: int
    warps: int
    pitch: int
    tile: int

    @property
    def knobs(self) -> tuple[int, ...]:
        return (self.stage, self.run, self.own, self.window, self.lanes)


@dataclass(frozen=True)
class Layout:
    """A whole way of cutting: both orientations that the problem needs, and what they share."""

    blocks: int
    channels: int
    stages: int
    span: int
    vertical: Cut | None
    horizontal: Cut | None

    @property
    def cuts(self) -> tuple[Cut, ...]:
        return tuple(cut for cut in (self.vertical, self.horizontal) if cut is not None)

    @property
    def warps(self) -> int:
        return max(cut.warps for cut in self.cuts)

    @property
    def pitch(self) -> int:
        return max(cut.pitch for cut in self.cuts)


def why_not(case: Case) -> str | None:
    """It needs rows of adjacent elements, aligned to 4 bytes, and lines that a cluster can hold."""
    if case.backward:
        module = _backward()
        return "it has no backward" if module is None else module.why_not(case)
    reason = why_not_layout(case)
    if reason is not None:
        return reason
    if _layout(case) is None:
        return (
            f"lines of {max(case.problem.height, case.problem.width)} places do not fit "
            f"{case.device.shared_memory} bytes of shared memory"
        )
    return None


def plan(case: Case) -> Plan:
    """A cluster of blocks for each plane, or one block for each."""
    if case.backward:
        module = _backward()
        assert module is not None
        backward: Plan = module.plan(case)
        return backward
    layout = _layout(case)
    assert layout is not None
    return _plan(case, layout)


def representative_kernels() -> list[tuple[Kernel, bool]]:
    """Kernels that the tests compile, and whether each is hot (must not spill)."""
    module = _backward()
    kernels = [] if module is None else list(module.representative_kernels())
    for storage, each in ((1, 8), (0, 4)):
        plain = (("STORAGE", storage), ("HAS_LAM", 1), ("STAGES", 3), ("CLUSTER", 0), ("RAGGED", 0))
        scan = (("NORMALIZE", 0), ("HAS_GATE", 0), ("SUMS", 0), ("THREADS", 512))
        four = (("NORMALIZE", 1), ("HAS_GATE", 1), ("SUMS", 1), ("THREADS", 256))
        for more in (
            (*scan, ("VERTICAL", each), ("HORIZONTAL", 0)),
            (*scan, ("VERTICAL", 0), ("HORIZONTAL", 2)),
            (*four, ("VERTICAL", each), ("HORIZONTAL", 2)),
        ):
            kernels.append((_kernel((*plain, *more, ("ALIGNMENT", 16), ("SPAN", 64))), True))
    return kernels


def why_not_layout(case: Case) -> str | None:
    """Why tensors laid out like these are no planes, or None; also for backward."""
    for name, view in case.views.items():
        if view.w != 1 and case.problem.width > 1:
            return f"columns of {name} are {view.w} elements apart, not adjacent"
    if alignment_of(case) < 4:
        return "rows do not start at multiples of 4 bytes"
    return None


def alignment_of(case: Case) -> int:
    """The largest power of two, at most 16, that divides the address of every row, in bytes."""
    bits = 16
    for view in case.views.values():
        bits |= view.alignment
        for stride, size in _strides(view, case):
            if size > 1:
                bits |= stride * case.itemsize
    return bits & -bits


def _strides(view: View, case: Case) -> tuple[tuple[int, int], ...]:
    problem = case.problem
    # That of taps' groups is in c, of which there are no more than channels.
    return (
        (view.b, problem.batch),
        (view.d, len(problem.directions)),
        (view.c, problem.channels),
        (view.k, 3),
        (view.h, problem.height),
    )


def _backward() -> ModuleType | None:
    name = f"{__package__}.planes_backward"
    return None if find_spec(name) is None else import_module(name)


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def _cut(case: Case, vertical: bool, each: int, stage: int, run: int, blocks: int) -> Cut | None:
    """None where blocks would need more than their neighbours hold."""
    problem = case.problem
    places = problem.width if vertical else problem.height
    vector = 16 // case.itemsize
    unit = vector if vertical else each
    own = _up(-(-places // blocks), unit)
    beyond = stage if blocks > 1 else 0
    if blocks > 1 and (own < beyond or beyond % unit or own * (blocks - 1) >= places):
        return None
    strip = own + 2 * beyond
    if strip <= LANES * each:
        warps, lanes, window, run = 1, 0, LANES * each, stage
    else:
        lanes = -(-run // each)
        warps = -(-strip // ((LANES - 2 * lanes) * each))
        window = _up(-(-strip // warps), each)
    if vertical:
        tile = stage * _up(strip, vector) * case.itemsize
    else:
        tile = each * _up(-(-strip // each), 8) * stage * case.itemsize
    return Cut(each, stage, run, own, window, lanes, warps, _up(strip, 8) + 8, tile)


def _shared(case: Case, layout: Layout) -> int:
    """Bytes of shared memory of a block."""
    sums = len(case.problem.directions) > 1
    tensors = 1 + ("lam" in case.views) + ("gate" in case.views)
    tiles = 3 + layout.channels * (tensors + sums * 4 // case.itemsize)
    states = _up((16 if layout.blocks > 1 else 8) * layout.channels * layout.pitch, STATES_ALIGNMENT)
    return states + layout.stages * tiles * max(cut.tile for cut in layout.cuts)


def _fits(case: Case, layout: Layout) -> bool:
    warps = layout.warps * layout.channels
    return warps <= MOST_WARPS and _shared(case, layout) <= case.device.shared_memory


def _layout(case: Case) -> Layout | None:
    """The first of the ways of cutting, best first, that fits."""
    return next((layout for layout in _layouts(case) if _fits(case, layout)), None)


def _layouts(case: Case) -> Iterator[Layout]:
    problem = case.problem
    vector = 16 // case.itemsize
    needs_vertical = any(d in ("down", "up") for d in problem.directions)
    needs_horizontal = any(d in ("right", "left") for d in problem.directions)
    each = _vertical_places(case)
    for blocks in _clusters(case):
        for span, stages in ((64, 3), (64, 2), (32, 3), (32, 2)):
            for lines in (16, 8, 4):
                vertical = horizontal = None
                if needs_vertical:
                    run = min(lines, max(each, 4))
                    vertical = _cut(case, True, each, lines, run, blocks)
                if needs_horizontal:
                    rows = 1 if problem.height <= 32 else 2
                    horizontal = _cut(case, False, rows, span // case.itemsize, vector, blocks)
                if (vertical is None) == needs_vertical or (horizontal is None) == needs_horizontal:
                    continue
                yield Layout(blocks, 1, stages, span, vertical, horizontal)


def _vertical_places(case: Case) -> int:
    """Places of a thread in vertical scans: few while one warp holds the line, at most 16 bytes."""
    vector = 16 // case.itemsize
    each = vector // 4
    while each < vector and LANES * each < case.problem.width:
        each *= 2
    return each


def _clusters(case: Case) -> tuple[int, ...]:
    """Blocks a line, best first."""
    if case.device.capability < (9, 0):
        return (1,)
    planes = case.problem.batch * case.problem.channels
    most = max(1, case.device.multiprocessors // planes)
    counts = [blocks for blocks in (8, 4, 2, 1) if blocks <= most]
    return (*counts, *(blocks for blocks in (2, 4, 8) if blocks > most))


def _kernel(defines: tuple[tuple[str, int], ...]) -> Kernel:
    return Kernel("planes_forward.cu", "planes_forward", defines)


def _plan(case: Case, layout: Layout) -> Plan:
    problem = case.problem
    vertical, horizontal = layout.vertical, layout.horizontal
    warps = layout.warps * layout.channels
    sums = len(problem.directions) > 1
    ragged = any(
        places % cut.each
        for places, cut in ((problem.width, vertical), (problem.height, horizontal))
        if cut is not None
    )
    kernel = _kernel(
        (
            *options(case),
            ("THREADS", LANES * max(4, 1 << (warps - 1).bit_length())),
            ("STAGES", layout.stages),
            ("SUMS", int(sums)),
            ("CLUSTER", int(layout.blocks > 1)),
            ("RAGGED", int(ragged)),
            ("ALIGNMENT", alignment_of(case)),
            ("VERTICAL", vertical.each if vertical else 0),
            ("HORIZONTAL", horizontal.each if horizontal else 0),
            ("SPAN", layout.span),
        )
    )
    segments, lines = 1, max(problem.height, problem.width)
    nothing = (0,) * 5
    knobs = (
        layout.blocks,
        layout.channels,
        layout.warps,
        layout.pitch,
        segments,
        lines,
        *(vertical.knobs if vertical else nothing),
        *(horizontal.knobs if horizontal else nothing),
    )
    grid = problem.batch * (problem.channels // layout.channels) * segments * layout.blocks
    shared = _shared(case, layout)
    launch = Launch(kernel, grid, LANES * warps, shared, cluster=layout.blocks, knobs=knobs)
    elements = problem.batch * problem.channels * problem.height * _up(problem.width, 4)
    scratch = 4 * elements if sums and case.itemsize < 4 else 0
    reasons = (
        f"rows are contiguous: {layout.channels} planes a block, {layout.blocks} blocks a line, "
        f"{layout.warps} warps a plane, {shared} bytes of shared memory",
    )
    return Plan("planes", (launch,), (scratch,), reasons)
