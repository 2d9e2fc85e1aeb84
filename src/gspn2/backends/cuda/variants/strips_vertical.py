"""Down and up over few planes: warps that scan strips of a row, and warps that copy for them.

Forward only, one direction, weights as given, sm_90: see `kernels/strips_vertical.cuh`.
Also over as many planes as fill the device four to a block, if these share taps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from ..geometry import Case, Kernel, Launch, Plan, options
from .planes_layout import LANES, RESERVED, VECTOR_BYTES
from .strips_common import cannot

CAPABILITY = (9, 0)
"""States go from block to block by counted stores."""

COPIERS = 4
"""Warps of a block that copy: a scheduler has one of them beside one that scans."""

SHORTEST, LONGEST = 33, 2048
"""Columns; narrower and wider planes are left to others."""

COLUMNS = 128
"""Of a block: more would leave multiprocessors idle, with fewer the halos are much of what is copied."""

ONE_STRIP = ((2, 0), (4, 0))
"""Places of a lane, and no halo, where a line is a single strip: as few as can be."""

WAYS = {2: ((2, 16), (4, 32)), 4: ((4, 32),)}
"""Places of a lane and halo of a strip, by bytes of an element, for longer lines: the first that fits."""

HALVED = ((4, 32),)
"""The same, where two blocks share a multiprocessor."""

ALONE = (8, 4, 32)
"""Strips of a block that has a whole line, places of a lane, and halo."""

SHARING = {2: (4, (1, 8, 0)), 4: (4, (3, 4, 16))}
"""Planes of a block that share their taps, by bytes of an element; for each of them as in `ALONE`."""

LOWEST = 128
"""Lines of such planes; lower ones may fit on chip, which `resident` knows better."""


@dataclass(frozen=True)
class Layout:
    """One way of running a case.

    Args:
        case: what it is for.
        cluster: blocks that share a plane.
        strips: warps of a block that scan a plane.
        places: of a lane.
        halo: places of its neighbours that a strip has on either side; 0 for a single strip.
        blocks: of a multiprocessor.
        planes: of a block, which share their taps.
    """

    case: Case
    cluster: int
    strips: int
    places: int
    halo: int
    blocks: int = 1
    planes: int = 1

    @property
    def most(self) -> int:
        """Columns of a strip, its own, at most."""
        return LANES * self.places - 2 * self.halo

    @property
    def own(self) -> int:
        """Columns of a strip: whole vectors, which are copied together."""
        unit = VECTOR_BYTES // self.case.itemsize
        return -(-self.case.problem.width // (self.cluster * self.strips * unit)) * unit

    @property
    def threads(self) -> int:
        return LANES * (self.scanning + COPIERS)

    @property
    def scanning(self) -> int:
        """Warps of a block that scan."""
        return self.strips * self.planes

    @property
    def lines(self) -> int:
        """Of a tile: half of 16 where there are two blocks, or no room for a third tile; or a quarter."""
        if self.planes > 1 and 3 * self._tile(8) > self._ring:
            return 4
        return 16 if self.blocks == 1 and 3 * self._tile(16) <= self._ring else 8

    @property
    def stages(self) -> int:
        """Tiles of a block, as many as it has memory for, but no more than 8."""
        return min(8, self._ring // self._tile(self.lines))

    @property
    def shared(self) -> int:
        """Bytes, as the kernel counts them."""
        head = self._head(self.stages)
        return -(-head // 128) * 128 + self.stages * self._tile(self.lines)

    def _head(self, stages: int) -> int:
        """Bytes before the ring."""
        return 4 * self.scanning * 4 * self.halo + 8 * (4 * self.scanning + 2 * stages)

    @property
    def _ring(self) -> int:
        """Bytes that tiles can have."""
        room = (self.case.device.shared_memory + RESERVED) // self.blocks - RESERVED
        return room - -(-self._head(8) // 128) * 128

    def _tile(self, lines: int) -> int:
        """Bytes."""
        operands = 3 + self.planes * (1 + ("lam" in self.case.views))
        return lines * operands * (self.strips * self.most + 2 * self.halo) * self.case.itemsize

    @property
    def grid(self) -> int:
        return self.case.problem.batch * self.case.problem.channels // self.planes * self.cluster

    def fits(self) -> bool:
        number, width = self.cluster * self.strips, self.case.problem.width
        if self.own > self.most or self.stages < 2:
            return False
        if number == 1:
            return self.halo == 0
        # States for a neighbour are all of one strip.
        return self.halo > 0 and width - self.own * (number - 1) >= self.halo


def why_not(case: Case) -> str | None:
    """It needs one direction, down or up, given weights, aligned rows, and few planes."""
    reason = cannot(case, CAPABILITY, ("down", "up"))
    if reason is not None:
        return reason
    if best_layout(case) is None:
        problem, planes = case.problem, case.problem.batch * case.problem.channels
        return f"others are faster for {planes} planes of {problem.height} x {problem.width}"
    return None


def plan(case: Case) -> Plan:
    layout = best_layout(case)
    assert layout is not None
    return plan_of(layout)


def best_layout(case: Case) -> Layout | None:
    """The one to run; None where others are faster."""
    if not SHORTEST <= case.problem.width <= LONGEST:
        return None
    # A block has a multiprocessor for itself, and not all can be had in clusters.
    most = case.device.multiprocessors * 10 // 11
    layout = next(_cuts(case, ONE_STRIP), None) or _long(case, WAYS[case.itemsize])
    if layout is None or layout.grid <= most:
        return layout
    # Long lines of more planes gain by two blocks on a multiprocessor, as long as that is about all of them.
    layout = _long(case, HALVED, blocks=2)
    if layout is not None and layout.cluster == 8 and layout.strips * layout.most <= COLUMNS:
        return layout if layout.grid <= 2 * case.device.multiprocessors else None
    return _alone(case) or _together(case)


def _alone(case: Case) -> Layout | None:
    """A block for each plane: with taps that channels share, a line's latency is longer than its bytes."""
    problem, processors = case.problem, case.device.multiprocessors
    if problem.groups == problem.channels or case.itemsize > 2:
        return None
    layout = Layout(case, 1, *ALONE)
    if not layout.fits() or 4 * problem.width < 3 * layout.strips * layout.most:
        return None
    return layout if 3 * processors <= 4 * layout.grid <= 4 * processors else None


