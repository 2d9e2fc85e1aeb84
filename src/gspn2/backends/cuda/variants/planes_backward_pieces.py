"""Backward of horizontal scans of planes in long pieces of rows: `kernels/planes_backward_pieces.cuh`.

A block, or each block of a cluster, has some rows of a plane and walks over them, its warps copying pieces of
their rows into tiles: forward, to leave the states in scratch memory (not where forward kept them), and back
from them. `variants.planes_backward` asks here for right and left.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..geometry import Case, Kernel, Launch, options

LANES = 32

HALO = 16
"""Rows beyond its own that a block scans along on either side, and lines between exchanges of blocks."""

OWN = 128
"""Rows of a block where there are many: 5 warps with those that it scans along."""

MOST_THREADS = 512
"""Of a block."""

RESERVED = 1024
"""Bytes of shared memory that the device takes for itself, of every block."""

GRADIENTS = ("dx", "dtaps", "dlam", "dgate")
"""In the order of the bits of the macro WANTS."""


@dataclass(frozen=True)
class Walk:
    """One launch: what it does, not how.

    Args:
        direction: "right" or "left".
        forward: it finds the states; otherwise it walks back from them.
        own_states: they are float32 and in scratch memory; otherwise as forward kept them.
        shared: the gradient of taps is left in parts, to be summed over channels.
        row: elements of a row in scratch memory.
        chains: sums of a group that channels add to one after another; 0 where each leaves its part.
        weights: two weights are read instead of three logits.
    """

    direction: str
    forward: bool
    own_states: bool
    shared: bool
    row: int
    chains: int = 0
    weights: bool = False

    def states(self, case: Case) -> int:
        """Operands that hold states: a float32 number is two halves beside 16-bit storage.

        The gradient of a tap, which later takes the place of states, always is; x makes room for one half
        where dx can take the place of sums.
        """
        if self.forward:
            return 0
        alone = len(case.problem.directions) == 1
        wide = self.own_states or (self.shared and (alone or self.weights))
        return 2 if wide and case.itemsize < 4 else 1

    def operands(self, case: Case) -> int:
        """OPERANDS of the kernel, or USED of them."""
        read = 4 + ("lam" in case.views) - self.weights
        if self.forward:
            return read
        sums = 0 if len(case.problem.directions) == 1 else 4 // case.itemsize
        return read + 1 + ("gate" in case.views) + self.states(case) + sums


@dataclass(frozen=True)
class Pieces:
    """How a walk is cut.

    Args:
        walk: what is cut.
        strips: blocks of a cluster.
        own: rows of a plane that each of them owns.
        piece: bytes of a row in a tile.
        buffers: tiles in a warp's ring.
        threads: of a block, one for each of its rows and of those that it scans along. A chain adds a warp.
        shared: bytes of shared memory of a block.
    """

    walk: Walk
    strips: int
    own: int
    piece: int
    buffers: int
    threads: int
    shared: int


def walks(
    case: Case,
    direction: str,
    *,
    at_hand: bool,
    shared: bool,
    row: int,
    chains: int = 0,
    weights: bool = False,
) -> list[Walk]:
    """What one direction takes.

    Args:
        at_hand: forward kept the states.
        shared: the gradient of taps is a sum over channels.
        row: elements of a row in scratch memory.
        chains, weights: as of `Walk`.
    """
    found = []
    if not at_hand and ("dtaps" in case.views or "dgate" in case.views):
        found.append(Walk(direction, True, True, False, row, 0, weights))
    return [*found, Walk(direction, False, not at_hand, shared, row, chains, weights)]


def pieces(case: Case, walk: Walk) -> Iterator[Pieces]:
    """Every way worth a thought that fits."""
    height = case.problem.height
    bytes_of_row = case.problem.width * case.itemsize
    for strips in range(1, 9 if case.device.capability >= (9, 0) else 2):
        own = -(-height // strips)
        if strips > 1 and (own < 2 * HALO or -(-height // own) != strips):
            continue
        rows = min(height, own + HALO * min(2, strips - 1))
        threads = -(-rows // LANES) * LANES
        if threads > _longest_block(case, walk):
            continue
        for piece in (32, 64, 128):
            for buffers in (1, 2):
                if piece > 32 and piece // 2 * buffers >= bytes_of_row:
                    continue
                shared = _shared(case, walk, strips, threads, piece, buffers)
                if shared <= case.device.shared_memory:
                    yield Pieces(walk, strips, own, piece, buffers, threads, shared)


def best(case: Case, walks: list[Walk]) -> tuple[Pieces, ...] | None:
    """The walks as they are cut; None if one of them fits in no way."""
    # The last is the longest. States lie as tiles do: all walks have the same.
    for last in sorted(pieces(case, walks[-1]), key=lambda cut: rank(case, cut)):
        found = [last]
        for walk in walks[:-1]:
            fitting = (cut for cut in pieces(case, walk) if cut.piece == last.piece)
            found += sorted(fitting, key=lambda cut: rank(case, cut))[:1]
        if len(found) == len(walks):
            return (*found[1:], last)
    return None


def row_of_states(case: Case, cuts: tuple[Pieces, ...]) -> int:
    """Elements that a row of states takes in scratch memory: whole tiles, of all walks alike."""
    columns = cuts[-1].piece // case.itemsize
    return -(-case.problem.width // columns) * columns


def launches(case: Case, index: int, cuts: tuple[Pieces, ...], flag: int, room: int) -> list[Launch]:
    """The launches of the scan with this index.

    Args:
        flag: first one of the chain.
        room: planes that there is memory for the states of: so many at a time, where these are needed.
    """
    planes = case.problem.batch * case.problem.channels
    room = room if len(cuts) > 1 else planes
    found = []
    for first in range(0, planes, room):
        count = min(room, planes - first)
        for cut in cuts:
            walk = cut.walk
            knobs = (index, cut.threads, walk.row, cut.strips, cut.own, 1, walk.chains, first, flag, room)
            threads = cut.threads + LANES * (walk.chains > 0)
            kernel = _kernel(case, cut)
            found.append(Launch(kernel, count * cut.strips, threads, cut.shared, cut.strips, knobs))
    return found


def reasons(direction: str, cuts: tuple[Pieces, ...]) -> list[str]:
    """Sentences for people."""
    return [
        f"{direction}, {'forward' if cut.walk.forward else 'back'}: {cut.strips} blocks a line, "
        f"{cut.threads} threads with a row each, {cut.buffers} tiles with {cut.piece} bytes of a row"
        for cut in cuts
    ]


def representative_kernels() -> list[tuple[Kernel, bool]]:
    """Kernels that the tests compile, and whether each is hot (must not spill).

    The first of a source runs on every device, clusters on sm_90 and newer.
    """

    def kernel(forward: int, storage: int, threads: int, piece: int, buffers: int, **other: int) -> Kernel:
        macros = {"STORAGE": storage, "NORMALIZE": 0, "HAS_LAM": 1, "HAS_GATE": 0, **_FIXED}
        macros |= {"SHARED": 0, "HAS_SUMS": 0, "HAS_HIDDEN": 1 - forward, "OWN_STATES": forward}
        macros |= {"REVERSED": 0, "THREADS": threads, "MIN_BLOCKS": 1, "WIDE": 1, "WANTS": 7 * (1 - forward)}
        macros |= {"SPLIT": 0, "CLUSTER": 0, "CHAIN": 0, "PIECE": piece, "BUFFERS": buffers} | other
        return Kernel(*_source(bool(forward)), tuple(macros.items()))

    cluster = {"SPLIT": 1, "CLUSTER": 1}
    four = {"NORMALIZE": 1, "HAS_GATE": 1, "HAS_SUMS": 1, "OWN_STATES": 1, "WANTS": 15, **cluster}
    return [
        (kernel(0, 1, 224, 64, 2), True),
        (kernel(0, 0, 256, 64, 2, REVERSED=1), True),
        (kernel(0, 1, 160, 64, 2, **{**four, "OWN_STATES": 0}, SHARED=1), True),
        (kernel(0, 1, 160, 64, 1, MIN_BLOCKS=3, REVERSED=1, **cluster), True),
        (kernel(0, 0, 160, 64, 1, MIN_BLOCKS=3, **cluster), True),
        (kernel(0, 0, 160, 128, 1, **cluster), True),
        (kernel(0, 1, 256, 64, 1, **four), True),
        (kernel(0, 1, 288, 64, 1, **four, SHARED=1, REVERSED=1), True),
        (kernel(0, 1, 192, 64, 1, **four, MIN_BLOCKS=2, SHARED=1, CHAIN=1, WEIGHTS=1), True),
        (kernel(0, 1, 192, 64, 1, **{**four, "OWN_STATES": 0}, MIN_BLOCKS=2, SHARED=1, CHAIN=1), True),
        (kernel(1, 1, 256, 64, 2, NORMALIZE=1), True),
        (kernel(1, 1, 160, 64, 2, MIN_BLOCKS=2, NORMALIZE=1, **cluster), True),
        (kernel(0, 0, 64, 32, 2, **four, SHARED=1), False),
        (kernel(0, 2, 64, 64, 2, NORMALIZE=1, HAS_LAM=0, WANTS=3), False),
        (kernel(1, 0, 32, 64, 2, NORMALIZE=1, HAS_LAM=0, WIDE=0, REVERSED=1), False),
    ]


_FIXED = {"HORIZONTAL": 1, "PLACES": 1, "SEGMENT": HALO, "RAGGED": 0}


def _source(forward: bool) -> tuple[str, str]:
    name = "planes_backward_states" if forward else "planes_backward_pieces"
    return f"{name}.cu", name


def _shared(case: Case, walk: Walk, strips: int, threads: int, piece: int, buffers: int) -> int:
    """Bytes of shared memory, as the kernel cuts it."""
    operands, states = walk.operands(case), walk.states(case)
    tile = (operands * LANES + 2 * states) * piece + -(-4 * states * (LANES + 2) // 16) * 16
    mail = 16 * HALO if strips > 1 else 0
    barriers = 32 + 32 * (walk.chains > 0)
    pointers = 16 * operands * walk.forward
    return threads // LANES * buffers * tile + 16 * (threads // LANES + 2) + mail + barriers + pointers


def rank(case: Case, cut: Pieces) -> tuple[float, ...]:
    """How far a way of cutting is from what was fastest on an H200, least first."""
    planes, processors = case.problem.batch * case.problem.channels, case.device.multiprocessors
    own, buffers = OWN, 2
    if cut.walk.forward and planes * -(-case.problem.height // OWN) > 2 * processors:
        buffers = 1  # blocks fill each other's time
    elif not cut.walk.forward and not _is_plain(case, cut.walk) and case.problem.height > OWN:
        buffers = 1  # two blocks on a multiprocessor gain more than tiles ahead
        two = 2 * (_shared(case, cut.walk, 2, OWN + 2 * HALO, 64, 1) + RESERVED)
        if two > _room(case) or _needs_registers(case, cut.walk):
            own = 205  # one block has the multiprocessor for itself: 8 warps
    return abs(cut.own / own - 1), abs(cut.piece / 64 - 1), abs(cut.buffers - buffers)


def _resident(case: Case, cut: Pieces) -> int:
    """Blocks that a multiprocessor holds."""
    shared = _room(case) // (cut.shared + RESERVED)
    return max(1, min(shared, _most_threads(case, cut.walk) // (cut.threads + LANES * (cut.walk.chains > 0))))


def _room(case: Case) -> int:
    """Bytes of shared memory of a multiprocessor."""
    return case.device.shared_memory + RESERVED


def _is_plain(case: Case, walk: Walk) -> bool:
    """Does the walk back of a single scan find its states, without a sum over anything?"""
    single = len(case.problem.directions) == 1 and "gate" not in case.views
    return single and not walk.own_states and not walk.shared


def _needs_registers(case: Case, walk: Walk) -> bool:
    """Would two blocks on a multiprocessor have too few registers, and are there that many blocks?

    A thread holds the weights of 8 lines and what gradients of their logits take besides: about 200
    registers. Two blocks leave it 168, and some would be spilled in every line. They also have more rows
    under way than the cache holds until the other halves of its lines are due.
    """
    rests = not walk.shared and case.problem.normalize and "dtaps" in case.views and case.itemsize < 4
    planes = case.problem.batch * case.problem.channels
    return rests and walk.own_states and planes * -(-case.problem.height // OWN) > case.device.multiprocessors


def _longest_block(case: Case, walk: Walk) -> int:
    """Threads of a block at most."""
    if walk.forward or _is_plain(case, walk):
        return MOST_THREADS
    return 256 if walk.own_states else 384


def _most_threads(case: Case, walk: Walk) -> int:
    """Threads of a multiprocessor that leave each of them the registers that it takes."""
    if walk.forward:
        return 768
    return 512 if _is_plain(case, walk) else 384


def _kernel(case: Case, cut: Pieces) -> Kernel:
    return Kernel(*_source(cut.walk.forward), tuple(defines(case, cut).items()))


def defines(case: Case, cut: Pieces) -> dict[str, int]:
    """The macros of a walk."""
    walk, views = cut.walk, case.views
    macros = dict(options(case)) | _FIXED
    if walk.forward:
        macros |= {"HAS_GATE": 0}
    return macros | {
        "REVERSED": int(walk.direction == "left"),
        "THREADS": cut.threads + LANES * (walk.chains > 0),
        "MIN_BLOCKS": _resident(case, cut),
        "WIDE": int(cut.threads > LANES),
        "SHARED": int(walk.shared),
        "HAS_SUMS": int(len(case.problem.directions) > 1 and not walk.forward),
        "WANTS": 0 if walk.forward else sum(1 << i for i, name in enumerate(GRADIENTS) if name in views),
        "HAS_HIDDEN": int(not walk.forward),
        "OWN_STATES": int(walk.own_states),
        "SPLIT": int(cut.strips > 1),
        "CLUSTER": int(cut.strips > 1),
        "PIECE": cut.piece,
        "BUFFERS": cut.buffers,
        "CHAIN": int(walk.chains > 0),
        "WEIGHTS": int(walk.weights),
    }
