"""Backward of channels that are adjacent in memory (`kernels/pixels_backward.cu`): its sizes."""

from __future__ import annotations

from dataclasses import dataclass

from ..geometry import Case, Kernel, Launch, Plan, options
from .pixels_layout import (
    LARGEST_CLUSTER,
    MOST_THREADS,
    SECTOR,
    SHORTEST_SPLIT,
    Tiling,
    blocks_of,
    channel_blocks,
    defines,
    has_states,
    image_sums,
    launch,
    own_taps,
    reasons,
    roles_of,
    sums,
    tap_groups,
    vector_of,
)

MOST_TAPS = 8
"""Of a thread: taps that wait in its registers."""

LARGE = 64 * 2**20
"""Bytes of scratch memory from which on saving a part of it is worth two launches more."""

MOST = 0.6
"""Of the multiprocessors: they have work if blocks are as wide as wanted."""

WIDEST = 64
"""Bytes of a pixel that a block takes of an operand at most."""


@dataclass(frozen=True)
class Warps(Tiling):
    """A tiling in whole warps.

    Args:
        lanes: of a warp, beside each other in channels; the others are at other places.
    """

    lanes: int

    @property
    def strips(self) -> int:
        """Warps that share a line."""
        return self.threads // 32 * self.lanes // self.vectors


def tiling_of(case: Case) -> Warps | None:
    """The tiling, or None if a line is too long for a block."""
    widest = vector_of(case)
    assert widest is not None
    # Narrower vectors make narrower blocks, for longer lines.
    for vector in (widest, 8, 4):
        if not case.itemsize <= vector <= widest:
            continue
        for vectors in _widths(case, vector):
            # With states at hand, what counts is how early lines are asked for: not a short ring.
            for fewest in (4, 2) if has_states(case, vector) else (2,):
                roles, splits = _cluster(case, vector, vectors)
                while roles * splits <= _largest_cluster(case):
                    tiling = _fit(case, vector, vectors, roles, splits, fewest)
                    if tiling is not None:
                        return tiling
                    splits *= 2
    return None


def _largest_cluster(case: Case) -> int:
    """Blocks of a cluster at most: 16 where several groups of multiprocessors must have as many."""
    if case.device.capability < (9, 0):
        return 1
    return 16 if case.device.capability == (9, 0) and case.device.multiprocessors >= 132 else LARGEST_CLUSTER