def _together(case: Case) -> Layout | None:
    """A block for several planes: the second-level cache, which is the limit, hands out taps once for all."""
    layout, processors = next(_sharing(case), None), case.device.multiprocessors
    if layout is None or case.problem.height < LOWEST:
        return None
    if 4 * case.problem.width < 3 * layout.strips * layout.most:
        return None
    rounds = -(-layout.grid // processors)
    return layout if 3 * processors * rounds <= 4 * layout.grid else None


def _sharing(case: Case) -> Iterator[Layout]:
    """A block for several planes, where these have the same taps, if it fits."""
    planes, alone = SHARING[case.itemsize]
    layout = Layout(case, 1, *alone, planes=planes)
    if case.problem.channels // case.problem.groups % planes == 0 and layout.fits():
        yield layout


def _long(case: Case, ways: tuple[tuple[int, int], ...], blocks: int = 1) -> Layout | None:
    """Of what fits, that whose blocks have as near to COLUMNS as can be, in the smallest cluster."""
    for way in ways:
        if found := list(_cuts(case, (way,), blocks)):
            return min(found, key=lambda it: (abs(it.strips * it.most - COLUMNS), it.cluster))
    return None


def _cuts(case: Case, ways: tuple[tuple[int, int], ...], blocks: int = 1) -> Iterator[Layout]:
    """Of lines over strips, so many places and such a halo, what fits."""
    for places, halo in ways:
        for cluster, strips in product((1, 2, 4, 8), (2, 4, 8)) if halo else ((1, 1),):
            layout = Layout(case, cluster, strips, places, halo, blocks)
            if layout.fits():
                yield layout


def layouts(case: Case) -> Iterator[Layout]:
    """Every way that fits, for tests and trials."""
    yield from _sharing(case)
    yield from _cuts(case, (*ONE_STRIP, *WAYS[2]))
    yield from _cuts(case, HALVED, blocks=2)


def plan_of(layout: Layout) -> Plan:
    case = layout.case
    defines = {
        "CLUSTER": layout.cluster,
        "PLANES": layout.planes,
        "STRIPS": layout.scanning,
        "COPIERS": COPIERS,
        "PLACES": layout.places,
        "HALO": layout.halo,
        "STAGES": layout.stages,
        "LINES": layout.lines,
    }
    kernel = Kernel("strips_vertical.cu", "strips_vertical", (*options(case), *defines.items()))
    launch = Launch(
        kernel, layout.grid, layout.threads, layout.shared, cluster=layout.cluster, knobs=(layout.own,)
    )
    reasons = (
        f"rows are contiguous and aligned; rows over {layout.cluster} blocks: {layout.scanning} warps scan "
        f"{layout.own} columns each of {layout.planes} planes, {COPIERS} copy",
        f"{layout.places} places a thread, {layout.lines} lines at once, {layout.stages} tiles a block",
    )
    return Plan("strips_vertical", (launch,), reasons=reasons)


def representative_kernels() -> list[tuple[Kernel, bool]]:
    """Kernels that the tests compile, and whether each is hot (must not spill)."""
    # A line in one warp, or in a block; planes that share taps; long lines of few planes, in clusters of
    # eight; of more planes, two blocks at once.
    cuts = {
        1: (
            (1, 1, 1, 2, 0, 16, 8),
            (1, 1, 1, 4, 0, 16, 8),
            (1, 1, 8, 4, 32, 8, 4),
            (1, 4, 4, 8, 0, 8, 5),
            (8, 1, 4, 2, 16, 16, 8),
            (8, 1, 2, 4, 32, 8, 7),
        ),
        0: (
            (1, 1, 1, 2, 0, 16, 8),
            (1, 1, 1, 4, 0, 16, 5),
            (1, 4, 12, 4, 16, 4, 4),
            (8, 1, 2, 4, 32, 16, 3),
            (8, 1, 2, 4, 32, 8, 3),
        ),
    }
    names = ("CLUSTER", "PLANES", "STRIPS", "PLACES", "HALO", "LINES", "STAGES")
    kernels = []
    for storage, cut in ((storage, cut) for storage, found in cuts.items() for cut in found):
        defines = {"STORAGE": storage, "NORMALIZE": 0, "HAS_LAM": 1, "HAS_GATE": 0, "COPIERS": COPIERS}
        defines |= dict(zip(names, cut, strict=True))
        kernels.append((Kernel("strips_vertical.cu", "strips_vertical", tuple(defines.items())), True))
    return kernels
