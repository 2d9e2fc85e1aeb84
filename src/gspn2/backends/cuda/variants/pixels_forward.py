"""Forward of channels that are adjacent in memory (`kernels/pixels_forward.cu`): its sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from ..geometry import Case, Kernel, Launch, Plan, options
from .pixels_layout import (
    MOST_THREADS,
    SECTOR,
    Tiling,
    blocks_of,
    channel_blocks,
    defines,
    largest_cluster,
    launch,
    own_taps,
    reasons,
    roles_of,
    rounded,
    sums,
    tap_groups,
    vector_of,
)
from .resident_records import up

HALO = 8
"""Places that a split recomputes on either side, and lines between two exchanges."""

BUSY = 4
"""Lines of a ring where most multiprocessors have work: with more only the queues become longer."""

WIDTHS = (64, SECTOR, SECTOR // 2)
"""Bytes of a pixel that a block may take, the most wanted first."""

SHORTEST_SPLIT = 64
"""Places of a split at least: with fewer, what it recomputes and exchanges costs more than it gains."""

MANY_BLOCKS = 4
"""Channel blocks of an image for which it pays to make weights once, in a launch of its own."""

WEIGHT_THREADS = 256
"""Of a block of that launch."""

MOST_WEIGHTS = 2**30
"""Places and directions: more would take more blocks than a grid has."""

MOST_TAPS = 4
"""Of a thread: taps that wait in its registers."""


def tiling_of(case: Case) -> Tiling | None:
    """The tiling, or None if a line is too long for a block."""
    widest = vector_of(case)
    assert widest is not None
    # More places a thread leave fewer warps. Narrower vectors make narrower blocks, for longer lines.
    for places, vector in ((1, widest), (2, widest), (4, widest), (4, 8), (4, 4)):
        if case.itemsize <= vector <= widest:
            for vectors, on_chip in _widths(case, vector):
                tiling = _split(case, vector, vectors, on_chip, places)
                if tiling is not None:
                    return tiling
    return None


def _split(case: Case, vector: int, vectors: int, on_chip: bool, places: int) -> Tiling | None:
    """The tiling, or None if there is none where a thread has at most so many places.

    A line that is too long gets more splits than the size of the problem calls for; with one place only where
    there are so many blocks that it does not matter if the last of them run alone.
    """
    roles, wanted = _cluster(case, vector, vectors)
    if on_chip:
        return _fit(case, vector, vectors, roles, 1, True, places) if wanted == 1 else None
    blocks = case.problem.batch * blocks_of(case, vector, vectors) * roles
    splits = wanted
    while roles * splits <= largest_cluster(case):
        tiling = _fit(case, vector, vectors, roles, splits, False, places)
        if tiling is not None:
            few = splits > wanted and blocks * splits < 2 * case.device.multiprocessors
            return None if few and places == 1 else tiling
        splits *= 2
    return None


def plan(case: Case, tiling: Tiling) -> Plan:
    """One launch, or one more before it for weights."""
    size = _shared_memory(case, tiling)
    chosen = (("ON_CHIP", int(tiling.on_chip)), ("PREPARED", int(tiling.prepared)))
    macros = (*defines(case, tiling, size), *chosen)
    kernel = Kernel("pixels_forward.cu", "pixels_forward", macros)
    before = (_weights(case),) if tiling.prepared else ()
    launches = (*before, launch(case, tiling, kernel, size))
    return Plan("pixels", launches, _scratch(case, tiling), reasons(tiling))


def _weights(case: Case) -> Launch:
    """Weights of all taps, a place a thread."""
    problem = case.problem
    planes = problem.batch * len(problem.directions) * problem.groups
    blocks = -(-problem.height * problem.width // WEIGHT_THREADS)
    kernel = Kernel("pixels_weights.cu", "pixels_weights", options(case))
    return Launch(kernel, planes * blocks, WEIGHT_THREADS, 0, knobs=(blocks,))


def ways(case: Case, tiling: Tiling) -> Iterator[Tiling]:
    """With weights prepared, which asks less of the second-level cache, if it may be; and without."""
    problem = case.problem
    shared = problem.normalize and case.itemsize == 2 and not own_taps(case)
    many = channel_blocks(case, tiling) >= MANY_BLOCKS and _places(case) < MOST_WEIGHTS
    # The lanes that have a place share its weights: they are in one warp, and their channels in one group.
    together = 32 % tiling.vectors == 0 and tap_groups(case, tiling.vector, tiling.vectors) == 1
    if tiling.on_chip and tiling.roles == 2 and shared and many and together:
        yield replace(tiling, prepared=True)
    yield tiling


def _places(case: Case) -> int:
    """Of all images, directions and tap groups."""
    problem = case.problem
    return problem.batch * len(problem.directions) * problem.groups * problem.height * problem.width


def _scratch(case: Case, tiling: Tiling) -> tuple[int, int, int]:
    """Bytes of float32 sums, for whole channel blocks: of all directions, or of either axis; of weights."""
    channels = channel_blocks(case, tiling) * tiling.vectors * tiling.vector // case.itemsize
    problem = case.problem
    image = 4 * problem.batch * channels * problem.height * problem.width * (not tiling.on_chip)
    weights = 4 * _places(case) * tiling.prepared
    return image * (sums(case) and case.itemsize < 4), image * (tiling.roles == 4), weights


def _shared_memory(case: Case, tiling: Tiling) -> int:
    """Bytes of a block, in the order of the kernel's constants."""
    threads, places, vectors = tiling.threads, tiling.places, tiling.vectors
    floats = 4 * tiling.vector // case.itemsize
    published = 2 * min(places, 2) * floats * (threads + 2 * vectors)
    carried = (tiling.roles > 1) * places * floats * threads
    halo = (tiling.splits > 1) * (16 + 4 * tiling.halo * floats * vectors)
    groups = tap_groups(case, tiling.vector, vectors)
    turned = not own_taps(case) and not tiling.prepared
    weights = turned * 2 * tiling.tap_lines * groups * tiling.longest * 16
    meeting = (tiling.cluster > 1) * 16
    on_chip = tiling.on_chip * _sums_on_chip(case, tiling)
    return tiling.depth * _slot(case, tiling) + published + carried + meeting + halo + weights + on_chip


