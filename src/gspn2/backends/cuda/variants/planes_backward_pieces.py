"""Backward of one horizontal scan of planes whose states are at hand: `kernels/planes_backward_pieces.cu`.

A block, or each block of a cluster, has some rows of a plane and walks back over them once. Its warps copy
pieces of their rows into tiles. `variants.planes_backward` asks here for right and left.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..geometry import Case, Kernel, Launch, options

SOURCE, FUNCTION = "planes_backward_pieces.cu", "planes_backward_pieces"

LANES = 32

HALO = 16
"""Rows beyond its own that a block scans along on either side, and lines between exchanges of blocks."""

MOST_THREADS = 512
"""Of a block: with more, registers would spill."""

RESERVED = 1024
"""Bytes of shared memory that the device takes for itself, of every block."""

Macros = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Pieces:
    """One way of cutting the rows of a plane.

    Args:
        strips: blocks of a cluster.
        own: rows of a plane that each of them owns.
        piece: bytes of a row in a tile.
        buffers: tiles in a warp's ring.
        threads: of a block, one for each of its rows and of those that it scans along.
        shared: bytes of shared memory of a block.
    """

    strips: int
    own: int
    piece: int
    buffers: int
    threads: int
    shared: int


def pieces(case: Case) -> Iterator[Pieces]:
    """Every way worth a thought that fits."""
    height = case.problem.height
    row = case.problem.width * case.itemsize
    for strips in range(1, 9 if case.device.capability >= (9, 0) else 2):
        own = -(-height // strips)
        if strips > 1 and (own < 2 * HALO or -(-height // own) != strips):
            continue
        rows = min(height, own + HALO * min(2, strips - 1))
        threads = -(-rows // LANES) * LANES
        if threads > MOST_THREADS:
            continue
        for piece in (32, 64, 128):
            for buffers in (1, 2):
                if piece > 32 and piece // 2 * buffers >= row:
                    continue
                shared = _shared(case, strips, threads, piece, buffers)
                if shared <= case.device.shared_memory:
                    yield Pieces(strips, own, piece, buffers, threads, shared)


def best(case: Case) -> Pieces | None:
    """The one to run; None if none fits."""
    return min(pieces(case), key=lambda cut: _cost(case, cut), default=None)


def launch(case: Case, cut: Pieces) -> Launch:
    """The one launch of a scan with index 0."""
    problem = case.problem
    knobs = (0, cut.threads, 0, cut.strips, cut.own, 1)
    blocks = problem.batch * problem.channels * cut.strips
    kernel = Kernel(SOURCE, FUNCTION, _defines(case, cut))
    return Launch(kernel, blocks, cut.threads, cut.shared, cut.strips, knobs)


def reason(direction: str, cut: Pieces) -> str:
    """A sentence for people."""
    return (
        f"{direction}: {cut.strips} blocks a line, {cut.threads} threads with a row each, "
        f"{cut.buffers} tiles with {cut.piece} bytes of a row"
    )


def representative_kernels() -> list[tuple[Kernel, bool]]:
    """Kernels that the tests compile, and whether each is hot (must not spill)."""

    def kernel(storage: int, threads: int, piece: int, buffers: int, **other: int) -> Kernel:
        macros = {"STORAGE": storage, "NORMALIZE": 0, "HAS_LAM": 1, "HAS_GATE": 0, **_FIXED}
        macros |= {"REVERSED": 0, "THREADS": threads, "MIN_BLOCKS": 1, "WIDE": 1, "WANTS": 7}
        macros |= {"SPLIT": 0, "CLUSTER": 0, "PIECE": piece, "BUFFERS": buffers} | other
        return Kernel(SOURCE, FUNCTION, tuple(macros.items()))

    cluster = {"SPLIT": 1, "CLUSTER": 1}
    return [
        (kernel(1, 224, 64, 2), True),
        (kernel(0, 256, 64, 2, REVERSED=1), True),
        (kernel(1, 224, 64, 2, **cluster), True),
        (kernel(1, 160, 64, 1, MIN_BLOCKS=3, REVERSED=1, **cluster), False),
        (kernel(0, 224, 64, 2, **cluster), True),
        (kernel(0, 160, 128, 1, **cluster), True),
        (kernel(2, 64, 64, 2, NORMALIZE=1, HAS_LAM=0, WANTS=3), False),
    ]


_FIXED = {"HORIZONTAL": 1, "PLACES": 1, "SEGMENT": HALO, "RAGGED": 0, "SHARED": 0}
_FIXED |= {"HAS_SUMS": 0, "HAS_HIDDEN": 1}


def _shared(case: Case, strips: int, threads: int, piece: int, buffers: int) -> int:
    """Bytes of shared memory, as the kernel cuts it."""
    operands = 6 + ("lam" in case.views)
    tile = (operands * LANES + 2) * piece + -(-4 * (LANES + 2) // 16) * 16
    mail = 16 * HALO if strips > 1 else 0
    return threads // LANES * buffers * tile + 16 * (threads // LANES + 2) + mail + 32 + 16 * operands


def _cost(case: Case, cut: Pieces) -> float:
    """Cycles of a multiprocessor, estimated: an order of magnitude, to choose by."""
    problem, device = case.problem, case.device
    resident = _resident(case, cut)
    blocks = problem.batch * problem.channels * cut.strips
    at_once = device.multiprocessors * resident
    if cut.strips > 1:
        at_once = device.multiprocessors // 16 * (16 * resident // cut.strips) * cut.strips
    busy = min(resident, -(-blocks // device.multiprocessors))
    warps = cut.threads // LANES
    columns = cut.piece // case.itemsize
    # One line: what it waits for the one before, what a multiprocessor issues, and what memory brings it.
    line = 110 + 40 * (cut.threads > LANES) + (150 if cut.strips > 1 else 50) / HALO
    if cut.buffers == 1:
        line += 2000 / columns
    issued = 55 * warps * busy / 4
    numbers = 2 * (5 + ("lam" in case.views))
    taken = numbers * case.itemsize * cut.own * busy / 18 * {32: 2.5, 64: 1.2, 128: 1}[cut.piece]
    return -(-blocks // max(1, at_once)) * problem.width * max(line + issued / 3, issued, taken)


def _resident(case: Case, cut: Pieces) -> int:
    """Blocks that a multiprocessor holds."""
    shared = (case.device.shared_memory + RESERVED) // (cut.shared + RESERVED)
    return max(1, min(shared, MOST_THREADS // cut.threads))


def _defines(case: Case, cut: Pieces) -> Macros:
    return (
        *options(case),
        *_FIXED.items(),
        ("REVERSED", int(case.problem.directions[0] == "left")),
        ("THREADS", cut.threads),
        ("MIN_BLOCKS", _resident(case, cut)),
        ("WIDE", int(cut.threads > LANES)),
        ("WANTS", sum(1 << i for i, name in enumerate(("dx", "dtaps", "dlam")) if name in case.views)),
        ("SPLIT", int(cut.strips > 1)),
        ("CLUSTER", int(cut.strips > 1)),
        ("PIECE", cut.piece),
        ("BUFFERS", cut.buffers),
    )
