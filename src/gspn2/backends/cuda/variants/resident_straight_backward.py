"""`resident` backward by a block for each direction, with states and adjoints in shared memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ...problem import DIRECTIONS
from ..geometry import Case, Kernel, Launch, Plan, options
from .pixels_layout import LARGEST_CLUSTER, largest_cluster
from .resident_records import LANES, MOST_PLACES, lane_places, longest, magic, up
from .resident_straight import adjacent, spans

VECTORS = (1, 2, 4)
"""Channels of a block."""

THREADS = 1024
"""Of a block, at most."""

SPREAD_THREADS = 512
"""Of a block where neighbouring pixels are not adjacent: more only wait for each other's sectors."""

MOST_BATCH = 2
"""Pixels of a thread whose reads are on the way together."""


def takes(case: Case) -> bool:
    """So few images that all blocks run at once?"""
    it = layout(case)
    if it is None or not _at_once(case, it):
        return False
    # Alone along rows of 16-bit planes, threads that hold rows are faster.
    along = it.scans == 1 and case.problem.directions[0] in ("right", "left")
    return not (along and case.itemsize == 2 and _adjacent_pixels(case))


def _adjacent_pixels(case: Case) -> bool:
    return all(view.w == 1 for view in case.views.values())


def plan(case: Case) -> Plan:
    """A task for each image and tap group, in a cluster: a block for each direction and part of channels."""
    it = layout(case)
    assert it is not None
    return plan_of(case, it)


