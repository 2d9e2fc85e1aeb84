"""Right and left over large planes: warps that scan strips of a line, and warps that copy for them.

Forward only, one direction, weights as given, sm_90: see `kernels/strips.cuh`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..geometry import Case, Kernel, Launch, Plan, options
from .planes_layout import LANES, REGISTERS, RESERVED
from .strips_common import cannot

CAPABILITY = (9, 0)
"""States go from block to block by counted stores."""

HALO = 16
"""Rows of its neighbours that a strip has on either side."""

ROWS = 3
"""Of a lane, as in the kernel."""

PIECE = 64
"""Bytes of a row in a tile, as in the kernel."""

REGISTERS_NEEDED = 192
"""Of a thread."""

MOST = LANES * ROWS - 2 * HALO
"""Rows of a strip, its own."""

SHORTEST = 256
"""Columns; narrower planes are left to others."""

SAVED = 0.1
"""Of the time, at least, that cutting the last planes has to save: a warp has some registers less for it."""


@dataclass(frozen=True)
class Choice:
    """What runs planes of so many rows: blocks of a plane, and what is in each (see `Layout`)."""

    least: int
    most: int
    cluster: int
    strips: int
    copiers: int
    stages: int = 2


# A strip's rows have to be nearly all there: 32 more are scanned twice, however few they are. Two tiles want
# as much shared memory as a block can have, and pay for it; clusters are as small as that allows. Only a few
# planes, which leave multiprocessors idle, gain by more blocks, with room for a third tile where tiles have
# half as many columns.
QUARTER = Choice(256, 256, 1, 4, 4)
HALF = Choice(448, 512, 2, 4, 4)
WHOLE = Choice(896, 1024, 4, 4, 2)
WHOLE_OF_FEW = Choice(896, 1024, 8, 2, 2)
WHOLE_OF_FEW_WIDE = Choice(896, 1024, 8, 2, 2, stages=3)

CHOICES = {
    (False, False): (QUARTER, HALF, WHOLE_OF_FEW, WHOLE),
    (False, True): (QUARTER, HALF, WHOLE_OF_FEW, WHOLE),
    (True, False): (HALF, WHOLE_OF_FEW_WIDE, WHOLE),
    (True, True): (QUARTER, HALF, WHOLE_OF_FEW_WIDE, WHOLE),
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
        stages: tiles of a block.
    """

    case: Case
    cluster: int
    strips: int
    copiers: int
    stages: int

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
        tile = (self.strips * MOST + 2 * HALO) * PIECE
        results = self.strips * MOST * PIECE
        slots = self.strips + 2
        head = 4 * slots * 2 * LANES * ROWS + 8 * (slots * 2 + 2 * self.stages)
        return -(-head // 128) * 128 + self.stages * (tensors * tile + results)

    @property
    def blocks(self) -> int:
        """At once on a multiprocessor."""
        room = (self.case.device.shared_memory + RESERVED) // (self.shared + RESERVED)
        return max(1, min(room, self._room))

    @property
    def _room(self) -> int:
        """Blocks whose registers a multiprocessor has."""
        return REGISTERS // (REGISTERS_NEEDED * self.threads)

    @property
    def clusters(self) -> int:
        """Of the grid. Small ones have planes in turn, as many each; large ones if the last are cut."""
        if self.cluster > 2:
            return self._at_once if self.cut else _planes(self.case)
        return -(-_planes(self.case) // self.rounds)

    @property
    def cut(self) -> int:
        """Planes, the last, whose tiles are dealt out to all clusters (see `kernels/strips_runs.cuh`)."""
        clusters = self._at_once
        whole, left = divmod(_planes(self.case), clusters)
        if self.cluster <= 2 or not whole or left * self._tiles < clusters:
            return 0
        # Parts of a plane wait for each other where they are more than have whole planes between them.
        parts = max(-(-(k + 1) * clusters // left) - k * clusters // left for k in range(left))
        waits = max(0, parts - whole - 1)
        return left if clusters - left * (1 + waits) >= SAVED * (whole + 1) * clusters else 0

    @property
    def _tiles(self) -> int:
        """Of a plane."""
        return -(-self.case.problem.width * self.case.itemsize // PIECE)

    @property
    def _at_once(self) -> int:
        """Planes. Of clusters of four or eight the device runs fewer than its multiprocessors would hold."""
        multiprocessors = self.case.device.multiprocessors
        if self.cluster > 2:
            multiprocessors = multiprocessors * 10 // 11
        return max(1, multiprocessors * self.blocks // self.cluster)

    @property
    def rounds(self) -> int:
        """Planes that a multiprocessor has one after the other."""
        return -(-_planes(self.case) // self._at_once)

    @property
    def filled(self) -> float:
        """Part of the multiprocessors' time in which they have a plane."""
        return _planes(self.case) / (self.rounds * self._at_once)

    def fits(self) -> bool:
        strips, height = self.cluster * self.strips, self.case.problem.height
        if self.own > MOST or self.shared > self.case.device.shared_memory or self._room < 1:
            return False
        # Nobody without rows; states for a neighbour are all of one strip.
        return self.own >= HALO and self.own * (strips - 1) < height


def _planes(case: Case) -> int:
    return case.problem.batch * case.problem.channels


def why_not(case: Case) -> str | None:
    """It needs one direction, right or left, given weights, aligned rows, and planes that are not small."""
    reason = cannot(case, CAPABILITY, ("right", "left"))
    if reason is not None:
        return reason
    if any(abs(view.h) >= 2**31 for view in case.views.values()):
        return "rows are further apart than 32 bits can tell"
    if best_layout(case) is None:
        height, width = case.problem.height, case.problem.width
        return f"others are faster for {_planes(case)} planes of {height} x {width}"
    return None


def plan(case: Case) -> Plan:
    layout = best_layout(case)
    assert layout is not None
    return plan_of(layout)


def best_layout(case: Case) -> Layout | None:
    """The one to run; None where others are faster."""
    problem = case.problem
    if problem.width < SHORTEST:
        return None
    for choice in CHOICES[case.itemsize == 4, problem.groups < problem.channels]:
        if not choice.least <= problem.height <= choice.most:
            continue
        layout = Layout(case, choice.cluster, choice.strips, choice.copiers, choice.stages)
        if layout.fits() and _pays(choice, layout):
            return layout
    return None


def _pays(choice: Choice, layout: Layout) -> bool:
    """With few planes a line's latency is all there is: only where that was found to be shorter."""
    case = layout.case
    if choice in (WHOLE_OF_FEW, WHOLE_OF_FEW_WIDE):
        # Not all multiprocessors can be had in clusters of eight.
        return _planes(case) * choice.cluster <= case.device.multiprocessors * 10 // 11
    few = choice in (QUARTER, HALF) and layout.rounds == 1 and case.itemsize == 2
    return few or choice is WHOLE or layout.filled >= FILLED


def layouts(case: Case) -> Iterator[Layout]:
    """What is chosen for large planes, and the like of it for small ones: for tests and trials."""
    for cluster in (1, 2, 4, 8):
        for strips, copiers, stages in ((2, 2, 2), (4, 4, 2), (4, 2, 2), (2, 2, 3)):
            layout = Layout(case, cluster, strips, copiers, stages)
            if layout.fits():
                yield layout


def plan_of(layout: Layout) -> Plan:
    case = layout.case
    defines = {
        "CLUSTER": layout.cluster,
        "STRIPS": layout.strips,
        "COPIERS": layout.copiers,
        "BLOCKS": layout.blocks,
        "STAGES": layout.stages,
        "CUT": int(layout.cut > 0),
    }
    kernel = Kernel("strips_forward.cu", "strips_forward", (*options(case), *defines.items()))
    knobs = (layout.clusters, layout.own, layout.cut)
    grid = layout.clusters * layout.cluster
    launches = [Launch(kernel, grid, layout.threads, layout.shared, cluster=layout.cluster, knobs=knobs)]
    scratch: tuple[int, ...] = ()
    reasons = [
        f"rows are contiguous and aligned; columns over {layout.cluster} blocks: {layout.strips} warps scan "
        f"{layout.own} rows each, {layout.copiers} copy",
        f"{PIECE} bytes of a row at once, {layout.stages} tiles a block",
    ]
    if layout.cut:
        # The first cluster takes nothing over.
        cuts = layout.clusters * layout.cluster * layout.strips
        scratch = (4 * LANES * ROWS * cuts, 4 * cuts)
        start = Kernel("strips_start.cu", "strips_start", options(case))
        launches.insert(0, Launch(start, 1, 256, 0, knobs=(cuts,)))
        reasons.append(
            f"the last {layout.cut} planes are cut: all {layout.clusters} clusters have as much to do"
        )
    return Plan("strips", tuple(launches), scratch, tuple(reasons))


def representative_kernels() -> list[tuple[Kernel, bool]]:
    """Kernels that the tests compile, and whether each is hot (must not spill)."""
    kernels: dict[Kernel, bool] = {}
    for (wide, _), choices in CHOICES.items():
        given = {"STORAGE": 0 if wide else 1, "NORMALIZE": 0, "HAS_LAM": 1, "HAS_GATE": 0}
        for choice, cut in ((it, cut) for it in choices for cut in (0, 1) if not cut or it is WHOLE):
            shape = {"CLUSTER": choice.cluster, "STRIPS": choice.strips, "COPIERS": choice.copiers}
            defines = given | shape | {"BLOCKS": 1, "STAGES": choice.stages, "CUT": cut}
            kernels[Kernel("strips_forward.cu", "strips_forward", tuple(defines.items()))] = True
        kernels[Kernel("strips_start.cu", "strips_start", tuple(given.items()))] = True
    return list(kernels.items())
