"""`resident` for what the mixers of a backbone ask for: two channels that share taps, as dense records."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ...problem import DIRECTIONS
from ..geometry import Case, Kernel, Launch, Plan, options
from .resident_records import (
    BLOCK_OVERHEAD,
    LANES,
    MOST_PLACES,
    is_dense,
    lane_places,
    longest,
    magic,
    record_bytes,
    record_has_x,
    up,
)

REGISTERS = 65536
LEAST_WARPS = 8
"""One for every scan, of both channels in backward."""

MOST_ROUNDS = 7
MOST_RING = 3
MOST_BLOCKS = 4


def takes(case: Case) -> bool:
    """Is it a pair of channels with shared taps in dense records, of an image that fits?"""
    return layout(case) is not None


def plan(case: Case) -> Plan:
    """One task for each image; blocks take one after the other."""
    chosen = layout(case)
    assert chosen is not None
    name = "resident_pair_backward" if case.backward else "resident_pair_forward"
    kernel = Kernel(f"{name}.cu", name, _macros(case, chosen))
    problem = case.problem
    grid = min(problem.batch, case.device.multiprocessors * chosen.blocks)
    lines = max(problem.height, problem.width)
    vertical, horizontal = chosen.axes
    knobs = (
        *(2, problem.batch, 1, 1),
        *(vertical.pitch, horizontal.pitch, vertical.pairs, horizontal.pairs),
        *(vertical.weights, horizontal.weights),
        *(0, chosen.slot, 0, chosen.operands + chosen.buffers, chosen.operands),
        *(magic(problem.width), magic(min(problem.chunk or lines, lines))),
    )
    launch = Launch(kernel, grid, LANES * chosen.warps, chosen.shared, knobs=knobs)
    # Gradients of a first pass: 2 words for each direction of dlam and dgate, 3 for two of dtaps.
    waiting = 4 * (7 * len(problem.directions) // 4) * chosen.rounds * LANES * chosen.warps * grid
    scratch = (waiting,) if chosen.passes == 2 else ()
    return Plan("resident", (launch,), scratch, _reasons(case, chosen))


def representative_kernels() -> list[tuple[Kernel, bool]]:
    """Kernels that the tests compile, and whether each is hot (must not spill)."""
    macros = (
        *(("STORAGE", 1), ("NORMALIZE", 1), ("HAS_LAM", 1), ("HAS_GATE", 1)),
        *(("SCANS", 4), ("DIRECTIONS", 0x3210), ("PLACES", 2), ("RECORD_X", 0), ("COPY", 16)),
        *(("WHOLE", 1), ("CHUNKED", 0)),
    )
    # 28 x 28, and 56 x 56; one with sizes at run time.
    fixed = (
        *(("FIXED", 1), ("HEIGHT", 56), ("WIDTH", 56), ("LINE_V", 29), ("LINE_H", 29)),
        *(("PAIRS_V", 12992), ("PAIRS_H", 12992), ("WEIGHTS_V", 6592), ("WEIGHTS_H", 6592)),
    )
    forward = [
        (("FIXED", 0), ("THREADS", 416), ("BLOCKS", 2), ("ROUNDS", 2), ("RING", 2)),
        (*fixed, ("THREADS", 640), ("BLOCKS", 1), ("ROUNDS", 5), ("RING", 2)),
    ]
    backward = [
        (("FIXED", 0), ("THREADS", 256), ("BLOCKS", 2), ("ROUNDS", 3), ("RING", 2), ("PASSES", 1)),
        (*fixed, ("THREADS", 448), ("BLOCKS", 1), ("ROUNDS", 7), ("RING", 3), ("PASSES", 2)),
    ]
    return [
        (Kernel(f"{name}.cu", name, (*macros, *own)), True)
        for name, sizes in (("resident_pair_forward", forward), ("resident_pair_backward", backward))
        for own in sizes
    ]


@dataclass(frozen=True)
class Axis:
    """Where the numbers of a scan are: place v of each lane is in part v of a plane.

    Args:
        pitch: items from line to line.
        pairs, weights: bytes of a part of a plane of pairs of float32 numbers, and of one of words.
    """

    pitch: int
    pairs: int
    weights: int


@dataclass(frozen=True)
class Layout:
    """How a block shares out an image, and its shared memory.

    Args:
        places: places of a line in a lane.
        axes: of vertical and horizontal scans.
        passes: parts of the directions, one after the other.
        blocks: on a multiprocessor.
        warps: of a block.
        rounds: bundles of an image that a warp takes.
        ring: bundles that a warp has on their way.
        slot: bytes of a bundle.
        operands: bytes of operands in order.
        buffers: bytes through which gradients of taps are written.
    """

    places: int
    axes: tuple[Axis, Axis]
    passes: int
    blocks: int
    warps: int
    rounds: int
    ring: int
    slot: int
    operands: int
    buffers: int

    @property
    def shared(self) -> int:
        return self.operands + self.buffers + self.warps * self.ring * self.slot


def layout(case: Case) -> Layout | None:
    """The best one with the fewest passes; None for other cases."""
    if not _is_pair(case):
        return None
    for passes in (1, 2) if case.backward else (1,):
        if passes == 1 or _cuts_by_axis(case):
            best = max(_layouts(case, passes), key=lambda it: _rank(case, it), default=None)
            if best is not None:
                return best
    return None


def _rank(case: Case, it: Layout) -> tuple[int, ...]:
    """Fastest on an H200: in backward many registers a thread, in forward two bundles on their way."""
    if case.backward:
        return (it.blocks, -it.warps, -it.rounds)
    return (it.blocks, int(it.ring >= min(it.rounds, 2)), -it.rounds)


def _is_pair(case: Case) -> bool:
    problem = case.problem
    scans = len(problem.directions)
    if (problem.channels, problem.groups, problem.normalize, case.itemsize) != (2, 1, True, 2):
        return False
    if scans % 2 or longest(case) > LANES * MOST_PLACES or not record_bytes(case):
        return False
    if problem.batch * problem.height * problem.width * record_bytes(case) >= 4 * 2**32:
        return False  # the kernels count words in 32 bits
    image = case.views.get("dx" if case.backward else "y")
    if image is None or image.c != 1 or image.alignment < 4 or not is_dense(case, image, 2):
        return False
    return not case.backward or _writes_vectors(case)


def _writes_vectors(case: Case) -> bool:
    """Are all gradients asked for, and dlam, dgate and dtaps dense records, aligned to vectors?"""
    views, scans = case.views, len(case.problem.directions)
    for name, size, alignment in (("dlam", 2, 4 * scans), ("dgate", 2, 4 * scans), ("dtaps", 3, 8)):
        view = views.get(name)
        if view is None or view.alignment < alignment or not is_dense(case, view, scans * size):
            return False
        if (view.k if name == "dtaps" else view.c, view.d) != (1, size):
            return False
    return True


def _cuts_by_axis(case: Case) -> bool:
    """Has each half of the directions only vertical, or only horizontal ones?"""
    vertical = [name in ("down", "up") for name in case.problem.directions]
    return len(vertical) == 4 and vertical[0] == vertical[1] and vertical[2] == vertical[3]


def _layouts(case: Case, passes: int) -> Iterator[Layout]:
    """What fits."""
    problem, device = case.problem, case.device
    directions = problem.directions
    part = len(directions) // passes
    places = lane_places(case)
    axes = _axes(case, places, passes)
    sizes = [
        places * ((2 if case.backward else 1) * axis.pairs + axis.weights)
        for axis in (axes[name in ("right", "left")] for name in directions)
    ]
    operands = max(sum(sizes[first : first + part]) for first in range(0, len(directions), part))
    slot = LANES * (record_bytes(case) + 4 * (not record_has_x(case)) + 4 * case.backward)
    buffer = LANES * 6 * len(directions) if case.backward else 0
    bundles = -(-problem.height * problem.width // LANES)
    wanted = max(1, min(MOST_BLOCKS, -(-problem.batch // device.multiprocessors)))
    for blocks in range(1, wanted + 1):
        room = (device.shared_memory + BLOCK_OVERHEAD) // blocks - BLOCK_OVERHEAD - operands
        for rounds in range(1, MOST_ROUNDS + 1):
            warps = max(LEAST_WARPS, -(-bundles // rounds))
            ring = min(MOST_RING, rounds, (room // warps - buffer) // slot)
            registers = min(255, REGISTERS // (LANES * warps * blocks) // 8 * 8)
            if ring > 0 and warps <= 32 and registers >= _registers(case, part, rounds):
                yield Layout(
                    places, axes, passes, blocks, warps, rounds, ring, slot, operands, warps * buffer
                )


def _axes(case: Case, places: int, passes: int) -> tuple[Axis, Axis]:
    """Of vertical and horizontal scans.

    In the scans along rows the pixels of a row are lines: an odd number of items from one to the next spreads
    them over the banks of shared memory. In the others they are neighbouring places, so that parts are apart.
    Two passes share their code, and on square images all of their distances.
    """
    height, width = case.problem.height, case.problem.width
    alike = passes == 2 and height == width
    return _axis(height, width, places, alike), _axis(width, height, places, True)


def _axis(lines: int, places: int, held: int, odd: bool) -> Axis:
    pitch = -(-places // held)
    pitch += odd and pitch % 2 == 0
    pairs = 16 // held + up(max(0, lines * pitch - 16 // held), 16)
    weights = 32 // held + up(max(0, lines * pitch - 32 // held), 32)
    return Axis(pitch, 8 * pairs, 4 * weights)


def _registers(case: Case, part: int, rounds: int) -> int:
    """That a thread needs: what it keeps while scans run, and what it works with."""
    if not case.backward:
        return 72 + rounds * part
    addresses = 48 if case.problem.height == case.problem.width else 56
    return addresses + rounds * (4 + part + 3 * part // 2)


def _macros(case: Case, it: Layout) -> tuple[tuple[str, int], ...]:
    problem = case.problem
    names = problem.directions
    lines = max(problem.height, problem.width)
    square = problem.height == problem.width
    whole = problem.height % it.places == 0 and problem.width % it.places == 0
    macros = {
        "THREADS": LANES * it.warps,
        "BLOCKS": it.blocks,
        "SCANS": len(names),
        "DIRECTIONS": sum(DIRECTIONS.index(name) << 4 * d for d, name in enumerate(names)),
        "PLACES": it.places,
        "WHOLE": int(whole),
        "CHUNKED": int((problem.chunk or lines) < lines),
        "RECORD_X": int(record_has_x(case)),
        "COPY": _copy(case),
        "ROUNDS": it.rounds,
        "RING": it.ring,
        # Backbones run on square images of few sizes. Others share kernels.
        "FIXED": int(square),
    }
    if square:
        vertical, horizontal = it.axes
        macros |= {"HEIGHT": problem.height, "WIDTH": problem.width}
        macros |= {"LINE_V": vertical.pitch, "LINE_H": horizontal.pitch}
        macros |= {"PAIRS_V": vertical.pairs, "PAIRS_H": horizontal.pairs}
        macros |= {"WEIGHTS_V": vertical.weights, "WEIGHTS_H": horizontal.weights}
    if case.backward:
        macros["PASSES"] = it.passes
    return (*options(case), *macros.items())


def _copy(case: Case) -> int:
    """Bytes of a copy: what images, records and the addresses of all of them are multiples of."""
    pixels = case.problem.height * case.problem.width
    views = [view for name, view in case.views.items() if name in ("x", "dy")]
    first = case.views["x"] if record_has_x(case) else case.views.get("lam", case.views.get("gate"))
    views.append(first or case.views["taps"])
    alignment = min(view.alignment for view in views)
    return next(size for size in (16, 8, 4) if alignment % size == 0 and 4 * pixels % size == 0)


def _reasons(case: Case, it: Layout) -> tuple[str, ...]:
    return (
        f"two channels with shared taps fit in {it.shared} bytes of shared memory; {it.blocks} blocks a "
        "multiprocessor",
        f"pixels are dense records: each of {it.warps} warps takes {it.rounds} times 32 of an image",
        *((f"directions in {it.passes} passes",) if it.passes > 1 else ()),
    )