def _slot(case: Case, tiling: Tiling) -> int:
    """Bytes of a line in the ring: operands, and sums if they are in memory."""
    operands = 1 + ("lam" in case.views) + ("gate" in case.views) + 3 * own_taps(case)
    in_memory = sums(case) and not tiling.on_chip
    vectors = tiling.vector * (operands + in_memory * 4 // case.itemsize)
    columns = tiling.threads // tiling.vectors
    words = up(4 * tiling.places * columns, 16) * tiling.prepared
    return tiling.threads * tiling.places * vectors + words


def _sums_on_chip(case: Case, tiling: Tiling) -> int:
    """Bytes of the sums that a block keeps: two quarters of the image, or the whole of it, rows padded."""
    problem = case.problem
    floats = 4 * tiling.vector // case.itemsize
    pixel = min(16, floats) * tiling.vectors
    rows, columns, quarters = problem.height, problem.width, 1
    if tiling.roles > 1:
        rows, columns, quarters = -(-rows // 2), -(-columns // 2), 2
    return quarters * floats // min(16, floats) * rows * (-(-columns * pixel // 128) * 128 + pixel)


def _widths(case: Case, vector: int) -> list[tuple[int, bool]]:
    """Vectors that a block may have, and whether its sums are on chip, the most wanted first.

    What the second-level cache is asked for limits speed, not how much it answers: a block asks for as wide
    pieces of a pixel as leave work for nearly half of the multiprocessors. No group of taps is cut.
    """
    half = case.device.multiprocessors * 9 // 20
    wanted = next((n for n in WIDTHS if _most_blocks(case, vector, max(1, n // vector)) >= half), WIDTHS[-1])
    on_chip = _vectors(case, vector, min(wanted, SECTOR))[:1] if sums(case) else []
    return [*((n, True) for n in on_chip), *((n, False) for n in _vectors(case, vector, wanted))]


def _vectors(case: Case, vector: int, wanted: int) -> list[int]:
    """Vectors of a block, the nearest to so many bytes first."""
    problem = case.problem
    vectors, most = problem.channels * case.itemsize // vector, max(1, wanted // vector)
    if own_taps(case) or problem.groups == 1:
        narrower = (most, SECTOR // vector, SECTOR // 2 // vector, 1)
        return list(dict.fromkeys(max(1, min(n, most, vectors)) for n in narrower))
    group = vectors // problem.groups
    fitting = [n for n in range(1, 17) if group % n == 0 or (n % group == 0 and vectors % n == 0)]
    return sorted(fitting, key=lambda n: (n < most, abs(n - most)))


def _most_blocks(case: Case, vector: int, vectors: int) -> int:
    """Blocks, of so many vectors, that there can be."""
    blocks = case.problem.batch * blocks_of(case, vector, vectors)
    roles = roles_of(case, blocks)
    shortest = min(case.problem.height, case.problem.width)
    return blocks * roles * max(1, min(largest_cluster(case) // roles, shortest // SHORTEST_SPLIT))


def _cluster(case: Case, vector: int, vectors: int) -> tuple[int, int]:
    """Roles and splits.

    As many blocks as there are multiprocessors; or, in whole waves of them, more: with fewer images at a time
    the second-level cache keeps x and sums until they are read again.
    """
    device = case.device
    blocks = case.problem.batch * blocks_of(case, vector, vectors)
    roles, splits = roles_of(case, blocks), 1
    shortest = min(case.problem.height, case.problem.width)
    while roles * splits * 2 <= largest_cluster(case) and shortest >= SHORTEST_SPLIT * 2 * splits:
        cluster = roles * splits * 2
        more = blocks * cluster
        if more > device.multiprocessors and more % (device.multiprocessors // cluster * cluster or 1):
            break
        splits *= 2
    return roles, splits


def _fit(
    case: Case, vector: int, vectors: int, roles: int, splits: int, on_chip: bool, most: int
) -> Tiling | None:
    """The tiling with as few places a thread as possible, or None if a line is too long."""
    problem, device = case.problem, case.device
    runs = (-(-problem.width // splits), -(-problem.height // splits))
    blocks = problem.batch * blocks_of(case, vector, vectors) * roles * splits
    memory = device.shared_memory
    # Shared memory of a block, lines of the ring and of a stage of taps at least.
    choices = [(memory, depth, 2) for depth in (BUSY, 2)]
    if blocks < device.multiprocessors // 2:
        choices[:0] = [(memory, depth, 2) for depth in (8, 6)]
    elif blocks >= device.multiprocessors and not on_chip:
        # Blocks that are on a multiprocessor together hide each other's latency.
        together = min(3, -(-blocks // device.multiprocessors))
        choices.insert(0, ((memory + 1024) // together - 1024, BUSY, 4))
    if on_chip:
        # They leave room for a ring of four lines at least, or are not worth it.
        choices = [choice for choice in choices if choice[1] >= 4]
    halo = HALO if splits > 1 else 0
    # The first and the last split have neighbours on one side only.
    longest = max(runs) + halo * min(2, splits - 1)
    for (memory, depth, fewest), places in product(choices, (1, 2, 4)):
        threads = -(-longest // places) * vectors
        if threads > MOST_THREADS or places > most or (splits > 1 and min(runs) < halo):
            continue
        size = rounded(threads)
        for lines in _tap_lines(case, vector, vectors, places, max(runs), on_chip):
            tiling = Tiling(vector, vectors, places, roles, splits, runs, size, halo, lines, depth, on_chip)
            fitting = [it for it in ways(case, tiling) if _shared_memory(case, it) <= memory]
            if lines >= fewest and fitting:
                return fitting[0]
    return None


def _tap_lines(case: Case, vector: int, vectors: int, places: int, run: int, on_chip: bool) -> list[int]:
    """Lines of taps that are normalised together, the most wanted first.

    Many cover the latency of memory, few fit registers and shared memory.
    """
    most = 4 if on_chip else 8
    if not own_taps(case):
        most = min(most, MOST_TAPS * vectors // (places * tap_groups(case, vector, vectors)))
    return [lines for lines in (8, 4, 2) if lines == 2 or lines <= min(most, 1024 // run)]


def representative_kernels() -> list[tuple[Kernel, bool]]:
    """Those of `pixels` for its forward pass."""
    plain = (("STORAGE", 1), ("NORMALIZE", 1), ("HAS_LAM", 1), ("HAS_GATE", 1), ("SUM", 1))
    shared = (("OWN_TAPS", 0), ("INTERLEAVED", 0), ("TAP_GROUPS", 1))
    own = (("OWN_TAPS", 1), ("INTERLEAVED", 1), ("TAP_GROUPS", 1))
    alone = (("ROLES", 1), ("SPLIT", 0), ("HALO", 0))
    wide = (("VECTOR", 16), ("VECTORS", 2), ("PLACES", 1), ("THREADS", 320), ("MIN_BLOCKS", 1))
    packed = (("VECTOR", 8), ("VECTORS", 4), ("PLACES", 1), ("THREADS", 256), ("MIN_BLOCKS", 1))
    long = (("VECTOR", 8), ("VECTORS", 2), ("PLACES", 2), ("THREADS", 320), ("MIN_BLOCKS", 1))
    kernels = []
    for taps in (shared, own):
        for size, on_chip, lines in ((wide, 0, 8), (packed, 1, 8), (long, 0, 4)):
            rest = (
                ("TAP_LINES", lines),
                ("TAP_WORDS", int(taps is shared)),
                ("DEPTH", 4),
                ("ON_CHIP", on_chip),
                ("PREPARED", 0),
            )
            macros = (*plain, *taps, *size, *alone, *rest)
            kernels.append((Kernel("pixels_forward.cu", "pixels_forward", macros), True))
    size = (("VECTOR", 16), ("VECTORS", 2), ("PLACES", 1), ("THREADS", 128), ("MIN_BLOCKS", 1))
    met = (("ROLES", 2), ("SPLIT", 0), ("HALO", 0), ("TAP_LINES", 4), ("TAP_WORDS", 1), ("DEPTH", 4))
    ways = (("ON_CHIP", 1), ("PREPARED", 1))
    kernels.append(
        (Kernel("pixels_forward.cu", "pixels_forward", (*plain, *shared, *size, *met, *ways)), True)
    )
    kernels.append((Kernel("pixels_weights.cu", "pixels_weights", plain[:4]), True))
    return kernels
