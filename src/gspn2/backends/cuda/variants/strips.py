"""Right and left over large planes: warps that scan strips of a line, and warps that copy for them.

Forward only, one direction, weights as given, sm_90: see `kernels/strips.cuh`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from ..geometry import Case, Kernel, Launch, Plan, options
from .planes_layout import LANES, REGISTERS, RESERVED, VECTOR_BYTES, alignment_of

CAPABILITY = (9, 0)
"""States go from block to block by counted stores."""

HALO = 16
"""Rows of its neighbours that a strip has on either side."""

REGISTERS_NEEDED = {3: 128, 5: 184}
"""Of a thread, by rows of a lane: odd, see the kernel."""

PIECE = 64
"""Bytes of a row in a tile, in every layout that is chosen."""

SHORTEST = 256
"""Columns; narrower planes are left to others."""


@dataclass(frozen=True)
class Choice:
    """What runs planes of so many rows: blocks of a plane, strips of a block, tiles of its ring."""

    least: int
    most: int
    cluster: int
    strips: int
    stages: int


# Three rows a lane, 64 rows of its own a strip, which have to be nearly all there: 32 more are scanned twice,
# however few they are. Two tiles want as much shared memory as a block can have, and pay for it; clusters are
# as small as that allows. Only for taps in 16 bits that channels share, which come from the cache, fewer
# blocks gain more than a second tile.
QUARTER = Choice(256, 256, 1, 4, 2)
HALF = Choice(448, 512, 2, 4, 2)
WHOLE = Choice(896, 1024, 4, 4, 2)
WHOLE_SHARED = Choice(896, 1024, 2, 8, 1)

CHOICES = {
    (False, False): (QUARTER, HALF, WHOLE),
    (False, True): (QUARTER, HALF, WHOLE_SHARED),
    (True, False): (WHOLE,),
    (True, True): (QUARTER, HALF, WHOLE),
}
"""What was faster than `lines` on an H200, by whether elements have 32 bits, and whether channels share taps.
In float32 with taps of their own both come near the speed of memory."""

FILLED = 0.85
"""Of the multiprocessors' time, at least: a block has one for itself, those of `lines` leave fewer idle."""


