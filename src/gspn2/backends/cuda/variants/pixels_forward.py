"""Forward of channels that are adjacent in memory (`kernels/pixels_forward.cu`): its sizes."""

from __future__ import annotations

from dataclasses import replace

from ..geometry import Case, Kernel, Plan
from .pixels_layout import (
    MOST_THREADS,
    Tiling,
    blocks_of,
    channel_blocks,
    defines,
    first_fitting,
    launch,
    own_taps,
    reasons,
    rounded,
    sums,
    tap_groups,
)

HALO = 8
"""Places that a split recomputes on either side, and lines between two exchanges."""

DEEPEST = 8
"""Lines of a ring at most."""

MOST_TAPS = 4
"""Of a thread: taps that wait in its registers."""


def tiling_of(case: Case) -> Tiling | None:
    """The tiling, or None if a line is too long for a block."""
    return first_fitting(case, _fit)


def plan(case: Case, tiling: Tiling) -> Plan:
    """One launch."""
    size = _shared_memory(case, tiling)
    macros = (*defines(case, tiling, size), ("ON_CHIP", int(tiling.on_chip)))
    kernel = Kernel("pixels_forward.cu", "pixels_forward", macros)
    return Plan("pixels", (launch(case, tiling, kernel, size),), _scratch(case, tiling), reasons(tiling))


def _scratch(case: Case, tiling: Tiling) -> tuple[int, int]:
    """Bytes of float32 sums over directions, for whole channel blocks: of all, or of either axis."""
    channels = channel_blocks(case, tiling) * tiling.vectors * tiling.vector // case.itemsize
    problem = case.problem
    image = 4 * problem.batch * channels * problem.height * problem.width * (not tiling.on_chip)
    return image * (sums(case) and case.itemsize < 4), image * (tiling.roles == 4)


def _shared_memory(case: Case, tiling: Tiling) -> int:
    """Bytes of a block, in the order of the kernel's constants."""
    threads, places, vectors = tiling.threads, tiling.places, tiling.vectors
    floats = 4 * tiling.vector // case.itemsize
    published = 2 * min(places, 2) * floats * (threads + 2 * vectors)
    carried = (tiling.roles > 1) * places * floats * threads
    halo = (tiling.splits > 1) * (16 + 4 * tiling.halo * floats * vectors)
    groups = tap_groups(case, tiling.vector, vectors)
    weights = (not own_taps(case)) * 2 * tiling.tap_lines * groups * tiling.longest * 16
    meeting = (tiling.cluster > 1) * 16
    on_chip = tiling.on_chip * _sums_on_chip(case, tiling)
    return tiling.depth * _slot(case, tiling) + published + carried + meeting + halo + weights + on_chip


def _slot(case: Case, tiling: Tiling) -> int:
    """Bytes of a line in the ring: operands, and sums if they are in memory."""
    operands = 1 + ("lam" in case.views) + ("gate" in case.views) + 3 * own_taps(case)
    in_memory = sums(case) and not tiling.on_chip
    return tiling.threads * tiling.places * tiling.vector * (operands + in_memory * 4 // case.itemsize)


def _sums_on_chip(case: Case, tiling: Tiling) -> int:
    """Bytes of the sums that a block keeps: two quarters of the image, or the whole of it, rows padded."""
    problem = case.problem
    floats = 4 * tiling.vector // case.itemsize
    pixel = min(16, floats) * tiling.vectors
    rows, columns, quarters = problem.height, problem.width, 1
    if tiling.roles > 1:
        rows, columns, quarters = -(-rows // 2), -(-columns // 2), 2
    return quarters * floats // min(16, floats) * rows * (-(-columns * pixel // 128) * 128 + pixel)


def _fit(case: Case, vector: int, vectors: int, roles: int, splits: int) -> Tiling | None:
    """The tiling with as few places a thread as possible, or None if a line is too long."""
    problem, device = case.problem, case.device
    runs = (-(-problem.width // splits), -(-problem.height // splits))
    blocks = problem.batch * blocks_of(case, vector, vectors) * roles * splits
    memory = device.shared_memory
    # Sums on chip, shared memory of a block, lines of the ring and of a stage of taps at least.
    choices = [(False, memory, depth, 2) for depth in (6, 4, 2)]
    if blocks >= device.multiprocessors:
        # Blocks that are on a multiprocessor together hide each other's latency.
        together = min(3, -(-blocks // device.multiprocessors))
        choices.insert(0, (False, (memory + 1024) // together - 1024, 4, 4))
    if splits == 1 and sums(case):
        # Sums on chip leave room for a ring of four lines at least, or are not worth it.
        choices.insert(0, (True, memory, 4, 2))
    halo = HALO if splits > 1 else 0
    for on_chip, memory, depth, fewest in choices:
        for places in (1, 2, 4):
            lines = _tap_lines(case, vector, vectors, places, max(runs))
            threads = -(-(max(runs) + 2 * halo) // places) * vectors
            if threads > MOST_THREADS or lines < fewest or (splits > 1 and min(runs) < halo):
                continue
            size = rounded(threads)
            tiling = Tiling(vector, vectors, places, roles, splits, runs, size, halo, lines, depth, on_chip)
            if _shared_memory(case, tiling) <= memory:
                return _deepened(case, tiling, memory)
    return None


def _deepened(case: Case, tiling: Tiling, memory: int) -> Tiling:
    """With a ring that reaches as far ahead as shared memory allows: a line takes less time than memory."""
    while tiling.depth < DEEPEST:
        deeper = replace(tiling, depth=tiling.depth + 2)
        if _shared_memory(case, deeper) > memory:
            break
        tiling = deeper
    return tiling


def _tap_lines(case: Case, vector: int, vectors: int, places: int, run: int) -> int:
    """Lines of taps that are normalised together.

    Many cover the latency of memory, few fit registers and shared memory.
    """
    most = 8
    if not own_taps(case):
        most = MOST_TAPS * vectors // (places * tap_groups(case, vector, vectors))
    return next(lines for lines in (8, 4, 2) if lines == 2 or lines <= min(most, 1024 // run))


def representative_kernels() -> list[tuple[Kernel, bool]]:
    """Those of `pixels` for its forward pass."""
    plain = (("STORAGE", 1), ("NORMALIZE", 1), ("HAS_LAM", 1), ("HAS_GATE", 1), ("SUM", 1))
    shared = (("OWN_TAPS", 0), ("INTERLEAVED", 0), ("TAP_GROUPS", 1))
    own = (("OWN_TAPS", 1), ("INTERLEAVED", 1), ("TAP_GROUPS", 1))
    alone = (("ROLES", 1), ("SPLIT", 0), ("HALO", 0))
    wide = (("VECTOR", 16), ("VECTORS", 2), ("PLACES", 1), ("THREADS", 128), ("MIN_BLOCKS", 2))
    packed = (("VECTOR", 8), ("VECTORS", 4), ("PLACES", 1), ("THREADS", 256), ("MIN_BLOCKS", 1))
    long = (("VECTOR", 8), ("VECTORS", 2), ("PLACES", 2), ("THREADS", 320), ("MIN_BLOCKS", 1))
    kernels = []
    for taps in (shared, own):
        for size, on_chip, lines in ((wide, 0, 8), (packed, 1, 8), (long, 0, 4)):
            macros = (*plain, *taps, *size, *alone, ("TAP_LINES", lines), ("DEPTH", 4), ("ON_CHIP", on_chip))
            kernels.append((Kernel("pixels_forward.cu", "pixels_forward", macros), True))
    return kernels
