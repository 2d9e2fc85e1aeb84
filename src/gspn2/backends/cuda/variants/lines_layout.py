"""One way of running a case by `lines`: threads, blocks of a cluster, and shared memory."""

from __future__ import annotations

from dataclasses import dataclass

from ..geometry import Case
from .planes_layout import LANES, REGISTERS, RESERVED

MOST_WARPS = 16
"""Of a block: with more, registers would spill; columns alone need half as many."""

MOST_THREADS_OF_PAIRS = 320
"""The same with two channels."""

REGISTERS_NEEDED = {(False, False): 88, (False, True): 112, (True, False): 112, (True, True): 128}
"""Of a thread, where several blocks could share a multiprocessor: with rows to scan, with logits."""

STRIP = 8
"""Columns, and rows, of a tile of sums in scratch memory."""

HALO = 16
"""Rows that a block of a cluster holds beyond its own on either side."""


@dataclass(frozen=True)
class Rows:
    """Down and up: `VPLACES`, `VLINES` and `VRING` of the kernel.

    Args:
        warps: of a block, if rows are cut over these and not over blocks.
        halo: beyond its own, the places of a block or of such a warp on either side.
    """

    places: int
    lines: int
    ring: int
    warps: int = 0
    halo: int = HALO


@dataclass(frozen=True)
class Columns:
    """Right and left: bytes of a row in a tile, and tiles of a warp."""

    piece: int
    buffers: int


@dataclass(frozen=True)
class Layout:
    """One way of running a case, or those of its directions that `rows` and `columns` are there for.

    Args:
        case: what it is for.
        cluster: blocks that share columns.
        split: they share rows, too; otherwise each scans those of a plane of its own.
        channels: scanned side by side by the same threads; more than one share taps.
        planes: of a cluster, or sets of so many channels.
        rows, columns: None where the problem has no such direction, or another launch has it.
        pair: a cluster of two blocks scans down and up at the same time.
        prepared: weights are made from logits by a launch of their own.
    """

    case: Case
    cluster: int
    split: bool
    channels: int
    planes: int
    rows: Rows | None
    columns: Columns | None
    pair: bool = False
    prepared: bool = False

    @property
    def scans(self) -> tuple[int, ...]:
        """The directions of this launch, by their number."""
        wanted = {"down": self.rows, "up": self.rows, "right": self.columns, "left": self.columns}
        directions = self.case.problem.directions
        return tuple(d for d, name in enumerate(directions) if wanted[name] is not None)

    @property
    def own_rows(self) -> int:
        """Rows of a block in horizontal scans."""
        return -(-self.case.problem.height // self.cluster)

    @property
    def own_columns(self) -> int:
        """Columns of a block in vertical scans, or of a warp."""
        width = self.case.problem.width
        if not self.split or self.rows is None:
            return width
        unit = max(self.rows.places, STRIP if has_sums(self.case) else 1)
        return -(-width // (self.row_strips * unit)) * unit

    @property
    def row_strips(self) -> int:
        """Into which rows are cut."""
        return self.cluster * max(1, self.rows.warps) if self.rows is not None and self.split else 1

    @property
    def row_threads(self) -> int:
        """Those that hold places of a row, in whole warps."""
        if self.rows is None:
            return 0
        if self.rows.warps:
            return self.rows.warps * LANES
        halo = 2 * HALO if self.split else 0
        return -(-(self.own_columns + halo) // (self.rows.places * LANES)) * LANES

    @property
    def column_threads(self) -> int:
        """Those that hold rows of horizontal scans, in whole warps."""
        if self.columns is None:
            return 0
        halo = 2 * HALO if self.cluster > 1 else 0
        return -(-(self.own_rows + halo) // LANES) * LANES

    @property
    def threads(self) -> int:
        return max(self.row_threads, self.column_threads)

    @property
    def grid(self) -> int:
        problem = self.case.problem
        return -(-problem.batch * problem.channels // (self.channels * self.planes)) * self.cluster

    @property
    def shared(self) -> int:
        """Bytes of shared memory, as `kernels/lines.cuh` cuts it."""
        warps = self.threads // LANES
        strips = max(1, self.rows.warps) if self.rows is not None else 1
        halo = self.rows.halo if self.rows is not None and self.rows.warps else HALO
        halos = 4 * strips * (self.channels * halo if self.cluster > 1 and not self.pair else 1)
        head = 4 * (self.channels * 4 * (warps + 2) + halos) + 32 * strips
        return -(-head // 128) * 128 + max(self._rows_ring, self._columns_ring)

    @property
    def room(self) -> int:
        """Blocks whose shared memory a multiprocessor has."""
        return (self.case.device.shared_memory + RESERVED) // (self.shared + RESERVED)

    @property
    def blocks(self) -> int:
        """At once on a multiprocessor: what the compiler is told, so that registers are left for them."""
        device = self.case.device
        needed = REGISTERS_NEEDED[self.rows is not None, self.case.problem.normalize]
        registers = REGISTERS // (-(-needed // 8) * 8 * self.threads)
        wanted = -(-self.grid // device.multiprocessors)
        return max(1, min(self.room, registers, wanted))

    @property
    def tensors(self) -> int:
        """That a thread reads."""
        return (2 if self.prepared else 3) + self.channels * (
            1 + ("lam" in self.case.views) + ("gate" in self.case.views)
        )

    @property
    def _rows_ring(self) -> int:
        rows = self.rows
        place = self.tensors * self.case.itemsize + 4 * has_sums(self.case) * self.channels
        return 0 if rows is None else rows.ring * rows.lines * self.row_threads * rows.places * place

    @property
    def _columns_ring(self) -> int:
        columns = self.columns
        if columns is None:
            return 0
        return columns.buffers * self.column_threads * columns.piece * self.tensors

    def fits(self) -> bool:
        problem = self.case.problem
        most = MOST_WARPS * (2 if self.rows is None and not has_sums(self.case) else 1) + 1
        if self.threads > min(LANES * most, 1024) or self.shared > self.case.device.shared_memory:
            return False
        if self.channels > 1 and self.threads > MOST_THREADS_OF_PAIRS:
            return False
        if self.pair:
            return True
        if self.cluster == 1:
            return True
        if self.columns is not None and problem.height - self.own_rows * (self.cluster - 1) < HALO:
            return False
        if self.rows is None or not self.split:
            return True
        held = LANES * self.rows.places if self.rows.warps else problem.width + 2 * HALO
        last = problem.width - self.own_columns * (self.row_strips - 1)
        return last >= self.rows.halo and self.own_columns + 2 * self.rows.halo <= held


def has_sums(case: Case) -> bool:
    """Is there a sum over directions?"""
    return len(case.problem.directions) > 1
