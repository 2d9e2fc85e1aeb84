"""Backward of planes by tiles: several directions of large images, channels that share their taps.

Scans over whole planes leave only what enters tiles of 32 x 32 places; then each tile makes all gradients
of all directions on the chip (`kernels/planes_tiles.cuh`). Every operand is read twice and every gradient
written once; no sums and no states of whole planes travel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ..geometry import Case, Kernel, Launch, Plan, View, options
from . import planes_backward_pieces as pieces
from .planes_backward_cuts import unsuitable
from .planes_backward_memory import WEIGHING, row

NAME = "planes_tiles"
CAPABILITY = (9, 0)

SIDE, LINES = 32, 16
"""Of a tile; of a segment, which a warp takes."""

EACH = 8
"""Places of a row that a thread of a vertical scan holds: 16 bytes."""

LONGEST = 1024 * EACH
"""Places of a row."""

FILLED = 1.5
"""Places of tiles for each place of an image, at most."""

WAVES = 2
"""Tiles for each multiprocessor, at least: with fewer, most launches would leave many of them idle."""

RESERVED = 1024
"""Bytes of shared memory that the device takes for itself, of every block."""


@dataclass(frozen=True)
class Choice:
    """What may be tuned.

    Args:
        ring: rows of a vertical scan in shared memory.
        blocks: of a vertical scan on a multiprocessor, at most.
        horizontal: how a horizontal scan is cut; None for the way expected to be fastest.
        clusters: blocks of horizontal scans on a multiprocessor, at most.
        tiles: of a block of the tiles' kernel, neighbours in a row.
        resident: tiles on a multiprocessor, at most.
        lockstep: do all warps of such a block wait for each other, or those of a tile?
        whole: are operands asked for with the rest of their lines of the cache?
        stream: are gradients written as what nobody will touch soon?
    """

    ring: int = 4
    blocks: int = 4
    horizontal: tuple[int, int, int] | None = None
    clusters: int = 5
    tiles: int = 1
    resident: int = 2
    lockstep: bool = False
    whole: bool = True
    stream: bool = True


def why_not(case: Case) -> str | None:
    """It takes large bfloat16 images in several directions whose channels share logits."""
    reason = cannot(case)
    if reason is not None:
        return reason
    height, width = case.problem.height, case.problem.width
    if _whole(height) * _whole(width) > FILLED * height * width:
        return f"much of the tiles of {SIDE} x {SIDE} places would be outside of images of {height} x {width}"
    if _blocks(case) < WAVES * case.device.multiprocessors:
        return f"{_blocks(case)} tiles are too few for {case.device.multiprocessors} multiprocessors"
    return None


def cannot(case: Case) -> str | None:
    """Why it is not able to; None if it is, fast or not."""
    problem = case.problem
    if not case.backward:
        return "it computes gradients only"
    if not problem.normalize or problem.dtype != torch.bfloat16:
        return "it takes bfloat16 logits only"
    if len(problem.directions) < 2:
        return "a single direction has nothing to sum on the chip"
    if "dtaps" not in case.views:
        return "no gradient of taps is asked for"
    if problem.channels // problem.groups < WEIGHING:
        return f"fewer than {WEIGHING} channels share their taps"
    if case.device.capability < CAPABILITY:
        return "it needs compute capability 9.0 or newer"
    if _tiles_shared(case) > case.device.shared_memory:
        return f"two channels of a tile do not fit {case.device.shared_memory} bytes of shared memory"
    # States that forward has kept are not looked at: walking back from them took longer than all of this.
    for name, view in case.views.items():
        reason = unsuitable(case, name, view) if name != "y" else None
        if reason is not None:
            return reason
    for name in {"lam", "gate"} & case.views.keys():
        if f"d{name}" in case.views and not _lie_alike(case.views[name], case.views[f"d{name}"]):
            return f"{name} and its gradient have different strides"
    if problem.width > LONGEST:
        return f"rows of {problem.width} places are longer than {LONGEST}"
    if _is_any(case, "right", "left") and not cuts(case):
        return f"columns of {problem.height} places do not fit in the blocks of a cluster"
    return None


def plan(case: Case, choice: Choice | None = None) -> Plan:
    """Weights, scans that leave what enters tiles, and the tiles."""
    choice = choice or Choice()
    problem = case.problem
    launches = [_weights(case, index) for index in range(len(problem.directions))]
    launches += _vertical(case, choice)
    reasons = ["gradients of planes by tiles, all directions at once"]
    cut = best(case, choice)
    if cut is not None:
        launches.append(_horizontal(case, choice, cut))
        reasons.append(
            f"right and left: {cut.strips} blocks a line, {cut.threads} threads with a row each, "
            f"{cut.buffers} tiles with {cut.piece} bytes of a row"
        )
    launches.append(_tiles(case, choice))
    return Plan(NAME, tuple(launches), (_borders(case), _bytes_of_weights(case)), tuple(reasons))


def cuts(case: Case) -> list[pieces.Pieces]:
    """All ways of cutting walks over columns."""
    return list(pieces.pieces(*_as_states(case)))


def best(case: Case, choice: Choice) -> pieces.Pieces | None:
    """The way that a choice names, (strips, bytes of a piece, tiles), or what was fastest for such walks."""
    if not _is_any(case, "right", "left"):
        return None
    found, alike = cuts(case), _as_states(case)[0]
    if choice.horizontal is not None:
        return next(cut for cut in found if (cut.strips, cut.piece, cut.buffers) == choice.horizontal)
    return min(found, key=lambda cut: pieces.rank(alike, cut))


def representative_kernels() -> list[tuple[Kernel, bool]]:
    """Kernels that the tests compile, and whether each is hot (must not spill)."""
    found: list[tuple[Kernel, bool]] = []
    for scales in (1, 0):
        macros = (("STORAGE", 1), ("NORMALIZE", 1), ("HAS_LAM", scales), ("HAS_GATE", scales))
        found.append((_tiles_kernel(macros, 4, Choice()), scales == 1))
        found.append((_vertical_kernel(macros, 128, 4, 4), True))
    macros = (("STORAGE", 1), ("NORMALIZE", 1), ("HAS_LAM", 0), ("HAS_GATE", 1))
    found.append((_tiles_kernel(macros, 2, Choice(resident=1, lockstep=True)), False))
    cluster = {
        "THREADS": 160,
        "MIN_BLOCKS": 4,
        "WIDE": 1,
        "SPLIT": 1,
        "CLUSTER": 1,
        "PIECE": 64,
        "BUFFERS": 1,
    }
    found.append((_horizontal_kernel(macros, cluster), True))
    return found


def _lie_alike(one: View, other: View) -> bool:
    return replace(one, alignment=other.alignment) == other


def _is_any(case: Case, *directions: str) -> bool:
    return any(direction in directions for direction in case.problem.directions)


def _as_states(case: Case) -> tuple[Case, pieces.Walk]:
    """The walk forward of `planes_backward_pieces` that reads as many operands."""
    views = {"x": case.views["x"]}
    if "gate" in case.views or "lam" in case.views:
        views["lam"] = case.views["x"]
    return replace(case, views=views), pieces.Walk("right", True, True, False, row(case), 0, True)


def _walks(case: Case, *directions: str) -> list[int]:
    """Forward and back, as kernels count them."""
    found = [i for i, direction in enumerate(case.problem.directions) if direction in directions]
    return [2 * index + back for index in found for back in (0, 1)]


def _whole(places: int) -> int:
    """Rounded up to whole tiles."""
    return -(-places // SIDE) * SIDE


def _blocks(case: Case) -> int:
    problem = case.problem
    tiles = _whole(problem.height) * _whole(problem.width) // SIDE**2
    return tiles * problem.batch * problem.groups


def _borders(case: Case) -> int:
    """Bytes of what enters tiles."""
    problem = case.problem
    walks = 2 * len(problem.directions) * problem.batch * problem.channels
    return 4 * walks * 2 * _whole(problem.height) * _whole(problem.width) // LINES


def _bytes_of_weights(case: Case) -> int:
    problem = case.problem
    return 4 * len(problem.directions) * problem.batch * problem.groups * problem.height * row(case)


def _weights(case: Case, index: int) -> Launch:
    """Weights of one direction from logits, once for all channels."""
    problem = case.problem
    kernel = Kernel("planes_backward_weights.cu", "planes_backward_weights", options(case))
    vectors = problem.batch * problem.groups * problem.height * problem.width // EACH
    blocks = min(-(-vectors // 256), 16 * case.device.multiprocessors)
    return Launch(kernel, blocks, 256, 0, 1, (index, row(case), index))


def _vertical(case: Case, choice: Choice) -> Iterator[Launch]:
    """All walks over rows, a block each."""
    problem = case.problem
    walks = _walks(case, "down", "up")
    if not walks:
        return
    threads = -(-problem.width // (32 * EACH)) * 32
    ring = choice.ring
    while ring > 2 and _vertical_shared(ring, threads) > case.device.shared_memory:
        ring -= 1
    shared = _vertical_shared(ring, threads)
    room = case.device.shared_memory + RESERVED
    resident = max(1, min(choice.blocks, room // (shared + RESERVED), 512 // threads))
    planes = problem.batch * problem.channels
    kernel = _vertical_kernel(options(case), threads, resident, ring)
    yield Launch(kernel, planes * len(walks), threads, shared, 1, (row(case), *walks))


def _vertical_shared(ring: int, threads: int) -> int:
    return ring * 4 * 16 * threads + 16 * (threads // 32 + 2)


def _vertical_kernel(macros: tuple[tuple[str, int], ...], threads: int, resident: int, ring: int) -> Kernel:
    macros = (*macros, ("THREADS", threads), ("MIN_BLOCKS", resident), ("RING", ring))
    return Kernel("planes_tiles_vertical.cu", "planes_tiles_vertical", macros)


def _horizontal(case: Case, choice: Choice, cut: pieces.Pieces) -> Launch:
    """All walks over columns, a cluster each."""
    problem = case.problem
    warps = cut.threads // 32
    mail = 16 * pieces.HALO + 32 if cut.strips > 1 else 0
    shared = warps * cut.buffers * 4 * 32 * cut.piece + 24 * (warps + 2) + mail
    room = case.device.shared_memory + RESERVED
    resident = max(1, min(choice.clusters, room // (shared + RESERVED), 800 // cut.threads))
    split = int(cut.strips > 1)
    macros = {"THREADS": cut.threads, "MIN_BLOCKS": resident, "WIDE": int(warps > 1), "SPLIT": split}
    macros |= {"CLUSTER": split, "PIECE": cut.piece, "BUFFERS": cut.buffers}
    walks = _walks(case, "right", "left")
    knobs = (0, cut.threads, row(case), cut.strips, cut.own, 1, 0, 0, 0, *walks)
    blocks = len(walks) * problem.batch * problem.channels * cut.strips
    kernel = _horizontal_kernel(options(case), macros)
    return Launch(kernel, blocks, cut.threads, shared, cut.strips, knobs)


def _horizontal_kernel(macros: tuple[tuple[str, int], ...], cut: dict[str, int]) -> Kernel:
    fixed = {"HORIZONTAL": 1, "REVERSED": 0, "PLACES": 1, "SEGMENT": pieces.HALO, "RAGGED": 0, "SHARED": 0}
    fixed |= {"HAS_SUMS": 0, "WANTS": 0, "HAS_HIDDEN": 0, "WEIGHTS": 1}
    return Kernel("planes_tiles_horizontal.cu", "planes_tiles_horizontal", (*macros, *(fixed | cut).items()))


def _tiles(case: Case, choice: Choice) -> Launch:
    problem, scans = case.problem, len(case.problem.directions)
    tiles = choice.tiles if _tiles_shared(case) * choice.tiles <= case.device.shared_memory else 1
    shared = tiles * _tiles_shared(case)
    resident = max(
        1, min(choice.resident // tiles, (case.device.shared_memory + RESERVED) // (shared + RESERVED))
    )
    choice = replace(choice, tiles=tiles, resident=resident)
    kernel = _tiles_kernel(options(case), scans, choice)
    rows, columns = _whole(problem.height) // SIDE, -(-problem.width // (SIDE * tiles))
    blocks = rows * columns * problem.batch * problem.groups
    return Launch(kernel, blocks, 64 * scans * tiles, shared, 1, (row(case),))


def _tiles_kernel(macros: tuple[tuple[str, int], ...], scans: int, choice: Choice) -> Kernel:
    """`choice.resident` counts blocks here."""
    how = (
        ("TILES", choice.tiles),
        ("LOCKSTEP", choice.lockstep),
        ("WHOLE", choice.whole),
        ("STREAM", choice.stream),
    )
    macros = (*macros, ("SCANS", scans), ("MIN_BLOCKS", choice.resident), *((n, int(v)) for n, v in how))
    return Kernel("planes_tiles.cu", "planes_tiles", macros)


def _tiles_shared(case: Case) -> int:
    """Two channels' tensors and borders, parts of dx, zeros and weights; or else gradients of weights."""
    scans = len(case.problem.directions)
    tensors = 2 + scans * (("lam" in case.views) + ("gate" in case.views))
    stage = SIDE * (2 * SIDE + 16) * tensors + 2 * scans * 4 * (2 * SIDE + 4 * LINES)
    part = SIDE * (4 * SIDE + 4)
    rest = scans * part + 4 * LINES + 2 * scans * 8 * SIDE * LINES
    return max(2 * stage + rest, 3 * scans * part)
