"""`resident` forward of records by a cluster: blocks own rows and run scans, and hand on what others need."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ...problem import DIRECTIONS
from ..geometry import Case, Kernel, Launch, Plan, options
from .pixels_layout import LARGEST_CLUSTER, largest_cluster
from .resident_records import (
    LANES,
    lane_places,
    longest,
    magic,
    record_bytes,
    record_has_x,
    up,
)

CAPABILITY = (9, 0)
"""Compute capability that clusters need."""

VECTORS = (2, 1, 4)
"""Channels of a block, by preference."""

THREADS = 512
"""Of a block. More bring no more bytes on their way, and meet at barriers for longer."""

MOST_CHANNELS = 16
"""All of a pixel's are in registers at a time."""

MOST_PLACES = 4
"""Of a line, in a lane: it sends as many states at once."""

ALIGNMENT = 16
"""Bytes of an asynchronous copy."""


def takes(case: Case) -> bool:
    """Several directions of so few images of records that all blocks run at once?"""
    it = layout(case)
    if it is None:
        return False
    # Not every multiprocessor can be had in clusters that large.
    multiprocessors = case.device.multiprocessors
    room = multiprocessors if it.cluster <= LARGEST_CLUSTER else multiprocessors * 3 // 4
    return case.problem.batch * it.cluster <= room


def plan(case: Case) -> Plan:
    """A cluster for each image: a block for each direction of some channels, which also owns some rows."""
    it = layout(case)
    assert it is not None
    return plan_of(case, it)


def plan_of(case: Case, it: Layout, threads: int = THREADS) -> Plan:
    """The plan with this layout, in blocks of so many threads."""
    problem = case.problem
    names = problem.directions
    macros = {
        "THREADS": threads,
        "BLOCKS": 1,
        "SCANS": len(names),
        "DIRECTIONS": sum(DIRECTIONS.index(name) << 4 * d for d, name in enumerate(names)),
        "PLACES": it.places,
        "IMAGE_CHANNELS": problem.channels,
        "TAP_GROUPS": problem.groups,
        "VECTOR": it.vector,
        "RECORD_X": int(record_has_x(case)),
    }
    name = "resident_exchange_forward"
    kernel = Kernel(f"{name}.cu", name, (*options(case), *macros.items()))
    places = (*it.slots, it.plane, it.column, it.arrived)
    knobs = (it.rows, magic(it.rows), magic(it.rows * problem.width), *places, *it.offsets, 0, 0, 0)
    launch = Launch(
        *(kernel, problem.batch * it.cluster, threads, it.shared, it.cluster),
        (*knobs, magic(problem.width), 0),
    )
    reasons = (
        f"records of an image are read once, {it.rows} rows by each of {it.cluster} blocks of a cluster",
        f"a block scans one direction of {it.vector} of {problem.channels} channels, in {it.shared} bytes",
    )
    return Plan("resident", (launch,), (), reasons)


def representative_kernels() -> list[tuple[Kernel, bool]]:
    """Kernels that the tests compile, and whether each is hot (must not spill)."""
    name = "resident_exchange_forward"
    four = (("NORMALIZE", 1), ("HAS_LAM", 1), ("HAS_GATE", 1), ("SCANS", 4), ("DIRECTIONS", 0x3210))
    block = (("THREADS", THREADS), ("BLOCKS", 1), ("PLACES", 2), ("IMAGE_CHANNELS", 8), ("TAP_GROUPS", 1))
    pair = (("VECTOR", 2), ("RECORD_X", 0))
    return [(Kernel(f"{name}.cu", name, (("STORAGE", s), *four, *block, *pair)), True) for s in (0, 1)]


@dataclass(frozen=True)
class Layout:
    """Who has what of an image, and the shared memory of a block.

    Args:
        vector: channels of a block.
        cluster: blocks, for each direction and part of the channels one; each owns some rows.
        rows: of an owner.
        places: places of a line in a lane.
        slots: places that an owner has in a plane of vertical and of horizontal scans.
        plane: bytes of sources of a channel, or of weights of one tap.
        column: places of a column among states that arrive from horizontal scans.
        arrived: bytes of a plane of states that arrive.
        offsets: of x, sources, states that arrive, and the barrier that counts these; records come first.
        shared: bytes of all.
    """

    vector: int
    cluster: int
    rows: int
    places: int
    slots: tuple[int, int]
    plane: int
    column: int
    arrived: int
    offsets: tuple[int, int, int, int]
    shared: int


def layout(case: Case) -> Layout | None:
    """The layout of the vector that is preferred; None if none can run the case."""
    return next(layouts(case), None)


def layouts(case: Case) -> Iterator[Layout]:
    """What fits."""
    if case.backward or case.device.capability < CAPABILITY or not _is_records(case):
        return
    problem = case.problem
    places = lane_places(case)
    if longest(case) > LANES * MOST_PLACES or problem.width % places:
        return
    for vector in VECTORS:
        cluster = len(problem.directions) * problem.channels // vector
        if problem.channels // problem.groups % vector or cluster > largest_cluster(case):
            continue
        if problem.height % (cluster * places):
            continue
        it = _layout(case, vector, cluster, places)
        pixels = it.rows * problem.width
        copied = pixels * record_bytes(case) | pixels * problem.channels * case.itemsize
        if it.shared <= case.device.shared_memory and copied % ALIGNMENT == 0:
            yield it


def _is_records(case: Case) -> bool:
    """Can lam, gate and taps be views of one tensor of records? The kernel sees by the addresses."""
    problem, views = case.problem, case.views
    order = ("x", "lam", "gate", "taps") if record_has_x(case) else ("lam", "gate", "taps")
    first = next(views[name] for name in order if name in views)
    return (
        len(problem.directions) in (2, 4)
        and problem.normalize
        and 2 <= problem.channels <= MOST_CHANNELS
        and record_bytes(case) > 0
        and min(views["x"].alignment, first.alignment) >= ALIGNMENT
    )


def _layout(case: Case, vector: int, cluster: int, places: int) -> Layout:
    problem, size = case.problem, case.itemsize
    rows = problem.height // cluster
    pixels = rows * problem.width
    # Slots of horizontal scans, and columns that arrive, are spread over the banks.
    slots, column = (pixels, pixels + rows), rows + places
    plane = up(4 * cluster * max(slots), 16)
    arrived = 4 * problem.width * column
    widths = (
        up(pixels * record_bytes(case), 16),
        0 if record_has_x(case) else pixels * problem.channels * size,
        (vector + (1 if size == 2 else 3)) * plane,
        len(problem.directions) * problem.channels * arrived,
    )
    x, sources, states, barrier = (sum(widths[: n + 1]) for n in range(4))
    offsets = x, sources, states, up(barrier, 8)
    shared = offsets[3] + 8
    return Layout(vector, cluster, rows, places, slots, plane, column, arrived, offsets, shared)
