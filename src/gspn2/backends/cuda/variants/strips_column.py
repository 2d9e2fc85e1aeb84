"""Right and left over few small planes: a warp holds a whole column, and other warps copy for it.

Forward only, one direction, weights as given, sm_90: see `kernels/strips_column.cu`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..geometry import Case, Kernel, Launch, Plan, options
from .planes_layout import LANES, VECTOR_BYTES
from .strips_common import cannot

CAPABILITY = (9, 0)
"""Waits at barriers in shared memory are those of this and newer devices."""

COPIERS = 4
"""Warps of a block that copy: a scheduler has one of them beside the one that scans."""

PIECE = 64
"""Bytes of a row in a tile, as in the kernel."""

SHORTEST, LONGEST = 33, 128
"""Rows; others scan shorter and longer columns faster."""

NARROWEST = 32
"""Columns: with fewer there is little to scan."""

MOST_STAGES = 8


@dataclass(frozen=True)
class Layout:
    """How a case is run.

    Args:
        case: what it is for.
        rows: of a lane.
    """

    case: Case
    rows: int

    @property
    def threads(self) -> int:
        return LANES * (1 + COPIERS)

    @property
    def tiles(self) -> int:
        """Of a plane."""
        return -(-self.case.problem.width * self.case.itemsize // PIECE)

    @property
    def stages(self) -> int:
        """Tiles of a block: a whole plane if there is memory for it, else as many as fit, perhaps none."""
        # Few numbers of stages, so that few kernels are compiled.
        wanted = 1 << (self.tiles - 1).bit_length()
        room = self.case.device.shared_memory - self._head(MOST_STAGES)
        return min(MOST_STAGES, wanted, max(0, room // self._tile))

    @property
    def shared(self) -> int:
        """Bytes, as the kernel counts them."""
        return self._head(self.stages) + self.stages * self._tile

    @staticmethod
    def _head(stages: int) -> int:
        return -(-16 * stages // 128) * 128

    @property
    def _tile(self) -> int:
        """Bytes of all tensors."""
        tensors = 4 + ("lam" in self.case.views)
        return tensors * LANES * self.rows * PIECE

    @property
    def grid(self) -> int:
        return self.case.problem.batch * self.case.problem.channels

    def fits(self) -> bool:
        """The next tile, if there is one, is read from before a tile is given back: it needs a place, too."""
        return self.stages >= min(2, self.tiles)


def why_not(case: Case) -> str | None:
    """It needs one direction, right or left, given weights, aligned rows, and few planes of few rows."""
    reason = cannot(case, CAPABILITY, ("right", "left"))
    if reason is not None:
        return reason
    problem = case.problem
    vector = VECTOR_BYTES // case.itemsize
    if problem.chunk is not None and problem.chunk < problem.width and problem.chunk % vector:
        return f"it restarts at multiples of {vector} columns only"
    rows = rows_of_a_lane(problem.height)
    if rows is None:
        return f"a warp holds up to {LONGEST} rows, the same number in each lane, not {problem.height}"
    if not Layout(case, rows).fits():
        return f"tiles of {LANES * rows} rows of all tensors do not fit in the shared memory of a block"
    planes = problem.batch * problem.channels
    if slower(case):
        return f"others are faster for {planes} planes of {problem.height} x {problem.width}"
    return None


def rows_of_a_lane(height: int) -> int | None:
    """Two or four, if they hold a column exactly."""
    return next((rows for rows in (2, 4) if height <= LANES * rows and height % rows == 0), None)


def slower(case: Case) -> bool:
    """With more planes than multiprocessors, or next to nothing to scan, others are faster."""
    problem = case.problem
    many = problem.batch * problem.channels > case.device.multiprocessors
    return many or problem.height < SHORTEST or problem.width < NARROWEST


def plan(case: Case) -> Plan:
    rows = rows_of_a_lane(case.problem.height)
    assert rows is not None
    layout = Layout(case, rows)
    defines = {"CLUSTER": 1, "STRIPS": 1, "COPIERS": COPIERS, "ROWS": rows, "STAGES": layout.stages}
    launch = Launch(_kernel((*options(case), *defines.items())), layout.grid, layout.threads, layout.shared)
    reasons = (
        f"rows are contiguous and aligned; a warp scans whole columns, {rows} rows a lane, {COPIERS} copy",
        f"{PIECE} bytes of a row at once, {layout.stages} tiles a block",
    )
    return Plan("strips_column", (launch,), reasons=reasons)


def representative_kernels() -> list[tuple[Kernel, bool]]:
    """Kernels that the tests compile, and whether each is hot (must not spill)."""
    kernels = []
    for storage, cuts in ((1, ((2, 2), (4, 4))), (0, ((2, 4), (4, 5)))):
        for rows, stages in cuts:
            given = {"STORAGE": storage, "NORMALIZE": 0, "HAS_LAM": 1, "HAS_GATE": 0}
            cut = {"CLUSTER": 1, "STRIPS": 1, "COPIERS": COPIERS, "ROWS": rows, "STAGES": stages}
            kernels.append((_kernel(tuple((given | cut).items())), True))
    return kernels


def _kernel(defines: tuple[tuple[str, int], ...]) -> Kernel:
    return Kernel("strips_column.cu", "strips_column", defines)
