"""Channels adjacent in memory: channels_last, and views into one packed (B, H, W, P) tensor.

A block scans a run of places of a line, some vectors of channels wide; both axes are coalesced as they are.
The kernels say how (`kernels/pixels*.cu`); here it is decided who does what:

- **roles**: with both directions of an axis, two blocks start at opposite ends and meet in the middle; with
  few blocks both axes run at the same time (four roles).
- **splits**: a line's places over several blocks, which recompute `HALO` places on either side and exchange
  states every `HALO` lines.

Both need clusters; a GPU without them runs the directions one after another, a block for each channel block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..geometry import Case, Kernel, Launch, Plan, View, options

HALO = 8
"""Places that a split recomputes on either side, and lines between two exchanges."""

MOST_THREADS = 512
"""Of a block: more would leave a thread less than 128 registers."""

SHORTEST_SPLIT = 128
"""Places of a split at least: with fewer, what it recomputes and exchanges costs more than it gains."""

LARGEST_CLUSTER = 8
DEEPEST = 8
"""Lines of a ring at most."""

MOST_TAPS = 4
"""Of a thread: taps that wait in its registers."""

SECTOR = 32
"""Bytes that a read moves at least."""


@dataclass(frozen=True)
class Tiling:
    """How the threads of a launch spread over the problem.

    Args:
        vector: bytes of a vector of channels.
        vectors: vectors of a block.
        places: neighbouring places of a thread.
        roles, splits: blocks of a cluster.
        runs: places of a split along a row and along a column.
        threads: of a block.
        halo: places that a split recomputes on either side, and lines between two exchanges.
        tap_lines: lines of taps that are normalised together; in backward also lines of a segment.
        depth: lines of the ring, even.
        on_chip: sums over directions are in shared memory, not in scratch.
    """

    vector: int
    vectors: int
    places: int
    roles: int
    splits: int
    runs: tuple[int, int]
    threads: int
    halo: int
    tap_lines: int
    depth: int
    on_chip: bool

    @property
    def longest(self) -> int:
        """Places that a block scans at most."""
        return max(self.runs) + 2 * self.halo

    @property
    def cluster(self) -> int:
        return self.roles * self.splits


def why_not(case: Case) -> str | None:
    """Channels must be adjacent, in vectors of at least 4 bytes; a line must fit the threads of a block."""
    problem = case.problem
    if problem.channels == 1:
        return "one channel has nothing adjacent to it: planes are read line by line"
    for name in _operands(case):
        if case.views[name].c != 1:
            return f"{name}: channels are not adjacent in memory (stride {case.views[name].c})"
    if _own_taps(case) and not _taps_adjacent(case):
        return "taps: neither the three of a channel nor the channels of a tap are adjacent in memory"
    if _vector(case) is None:
        return "channels do not come in vectors of 4 bytes: an odd number, stride or address"
    if _tiling(case) is None:
        return f"a line of {max(problem.height, problem.width)} places is too long for a block's threads"
    return None


def plan(case: Case) -> Plan:
    """Launches, and why they are as they are."""
    tiling = _tiling(case)
    assert tiling is not None
    return _backward(case, tiling) if case.backward else _forward(case, tiling)


def _forward(case: Case, tiling: Tiling) -> Plan:
    defines = (*_defines(case, tiling), ("ON_CHIP", int(tiling.on_chip)))
    kernel = Kernel("pixels_forward.cu", "pixels_forward", defines)
    return Plan("pixels", (_launch(case, tiling, kernel),), _image_sums(case, tiling), _reasons(tiling))


def _backward(case: Case, tiling: Tiling) -> Plan:
    problem = case.problem
    blocks = _channel_blocks(case, tiling)
    direct = _own_taps(case) or "dtaps" not in case.views or blocks <= problem.groups
    needs = tuple(
        (f"NEED_{name.upper()}", int(name in case.views)) for name in ("dx", "dtaps", "dlam", "dgate")
    )
    defines = (*_defines(case, tiling), ("SEGMENT", tiling.tap_lines), ("DIRECT", int(direct)), *needs)
    kernel = Kernel("pixels_backward.cu", "pixels_backward", defines)
    axes = []
    if {"down", "up"} & set(problem.directions):
        axes.append((problem.height, problem.width))
    if {"right", "left"} & set(problem.directions):
        axes.append((problem.width, problem.height))
    kept = max(_kept_lines(lines, tiling) * places for lines, places in axes)
    launches = [_launch(case, tiling, kernel, kept)]
    pixels = problem.height * problem.width
    planes = problem.batch * len(problem.directions)
    if not direct:
        options_ = options(case)
        add = Kernel("pixels_taps.cu", "pixels_taps", options_)
        grid = -(-planes * problem.groups * pixels // 256)
        launches.append(Launch(add, grid, 256, 0, knobs=(blocks, blocks // problem.groups)))
    scratch = (
        *(size * ("dx" in case.views) for size in _image_sums(case, tiling)),
        4 * problem.batch * tiling.roles * kept * problem.channels,
        0 if direct else 12 * planes * blocks * pixels,
    )
    return Plan("pixels", tuple(launches), scratch, _reasons(tiling))


def _launch(case: Case, tiling: Tiling, kernel: Kernel, *knobs: int) -> Launch:
    blocks = _channel_blocks(case, tiling)
    return Launch(
        kernel,
        case.problem.batch * blocks * tiling.cluster,
        tiling.threads,
        _shared_memory(case, tiling),
        cluster=tiling.cluster,
        knobs=(tiling.splits, blocks, *tiling.runs, *knobs),
    )


def _image_sums(case: Case, tiling: Tiling) -> tuple[int, int]:
    """Bytes of float32 sums over directions: of all, or of either axis."""
    problem = case.problem
    image = 4 * problem.batch * problem.channels * problem.height * problem.width * (not tiling.on_chip)
    return image * (_sums(case) and case.itemsize < 4), image * (tiling.roles == 4)


def _kept_lines(lines: int, tiling: Tiling) -> int:
    """Segments of a direction: counted from either end of the line where two roles meet."""
    middle = (lines + 1) // 2 if tiling.roles > 1 else lines
    return -(-middle // tiling.tap_lines) + -(-(lines - middle) // tiling.tap_lines)


def _defines(case: Case, tiling: Tiling) -> tuple[tuple[str, int], ...]:
    own = _own_taps(case)
    return (
        *options(case),
        ("VECTOR", tiling.vector),
        ("VECTORS", tiling.vectors),
        ("PLACES", tiling.places),
        ("OWN_TAPS", int(own)),
        ("INTERLEAVED", int(own and case.views["taps"].c == 3)),
        ("TAP_GROUPS", _tap_groups(case, tiling.vector, tiling.vectors)),
        ("TAP_LINES", tiling.tap_lines),
        ("ROLES", tiling.roles),
        ("SPLIT", int(tiling.splits > 1)),
        ("HALO", tiling.halo),
        ("DEPTH", tiling.depth),
        ("SUM", int(_sums(case))),
        ("THREADS", tiling.threads),
        ("MIN_BLOCKS", _blocks_at_once(case, tiling)),
    )


def _shared_memory(case: Case, tiling: Tiling) -> int:
    """Bytes of a block, in the order of the kernels' constants."""
    own, threads, places, vectors = _own_taps(case), tiling.threads, tiling.places, tiling.vectors
    floats = 4 * tiling.vector // case.itemsize
    pitch = threads + 2 * vectors
    slot = _slot(case, tiling)
    halo = (tiling.splits > 1) * (16 + 4 * tiling.halo * floats * vectors)
    groups = _tap_groups(case, tiling.vector, vectors)
    weights = (not own) * 2 * tiling.tap_lines * groups * tiling.longest * 16
    if case.backward:
        states = (tiling.tap_lines + 1) * floats * places * pitch + own * 2 * floats * pitch
        gradients = (not own) * tiling.tap_lines * 12 * places * threads
        return tiling.depth * slot + states + halo + gradients + weights
    published = 2 * min(places, 2) * floats * pitch
    carried = (tiling.roles > 1) * places * floats * threads
    return (
        tiling.depth * slot
        + published
        + carried
        + halo
        + weights
        + tiling.on_chip * _sums_on_chip(case, tiling)
    )


