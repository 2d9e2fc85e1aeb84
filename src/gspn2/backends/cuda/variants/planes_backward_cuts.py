"""How lines of planes are cut over blocks and threads in backward: what fits, and what it should cost.

`variants.planes_backward` makes launches of the cuts chosen here.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..geometry import Case, View
from . import planes_backward_memory as memory

WARP = 32

UNIT = 16
"""Bytes of an asynchronous copy; rows start at multiples of it."""

POINTERS = 2 * 8 * 10
"""Bytes of the addresses that horizontal scans keep in shared memory: ten operands and gradients at most."""

BARRIERS = 32
"""Bytes of those that count what blocks of a line send each other, and of those of a chain."""

RESERVED = 1024
"""Bytes of shared memory that the device takes for itself, of every block."""

THREADS = (32, 64, 128, 160, 192, 256, 320, 384, 512, 576)
"""Numbers of threads that kernels are compiled for: a block has at most as many."""

RESIDENT = 512
"""Threads of a multiprocessor that leave each of them 128 registers."""

SPILLS = 1.1
"""A factor of the cost of cuts whose kernels spill registers: instructions, about 30 in 1000, and traffic."""


@dataclass(frozen=True)
class Sizes:
    """One direction: its orientation, number of lines, and places along each."""

    horizontal: bool
    reversed: bool
    lines: int
    places: int

    @staticmethod
    def of(case: Case, direction: str) -> Sizes:
        height, width = case.problem.height, case.problem.width
        horizontal = direction in ("right", "left")
        lines, places = (width, height) if horizontal else (height, width)
        return Sizes(horizontal, direction in ("up", "left"), lines, places)


@dataclass(frozen=True)
class Cut:
    """How one direction is cut over blocks and threads.

    Args:
        sizes: of the direction.
        places: of a thread.
        strips: blocks of a line, a cluster.
        own: places of a line that each of them writes.
        together: channels with the same taps in a cluster, which sums the gradient over them.
        parts: clusters for all channels with the same taps.
        width: threads of a block's part of a line.
        threads: of a block.
        blocks: of the grid.
        segment: lines of a segment.
        shared: bytes of shared memory of a block.
        halo: places beyond its own that a block scans along on either side.
    """

    sizes: Sizes
    places: int
    strips: int
    own: int
    together: int
    parts: int
    width: int
    threads: int
    blocks: int
    segment: int
    shared: int
    halo: int

    @property
    def cluster(self) -> int:
        return self.strips * self.together

    @property
    def kept(self) -> int:
        """Numbers of a line of kept states: blocks that share it keep those beyond their own places, too."""
        if self.strips > 1:
            return self.strips * (self.own + 2 * self.halo)
        return -(-self.sizes.places // 4) * 4


def cuts(case: Case, direction: str) -> Iterator[Cut]:
    """Every way to cut a direction that fits."""
    return _cuts(case, Sizes.of(case, direction))


def best(case: Case, direction: str) -> Cut | None:
    """The cut that is expected to be fastest, or None if none fits."""
    return min(cuts(case, direction), key=lambda cut: _cost(case, cut), default=None)


def longest(case: Case, direction: str) -> int:
    """Places of the longest line that fits, in whole warps, where one of the case's length does not."""
    sizes = Sizes.of(case, direction)
    warps = range(1, sizes.places // 32 + 1)
    fitting = bisect_left(
        warps, True, key=lambda count: next(_cuts(case, replace(sizes, places=32 * count)), None) is None
    )
    return 32 * fitting


def unsuitable(case: Case, name: str, view: View) -> str | None:
    """Why rows of the tensor cannot be copied in units; None if they can."""
    problem, size = case.problem, case.itemsize
    if problem.width > 1 and view.w != 1:
        return f"{name}: columns are {view.w} elements apart, not adjacent"
    if problem.width * size % UNIT:
        return f"rows are {problem.width * size} bytes long, no multiple of {UNIT}"
    strides = [view.alignment // size]
    strides += [view.b] * (problem.batch > 1) + [view.d] * (len(problem.directions) > 1)
    strides += [view.c] * (problem.channels > 1) + [view.k, view.h * (problem.height > 1)]
    if any(stride * size % UNIT for stride in strides):
        return f"{name}: a row starts at an address that is no multiple of {UNIT} bytes"
    if view.h * (problem.height > 1) >= 2**31:
        return f"{name}: rows are {view.h} elements apart, more than 32 bits hold"
    return None


def is_direct(case: Case, sizes: Sizes, strips: int, together: int, width: int) -> bool:
    """Do gradients of shared weights go to memory line by line?"""
    shared = memory.sums_channels(case) and memory.is_large(case) and not sizes.horizontal
    return shared and strips == together == 1 and width > WARP


def has_hidden(case: Case, horizontal: bool) -> bool:
    """Does a scan in whole lines find its states? Vertical ones do; horizontal ones in long pieces do."""
    return is_at_hand(case) and not horizontal


def is_at_hand(case: Case) -> bool:
    """Are the states at hand, in rows as those of the other tensors?"""
    return "y" in case.views and unsuitable(case, "y", case.views["y"]) is None


def most_blocks(case: Case) -> int:
    """Blocks of a cluster, at most."""
    return 8 if case.device.capability >= (9, 0) else 1


def min_blocks(case: Case, cut: Cut, threads: int) -> int:
    """Blocks of so many threads that a multiprocessor must have registers for: as many as have shared memory.

    Registers are those of a quarter of a multiprocessor, shared by its warps: 12 warps leave a thread 168 of
    them, 16 leave 128.
    """
    shared = (case.device.shared_memory + RESERVED) // (cut.shared + RESERVED)
    blocks = max(1, min(shared, RESIDENT // threads))
    if threads > 128:
        return blocks
    if threads == 32 and blocks == 16 and cut.sizes.horizontal and cut.places == 2:
        return 12  # where no barrier keeps rows apart, two of them take more than 128 registers
    return 1 << (blocks.bit_length() - 1)


def _cuts(case: Case, sizes: Sizes) -> Iterator[Cut]:
    size, most = case.itemsize, most_blocks(case)
    each = UNIT // size
    for strips in range(1, most + 1):
        own = -(-sizes.places // (strips * 32)) * 32
        if strips > 1 and (own < 64 or -(-sizes.places // own) != strips):
            continue
        for places in (1, 2) if sizes.horizontal else (each // 4, each // 2, each):
            for segment in _segments(case, sizes.horizontal):
                for together in (
                    {most // strips, 1} if memory.sums_channels(case) and not memory.is_large(case) else (1,)
                ):
                    cut = _fit(case, sizes, strips, together, own, places, segment)
                    if cut is not None:
                        yield cut


def _segments(case: Case, horizontal: bool) -> tuple[int, ...]:
    """Lines that a segment may have."""
    if horizontal:
        return (64 // case.itemsize, 32 // case.itemsize, 16 // case.itemsize)
    single = len(case.problem.directions) == 1 and "gate" not in case.views
    if has_hidden(case, horizontal) and not (single and not memory.sums_channels(case)):
        return (4,)  # with so many operands, more blocks on a multiprocessor are worth more than longer ones
    return (16, 12, 8, 6, 4)


def _fit(case: Case, sizes: Sizes, strips: int, most: int, own: int, places: int, segment: int) -> Cut | None:
    """The cut with these numbers if it fits; a cluster takes up to `most` channels."""
    problem, size = case.problem, case.itemsize
    sums = memory.sums_channels(case)
    halo = 0 if strips == 1 else _halo(case, places, segment)
    if (strips > 1 and halo > own) or (not sizes.horizontal and segment % (UNIT // (places * size))):
        return None
    needed = -(-min(sizes.places, own + min(2, strips - 1) * halo) // places)
    width = -(-needed // 32) * 32
    if not sizes.horizontal and not sums and strips == 1 and needed <= 16:
        width = max(1 << (needed - 1).bit_length(), UNIT // (places * size))
    threads = max(width, 32)
    direct = is_direct(case, sizes, strips, min(most, 1), width)
    taken = 2 * segment * case.itemsize * (direct and memory.has_weights(case))  # a tap that is not read
    shared = (
        (_place_bytes(case, sizes.horizontal, segment) - taken) * threads * places
        + 16 * (threads // 32 + 2)
        + 16 * halo
    )
    shared += (
        BARRIERS * (strips > 1)
        + BARRIERS * (direct and memory.chains(case) > 0)
        + POINTERS * sizes.horizontal
    )
    if shared > case.device.shared_memory or threads > THREADS[-1]:
        return None
    together = parts = 1
    blocks = -(-problem.batch * problem.channels // (threads // width)) * strips
    if sums:
        per_group = problem.channels // problem.groups
        parts = -(-per_group // most)
        together = -(-per_group // parts)
        blocks = problem.batch * problem.groups * parts * together * strips
    return Cut(sizes, places, strips, own, together, parts, width, threads, blocks, segment, shared, halo)


def _halo(case: Case, places: int, segment: int) -> int:
    rounded = max(places, UNIT // case.itemsize)
    return -(-segment // rounded) * rounded


def _units(case: Case, horizontal: bool) -> int:
    """Stages of all operands together, as UNITS in the kernel."""
    both = 4 + ("lam" in case.views)
    sums = 0 if len(case.problem.directions) == 1 else 1 if case.itemsize == 4 else 2
    back = 1 + ("gate" in case.views) + sums
    return 2 * (both + back + 1) if has_hidden(case, horizontal) else 2 * both + back


def _place_bytes(case: Case, horizontal: bool, segment: int) -> int:
    """Bytes of shared memory for one place in all lines of a segment."""
    states = 0 if has_hidden(case, horizontal) else 4
    return segment * (_units(case, horizontal) * case.itemsize + states)


def _cost(case: Case, cut: Cut) -> float:
    """Cycles that a launch takes, estimated: waves of blocks, each as slow as what limits it.

    The constants are of an H200 at 1.8 GHz, instructions as compiled: an order of magnitude, to choose by.
    """
    device, many = case.device, case.device.multiprocessors
    hidden, normalize = has_hidden(case, cut.sizes.horizontal), case.problem.normalize
    wide = cut.width > 32
    warps = cut.threads // 32
    resident = min(
        (device.shared_memory + RESERVED) // (cut.shared + RESERVED),
        max(1, RESIDENT // cut.threads),
        -(-cut.blocks // many),
    )
    # Clusters live in a GPC, of about 16 multiprocessors.
    at_once = many * resident
    if cut.cluster > 1:
        at_once = max(1, many // 16 * (16 * resident // cut.cluster)) * cut.cluster
    # Of a warp for one line on the way back, and twice on the way forward.
    if cut.sizes.horizontal:
        back, forward = 50 + (35 + 45 * normalize) * cut.places, 25 + (12 + 35 * normalize) * cut.places
    else:
        back, forward = 90 + (28 + 45 * normalize) * cut.places, 60 + (14 + 30 * normalize) * cut.places
    instructions = back + (0 if hidden else 2 * forward)
    # What one line waits for the one before, and a segment for its operands; what a cluster sums over its
    # blocks comes through their shared memory, and slowly.
    waiting = 100 + 25 * wide * warps + (600 + 600 * (cut.cluster > 1)) / cut.segment
    waiting += (cut.together > 1) * (1000 + 5 * cut.own)
    waiting += (cut.strips > 1) * (3000 if hidden else 12000) / cut.segment
    if not hidden:
        waiting += 2 * (60 + 50 * wide)
    traffic = _traffic(case, cut) * _pages(case, cut)
    place = cut.threads * cut.places
    own = cut.own if cut.strips > 1 else cut.sizes.places * cut.threads // cut.width

    def wave(blocks: int) -> float:
        busy = -(-blocks // many)
        issued = instructions * warps * busy / 4
        line = max(
            issued,
            instructions * -(-warps // 4) + waiting,
            traffic * place * busy / 35,
            traffic * blocks * own / (18 * many),
        )
        # Of equals, the one with fewer instructions.
        return cut.sizes.lines * (line + issued / 50)

    rest = cut.blocks % at_once
    total = cut.blocks // at_once * wave(at_once) + (wave(rest) if rest else 0)
    # Of equals, the one with fewer places beyond its own, and not the fewest threads.
    total *= 0.9 + 0.1 * place / own
    if not cut.sizes.horizontal and cut.places * case.itemsize == UNIT:
        total *= 1.05
    return total * (SPILLS if _spills(cut) else 1)


def _traffic(case: Case, cut: Cut) -> float:
    """Bytes to and from memory for one place of one line of a channel."""
    problem, size = case.problem, case.itemsize
    sums = 4 * (len(problem.directions) > 1)
    lam, gate = "lam" in case.views, "gate" in case.views
    # Blocks of a cluster read the same taps at about the same time.
    taps = 3 * size / cut.together
    traffic = size * (3 + 2 * lam + 2 * gate) + 2 * sums + taps
    if has_hidden(case, cut.sizes.horizontal):
        traffic += size
    else:
        traffic += size * (1 + lam) + taps + 8 / cut.segment
    if not memory.sums_channels(case):
        return traffic + 3 * size
    per_group = problem.channels // problem.groups
    return traffic + (24 * cut.parts if cut.parts > 1 else 3 * size) / per_group


def _pages(case: Case, cut: Cut) -> float:
    """How much longer short pieces of rows take from memory than whole rows do: its pages are longer."""
    problem = case.problem
    all_planes = problem.batch * problem.channels * problem.height * problem.width
    if not cut.sizes.horizontal or all_planes * _traffic(case, cut) < case.device.cache:
        return 1
    return {16: 12, 32: 3, 64: 3}[cut.segment * case.itemsize]


def _spills(cut: Cut) -> bool:
    """Has a block too many threads for the registers that a thread with so many places takes?"""
    return cut.threads > RESIDENT and cut.places >= (2 if cut.sizes.horizontal else 4)