def _cluster(case: Case, vector: int, vectors: int) -> tuple[int, int]:
    """Roles and splits: as many blocks as there are multiprocessors, or more, in whole waves of them.

    With fewer images at a time the second-level cache keeps what is read again.
    """
    device = case.device
    blocks = case.problem.batch * blocks_of(case, vector, vectors)
    roles, splits = roles_of(case, blocks), 1
    shortest = min(case.problem.height, case.problem.width)
    while roles * splits * 2 <= _largest_cluster(case) and shortest >= SHORTEST_SPLIT * 2 * splits:
        cluster = roles * splits * 2
        more = blocks * cluster
        if more > device.multiprocessors and more % max(1, device.multiprocessors // cluster * cluster):
            break
        splits *= 2
    return roles, splits


def _widths(case: Case, vector: int) -> list[int]:
    """Vectors that a block may have, the most wanted first: as many as leave most multiprocessors a block.

    What limits the kernel are requests to the second-level cache, and one brings the vectors of a warp
    that lie beside each other. No group of taps is cut.
    """
    problem = case.problem
    vectors = problem.channels * case.itemsize // vector
    wanted = min(max(1, WIDEST // vector), 1 << (vectors - 1).bit_length())
    # Half a sector is the least.
    while wanted > 1 and wanted * vector > SECTOR // 2:
        roles, splits = _cluster(case, vector, wanted)
        blocks = problem.batch * blocks_of(case, vector, wanted) * roles * splits
        if blocks >= MOST * case.device.multiprocessors:
            break
        wanted //= 2
    if own_taps(case) or problem.groups == 1:
        return [n for n in (16, 8, 4, 2, 1) if n <= wanted]
    group = vectors // problem.groups
    fitting = [n for n in range(1, 17) if group % n == 0 or (n % group == 0 and vectors % n == 0)]
    return sorted(fitting, key=lambda n: (n < wanted, abs(n - wanted)))


def plan(case: Case, tiling: Warps) -> Plan:
    """One launch; another that adds up what several blocks have of the gradients of shared taps."""
    problem = case.problem
    blocks = channel_blocks(case, tiling)
    needs = tuple(
        (f"NEED_{name.upper()}", int(name in case.views)) for name in ("dx", "dtaps", "dlam", "dgate")
    )
    size = _shared_memory(case, tiling)
    whole = problem.channels * case.itemsize % (tiling.vector * tiling.vectors) == 0
    own = (
        ("SEGMENT", tiling.tap_lines),
        ("LANES", tiling.lanes),
        ("WHOLE", int(whole)),
        ("HAS_HIDDEN", int(has_states(case, tiling.vector))),
    )
    macros = (*defines(case, tiling, size), *own, *needs)
    kernel = Kernel("pixels_backward.cu", "pixels_backward", macros)
    axes = []
    if {"down", "up"} & set(problem.directions):
        axes.append((problem.height, problem.width))
    if {"right", "left"} & set(problem.directions):
        axes.append((problem.width, problem.height))
    kept = 0
    if not has_states(case, tiling.vector):
        kept = max(_kept_lines(lines, tiling) * places for lines, places in axes)
    pixels = problem.height * problem.width
    # One for each block of a group, or each group of a block.
    planes = 0 if own_taps(case) or "dtaps" not in case.views else max(blocks, problem.groups)
    sums_of_taps = 12 * problem.batch * len(problem.directions) * planes * pixels
    parts = [-1]
    if tiling.roles == 2 and len(axes) == 2 and sums_of_taps > LARGE:
        # An axis after the other, so that they need this memory one after the other.
        parts, sums_of_taps = [0, 1], sums_of_taps // 2
    launches = []
    for axis in parts:
        launches.append(launch(case, tiling, kernel, size, kept, axis))
        if planes:
            add = Kernel("pixels_taps.cu", "pixels_taps", options(case))
            items = problem.batch * len(problem.directions) // len(parts) * problem.groups * pixels
            knobs = (planes, planes // problem.groups, axis)
            launches.append(Launch(add, -(-items // 256), 256, 0, knobs=knobs))
    scratch = (
        *(image * ("dx" in case.views) for image in image_sums(case, tiling)),
        4 * problem.batch * tiling.roles * kept * problem.channels,
        sums_of_taps,
    )
    return Plan("pixels", tuple(launches), scratch, reasons(tiling))


def _kept_lines(lines: int, tiling: Tiling) -> int:
    """Segments of a direction: counted from either end of the line where two roles meet."""
    middle = (lines + 1) // 2 if tiling.roles > 1 else lines
    return -(-middle // tiling.tap_lines) + -(-(lines - middle) // tiling.tap_lines)


def _shared_memory(case: Case, tiling: Warps) -> int:
    """Bytes of a block."""
    return sum(regions(case, tiling))


def regions(case: Case, tiling: Warps) -> tuple[int, ...]:
    """Bytes of what a block has in shared memory, in the order of the kernel's constants.

    Each starts where the one before ends, at a multiple of 16: most hold vectors of as many bytes.
    """
    own, threads, vectors, lines = own_taps(case), tiling.threads, tiling.vectors, tiling.tap_lines
    channels = tiling.vector // case.itemsize
    floats = 4 * channels * tiling.places * threads
    hidden = has_states(case, tiling.vector)
    reads_states = hidden and bool({"dtaps", "dgate"} & set(case.views))
    operands = 2 + ("lam" in case.views) + ("gate" in case.views) + 3 * own + reads_states
    ring = lines * operands * tiling.places * threads * tiling.vector
    sums_ = lines * floats * (sums(case) and "dx" in case.views)
    states = (2 + lines) * floats * (not hidden)
    edges = (tiling.strips > 1) * channels * threads * tiling.lanes // 2
    halo = (tiling.splits > 1) * (16 + 16 * channels * tiling.halo * vectors)
    gradients = (not own and (channels < 4 or hidden)) * lines * tiling.places * threads * 16
    weights = (not own) * 2 * lines * tap_groups(case, tiling.vector, vectors) * tiling.longest * 16
    return ring, sums_, states, edges, halo, gradients, weights


def _fit(case: Case, vector: int, vectors: int, roles: int, splits: int, shortest: int = 2) -> Warps | None:
    """The tiling with few idle threads, whose segments are as long as shared memory allows."""
    problem, device = case.problem, case.device
    runs = (-(-problem.width // splits), -(-problem.height // splits))
    blocks = problem.batch * blocks_of(case, vector, vectors) * roles * splits
    memory = device.shared_memory
    # Blocks that are on a multiprocessor together hide each other's latency.
    together = max(1, min(3, -(-blocks // device.multiprocessors)))
    choices = [((memory + 1024) // together - 1024, 4), (memory, 4), (memory, 2)]
    for most, fewest in dict.fromkeys(choices):
        for lines in _segments(case, vector, vectors):
            halo = lines if splits > 1 else 0
            if lines < max(fewest, shortest) or (splits > 1 and min(runs) < halo):
                continue
            shapes = _shapes(case, vector, vectors, lines, max(runs) + 2 * halo)
            for lanes, places, threads in shapes:
                tiling = Warps(
                    vector, vectors, places, roles, splits, runs, threads, halo, lines, lines, False, lanes
                )
                if threads <= MOST_THREADS and _shared_memory(case, tiling) <= most:
                    return tiling
    return None


def _shapes(case: Case, vector: int, vectors: int, lines: int, longest: int) -> list[tuple[int, int, int]]:
    """Lanes beside each other in channels, places of a thread, threads of a block: the most wanted first."""
    found = []
    taps = 0 if own_taps(case) else lines * tap_groups(case, vector, vectors)
    for lanes in (1, 2, 4, 8, 16):
        for places in (1, 2, 4):
            if vectors % lanes or places * vector > 32 or taps * places > MOST_TAPS * vectors:
                continue
            strips = -(-longest * lanes // (32 * places))
            found.append((lanes, places, 32 * vectors // lanes * strips))
    # Few idle threads; then wide requests, then many threads.
    return sorted(found, key=lambda s: (s[1] * s[2] // 64, -min(s[0] * vector, WIDEST), s[1]))


def _segments(case: Case, vector: int, vectors: int) -> list[int]:
    """Lines of a segment, whose taps are normalised together, the most wanted first."""
    problem = case.problem
    most = 8
    if not own_taps(case):
        most = max(2, MOST_TAPS * vectors // tap_groups(case, vector, vectors))
    image = 4 * problem.batch * problem.channels * problem.height * problem.width
    packed = {"lam", "gate"} & set(case.views)
    if packed and problem.channels * case.itemsize < SECTOR and image > case.device.cache:
        # A part of each sector is other operands; with less on its way more of it is in the cache later.
        most = 4 if has_states(case, vector) else 2
    order = (6, 4, 8, 2) if has_states(case, vector) else (4, 8, 6, 2)
    return [lines for lines in order if lines <= most]


def representative_kernels() -> list[tuple[Kernel, bool]]:
    """Those of `pixels` for its backward pass."""
    plain = (("STORAGE", 1), ("NORMALIZE", 1), ("HAS_LAM", 1), ("HAS_GATE", 1), ("SUM", 1))
    shared = (("OWN_TAPS", 0), ("INTERLEAVED", 0), ("TAP_GROUPS", 1))
    own = (("OWN_TAPS", 1), ("INTERLEAVED", 1), ("TAP_GROUPS", 1))
    alone = (("ROLES", 1), ("SPLIT", 0), ("HALO", 0))
    wide = (("VECTOR", 16), ("VECTORS", 4), ("LANES", 4), ("THREADS", 256))
    packed = (("VECTOR", 8), ("VECTORS", 2), ("LANES", 2), ("THREADS", 288))
    long = (("VECTOR", 16), ("VECTORS", 2), ("LANES", 2), ("THREADS", 288))
    gradients = tuple((f"NEED_{name}", 1) for name in ("DX", "DTAPS", "DLAM", "DGATE"))
    kernels = []
    for taps in (shared, own):
        for size, lines in ((wide, 4), (packed, 2), (long, 4)):
            block = (("PLACES", 1), ("MIN_BLOCKS", 1), ("WHOLE", 1))
            rest = (("TAP_LINES", lines), ("SEGMENT", lines), *gradients)
            for hidden in (0, 1):
                macros = (*plain, *taps, *size, *block, *alone, *rest, ("HAS_HIDDEN", hidden))
                kernels.append((Kernel("pixels_backward.cu", "pixels_backward", macros), True))
    kernels.append((Kernel("pixels_taps.cu", "pixels_taps", plain[:4]), False))
    return kernels