def plan_of(case: Case, it: Layout, most_threads: int | None = None) -> Plan:
    """The plan with this layout, in blocks of at most so many threads."""
    if most_threads is None:
        most_threads = THREADS if _adjacent_pixels(case) else SPREAD_THREADS
    problem = case.problem
    names = problem.directions
    near = it.vector > 1 and adjacent(case, it.vector)
    threads = max(2 * LANES * it.vector, min(most_threads, up(problem.height * problem.width, LANES)))
    macros = {
        "THREADS": threads,
        "BLOCKS": 1,
        "SCANS": it.scans,
        "DIRECTIONS": sum(DIRECTIONS.index(name) << 4 * d for d, name in enumerate(names)),
        "PLACES": it.places,
        "VECTOR": it.vector,
        "ADJACENT": int(near),
        "SHARERS": it.sharers,
        "FETCH": int(it.fetches),
        "BATCH": MOST_BATCH if near or it.vector == 1 else 1,
    }
    name = "resident_straight_backward"
    kernel = Kernel(f"{name}.cu", name, (*options(case), *macros.items()))
    clusters = max(1, case.device.multiprocessors // it.cluster)
    lines = max(problem.height, problem.width)
    knobs = (
        *(it.vector * it.sharers, it.tasks, problem.groups, 1),
        *(*it.pitches, *it.planes, *it.taps),
        *(-(-problem.height * problem.width // threads), 0, 0, 0, it.operands),
        *(magic(problem.width), magic(min(problem.chunk or lines, lines))),
    )
    launch = Launch(kernel, min(it.tasks, clusters) * it.cluster, threads, it.shared, it.cluster, knobs)
    reasons = (
        f"a block for each direction of {it.vector} channels of an image, in {it.shared} bytes of memory",
        f"all {it.vector * it.sharers} channels that share taps in a cluster of {it.cluster} blocks",
    )
    return Plan("resident", (launch,), (), reasons)


def representative_kernels() -> list[tuple[Kernel, bool]]:
    """Kernels that the tests compile, and whether each is hot (must not spill)."""
    four = (("NORMALIZE", 1), ("HAS_LAM", 1), ("HAS_GATE", 1), ("SCANS", 4), ("DIRECTIONS", 0x3210))
    one = (("NORMALIZE", 0), ("HAS_LAM", 1), ("HAS_GATE", 0), ("SCANS", 1), ("DIRECTIONS", 2))
    block = (("THREADS", THREADS), ("BLOCKS", 1), ("PLACES", 2))
    single = (("VECTOR", 1), ("SHARERS", 1), ("FETCH", 0))
    pair, four_each = (
        (("VECTOR", 2), ("SHARERS", 4), ("FETCH", 0)),
        (("VECTOR", 4), ("SHARERS", 2), ("FETCH", 1)),
    )
    name = "resident_straight_backward"
    # The first one has no cluster: it is compiled for older GPUs, too.
    every = [
        (("STORAGE", 0), *one, *block, *single, ("ADJACENT", 0), ("BATCH", MOST_BATCH)),
        *((("STORAGE", s), *four, *block, *pair, ("ADJACENT", 1), ("BATCH", MOST_BATCH)) for s in (0, 1)),
        *((("STORAGE", s), *four, *block, *pair, ("ADJACENT", 0), ("BATCH", 1)) for s in (0, 1)),
        *(
            (("STORAGE", s), *four, *block, *four_each, ("ADJACENT", 1), ("BATCH", MOST_BATCH))
            for s in (0, 1)
        ),
        *((("STORAGE", s), *four, *block, *four_each, ("ADJACENT", 0), ("BATCH", 1)) for s in (0, 1)),
    ]
    return [(Kernel(f"{name}.cu", name, macros), True) for macros in every]


@dataclass(frozen=True)
class Layout:
    """How the channels of a tap group are shared out, and the shared memory of a block.

    Args:
        scans: directions.
        vector: channels of a block.
        sharers: parts of the channels of a tap group.
        tasks: images and tap groups.
        places: places of a line in a lane.
        pitches: of vertical and horizontal lines, in places.
        planes: bytes of a plane of sources, for vertical and horizontal scans.
        taps: bytes of weights, for both.
        operands: bytes of sources and weights, or parts of their gradients.
        sums: bytes of parts of dx.
        fetches: these stay with the blocks that made them.
    """

    scans: int
    vector: int
    sharers: int
    tasks: int
    places: int
    pitches: tuple[int, int]
    planes: tuple[int, int]
    taps: tuple[int, int]
    operands: int
    sums: int
    fetches: bool

    @property
    def shared(self) -> int:
        return self.operands + self.sums

    @property
    def cluster(self) -> int:
        return self.scans * self.sharers


def layout(case: Case) -> Layout | None:
    """The layout with the fewest channels in a block whose blocks all run at once; None if none fits."""
    found = list(layouts(case))
    return next(iter([it for it in found if _at_once(case, it)] or found), None)


def _at_once(case: Case, it: Layout) -> bool:
    """Do all blocks run at the same time? Not every multiprocessor can be had in clusters that large."""
    multiprocessors = case.device.multiprocessors
    room = multiprocessors if it.cluster <= LARGEST_CLUSTER else multiprocessors * 3 // 4
    return it.tasks * it.cluster <= room


def layouts(case: Case) -> Iterator[Layout]:
    """What fits, the fewest channels in a block first."""
    problem, device = case.problem, case.device
    scans, per_group = len(problem.directions), problem.channels // problem.groups
    if not case.backward or scans == 3 or longest(case) > LANES * MOST_PLACES:
        return
    if any(spans(case, view) for view in case.views.values()):
        return
    for vector in VECTORS:
        cluster = scans * per_group // vector
        if per_group % vector or cluster > largest_cluster(case):
            continue
        for fetches in (False, True):
            it = _layout(case, vector, fetches)
            if it.shared <= device.shared_memory:
                yield it
                break


def _layout(case: Case, vector: int, fetches: bool) -> Layout:
    problem, size = case.problem, case.itemsize
    sharers = problem.channels // problem.groups // vector
    places = lane_places(case)
    vertical = up(problem.width, places)
    # Pixels of a row go to different lines: an odd number of lane widths spreads them over the banks.
    horizontal = up(problem.height, places)
    horizontal += places * (horizontal // places % 2 == 0)
    counts = problem.height * vertical, problem.width * horizontal
    planes = up(counts[0] * 4, 16), up(counts[1] * 4, 16)
    pair = problem.normalize and size == 2
    down, right = (up(count * 4, 16) if pair else 3 * up(count * size, 16) for count in counts)
    taps = down, right
    scans, pixels = len(problem.directions), problem.height * problem.width
    # Parts of dw arrive where the weights were: three numbers in float32.
    arrived = 12 * up(pixels, LANES * sharers) * (sharers > 1)
    axes = {name in ("right", "left") for name in problem.directions}
    operands = up(max(2 * vector * planes[axis] + max(taps[axis], arrived) for axis in axes), 16)
    sums = 4 * vector * up(pixels, LANES * scans) * (scans > 1 and not fetches)
    tasks = problem.batch * problem.groups
    pitches = vertical, horizontal
    return Layout(scans, vector, sharers, tasks, places, pitches, planes, taps, operands, sums, fetches)
