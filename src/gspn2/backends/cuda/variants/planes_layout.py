"""How the planes kernels cut their lines: every way that fits the device, and an estimate of its time.

The estimate knows three limits (instructions, latency of a line, bytes) and is good for choosing, not for
promises. Times are in clock cycles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

from ...problem import Problem
from ..geometry import Case, Device, options

LANES = 32
REGISTERS = 65536
"""Of a multiprocessor."""

RESERVED = 1024
"""Bytes of shared memory that the device takes for itself, of every block."""

VECTOR_BYTES = 16
LONGEST_SPAN = 64
"""Bytes of a row in a stage of horizontal scans, at most."""

ENOUGH_BLOCKS = 4
"""A multiprocessor: with more planes than this, segments stay in one block."""

BARRIERS = 128
"""Bytes of shared memory for the barriers of bulk copies."""

# What the estimate is made of, for an H200: cycles, and bytes a cycle.
BLOCK_BARRIER = 90
CLUSTER_BARRIER = 400
STAGE = 150
LATENCY_OF_A_LINE = 40
LATENCY_OF_MEMORY = 1200
LAUNCH_OF_A_BLOCK = 1500
BYTES_OF_ALL = 2400.0
BYTES_OF_ONE = 48.0
CACHE = 1.25
"""What the second-level cache delivers, as a multiple of what memory does."""
SHORT_ROWS = 0.8
"""Share of the bandwidth that is left where rows are read in pieces of 32 bytes."""
OVERLAP = 0.1
"""Share of the lesser limits that adds to the greatest."""


@dataclass(frozen=True)
class Facts:
    """What cutting depends on.

    Args:
        problem: semantics and sizes.
        device: the GPU.
        options: macros that say what is computed, from what.
        lam, gate: are these tensors there.
        alignment: the largest power of two, at most 16, that divides the address of every row, in bytes.
    """

    problem: Problem
    device: Device
    options: tuple[tuple[str, int], ...]
    lam: bool
    gate: bool
    alignment: int

    @staticmethod
    def of(case: Case) -> Facts:
        lam, gate = "lam" in case.views, "gate" in case.views
        return Facts(case.problem, case.device, options(case), lam, gate, alignment_of(case))

    @property
    def itemsize(self) -> int:
        return self.problem.dtype.itemsize

    @property
    def vector(self) -> int:
        """Elements in 16 bytes."""
        return VECTOR_BYTES // self.itemsize

    @property
    def tensors(self) -> int:
        """Of a channel, besides taps and sums."""
        return 1 + self.lam + self.gate

    @property
    def sums(self) -> bool:
        """Is there a sum over directions?"""
        return len(self.problem.directions) > 1

    @property
    def verticals(self) -> int:
        """How many directions are vertical."""
        return sum(direction in ("down", "up") for direction in self.problem.directions)

    @property
    def horizontals(self) -> int:
        return len(self.problem.directions) - self.verticals

    @property
    def bulk(self) -> bool:
        """Can the copy engine take rows, which then start and end at multiples of 16 bytes?"""
        return (
            self.verticals > 0
            and self.device.capability >= (9, 0)
            and self.alignment == VECTOR_BYTES
            and self.problem.width * self.itemsize % VECTOR_BYTES == 0
        )

    @property
    def lines(self) -> int:
        """Most lines of a direction."""
        return max(
            self.problem.height if self.verticals else 0, self.problem.width if self.horizontals else 0
        )

    @cached_property
    def segment(self) -> int:
        """Lines that one block scans: between restarts, segments are problems of their own.

        With one direction and few planes they are shared out to blocks. Horizontal scans cut where a stage
        ends, whose columns are counted from the left.
        """
        problem, lines = self.problem, self.lines
        if problem.chunk is None or problem.chunk >= lines or self.sums:
            return lines
        step = problem.chunk
        if self.horizontals:
            columns = LONGEST_SPAN // self.itemsize
            step = math.lcm(step, columns)
            if problem.directions == ("left",) and problem.width % columns:
                return lines
        wanted = ENOUGH_BLOCKS * self.device.multiprocessors // max(1, problem.batch * problem.channels)
        return lines if wanted < 2 else min(lines, up(-(-lines // wanted), step))

    @property
    def segments(self) -> int:
        return -(-self.lines // self.segment)

    def elements(self, channels: int) -> int:
        """Elements of the storage type that are read for a place of so many channels, sums included."""
        return 3 + channels * (self.tensors + self.sums * 4 // self.itemsize)


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
        facts: what it is for.
        blocks: of a line; more than one run as a cluster.
        channels: of a block.
        stages: in shared memory.
        span: bytes of a row in a stage of horizontal scans.
        vertical, horizontal: None where the problem has no such direction.
        bulk: rows of vertical scans are copied whole, by the copy engine.
    """

    facts: Facts
    blocks: int
    channels: int
    stages: int
    span: int
    vertical: Cut | None
    horizontal: Cut | None
    bulk: bool

    @property
    def cuts(self) -> tuple[Cut, ...]:
        return tuple(cut for cut in (self.vertical, self.horizontal) if cut is not None)

    @cached_property
    def warps(self) -> int:
        """Of a block."""
        return self.channels * max(cut.warps for cut in self.cuts)

    @property
    def grid(self) -> int:
        problem = self.facts.problem
        return problem.batch * problem.channels // self.channels * self.facts.segments * self.blocks

    @cached_property
    def shared(self) -> int:
        """Bytes of shared memory of a block."""
        pitch = (max(cut.strip for cut in self.cuts) + 15) // 8 * 8
        lines = 4 if self.blocks > 1 else 2
        states = up(4 * lines * self.channels * pitch, 128)
        tile = max(cut.tile for cut in self.cuts)
        return BARRIERS * self.bulk + states + self.stages * self.facts.elements(self.channels) * tile

    @property
    def registers(self) -> int:
        """With fewer of them a thread would spill."""
        sums = self.facts.sums
        if self.horizontal is not None and self.horizontal.each > 2:
            return 236 if sums else 192
        wide = self.vertical is not None and self.vertical.each > 4
        return 168 if sums and wide and self.blocks > 1 else 128

    @property
    def threads(self) -> int:
        """A bound that few kernels share."""
        return LANES * (self.warps if self.warps < 4 else up(self.warps, 4))

    def fits(self) -> bool:
        return self.registers * self.threads <= REGISTERS and self.shared <= self.facts.device.shared_memory

    @cached_property
    def resident(self) -> int:
        """Blocks at once on a multiprocessor."""
        device = self.facts.device
        room = (device.shared_memory + RESERVED) // (self.shared + RESERVED)
        wanted = -(-self.grid // device.multiprocessors)
        return max(1, min(room, REGISTERS // (self.registers * self.threads), wanted))

    def cycles(self) -> float:
        """Estimate of the time of all directions."""
        facts = self.facts
        total = 0.0
        if self.vertical is not None:
            line = self._cycles_of_a_line(self.vertical)
            total += facts.verticals * (LATENCY_OF_MEMORY + min(facts.problem.height, facts.segment) * line)
        if self.horizontal is not None:
            line = self._cycles_of_a_line(self.horizontal)
            total += facts.horizontals * (LATENCY_OF_MEMORY + min(facts.problem.width, facts.segment) * line)
        waves = -(-self.grid // (facts.device.multiprocessors * self.resident))
        return waves * (LAUNCH_OF_A_BLOCK + total)

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
        limits = (alone, together, self._cycles_of_bytes(cut))
        return (1 - OVERLAP) * max(limits) + OVERLAP * sum(limits)

    def _instructions(self, cut: Cut) -> float:
        """Of a warp, a line."""
        facts = self.facts
        narrow = facts.itemsize < 4
        place = 5 + 6 * narrow + 32 * facts.problem.normalize + 3 * facts.sums + (1 + narrow) * facts.gate
        return 24 + cut.each * place

    def _cycles_of_bytes(self, cut: Cut) -> float:
        """Bytes of a line by the rate at which a multiprocessor gets them."""
        facts = self.facts
        device = facts.device
        place = facts.elements(self.channels) * facts.itemsize
        written = self.channels * cut.own * (4 if facts.sums else facts.itemsize)
        busy = min(device.multiprocessors, self.grid / self.resident)
        memory = BYTES_OF_ALL / busy
        if cut is self.horizontal and self.span < 64:
            memory *= SHORT_ROWS
        under_way = self.resident * (self.stages - 1) * facts.elements(self.channels) * cut.tile
        latency = (LATENCY_OF_MEMORY + under_way / BYTES_OF_ONE) / under_way
        return self.resident * max(
            (place * cut.own + written) / memory,
            (place * cut.strip + written) / min(BYTES_OF_ONE, CACHE * memory),
            place * cut.strip * latency,
        )


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
    facts: Facts, vertical: bool, each: int, stage: int, run: int, beyond: int, blocks: int
) -> Cut | None:
    """A cut; None where it does not exist: a block would need more than its neighbours hold."""
    problem = facts.problem
    places = problem.width if vertical else problem.height
    unit = facts.vector if vertical else each
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
        tile = stage * up(strip, facts.vector) * facts.itemsize
    else:
        tile = each * up(-(-strip // each), 8) * stage * facts.itemsize
    return Cut(each, stage, run, own, beyond, window, lanes, warps, tile)


def layouts(case: Case) -> Iterator[Layout]:
    """Every way worth a thought that fits."""
    return _layouts(Facts.of(case))


def best_layout(case: Case) -> Layout | None:
    """The one with the lowest estimate; None if none fits."""
    return _best_layout(Facts.of(case))


def _layouts(facts: Facts) -> Iterator[Layout]:
    for blocks, channels in _sharings(facts):
        for span in (LONGEST_SPAN, 32) if facts.horizontals else (LONGEST_SPAN,):
            horizontals = list(_horizontals(facts, span, blocks))
            for vertical in _verticals(facts, blocks):
                for horizontal in horizontals:
                    for stages in (4, 3, 2):
                        layout = Layout(
                            facts, blocks, channels, stages, span, vertical, horizontal, facts.bulk
                        )
                        if layout.fits():
                            yield layout


@lru_cache(maxsize=256)
def _best_layout(facts: Facts) -> Layout | None:
    return min(_layouts(facts), key=Layout.cycles, default=None)


def _sharings(facts: Facts) -> Iterator[tuple[int, int]]:
    """Blocks a line, and channels a block; these share taps."""
    problem = facts.problem
    per_group = problem.channels // problem.groups
    for blocks in (1, 2, 4, 8) if facts.device.capability >= (9, 0) else (1,):
        yield blocks, 1
        if blocks > 1 and per_group % blocks == 0:
            yield blocks, blocks


def _verticals(facts: Facts, blocks: int) -> Iterator[Cut | None]:
    if not facts.verticals:
        yield None
        return
    vector, width = facts.vector, facts.problem.width
    least = each = vector // 4
    while each < vector and LANES * each < width:
        each *= 2
    for places in dict.fromkeys((each, max(least, each // 2), max(least, each // 4))):
        for stage in (16, 8, 4, 2):
            if stage > 4 and stage >= 2 * facts.problem.height:
                continue
            run = min(stage, max(places, 4))
            for beyond in (8, 16) if blocks > 1 else (0,):
                cut = cut_lines(facts, True, places, stage, run, beyond, blocks)
                if cut is not None:
                    yield cut


def _horizontals(facts: Facts, span: int, blocks: int) -> Iterator[Cut | None]:
    if not facts.horizontals:
        yield None
        return
    stage = span // facts.itemsize
    for places in (1, 2, 4):
        for beyond in dict.fromkeys((facts.vector, 16, stage)) if blocks > 1 else (0,):
            cut = cut_lines(facts, False, places, stage, facts.vector, beyond, blocks)
            if cut is not None:
                yield cut
