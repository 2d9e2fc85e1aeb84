"""How the planes kernels cut their lines: every way that fits the device, and an estimate of its time.

The estimate knows three limits (instructions, latency of a line, bytes) and is good for choosing, not for
promises. Times are in clock cycles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from ..geometry import Case

LANES = 32
MOST_WARPS = 16
"""Of a block: with more, registers would spill."""

RESERVED = 1024
"""Bytes of shared memory that the device takes for itself, of every block."""

VECTOR_BYTES = 16
BARRIERS = 128
"""Bytes of shared memory for the barriers of bulk copies."""

# What the estimate is made of, for an H200: cycles, and bytes a cycle.
BLOCK_BARRIER = 90
CLUSTER_BARRIER = 400
STAGE = 150
LATENCY_OF_A_LINE = 40
LATENCY_OF_MEMORY = 1400
LAUNCH_OF_A_BLOCK = 1500
BYTES_OF_ALL = 2400.0
BYTES_OF_ONE = 48.0


@dataclass(frozen=True)
class Cut:
    """How the lines of vertical or of horizontal scans are cut; `Cut` and its macros in `kernels/planes.cuh`.

    Args:
        each: places of a thread.
        stage: lines that are in shared memory together.
        run: lines between exchanges of warps.
        own: places of a block.
        beyond: places it holds beyond these on either side.
        window: places of a warp.
        lanes: lanes that hold places beyond these, on either side.
        warps: of a channel.
        tile: bytes of one tensor's part of a stage, in its storage type.
    """

    each: int
    stage: int
    run: int
    own: int
    beyond: int
    window: int
    lanes: int
    warps: int
    tile: int

    @property
    def strip(self) -> int:
        return self.own + 2 * self.beyond

    @property
    def knobs(self) -> tuple[int, ...]:
        return (self.stage, self.run, self.own, self.beyond, self.window, self.lanes)


@dataclass(frozen=True)
class Layout:
    """A whole way of cutting: both orientations that the problem needs, and what they share.

    Args:
        case: what it is for.
        blocks: of a line; more than one run as a cluster.
        channels: of a block.
        stages: in shared memory.
        span: bytes of a row in a stage of horizontal scans.
        vertical, horizontal: None where the problem has no such direction.
    """

    case: Case
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
        """Of a block."""
        return self.channels * max(cut.warps for cut in self.cuts)

    @property
    def grid(self) -> int:
        problem = self.case.problem
        return problem.batch * problem.channels // self.channels * self.blocks

    @property
    def bulk(self) -> bool:
        """Can rows be copied whole by the copy engine?"""
        case = self.case
        return (
            self.vertical is not None
            and case.device.capability >= (9, 0)
            and alignment_of(case) == VECTOR_BYTES
            and case.problem.width * case.itemsize % VECTOR_BYTES == 0
        )

    @cached_property
    def shared(self) -> int:
        """Bytes of shared memory of a block."""
        pitch = (max(cut.strip for cut in self.cuts) + 15) // 8 * 8
        lines = 4 if self.blocks > 1 else 2
        states = up(4 * lines * self.channels * pitch, 128)
        tiles = 3 + self.channels * (tensors(self.case) + sums(self.case) * 4 // self.case.itemsize)
        return BARRIERS * self.bulk + states + self.stages * tiles * max(cut.tile for cut in self.cuts)

    def fits(self) -> bool:
        return self.warps <= MOST_WARPS and self.shared <= self.case.device.shared_memory

    @cached_property
    def resident(self) -> int:
        """Blocks at once on a multiprocessor."""
        device = self.case.device
        most = (device.shared_memory + RESERVED) // (self.shared + RESERVED)
        return max(
            1,
            min(
                most, 32, 16 // self.warps if self.warps > 1 else 32, -(-self.grid // device.multiprocessors)
            ),
        )

    def cycles(self) -> float:
        """Estimate of the time of all directions."""
        directions = self.case.problem.directions
        vertical = sum(direction in ("down", "up") for direction in directions)
        waves = -(-self.grid // (self.case.device.multiprocessors * self.resident))
        total = 0.0
        for cut, times in ((self.vertical, vertical), (self.horizontal, len(directions) - vertical)):
            if cut is not None and times:
                total += times * (LATENCY_OF_MEMORY + self._lines(cut) * self._cycles_of_a_line(cut))
        return waves * (LAUNCH_OF_A_BLOCK + total)

    def _lines(self, cut: Cut) -> int:
        problem = self.case.problem
        return problem.height if cut is self.vertical else problem.width

    def _cycles_of_a_line(self, cut: Cut) -> float:
        """Of the blocks that share a multiprocessor, together."""
        instructions = self._instructions(cut)
        warps = cut.warps * self.channels
        alone = instructions * -(-warps // 4) + LATENCY_OF_A_LINE + STAGE / cut.stage
        if cut.lanes:
            alone += BLOCK_BARRIER / cut.run
        if self.blocks > 1:
            alone += CLUSTER_BARRIER / cut.beyond
        together = instructions * -(-warps * self.resident // 4)
        return max(alone, together, self._cycles_of_bytes(cut))

    def _instructions(self, cut: Cut) -> float:
        """Of a warp, a line."""
        narrow, normalize = self.case.itemsize < 4, self.case.problem.normalize
        place = (
            8 + 6 * narrow + 32 * normalize + 3 * sums(self.case) + (1 + narrow) * ("gate" in self.case.views)
        )
        return 24 + cut.each * place

    def _cycles_of_bytes(self, cut: Cut) -> float:
        """Bytes of a line by the rate at which a multiprocessor gets them."""
        device = self.case.device
        itemsize = self.case.itemsize
        tiles = 3 + self.channels * (tensors(self.case) + sums(self.case) * 4 // itemsize)
        read = tiles * itemsize * cut.strip
        written = self.channels * cut.own * (4 if sums(self.case) else itemsize)
        busy = min(device.multiprocessors, self.grid / self.resident)
        rate = min(BYTES_OF_ONE, BYTES_OF_ALL / busy)
        under_way = self.resident * (self.stages - 1) * tiles * cut.tile
        rate = min(rate, under_way / LATENCY_OF_MEMORY)
        if cut is self.horizontal and self.span < 64:
            rate *= 0.8
        return self.resident * (read + written) / rate


def tensors(case: Case) -> int:
    """Of a channel, besides taps and sums."""
    return 1 + ("lam" in case.views) + ("gate" in case.views)


def sums(case: Case) -> bool:
    """Is there a sum over directions?"""
    return len(case.problem.directions) > 1


def up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def alignment_of(case: Case) -> int:
    """The largest power of two, at most 16, that divides the address of every row, in bytes."""
    problem = case.problem
    bits = VECTOR_BYTES
    for view in case.views.values():
        bits |= view.alignment
        # The stride of taps' groups is in c, and there are no more of them than channels.
        for stride, size in (
            (view.b, problem.batch),
            (view.d, len(problem.directions)),
            (view.c, problem.channels),
            (view.k, 3),
            (view.h, problem.height),
        ):
            if size > 1:
                bits |= stride * case.itemsize
    return bits & -bits


def cut_lines(
    case: Case, vertical: bool, each: int, stage: int, run: int, beyond: int, blocks: int
) -> Cut | None:
    """A cut; None where it does not exist: a block would need more than its neighbours hold."""
    problem = case.problem
    places = problem.width if vertical else problem.height
    vector = VECTOR_BYTES // case.itemsize
    unit = vector if vertical else each
    own = up(-(-places // blocks), unit)
    if blocks == 1:
        beyond = 0
    elif own < beyond or beyond % unit or stage % beyond or own * (blocks - 1) >= places:
        return None
    strip = own + 2 * beyond
    if strip <= LANES * each:
        warps, lanes, window = 1, 0, LANES * each
        run = beyond if blocks > 1 else stage
    else:
        lanes = -(-run // each)
        if lanes > 8 or stage % run or beyond % run:
            return None
        warps = -(-strip // ((LANES - 2 * lanes) * each))
        window = up(-(-strip // warps), each)
    if vertical:
        tile = stage * up(strip, vector) * case.itemsize
    else:
        tile = each * up(-(-strip // each), 8) * stage * case.itemsize
    return Cut(each, stage, run, own, beyond, window, lanes, warps, tile)


def layouts(case: Case) -> Iterator[Layout]:
    """Every way worth a thought that fits."""
    for blocks, channels in _sharings(case):
        for span in (64, 32):
            horizontals = list(_horizontals(case, span, blocks))
            for vertical in _verticals(case, blocks):
                for horizontal in horizontals:
                    for stages in (4, 3, 2):
                        layout = Layout(case, blocks, channels, stages, span, vertical, horizontal)
                        if layout.fits():
                            yield layout
            if horizontals == [None]:
                break


def best_layout(case: Case) -> Layout | None:
    """The one with the lowest estimate; None if none fits."""
    return min(layouts(case), key=Layout.cycles, default=None)


def _sharings(case: Case) -> Iterator[tuple[int, int]]:
    """Blocks a line, and channels a block; these share taps."""
    problem = case.problem
    per_group = problem.channels // problem.groups
    for blocks in (1, 2, 4, 8) if case.device.capability >= (9, 0) else (1,):
        yield blocks, 1
        if blocks > 1 and per_group % blocks == 0:
            yield blocks, blocks


def _verticals(case: Case, blocks: int) -> Iterator[Cut | None]:
    problem = case.problem
    if not any(direction in ("down", "up") for direction in problem.directions):
        yield None
        return
    vector = VECTOR_BYTES // case.itemsize
    least = vector // 4
    each = least
    while each < vector and LANES * each < problem.width:
        each *= 2
    for places in dict.fromkeys((each, max(least, each // 2), max(least, each // 4))):
        for stage in (16, 8, 4, 2):
            if stage > 4 and stage >= 2 * problem.height:
                continue
            run = min(stage, max(places, 4))
            for beyond in (8, 16) if blocks > 1 else (0,):
                cut = cut_lines(case, True, places, stage, run, beyond, blocks)
                if cut is not None:
                    yield cut


def _horizontals(case: Case, span: int, blocks: int) -> Iterator[Cut | None]:
    problem = case.problem
    if not any(direction in ("right", "left") for direction in problem.directions):
        yield None
        return
    vector = VECTOR_BYTES // case.itemsize
    stage = span // case.itemsize
    for places in (1, 2, 4):
        for beyond in dict.fromkeys((vector, 16, stage)) if blocks > 1 else (0,):
            cut = cut_lines(case, False, places, stage, vector, beyond, blocks)
            if cut is not None:
                yield cut
