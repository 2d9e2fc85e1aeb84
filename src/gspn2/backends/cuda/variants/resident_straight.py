"""`resident` forward by a block for each direction: operands go from the tensors straight to threads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ...problem import DIRECTIONS
from ..geometry import Case, Kernel, Launch, Plan, View, options
from . import tiles
from .resident_records import BLOCK_OVERHEAD, LANES, MOST_PLACES, lane_places, longest, magic, up

REGISTERS = 65536
MOST_THREADS = 1024
MOST_ROUNDS = 16
MOST_BATCH = 4
ENOUGH_THREADS = 1280
"""On a multiprocessor: more do not bring more bytes on their way."""

MOST_ROWS = 64
"""Of planes that are scanned along their rows here and not by `lines`."""

FEW_BLOCKS = 16
"""With more, a block takes several channels if they are adjacent: less than a sector costs as much."""


LONG = 128
"""Lines and places of each from which on `tiles` is faster: a warp here would hold many places of a line."""


def takes(case: Case) -> bool:
    """Several directions of so few images that all blocks run at once, or small planes along their rows?"""
    it = layout(case)
    if it is None:
        return False
    if it.scans == 1:
        return _scans_rows(case)
    if min(case.problem.height, case.problem.width) >= LONG and tiles.why_not(case) is None:
        return False
    tasks = case.problem.batch * case.problem.channels // it.vector
    return tasks * it.scans <= case.device.multiprocessors


def _scans_rows(case: Case) -> bool:
    """Small float32 planes along their rows, weights as given: `lines` takes only four columns at a time."""
    problem = case.problem
    planes = all(view.w == 1 for view in case.views.values())
    small = max(problem.height, problem.width) <= MOST_ROWS
    along = problem.directions[0] in ("right", "left")
    return planes and small and along and case.itemsize == 4 and not problem.normalize


def plan(case: Case) -> Plan:
    """A task for each image and vector of channels, in a cluster of a block for each direction."""
    it = layout(case)
    assert it is not None
    problem = case.problem
    names = problem.directions
    macros = {
        "THREADS": it.threads,
        "BLOCKS": it.blocks,
        "SCANS": it.scans,
        "DIRECTIONS": sum(DIRECTIONS.index(name) << 4 * d for d, name in enumerate(names)),
        "PLACES": it.places,
        "WHOLE": int(problem.height % it.places == 0 and problem.width % it.places == 0),
        "VECTOR": it.vector,
        "ADJACENT": int(it.vector > 1),
        "ROUNDS": it.rounds,
        "BATCH": min(it.rounds, MOST_BATCH),
    }
    name = "resident_straight_forward"
    kernel = Kernel(f"{name}.cu", name, (*options(case), *macros.items()))
    tasks = problem.batch * problem.channels // it.vector
    grid = min(tasks, max(1, case.device.multiprocessors * it.blocks // it.scans)) * it.scans
    lines = max(problem.height, problem.width)
    knobs = (
        *(it.vector, tasks, problem.channels // it.vector, 1),
        *(*it.pitches, *it.planes, *it.taps),
        *(magic(-(-problem.height * problem.width // it.scans)), 0, 0, 0, it.operands),
        *(magic(problem.width), magic(min(problem.chunk or lines, lines))),
    )
    launch = Launch(kernel, grid, it.threads, it.shared, it.scans, knobs)
    reasons = (
        f"a block for each direction of {it.vector} of {problem.channels} channels of an image, in "
        f"{it.shared} bytes of shared memory; {it.blocks} blocks a multiprocessor",
    )
    return Plan("resident", (launch,), (), reasons)


def representative_kernels() -> list[tuple[Kernel, bool]]:
    """Kernels that the tests compile, and whether each is hot (must not spill)."""
    four = (("NORMALIZE", 1), ("HAS_LAM", 1), ("HAS_GATE", 1), ("SCANS", 4), ("DIRECTIONS", 0x3210))
    one = (("NORMALIZE", 0), ("HAS_LAM", 1), ("HAS_GATE", 0), ("SCANS", 1), ("DIRECTIONS", 2))
    few = (("THREADS", 1024), ("BLOCKS", 1), ("PLACES", 2), ("WHOLE", 1), ("ROUNDS", 4), ("BATCH", 4))
    many = (("THREADS", 416), ("BLOCKS", 3), ("PLACES", 2), ("WHOLE", 0), ("ROUNDS", 10), ("BATCH", 4))
    single, pair = (("VECTOR", 1), ("ADJACENT", 0)), (("VECTOR", 2), ("ADJACENT", 1))
    name = "resident_straight_forward"
    # The first one has no cluster: it is compiled for older GPUs, too.
    every = [
        (("STORAGE", 0), *one, *many, *single),
        (("STORAGE", 1), *four, *few, *single),
        (("STORAGE", 0), *four, *few, *pair),
    ]
    return [(Kernel(f"{name}.cu", name, macros), True) for macros in every]


@dataclass(frozen=True)
class Layout:
    """How a block shares out its pixels, and its shared memory.

    Args:
        scans: directions, and blocks of a cluster.
        vector: channels of a task.
        places: places of a line in a lane.
        pitches: of vertical and horizontal lines, in places.
        planes: bytes of a plane of sources, for vertical and horizontal scans.
        taps: bytes of weights, for both.
        blocks: on a multiprocessor.
        threads: of a block.
        rounds: pixels of a thread.
        operands: bytes of operands in order.
        sums: bytes of gated states of all directions.
    """

    scans: int
    vector: int
    places: int
    pitches: tuple[int, int]
    planes: tuple[int, int]
    taps: tuple[int, int]
    blocks: int
    threads: int
    rounds: int
    operands: int
    sums: int

    @property
    def shared(self) -> int:
        return self.operands + self.sums


def layout(case: Case) -> Layout | None:
    """The layout with the most threads on a multiprocessor; None if it cannot run the case."""
    scans = len(case.problem.directions)
    if case.backward or scans == 3 or (scans > 1 and case.device.capability < (9, 0)):
        return None
    if longest(case) > LANES * MOST_PLACES or any(spans(case, view) for view in case.views.values()):
        return None
    return max(_layouts(case, _vector(case)), key=_rank, default=None)


def spans(case: Case, view: View) -> bool:
    """Are pixels of one image 2^31 elements apart?"""
    return (case.problem.height - 1) * abs(view.h) + (case.problem.width - 1) * abs(view.w) >= 2**31


def _rank(it: Layout) -> tuple[int, ...]:
    return (min(it.blocks * it.threads, ENOUGH_THREADS), it.blocks, -it.rounds)


def _vector(case: Case) -> int:
    """Channels of a task: more than one only if they are adjacent, and if there are tasks enough."""
    problem = case.problem
    for vector in (4, 2):
        blocks = problem.batch * problem.channels // vector * len(problem.directions)
        if (
            adjacent(case, vector)
            and problem.channels // problem.groups % vector == 0
            and blocks >= FEW_BLOCKS
        ):
            return vector
    return 1


def adjacent(case: Case, vector: int) -> bool:
    """Are so many channels of what is read adjacent, and aligned to their size? And of gradients?"""
    names = ("x", "lam", "gate", "dy", "dx", "dlam", "dgate")
    images = [view for name, view in case.views.items() if name in names]
    size = vector * case.itemsize
    return all(view.c == 1 and _aligned(case, view, size) for view in images)


def _aligned(case: Case, view: View, size: int) -> bool:
    strides = (view.b, view.d, view.h, view.w)
    return view.alignment >= size and all(stride * case.itemsize % size == 0 for stride in strides)


def _layouts(case: Case, vector: int) -> Iterator[Layout]:
    """What fits."""
    problem, device, size = case.problem, case.device, case.itemsize
    scans, pixels = len(problem.directions), case.problem.height * case.problem.width
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
    axes = {name in ("right", "left") for name in problem.directions}
    operands = max(vector * planes[axis] + taps[axis] for axis in axes)
    sums = vector * scans * -(-pixels // scans) * 4 if scans > 1 else 0
    tasks = problem.batch * problem.channels // vector
    wanted = max(1, -(-tasks * scans // device.multiprocessors))
    fitting = (device.shared_memory + BLOCK_OVERHEAD) // (operands + sums + BLOCK_OVERHEAD)
    for blocks in range(1, min(wanted, fitting, 16) + 1):
        for rounds in range(1, MOST_ROUNDS + 1):
            threads = max(LANES * vector, up(-(-pixels // rounds), LANES))
            registers = min(255, REGISTERS // (threads * blocks) // 8 * 8) if threads <= MOST_THREADS else 0
            if registers >= _registers(case, vector, rounds):
                pitches = vertical, horizontal
                yield Layout(
                    scans, vector, places, pitches, planes, taps, blocks, threads, rounds, operands, sums
                )


def _registers(case: Case, vector: int, rounds: int) -> int:
    """That a thread needs: operands on their way, gates that wait, and what it works with."""
    words = vector * case.itemsize // 4 if vector > 1 else 1
    operands = ("lam" in case.views) + ("gate" in case.views) + 1
    batch = min(rounds, MOST_BATCH)
    return 28 + batch * (operands * words + 3) + (rounds - batch) * words * ("gate" in case.views)