def _sums_on_chip(case: Case, tiling: Tiling) -> int:
    """Bytes of the sums that a block keeps: two quarters of the image, or the whole of it, rows padded."""
    problem = case.problem
    floats = 4 * tiling.vector // case.itemsize
    pixel = min(16, floats) * tiling.vectors
    rows, columns, quarters = problem.height, problem.width, 1
    if tiling.roles > 1:
        rows, columns, quarters = -(-rows // 2), -(-columns // 2), 2
    return quarters * floats // min(16, floats) * rows * (-(-columns * pixel // 128) * 128 + pixel)


def _blocks_at_once(case: Case, tiling: Tiling) -> int:
    """Blocks of a multiprocessor that registers should be saved for."""
    by_memory = case.device.shared_memory // (_shared_memory(case, tiling) + 1024)
    return max(1, min(MOST_THREADS // tiling.threads, by_memory))


def _slot(case: Case, tiling: Tiling) -> int:
    """Bytes of a line in the ring."""
    operands = 1 + ("lam" in case.views) + ("gate" in case.views) + 3 * _own_taps(case) + case.backward
    sums = (_sums(case) and not tiling.on_chip) or case.backward
    return tiling.threads * tiling.places * tiling.vector * (operands + sums * 4 // case.itemsize)


def _tiling(case: Case) -> Tiling | None:
    """The first tiling that fits a block, from the widest channel blocks on."""
    vector = _vector(case)
    assert vector is not None
    for vectors in _widths(case, vector):
        roles, splits = _cluster(case, vector, vectors)
        while True:
            tiling = _fit(case, vector, vectors, roles, splits)
            if tiling is not None:
                return tiling
            if roles * splits * 2 > LARGEST_CLUSTER or case.device.capability < (9, 0):
                break
            splits *= 2
    return None


def _fit(case: Case, vector: int, vectors: int, roles: int, splits: int) -> Tiling | None:
    """The tiling with as few places a thread as possible, or None if a line is too long."""
    problem, device = case.problem, case.device
    runs = (-(-problem.width // splits), -(-problem.height // splits))
    blocks = problem.batch * _blocks_of(case, vector, vectors) * roles * splits
    many = blocks >= device.multiprocessors
    memory = device.shared_memory
    # Sums on chip, shared memory of a block, lines of the ring and of a stage of taps at least.
    choices = [(False, memory, depth, 2) for depth in (6, 4, 2)]
    if case.backward:
        # Short segments cost memory and, in splits, exchanges: a shorter ring is better.
        choices = [(False, memory, 5, 4), (False, memory, 3, 4), (False, memory, 2, 2)]
    if many:
        # Blocks that are on a multiprocessor together hide each other's latency.
        together = min(3, -(-blocks // device.multiprocessors))
        choices.insert(0, (False, (memory + 1024) // together - 1024, 3 if case.backward else 4, 4))
    if not case.backward and splits == 1 and _sums(case):
        # Sums on chip leave room for a ring of four lines at least, or are not worth it.
        choices.insert(0, (True, memory, 4, 2))
    for on_chip, memory, depth, fewest in choices:
        # With narrow vectors a second place shares out what backward does once a thread.
        for places in (2, 1, 4) if case.backward and many and vector <= 8 else (1, 2, 4):
            for lines in _tap_lines(case, vector, vectors, places, max(runs)):
                halo = (lines if case.backward else HALO) if splits > 1 else 0
                threads = -(-(max(runs) + 2 * halo) // places) * vectors
                if threads > MOST_THREADS or lines < fewest or (splits > 1 and min(runs) < halo):
                    continue
                size = _rounded(threads)
                tiling = Tiling(
                    vector, vectors, places, roles, splits, runs, size, halo, lines, depth, on_chip
                )
                if _shared_memory(case, tiling) <= memory:
                    return _deepened(case, tiling, memory)
    return None


def _deepened(case: Case, tiling: Tiling, memory: int) -> Tiling:
    """With a ring that reaches as far ahead as shared memory allows: a line takes less time than memory."""
    step = 1 if case.backward else 2
    while tiling.depth < DEEPEST:
        deeper = replace(tiling, depth=tiling.depth + step)
        if _shared_memory(case, deeper) > memory:
            break
        tiling = deeper
    return tiling


def _rounded(threads: int) -> int:
    """Whole warps, of few different numbers: a kernel is compiled for one."""
    warps = -(-threads // 32)
    step = 1 << max(0, warps.bit_length() - 3)
    return 32 * (-(-warps // step) * step)


def _roles(case: Case, blocks: int) -> int:
    """Blocks of a cluster that take different directions; four where there would be few blocks."""
    problem, device = case.problem, case.device
    if device.capability < (9, 0) or not _paired(problem.directions):
        return 1
    few = 4 * blocks <= device.multiprocessors and max(problem.height, problem.width) <= 256
    return 4 if few and len(problem.directions) == 4 else 2


def _cluster(case: Case, vector: int, vectors: int) -> tuple[int, int]:
    """Roles and splits: as many blocks as the GPU has multiprocessors, if the cluster can be so large."""
    problem, device = case.problem, case.device
    blocks = problem.batch * _blocks_of(case, vector, vectors)
    roles = _roles(case, blocks)
    splits = 1
    shortest = min(problem.height, problem.width)
    while (
        device.capability >= (9, 0)
        and roles * splits * 2 <= LARGEST_CLUSTER
        and blocks * roles * splits * 2 <= device.multiprocessors
        and shortest >= SHORTEST_SPLIT * 2 * splits
    ):
        splits *= 2
    return roles, splits


def _widths(case: Case, vector: int) -> list[int]:
    """Vectors that a block may have, the most wanted first.

    Wanted are the bytes of a sector, or half of them where that gives more multiprocessors work. No
    group of taps is cut.
    """
    problem = case.problem
    vectors = problem.channels * case.itemsize // vector
    wanted = max(1, SECTOR // vector)
    blocks = problem.batch * _blocks_of(case, vector, wanted)
    if vector * wanted > 16 and 2 * blocks * _roles(case, blocks) <= case.device.multiprocessors:
        wanted //= 2
    if _own_taps(case) or problem.groups == 1:
        return list(dict.fromkeys((min(wanted, vectors), 1)))
    group = vectors // problem.groups
    fitting = [n for n in range(1, 17) if group % n == 0 or (n % group == 0 and vectors % n == 0)]
    return sorted(fitting, key=lambda n: (n < wanted, abs(n - wanted)))


def _vector(case: Case) -> int | None:
    """The widest vector, in bytes, that all operands are aligned to."""
    for vector in (16, 8, 4):
        if vector >= case.itemsize and _aligned(case, vector):
            return vector
    return None


def _aligned(case: Case, vector: int) -> bool:
    problem = case.problem
    width = vector // case.itemsize
    span = problem.channels if _own_taps(case) else problem.channels // problem.groups
    if span % width:
        return False
    sizes = {"b": problem.batch, "d": len(problem.directions), "h": problem.height, "w": problem.width}
    taps = [name for name in ("taps", "dtaps") if name in case.views and _own_taps(case)]
    names = [*_operands(case), *taps]
    for name in names:
        view = case.views[name]
        if view.alignment < vector:
            return False
        strides = [getattr(view, axis) for axis, size in sizes.items() if size > 1]
        if name in ("taps", "dtaps") and view.c == 1:
            strides.append(view.k)
        if any(stride % width for stride in strides):
            return False
    return True


def _operands(case: Case) -> list[str]:
    """The tensors whose channels are read or written in vectors; a state that forward kept is not read."""
    unread = ("taps", "dtaps", "y") if case.backward else ("taps",)
    return [name for name in case.views if name not in unread]


def _own_taps(case: Case) -> bool:
    return case.problem.groups == case.problem.channels


def _taps_adjacent(case: Case) -> bool:
    """Both taps and their gradient, in the same way."""
    views: list[View] = [case.views[name] for name in ("taps", "dtaps") if name in case.views]
    return all(view.k == 1 and view.c == 3 for view in views) or all(view.c == 1 for view in views)


def _paired(directions: tuple[str, ...]) -> bool:
    """Do the directions come in pairs of opposites?"""
    return set(directions) in ({"down", "up"}, {"right", "left"}, {"down", "up", "right", "left"})


def _sums(case: Case) -> bool:
    return len(case.problem.directions) > 1


def _blocks_of(case: Case, vector: int, vectors: int) -> int:
    return -(-case.problem.channels * case.itemsize // (vector * vectors))


def _channel_blocks(case: Case, tiling: Tiling) -> int:
    return _blocks_of(case, tiling.vector, tiling.vectors)


def _tap_groups(case: Case, vector: int, vectors: int) -> int:
    """Groups of taps that a block meets."""
    problem = case.problem
    group = problem.channels // problem.groups * case.itemsize // vector
    return max(1, vectors // max(1, group)) if problem.groups > 1 and not _own_taps(case) else 1


def _tap_lines(case: Case, vector: int, vectors: int, places: int, run: int) -> list[int]:
    """Lines of taps that are normalised together, the most wanted first.

    Many cover the latency of memory, few fit registers and shared memory. In backward they are a segment.
    """
    most = (8 if case.backward else MOST_TAPS) * vectors // (places * _tap_groups(case, vector, vectors))
    if _own_taps(case):
        most = 8
    if case.backward:
        return [lines for lines in (8, 6, 4, 2) if lines <= max(2, most)]
    return [next(lines for lines in (8, 4, 2) if lines == 2 or lines <= min(most, 1024 // run))]


def _reasons(tiling: Tiling) -> tuple[str, ...]:
    roles = {
        1: "directions one after another",
        2: "opposite directions start at both ends and meet",
        4: "both axes at the same time, opposite directions from both ends",
    }
    return (
        f"channels are adjacent: vectors of {tiling.vector} bytes, {tiling.vectors} to a block",
        roles[tiling.roles],
        *((f"a line is split over {tiling.splits} blocks",) if tiling.splits > 1 else ()),
        *(("sums over directions stay in shared memory",) if tiling.on_chip else ()),
    )


def representative_kernels() -> list[tuple[Kernel, bool]]:
    """Kernels that the tests compile, and whether each is hot (must not spill)."""
    plain = (("STORAGE", 1), ("NORMALIZE", 1), ("HAS_LAM", 1), ("HAS_GATE", 1), ("SUM", 1))
    shared = (("OWN_TAPS", 0), ("INTERLEAVED", 0), ("TAP_GROUPS", 1))
    own = (("OWN_TAPS", 1), ("INTERLEAVED", 1), ("TAP_GROUPS", 1))
    alone = (("ROLES", 1), ("SPLIT", 0), ("HALO", 0))
    wide = (("VECTOR", 16), ("VECTORS", 2), ("PLACES", 1), ("THREADS", 128), ("MIN_BLOCKS", 2))
    packed = (("VECTOR", 8), ("VECTORS", 4), ("PLACES", 1), ("THREADS", 256), ("MIN_BLOCKS", 1))
    long = (("VECTOR", 8), ("VECTORS", 2), ("PLACES", 2), ("THREADS", 320), ("MIN_BLOCKS", 1))
    forward = ("pixels_forward.cu", "pixels_forward")
    backward = ("pixels_backward.cu", "pixels_backward")
    gradients = tuple((f"NEED_{name}", 1) for name in ("DX", "DTAPS", "DLAM", "DGATE"))
    kernels = []
    for taps in (shared, own):
        for size, on_chip, lines in ((wide, 0, 8), (packed, 1, 8), (long, 0, 4)):
            common = (*plain, *taps, *size, *alone, ("TAP_LINES", lines))
            kernels.append((Kernel(*forward, (*common, ("DEPTH", 4), ("ON_CHIP", on_chip))), True))
            segments = (("SEGMENT", lines), ("DEPTH", 3), ("DIRECT", on_chip), *gradients)
            kernels.append((Kernel(*backward, (*common, *segments)), True))
    kernels.append((Kernel("pixels_taps.cu", "pixels_taps", plain[:4]), False))
    return kernels
