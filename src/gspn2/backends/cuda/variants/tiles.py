"""Large images of several directions, channels adjacent: tile by tile, operands read twice, no sum in memory.

`kernels/tiles.cuh` says how; here it is decided how large tiles are. A larger tile has fewer borders, a
smaller one leaves room for several blocks on a multiprocessor, of which some copy while others compute.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..geometry import Case, Kernel, Launch, Plan, options
from .pixels_layout import has_vectors, operands, own_taps

VECTORS = (4, 2)
"""Channels of a vector, whatever their type, the most wanted first."""

LEAST_LINES = 64
"""Of an image: with fewer it is a few tiles, and most of their places are beside another."""

WANTED = ((16, 4), (16, 2), (32, 1), (32, 2), (16, 8), (16, 10), (32, 4))
"""Sides of tiles and vectors of blocks, the most wanted first: the second-level cache is asked for pieces of
a pixel, and half a sector costs as much as a whole one."""

WANTED_PAIRS = ((16, 1), (32, 1))
"""The same where two channels are a vector: such a tile is little to do, and small ones are many."""

WANTED_OWN = ((16, 2), (16, 1))
"""The same where each channel has its taps."""

WIDEST = 16
"""Channels that one block takes of a pixel: of more it asks for short pieces, and `pixels` was faster."""

FEW, LARGE = 48, 256
"""Channels of all images at most, and lines of an image at least: `pixels` then has few blocks, whose lines
follow one another, and most of the device waits."""

LARGE_PAIRS = 128
"""The same lines where two channels are a vector."""

MOST_THREADS = 1024

FOUR_WARPS = 128
"""Threads of a block that has a warp for each scheduler of a multiprocessor."""

MOST_TOGETHER, MOST_TOGETHER_OWN = 640, 1024
"""Threads of a multiprocessor that registers are saved for, of a vector each and (own taps) of two channels:
more would leave each too few."""

RING = 12
"""Lines that are on their way in `tiles_borders`, at most."""


@dataclass(frozen=True)
class Cut:
    """How an image is cut.

    Args:
        side: pixels along the sides of a tile.
        vectors: of a block.
        places: of a thread of `tiles_borders`.
        vector: channels of a vector.
    """

    side: int
    vectors: int
    places: int
    vector: int = 4

    @property
    def channels(self) -> int:
        """Of a block."""
        return self.vectors * self.vector


def why_not(case: Case) -> str | None:
    """Several directions of a large image, weights to be made."""
    return cannot(case) or slower(case)


def slower(case: Case) -> str | None:
    """Why another variant is faster."""
    problem, device = case.problem, case.device
    pixels = problem.height * problem.width
    if min(problem.height, problem.width) < LEAST_LINES:
        return f"images of less than {LEAST_LINES} lines are too few tiles"
    # Those of 32 bytes of channels, in two blocks.
    if pixels * 8 * 4 // 2 <= device.shared_memory:
        return "sums over the directions of an image stay on the chip as they are"
    few, least = problem.batch * problem.channels <= FEW, min(problem.height, problem.width)
    if vector_of(case) < VECTORS[0]:
        return None if few and least >= LARGE_PAIRS else "vectors of two channels are for few large images"
    if few and least >= LARGE:
        return None
    scaled = "lam" in case.views or "gate" in case.views
    if problem.channels > WIDEST and (not case.backward or (scaled and not own_taps(case))):
        return f"more than {WIDEST} channels would be asked for in short pieces, twice"
    if (4 + case.itemsize) * problem.batch * problem.channels * pixels <= device.cache:
        return "x and sums over directions stay in the cache: operands would be read twice for nothing"
    return None


def cannot(case: Case) -> str | None:
    """Why it cannot run the case at all."""
    problem = case.problem
    if len(problem.directions) < 2:
        return "a single direction has no sum to keep on the chip"
    if not problem.normalize:
        return "weights as given, which need not add up to one"
    narrowest = VECTORS[-1]
    if own_taps(case):
        reason = _cannot_have_own_taps(case)
        if reason:
            return reason
    elif problem.channels // problem.groups % narrowest:
        return f"taps are not shared by {narrowest} channels or a multiple of that"
    # States that forward has kept are not looked at.
    for name in operands(case):
        if case.views[name].c != 1:
            return f"{name}: channels are not adjacent in memory (stride {case.views[name].c})"
        if not has_vectors(case, case.views[name], narrowest * case.itemsize):
            return f"{name}: pixels do not start at multiples of {narrowest} channels"
    if next(cuts(case), None) is None:
        return "a line is too long for a block's threads, or tiles do not fit in its memory"
    return None


def _cannot_have_own_taps(case: Case) -> str | None:
    """Why it cannot run a case whose channels have taps of their own."""
    if case.problem.channels % VECTORS[0]:
        return f"{case.problem.channels} channels are no multiple of {VECTORS[0]}"
    if case.problem.dtype != torch.bfloat16:
        return "taps of each channel are taken in bfloat16 only: weights of 32 bits would fill the memory"
    for name in ("taps", "dtaps"):
        view = case.views.get(name)
        if view is None:
            continue
        if (view.c, view.k) != (3, 1):
            return f"{name}: the three taps of a channel are not adjacent in memory"
        if not has_vectors(case, view, VECTORS[0] * case.itemsize):
            return f"{name}: pixels do not start at multiples of {VECTORS[0]} taps"
    return None


def cuts(case: Case) -> Iterator[Cut]:
    """The ways of cutting that there are, the most wanted first."""
    problem = case.problem
    longest = max(problem.height, problem.width)
    own, vector = own_taps(case), vector_of(case)
    vectors_of = problem.channels // (1 if own else problem.groups) // vector
    wanted = WANTED_OWN if own else WANTED if vector == VECTORS[0] else WANTED_PAIRS
    for side, vectors in wanted:
        # A lane has a vector, or two channels with taps of their own.
        if vectors_of % vectors == 0 and (side * vectors * (1 + own) % 32 == 0 or _come_in_pairs(case)):
            for places in _places(case, longest, vector):
                if longest <= places * MOST_THREADS:
                    cut = Cut(side, vectors, places, vector)
                    if memory(case, cut) <= case.device.shared_memory:
                        yield cut


def _places(case: Case, longest: int, vector: int) -> tuple[int, ...]:
    """Of a thread of `tiles_borders`, the most wanted first.

    Places of two channels are little to do: a block has a warp for each scheduler, if it can, and no more.
    """
    if own_taps(case):
        return (2, 4)
    if vector == VECTORS[0]:
        return (4, 2)
    wanted = next((places for places in (2, 4) if longest <= places * FOUR_WARPS), 8)
    return (wanted, *(places for places in (8, 4, 2) if places != wanted))


def vector_of(case: Case) -> int:
    """Channels of a vector: as many as share taps and start a multiple of that many everywhere.

    Those that have taps of their own: the widest.
    """
    if own_taps(case):
        return VECTORS[0]
    shared = case.problem.channels // case.problem.groups
    return next(
        vector
        for vector in VECTORS
        if shared % vector == 0
        and all(has_vectors(case, case.views[name], vector * case.itemsize) for name in operands(case))
    )


def _come_in_pairs(case: Case) -> bool:
    """Do neighbouring directions have lines along the same axis, so that a warp may hold two?"""
    vertical = [name in ("down", "up") for name in case.problem.directions]
    return len(vertical) % 2 == 0 and vertical[::2] == vertical[1::2]


def plan(case: Case) -> Plan:
    """Tiles by themselves, what they hand to each other, tiles again."""
    return plan_of(case, next(cuts(case)))


def plan_of(case: Case, cut: Cut) -> Plan:
    problem = case.problem
    side, vectors = cut.side, cut.vectors
    scans = len(problem.directions)
    restarts = problem.chunk is not None and problem.chunk < max(problem.height, problem.width)
    own = own_taps(case)
    shape = (("VECTOR", cut.vector), ("SIDE", side), ("SUBS", vectors), ("SCANS", scans))
    common = (*options(case), *shape, ("OWN_TAPS", int(own)), ("RESTARTS", int(restarts)))
    tiles = problem.batch * -(-problem.height // side) * -(-problem.width // side)

    def tiled(final: bool) -> Launch:
        size = _memory(case, cut, final)
        threads = scans * vectors * side
        name = "tiles_backward" if case.backward else "tiles_forward"
        which: tuple[tuple[str, int], ...] = (("FINAL", int(final)),)
        if own:
            # Two channels a lane; and states and adjoints of the tile alone at the same time.
            threads *= 2 * (1 + (case.backward and not final))
            name = name.replace("tiles", "tiles_own") if final else "tiles_own_alone"
            which = () if final else (("BACKWARD", int(case.backward)),)
        # Registers are saved for as many blocks as fit; with more warps than that nothing is gained.
        most = MOST_TOGETHER_OWN if own else MOST_TOGETHER
        together = min(case.device.shared_memory // (size + 1024), most // threads)
        macros = (*common, *which, ("MIN_BLOCKS", max(1, together)))
        # Weights are made once by a block, and the gradient of taps is a sum over the channels of a group.
        # States from borders are as good in many blocks.
        span = problem.channels // problem.groups
        if own or (final and not case.backward):
            span = cut.channels
        parts = problem.channels // span
        return Launch(Kernel(f"{name}.cu", name, macros), tiles * parts, threads, size, knobs=(span,))

    launches = (tiled(False), _borders(case, cut, common), tiled(True))
    reasons = (
        f"channels are adjacent, images large: tiles of {side} x {side}, {cut.channels} channels",
        "first the states at borders of tiles, then every tile by itself: sums stay on the chip",
    )
    return Plan("tiles", launches, _scratch(case, cut), reasons)


def _borders(case: Case, cut: Cut, common: tuple[tuple[str, int], ...]) -> Launch:
    problem = case.problem
    longest = max(problem.height, problem.width)
    threads = 32 * -(-longest // (32 * cut.places))
    state = 4 * cut.vector
    line = threads * (cut.places * _pair(case) + state)
    rest = state * 2 * 2 * (threads // 32 + 2)
    chains = problem.batch * len(problem.directions) * problem.channels // cut.vector * (1 + case.backward)
    # Where there are more blocks than multiprocessors, two of them fit.
    memory = case.device.shared_memory
    if chains > case.device.multiprocessors and threads <= MOST_THREADS // 2:
        memory = (memory + 1024) // 2 - 1024
    depth = min(RING, (memory - rest) // line)
    # These make no difference to it.
    same = {"HAS_LAM": 0, "HAS_GATE": 0, "SUBS": 1}
    plain = tuple((name, same.get(name, value)) for name, value in common)
    cut_up = (("THREADS", threads), ("PLACES", cut.places), ("DEPTH", depth))
    kernel = Kernel("tiles_borders.cu", "tiles_borders", (*plain, *cut_up, ("BACKWARD", int(case.backward))))
    return Launch(kernel, chains, threads, depth * line + rest)


def _pair(case: Case) -> int:
    """Bytes of the two weights of a place that are kept: of a group, or of each channel of a vector."""
    return (4 if case.problem.dtype == torch.bfloat16 else 8) * (VECTORS[0] if own_taps(case) else 1)


def memory(case: Case, cut: Cut) -> int:
    """Bytes of shared memory of a block, at most."""
    return max(_memory(case, cut, False), _memory(case, cut, True))


def _memory(case: Case, cut: Cut, final: bool) -> int:
    """Bytes of shared memory of a block, in the order of the kernel's constants."""
    side, vectors, scans, back = cut.side, cut.vectors, len(case.problem.directions), case.backward
    stored, state = cut.vector * case.itemsize, 4 * cut.vector
    plane = side * (side + 1) + (1 if cut.vector == 4 else 4)
    planes = scans * vectors * plane
    if own_taps(case):
        operands = ("lam" in case.views) + ("gate" in case.views and (final or back)) + 3 * (final and back)
        outside = final * (1 + back) * scans * vectors * side * 2 * 16
        return planes * (16 + operands * stored) + outside + vectors * plane * stored * (1 + back)
    slots = "lam" in case.views or (back and "gate" in case.views) or (final and not back)
    slot = slots * stored * (1 + (final or back))
    outside = final * (1 + back) * scans * vectors * side * 2 * state
    pairs = scans * side * side * _pair(case)
    kept = final and back
    sums = kept * -(-vectors * side // 32) * 3 * scans * side * side * 4
    images = vectors * plane * stored * (1 + back)
    return -(-planes * slot // 16) * 16 + kept * planes * state + outside + pairs + sums + images


def _scratch(case: Case, cut: Cut) -> tuple[int, int, int]:
    """Bytes of weights, of states (and adjoints) at borders between places, and of those between lines."""
    problem, side = case.problem, cut.side
    height, width = problem.height, problem.width
    images = problem.batch * len(problem.directions)
    pairs = max(height * (-(-width // 4) * 4), width * (-(-height // 4) * 4))
    ends = max(height * -(-width // side), width * -(-height // side)) * problem.channels
    sets = images * (1 + case.backward)
    weights = problem.channels // VECTORS[0] if own_taps(case) else problem.groups
    return (images * weights * pairs * _pair(case), sets * 2 * ends * 4, sets * ends * 4)


def representative_kernels() -> list[tuple[Kernel, bool]]:
    """Kernels that the tests compile, and whether each is hot (must not spill)."""
    plain = (("STORAGE", 1), ("NORMALIZE", 1), ("HAS_LAM", 1), ("HAS_GATE", 1))
    kernels = []

    def add(name: str, macros: tuple[tuple[str, int], ...]) -> None:
        kernels.append((Kernel(f"{name}.cu", name, macros), True))

    def common(vector: int, side: int, vectors: int, own: int) -> tuple[tuple[str, int], ...]:
        shape = (("VECTOR", vector), ("SIDE", side), ("SUBS", vectors), ("SCANS", 4))
        return (*plain, *shape, ("OWN_TAPS", own), ("RESTARTS", 0))

    for vector, side, vectors, blocks in (
        (4, 16, 2, (5, 4, 4, 2)),
        (4, 32, 1, (4, 2, 2, 1)),
        (2, 16, 1, (10, 10, 10, 5)),
        (2, 32, 1, (5, 3, 3, 1)),
    ):
        for number, together in enumerate(blocks):
            macros = (("FINAL", number % 2), ("MIN_BLOCKS", together))
            add(
                ("tiles_forward", "tiles_backward")[number // 2], (*common(vector, side, vectors, 0), *macros)
            )
    for vectors, blocks in ((1, (6, 5, 4, 3)), (2, (3, 2, 2, 1))):
        shape = common(4, 16, vectors, 1)
        for backward in (0, 1):
            alone, last = blocks[2 * backward : 2 * backward + 2]
            add("tiles_own_alone", (*shape, ("BACKWARD", backward), ("MIN_BLOCKS", alone)))
            add(("tiles_own_forward", "tiles_own_backward")[backward], (*shape, ("MIN_BLOCKS", last)))
    for vector, own, threads, places, backward, depth in (
        (4, 0, 512, 2, 0, RING),
        (4, 0, 512, 2, 1, 9),
        (2, 0, 128, 4, 0, RING),
        (2, 0, 128, 4, 1, RING),
        (4, 1, 512, 2, 1, 5),
    ):
        carried = (("THREADS", threads), ("PLACES", places), ("DEPTH", depth), ("BACKWARD", backward))
        add("tiles_borders", (*common(vector, 16 if own else 32, 1, own), *carried))
    return kernels
