"""What forward and backward of `pixels` share: who scans what, and what the kernels are told of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..geometry import Case, Kernel, Launch, View, options

MOST_THREADS = 512
"""Of a block: more would leave a thread less than 128 registers."""

SHORTEST_SPLIT = 128
"""Places of a split at least: with fewer, what it recomputes and exchanges costs more than it gains."""

LARGEST_CLUSTER = 8
"""Blocks that every device with clusters can run together."""

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
        prepared: weights of shared taps are made by a launch before.
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
    prepared: bool = field(default=False, kw_only=True)

    @property
    def longest(self) -> int:
        """Places that a block scans at most."""
        return max(self.runs) + 2 * self.halo

    @property
    def cluster(self) -> int:
        return self.roles * self.splits


def rounded(threads: int) -> int:
    """Whole warps, of few different numbers: a kernel is compiled for one."""
    warps = -(-threads // 32)
    step = 1 << max(0, warps.bit_length() - 3)
    return 32 * (-(-warps // step) * step)


def roles_of(case: Case, blocks: int) -> int:
    """Blocks of a cluster that take different directions; four where there would be few blocks."""
    problem, device = case.problem, case.device
    if device.capability < (9, 0) or not paired(problem.directions):
        return 1
    few = 4 * blocks <= device.multiprocessors and max(problem.height, problem.width) <= 256
    return 4 if few and len(problem.directions) == 4 else 2


def largest_cluster(case: Case) -> int:
    """Blocks of a cluster at most: 16 where several groups of multiprocessors must have as many."""
    capability = case.device.capability
    if capability < (9, 0):
        return 1
    return 16 if capability == (9, 0) and case.device.multiprocessors >= 132 else LARGEST_CLUSTER


def vector_of(case: Case) -> int | None:
    """The widest vector, in bytes, that all operands are aligned to."""
    for vector in (16, 8, 4):
        if vector >= case.itemsize and aligned(case, vector):
            return vector
    return None


def aligned(case: Case, vector: int) -> bool:
    """Do all operands come in vectors of so many bytes?"""
    problem = case.problem
    width = vector // case.itemsize
    span = problem.channels if own_taps(case) else problem.channels // problem.groups
    if span % width:
        return False
    taps = [name for name in ("taps", "dtaps") if name in case.views and own_taps(case)]
    if any(case.views[name].c == 1 and case.views[name].k % width for name in taps):
        return False
    return all(has_vectors(case, case.views[name], vector) for name in [*operands(case), *taps])


def has_vectors(case: Case, view: View, vector: int) -> bool:
    """Do the pixels of a tensor start at multiples of so many bytes?"""
    problem = case.problem
    sizes = {"b": problem.batch, "d": len(problem.directions), "h": problem.height, "w": problem.width}
    strides = [getattr(view, axis) for axis, size in sizes.items() if size > 1]
    return view.alignment >= vector and not any(stride * case.itemsize % vector for stride in strides)


def has_states(case: Case, vector: int) -> bool:
    """Are the states at hand in backward, in vectors of so many bytes?"""
    return "y" in case.views and case.views["y"].c == 1 and has_vectors(case, case.views["y"], vector)


def operands(case: Case) -> list[str]:
    """The tensors whose channels are read or written in vectors, but for states: others are found instead."""
    unread = ("taps", "dtaps", "y") if case.backward else ("taps",)
    return [name for name in case.views if name not in unread]


def own_taps(case: Case) -> bool:
    """Does each channel have taps of its own?"""
    return case.problem.groups == case.problem.channels


def taps_adjacent(case: Case) -> bool:
    """Both taps and their gradient, in the same way."""
    views: list[View] = [case.views[name] for name in ("taps", "dtaps") if name in case.views]
    return all(view.k == 1 and view.c == 3 for view in views) or all(view.c == 1 for view in views)


def paired(directions: tuple[str, ...]) -> bool:
    """Do the directions come in pairs of opposites?"""
    return set(directions) in ({"down", "up"}, {"right", "left"}, {"down", "up", "right", "left"})


def sums(case: Case) -> bool:
    """Is y a sum over directions?"""
    return len(case.problem.directions) > 1


def blocks_of(case: Case, vector: int, vectors: int) -> int:
    """Channel blocks of so many vectors."""
    return -(-case.problem.channels * case.itemsize // (vector * vectors))


def channel_blocks(case: Case, tiling: Tiling) -> int:
    return blocks_of(case, tiling.vector, tiling.vectors)


def tap_groups(case: Case, vector: int, vectors: int) -> int:
    """Groups of taps that a block meets."""
    problem = case.problem
    group = problem.channels // problem.groups * case.itemsize // vector
    return max(1, vectors // max(1, group)) if problem.groups > 1 and not own_taps(case) else 1


def defines(case: Case, tiling: Tiling, shared_memory: int) -> tuple[tuple[str, int], ...]:
    """Macros of both kernels."""
    own = own_taps(case)
    return (
        *options(case),
        ("VECTOR", tiling.vector),
        ("VECTORS", tiling.vectors),
        ("PLACES", tiling.places),
        ("OWN_TAPS", int(own)),
        ("INTERLEAVED", int(own and case.views["taps"].c == 3)),
        ("TAP_GROUPS", tap_groups(case, tiling.vector, tiling.vectors)),
        ("TAP_LINES", tiling.tap_lines),
        ("TAP_WORDS", int(_tap_words(case))),
        ("ROLES", tiling.roles),
        ("SPLIT", int(tiling.splits > 1)),
        ("HALO", tiling.halo),
        ("DEPTH", tiling.depth),
        ("SUM", int(sums(case))),
        ("THREADS", tiling.threads),
        ("MIN_BLOCKS", blocks_at_once(case, tiling, shared_memory)),
    )


def _tap_words(case: Case) -> bool:
    """Do three shared taps of 16 bits always lie in two aligned words that hold nothing but taps?"""
    problem, view = case.problem, case.views["taps"]
    if case.itemsize != 2 or own_taps(case) or view.k != 1 or view.alignment < 4:
        return False
    sizes = {"b": problem.batch, "h": problem.height, "w": problem.width}
    directions = len(problem.directions)
    return (
        # An even number of triples: the last ends with a word.
        directions * problem.groups % 2 == 0
        and (view.c == 3 or problem.groups == 1)
        and (view.d == 3 * problem.groups or directions == 1)
        and not any(getattr(view, axis) % 2 for axis, size in sizes.items() if size > 1)
    )


def launch(case: Case, tiling: Tiling, kernel: Kernel, shared_memory: int, *knobs: int) -> Launch:
    """With the knobs of the kernels' Layout, and more."""
    blocks = channel_blocks(case, tiling)
    return Launch(
        kernel,
        case.problem.batch * blocks * tiling.cluster,
        tiling.threads,
        shared_memory,
        cluster=tiling.cluster,
        knobs=(tiling.splits, blocks, *tiling.runs, *knobs),
    )


def blocks_at_once(case: Case, tiling: Tiling, shared_memory: int) -> int:
    """Blocks of a multiprocessor, of so many bytes each, that registers should be saved for."""
    by_memory = case.device.shared_memory // (shared_memory + 1024)
    return max(1, min(MOST_THREADS // tiling.threads, by_memory))


def image_sums(case: Case, tiling: Tiling) -> tuple[int, int]:
    """Bytes of float32 sums over directions: of all, or of either axis."""
    problem = case.problem
    image = 4 * problem.batch * problem.channels * problem.height * problem.width * (not tiling.on_chip)
    return image * (sums(case) and case.itemsize < 4), image * (tiling.roles == 4)


def reasons(tiling: Tiling) -> tuple[str, ...]:
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
        *(("weights are made once for all channels, by a launch before",) if tiling.prepared else ()),
    )