@dataclass(frozen=True)
class Layout:
    """One way of running a case.

    Args:
        case: what it is for.
        cluster: blocks that share a plane.
        strips, copiers: warps of a block that scan, and that copy.
        rows: of a lane.
        piece: bytes of a row in a tile.
        stages: tiles of a block.
    """

    case: Case
    cluster: int
    strips: int
    copiers: int
    rows: int
    piece: int
    stages: int

    @property
    def most(self) -> int:
        """Rows of a strip, its own, at most."""
        return LANES * self.rows - 2 * HALO

    @property
    def own(self) -> int:
        """Rows of a strip."""
        return -(-self.case.problem.height // (self.cluster * self.strips))

    @property
    def threads(self) -> int:
        return LANES * (self.strips + self.copiers)

    @property
    def shared(self) -> int:
        """Bytes, as the kernel counts them."""
        tensors = 4 + ("lam" in self.case.views)
        tile = (self.strips * self.most + 2 * HALO) * self.piece
        results = self.strips * self.most * self.piece
        head = 4 * self.strips * 4 * HALO + 8 * (4 * self.strips + 2 * self.stages)
        return -(-head // 128) * 128 + self.stages * (tensors * tile + results)

    @property
    def blocks(self) -> int:
        """At once on a multiprocessor."""
        room = (self.case.device.shared_memory + RESERVED) // (self.shared + RESERVED)
        return max(1, min(room, self._room))

    @property
    def _room(self) -> int:
        """Blocks whose registers a multiprocessor has."""
        return REGISTERS // (REGISTERS_NEEDED[self.rows] * self.threads)

    @property
    def clusters(self) -> int:
        """Of the grid. Small ones have planes in turn, as many each.

        Of clusters of four or eight the device runs fewer at once than its multiprocessors would hold.
        """
        return _planes(self.case) if self.cluster > 2 else -(-_planes(self.case) // self._rounds)

    @property
    def _at_once(self) -> int:
        """Planes."""
        return max(1, self.case.device.multiprocessors * self.blocks // self.cluster)

    @property
    def _rounds(self) -> int:
        return -(-_planes(self.case) // self._at_once)

    @property
    def filled(self) -> float:
        """Part of the multiprocessors' time in which they have a plane."""
        return _planes(self.case) / (self._rounds * self._at_once)

    def fits(self) -> bool:
        strips, height = self.cluster * self.strips, self.case.problem.height
        if self.own > self.most or self.shared > self.case.device.shared_memory or self._room < 1:
            return False
        if self.copiers * LANES * VECTOR_BYTES // self.piece % 8:
            return False
        # Nobody without rows; states for a neighbour are all of one strip.
        return self.own >= HALO and self.own * (strips - 1) < height


def _planes(case: Case) -> int:
    return case.problem.batch * case.problem.channels


def why_not(case: Case) -> str | None:
    """It needs one direction, right or left, given weights, aligned rows, and planes that are not small."""
    if case.device.capability < CAPABILITY:
        return "it needs compute capability 9.0"
    if case.backward:
        return "it has no backward"
    problem = case.problem
    if problem.normalize or len(problem.directions) > 1 or problem.directions[0] not in ("right", "left"):
        return "it scans one direction, right or left, with weights as given"
    if "gate" in case.views:
        return "it has no gate"
    for name, view in case.views.items():
        if view.w != 1:
            return f"columns of {name} are {view.w} elements apart, not adjacent"
    if any(abs(view.h) >= 2**31 for view in case.views.values()):
        return "rows are further apart than 32 bits can tell"
    if alignment_of(case) < VECTOR_BYTES or problem.width * case.itemsize % VECTOR_BYTES:
        return f"rows do not start and end at multiples of {VECTOR_BYTES} bytes"
    if best_layout(case) is None:
        return f"others are faster for {_planes(case)} planes of {problem.height} x {problem.width}"
    return None


def plan(case: Case) -> Plan:
    layout = best_layout(case)
    assert layout is not None
    return plan_of(layout)


def best_layout(case: Case) -> Layout | None:
    """The one to run; None where others are faster."""
    problem = case.problem
    wide, shared = case.itemsize == 4, problem.groups < problem.channels
    for choice in CHOICES[wide, shared]:
        if problem.width < SHORTEST or not choice.least <= problem.height <= choice.most:
            continue
        layout = Layout(case, choice.cluster, choice.strips, choice.strips, 3, PIECE, choice.stages)
        # With few planes a line's latency is all there is: only where that was found to be shorter.
        if layout.fits() and (layout.filled >= FILLED or (choice is WHOLE and not wide)):
            return layout
    return None


def layouts(case: Case) -> Iterator[Layout]:
    """Every way that fits, for tests and trials."""
    for cluster, strips, rows in product((1, 2, 4, 8), (2, 4, 8), REGISTERS_NEEDED):
        for piece, stages in product((128, 64, 32), (2, 1)):
            copiers = max(min(strips, 4), piece // 64)
            layout = Layout(case, cluster, strips, copiers, rows, piece, stages)
            if layout.fits():
                yield layout


def plan_of(layout: Layout) -> Plan:
    case = layout.case
    defines = {
        "CLUSTER": layout.cluster,
        "STRIPS": layout.strips,
        "COPIERS": layout.copiers,
        "BLOCKS": layout.blocks,
        "ROWS": layout.rows,
        "PIECE": layout.piece,
        "STAGES": layout.stages,
    }
    kernel = Kernel("strips_forward.cu", "strips_forward", (*options(case), *defines.items()))
    knobs = (layout.clusters, layout.own)
    grid = layout.clusters * layout.cluster
    launch = Launch(kernel, grid, layout.threads, layout.shared, cluster=layout.cluster, knobs=knobs)
    reasons = (
        f"rows are contiguous and aligned; columns over {layout.cluster} blocks: {layout.strips} warps scan "
        f"{layout.own} rows each, {layout.copiers} copy",
        f"{layout.piece} bytes of a row at once, {layout.stages} tiles a block",
    )
    return Plan("strips", (launch,), reasons=reasons)


def representative_kernels() -> list[tuple[Kernel, bool]]:
    """Kernels that the tests compile, and whether each is hot (must not spill)."""
    kernels = []
    for storage, choice in product((1, 0), (QUARTER, HALF, WHOLE, WHOLE_SHARED)):
        defines = {"STORAGE": storage, "NORMALIZE": 0, "HAS_LAM": 1, "HAS_GATE": 0, "CLUSTER": choice.cluster}
        defines |= {"STRIPS": choice.strips, "COPIERS": choice.strips, "BLOCKS": 1, "ROWS": 3}
        defines |= {"PIECE": PIECE, "STAGES": choice.stages}
        kernels.append((Kernel("strips_forward.cu", "strips_forward", tuple(defines.items())), True))
    return kernels
