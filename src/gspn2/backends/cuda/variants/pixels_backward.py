"""Backward of channels that are adjacent in memory (`kernels/pixels_backward.cu`): its sizes."""

from __future__ import annotations

from dataclasses import replace

from ..geometry import Case, Kernel, Launch, Plan, options
from .pixels_layout import (
    MOST_THREADS,
    Tiling,
    blocks_of,
    channel_blocks,
    defines,
    first_fitting,
    image_sums,
    launch,
    own_taps,
    reasons,
    rounded,
    tap_groups,
)

DEEPEST = 8
"""Lines of a ring at most."""

MOST_TAPS = 8
"""Of a thread: taps that wait in its registers."""


def tiling_of(case: Case) -> Tiling | None:
    """The tiling, or None if a line is too long for a block."""
    return first_fitting(case, _fit)


def plan(case: Case, tiling: Tiling) -> Plan:
    """One launch; another that adds up what several blocks have of the gradients of shared taps."""
    problem = case.problem
    blocks = channel_blocks(case, tiling)
    direct = own_taps(case) or "dtaps" not in case.views or blocks <= problem.groups
    needs = tuple(
        (f"NEED_{name.upper()}", int(name in case.views)) for name in ("dx", "dtaps", "dlam", "dgate")
    )
    size = _shared_memory(case, tiling)
    macros = (*defines(case, tiling, size), ("SEGMENT", tiling.tap_lines), ("DIRECT", int(direct)), *needs)
    kernel = Kernel("pixels_backward.cu", "pixels_backward", macros)
    axes = []
    if {"down", "up"} & set(problem.directions):
        axes.append((problem.height, problem.width))
    if {"right", "left"} & set(problem.directions):
        axes.append((problem.width, problem.height))
    kept = max(_kept_lines(lines, tiling) * places for lines, places in axes)
    launches = [launch(case, tiling, kernel, size, kept)]
    pixels = problem.height * problem.width
    planes = problem.batch * len(problem.directions)
    if not direct:
        add = Kernel("pixels_taps.cu", "pixels_taps", options(case))
        grid = -(-planes * problem.groups * pixels // 256)
        launches.append(Launch(add, grid, 256, 0, knobs=(blocks, blocks // problem.groups)))
    scratch = (
        *(image * ("dx" in case.views) for image in image_sums(case, tiling)),
        4 * problem.batch * tiling.roles * kept * problem.channels,
        0 if direct else 12 * planes * blocks * pixels,
    )
    return Plan("pixels", tuple(launches), scratch, reasons(tiling))


def _kept_lines(lines: int, tiling: Tiling) -> int:
    """Segments of a direction: counted from either end of the line where two roles meet."""
    middle = (lines + 1) // 2 if tiling.roles > 1 else lines
    return -(-middle // tiling.tap_lines) + -(-(lines - middle) // tiling.tap_lines)


def _shared_memory(case: Case, tiling: Tiling) -> int:
    """Bytes of a block."""
    return sum(regions(case, tiling))


def regions(case: Case, tiling: Tiling) -> tuple[int, ...]:
    """Bytes of what a block has in shared memory, in the order of the kernel's constants.

    Each starts where the one before ends, at a multiple of 16: most hold vectors of as many bytes.
    """
    own, threads, places, vectors = own_taps(case), tiling.threads, tiling.places, tiling.vectors
    floats = 4 * tiling.vector // case.itemsize
    pitch = -(-(threads + 2 * vectors) // 4) * 4
    ring = tiling.depth * _slot(case, tiling)
    states = (tiling.tap_lines + 1) * floats * places * pitch
    after = own * 2 * floats * pitch
    halo = (tiling.splits > 1) * (16 + 4 * tiling.halo * floats * vectors)
    gradients = (not own) * tiling.tap_lines * 12 * places * threads
    groups = tap_groups(case, tiling.vector, vectors)
    weights = (not own) * 2 * tiling.tap_lines * groups * tiling.longest * 16
    return ring, states, after, halo, gradients, weights


def _slot(case: Case, tiling: Tiling) -> int:
    """Bytes of a line in the ring: operands, dy and sums of dx."""
    operands = 2 + ("lam" in case.views) + ("gate" in case.views) + 3 * own_taps(case)
    return tiling.threads * tiling.places * tiling.vector * (operands + 4 // case.itemsize)


def _fit(case: Case, vector: int, vectors: int, roles: int, splits: int) -> Tiling | None:
    """The tiling with as few places a thread as possible, or None if a line is too long."""
    problem, device = case.problem, case.device
    runs = (-(-problem.width // splits), -(-problem.height // splits))
    blocks = problem.batch * blocks_of(case, vector, vectors) * roles * splits
    many = blocks >= device.multiprocessors
    memory = device.shared_memory
    # Shared memory of a block, lines of the ring and of a segment at least. Short segments cost memory and,
    # in splits, exchanges: a shorter ring is better.
    choices = [(memory, 5, 4), (memory, 3, 4), (memory, 2, 2)]
    if many:
        # Blocks that are on a multiprocessor together hide each other's latency.
        together = min(3, -(-blocks // device.multiprocessors))
        choices.insert(0, ((memory + 1024) // together - 1024, 3, 4))
    for memory, depth, fewest in choices:
        # With narrow vectors a second place shares out what is done once a thread.
        for places in (2, 1, 4) if many and vector <= 8 else (1, 2, 4):
            for lines in _segments(case, vector, vectors, places):
                halo = lines if splits > 1 else 0
                threads = -(-(max(runs) + 2 * halo) // places) * vectors
                if threads > MOST_THREADS or lines < fewest or (splits > 1 and min(runs) < halo):
                    continue
                size = rounded(threads)
                tiling = Tiling(vector, vectors, places, roles, splits, runs, size, halo, lines, depth, False)
                if _shared_memory(case, tiling) <= memory:
                    return _deepened(case, tiling, memory)
    return None


def _deepened(case: Case, tiling: Tiling, memory: int) -> Tiling:
    """With a ring that reaches as far ahead as shared memory allows: a line takes less time than memory."""
    while tiling.depth < DEEPEST:
        deeper = replace(tiling, depth=tiling.depth + 1)
        if _shared_memory(case, deeper) > memory:
            break
        tiling = deeper
    return tiling


def _segments(case: Case, vector: int, vectors: int, places: int) -> list[int]:
    """Lines of a segment, whose taps are normalised together, the most wanted first."""
    most = 8
    if not own_taps(case):
        most = MOST_TAPS * vectors // (places * tap_groups(case, vector, vectors))
    return [lines for lines in (8, 6, 4, 2) if lines <= max(2, most)]


def representative_kernels() -> list[tuple[Kernel, bool]]:
    """Those of `pixels` for its backward pass."""
    plain = (("STORAGE", 1), ("NORMALIZE", 1), ("HAS_LAM", 1), ("HAS_GATE", 1), ("SUM", 1))
    shared = (("OWN_TAPS", 0), ("INTERLEAVED", 0), ("TAP_GROUPS", 1))
    own = (("OWN_TAPS", 1), ("INTERLEAVED", 1), ("TAP_GROUPS", 1))
    alone = (("ROLES", 1), ("SPLIT", 0), ("HALO", 0))
    wide = (("VECTOR", 16), ("VECTORS", 2), ("PLACES", 1), ("THREADS", 128), ("MIN_BLOCKS", 2))
    packed = (("VECTOR", 8), ("VECTORS", 4), ("PLACES", 1), ("THREADS", 256), ("MIN_BLOCKS", 1))
    long = (("VECTOR", 8), ("VECTORS", 2), ("PLACES", 2), ("THREADS", 320), ("MIN_BLOCKS", 1))
    gradients = tuple((f"NEED_{name}", 1) for name in ("DX", "DTAPS", "DLAM", "DGATE"))
    kernels = []
    for taps in (shared, own):
        for size, direct, lines in ((wide, 0, 8), (packed, 1, 8), (long, 0, 4)):
            rest = (("TAP_LINES", lines), ("SEGMENT", lines), ("DEPTH", 3), ("DIRECT", direct), *gradients)
            macros = (*plain, *taps, *size, *alone, *rest)
            kernels.append((Kernel("pixels_backward.cu", "pixels_backward", macros), True))
    kernels.append((Kernel("pixels_taps.cu", "pixels_taps", plain[:4]), False))
    return kernels
