"""Planes by tiles: several directions of large images, channels that share their taps.

Scans over whole planes leave only what enters tiles of 32 x 32 places; then each tile makes y, or all
gradients, of all directions on the chip (`kernels/planes_tiles.cuh`). Every operand is read twice (gates in
forward once) and every result written once; no sums and no states of whole planes travel.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ...problem import DIRECTIONS
from ..geometry import Case, Kernel, Launch, Plan, View, options
from .planes_backward_cuts import unsuitable
from .planes_backward_memory import WEIGHING, row

NAME = "planes_tiles"
CAPABILITY = (9, 0)

SIDE, LINES = 32, 16
"""Of a tile; of a segment, which a warp takes."""

EACH = 8
"""Places of a row that a thread of a vertical scan holds: 16 bytes."""

MOST_BLOCKS, SHORTEST_RING = 4, 2
"""Of vertical scans: blocks on a multiprocessor, at most; rows in shared memory, at least: the one that is
computed and one on its way."""

HALO, OWN, PIECE = 16, 128, 64
"""Of horizontal scans: rows that a block scans along on either side, rows that it answers for at best, and
bytes of a row in a tile."""

MOST_STRIPS, MOST_THREADS = 8, 512
"""Blocks of a cluster; threads of a block."""

MOST_RESIDENT = {1: 800, 2: 640}
"""Threads of horizontal scans on a multiprocessor that leave each of them its registers, by the channels of
a walk."""

LONGEST = 1024 * EACH
"""Places of a row."""

FILLED = 1.5
"""Places of tiles for each place of an image, at most."""

WAVES = 2
"""Tiles for each multiprocessor in backward, at least: with fewer, most launches would leave many of them
idle."""

MOST_TILES = 4
"""Tiles on a multiprocessor in forward that leave threads their registers."""

FULL, SHARING = 4, 8
"""In forward: how often blocks fill the device, if a block then has so many channels, which share weights."""

SHORTEST, MOST_PLANES = 512, 80
"""In forward: lines and places of an image at least, and planes at most. Of others `lines`, which computes
states once, was as fast or faster on an H200."""

RESERVED = 1024
"""Bytes of shared memory that the device takes for itself, of every block."""


@dataclass(frozen=True)
class Choice:
    """What may be tuned.

    Args:
        ring: rows of a vertical scan in shared memory.
        strips: blocks that share the rows of a horizontal scan; None for as many as are expected to be best.
        stages: channels of a tile in shared memory in forward; None for as many as are expected to be best.
        channels: that a block scans in forward one after another, at most; None as for stages.
    """

    ring: int = 4
    strips: int | None = None
    stages: int | None = None
    channels: int | None = None


def why_not(case: Case) -> str | None:
    """It takes large bfloat16 images in several directions whose channels share logits."""
    reason = cannot(case)
    if reason is not None:
        return reason
    height, width = case.problem.height, case.problem.width
    if _whole(height) * _whole(width) > FILLED * height * width:
        return f"much of the tiles of {SIDE} x {SIDE} places would be outside of images of {height} x {width}"
    if not case.backward:
        return _slower(case)
    if _blocks(case) < WAVES * case.device.multiprocessors:
        return f"{_blocks(case)} tiles are too few for {case.device.multiprocessors} multiprocessors"
    return None


def _slower(case: Case) -> str | None:
    """Why forward that hands sums from launch to launch is expected to be faster."""
    problem, planes = case.problem, case.problem.batch * case.problem.channels
    if min(problem.height, problem.width) < SHORTEST:
        return f"images of {problem.height} x {problem.width} are small: their sums stay in the cache"
    if planes > MOST_PLANES:
        return f"{planes} planes are many: `lines`, which computes states once, is expected to be faster"
    return None


def cannot(case: Case) -> str | None:
    """Why it is not able to; None if it is, fast or not."""
    problem = case.problem
    if not problem.normalize or problem.dtype != torch.bfloat16:
        return "it takes bfloat16 logits only"
    if len(problem.directions) < 2:
        return "a single direction has nothing to sum on the chip"
    if not case.backward and not (_is_any(case, "down", "up") and _is_any(case, "right", "left")):
        return "a single axis has no sums that would travel to another launch"
    if case.backward and "dtaps" not in case.views:
        return "no gradient of taps is asked for"
    if problem.channels // problem.groups < WEIGHING:
        return f"fewer than {WEIGHING} channels share their taps"
    if case.device.capability < CAPABILITY:
        return "it needs compute capability 9.0 or newer"
    if _tiles_shared(case, SHORTEST_RING) > case.device.shared_memory:
        return f"two channels of a tile do not fit {case.device.shared_memory} bytes of shared memory"
    # States that forward has kept are not looked at: walking back from them took longer than all of this.
    for name, view in case.views.items():
        reason = unsuitable(case, name, view) if name != "y" or not case.backward else None
        if reason is not None:
            return reason
    for name in {"lam", "gate"} & case.views.keys():
        if f"d{name}" in case.views and not _lie_alike(case.views[name], case.views[f"d{name}"]):
            return f"{name} and its gradient have different strides"
    for name in {"lam", "gate"} & case.views.keys() if not case.backward else ():
        if max(_starts(case, name, [len(problem.directions) - 1])) >= 2**31:
            return f"directions of {name} are {case.views[name].d} elements apart"
    if problem.width > LONGEST:
        return f"rows of {problem.width} places are longer than {LONGEST}"
    if _is_any(case, "down", "up") and _vertical_shared(case, SHORTEST_RING) > case.device.shared_memory:
        return f"two rows of {problem.width} places do not fit in shared memory"
    if _is_any(case, "right", "left") and not cuts(case):
        return f"columns of {problem.height} places do not fit in {MOST_STRIPS} blocks"
    return None


def plan(case: Case, choice: Choice | None = None) -> Plan:
    """Weights, scans that leave what enters tiles, and the tiles."""
    choice, problem = choice or Choice(), case.problem
    launches = [_weights(case)]
    reasons = [f"{'gradients of ' * case.backward}planes by tiles, all directions at once"]
    if _is_any(case, "down", "up"):
        launches.append(_vertical(case, choice))
    if _is_any(case, "right", "left"):
        strips = choice.strips or min(cuts(case), key=lambda count: abs(problem.height / count / OWN - 1))
        channels = _together(case, strips)
        launches.append(_horizontal(case, channels, strips))
        reasons.append(
            f"right and left: {channels} channel{'s' * (channels > 1)} a walk, {strips} blocks a line, "
            f"{launches[-1].block} threads with a row each"
        )
    launches.append(_tiles(case) if case.backward else _tiles_forward(case, choice))
    return Plan(NAME, tuple(launches), (_borders(case), _bytes_of_weights(case)), tuple(reasons))


def cuts(case: Case) -> list[int]:
    """Numbers of blocks that can share the rows of a horizontal scan."""
    height = case.problem.height
    found = []
    for strips in range(1, MOST_STRIPS + 1):
        own = -(-height // strips)
        if strips > 1 and (own < 2 * HALO or -(-height // own) != strips):
            continue
        threads = _threads(height, strips)
        fits = _horizontal_shared(case, 1, threads, strips) <= case.device.shared_memory
        if threads <= MOST_THREADS and fits:
            found.append(strips)
    return found


def representative_kernels() -> list[tuple[Kernel, bool]]:
    """Kernels that the tests compile, and whether each is hot (must not spill)."""
    found: list[tuple[Kernel, bool]] = []
    bfloat16 = (("STORAGE", 1), ("NORMALIZE", 1))
    for scales in (1, 0):
        walks = (*bfloat16, ("HAS_LAM", scales), ("HAS_GATE", 0), ("BACKWARD", 0))
        found.append((_vertical_kernel(walks, 128, 4, 4), True))
        found.append((_horizontal_kernel(walks, 160, 4 - scales, 2, 8), True))
        macros = (*bfloat16, ("HAS_LAM", scales), ("HAS_GATE", scales), ("BACKWARD", 0))
        found.append((_tiles_forward_kernel(macros, (3, 3), 3 - scales, MOST_TILES), True))
    macros = (*bfloat16, ("HAS_LAM", 0), ("HAS_GATE", 1), ("BACKWARD", 0))
    found.append((_tiles_forward_kernel(macros, (2, 1), 2, MOST_TILES), False))
    for scales in (1, 0):
        macros = (*bfloat16, ("HAS_LAM", scales), ("HAS_GATE", scales), ("BACKWARD", 1))
        found.append((_tiles_kernel(macros, 4, 2), scales == 1))
        found.append((_vertical_kernel(macros, 128, 4, 4), True))
        found.append((_horizontal_kernel(macros, 160, 4 - scales, 2, 8), True))
        found.append((_horizontal_kernel(macros, 160, 5, 1, 8), True))
    macros = (*bfloat16, ("HAS_LAM", 0), ("HAS_GATE", 1), ("BACKWARD", 1))
    found.append((_tiles_kernel(macros, 2, 1), False))
    found.append((_horizontal_kernel(macros, 32, 1, 1, 1), False))
    return found


def _lie_alike(one: View, other: View) -> bool:
    return replace(one, alignment=other.alignment) == other


def _is_any(case: Case, *directions: str) -> bool:
    return any(direction in directions for direction in case.problem.directions)


def _walks(case: Case, *directions: str) -> list[int]:
    """Forward, and in backward back, as kernels count them."""
    found = [i for i, direction in enumerate(case.problem.directions) if direction in directions]
    return [2 * index + back for index in found for back in range(_passes(case))]


def _passes(case: Case) -> int:
    """Of each direction: states, and in backward what lines hand back."""
    return 1 + case.backward


def _options(case: Case, walks: bool) -> tuple[tuple[str, int], ...]:
    """Macros; walks forward do not look at gates."""
    macros = dict(options(case)) | {"BACKWARD": int(case.backward)}
    if walks and not case.backward:
        macros["HAS_GATE"] = 0
    return tuple(macros.items())


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
    walks = _passes(case) * len(problem.directions) * problem.batch * problem.channels
    return 4 * walks * _plane_of_borders(case)


def _plane_of_borders(case: Case) -> int:
    """Numbers of one plane and walk, lines and sides."""
    return 2 * _whole(case.problem.height) * _whole(case.problem.width) // LINES


def _bytes_of_weights(case: Case) -> int:
    problem = case.problem
    return 4 * len(problem.directions) * problem.batch * problem.groups * problem.height * row(case)


def _weights(case: Case) -> Launch:
    """Weights of all directions from logits, once for all channels."""
    problem, scans = case.problem, len(case.problem.directions)
    kernel = Kernel("planes_backward_weights.cu", "planes_backward_weights", options(case))
    vectors = scans * problem.batch * problem.groups * problem.height * problem.width // EACH
    blocks = min(-(-vectors // 256), 16 * case.device.multiprocessors)
    return Launch(kernel, blocks, 256, 0, 1, (0, row(case), scans))


def _resident(case: Case, shared: int, most: int) -> int:
    """Blocks on a multiprocessor."""
    return max(1, min(most, (case.device.shared_memory + RESERVED) // (shared + RESERVED)))


def _vertical(case: Case, choice: Choice) -> Launch:
    """All walks over rows, a block each."""
    problem, walks, threads = case.problem, _walks(case, "down", "up"), _threads_of_row(case)
    ring = choice.ring
    while ring > SHORTEST_RING and _vertical_shared(case, ring) > case.device.shared_memory:
        ring -= 1
    shared = _vertical_shared(case, ring)
    resident = _resident(case, shared, min(MOST_BLOCKS, 512 // threads))
    kernel = _vertical_kernel(_options(case, True), threads, resident, ring)
    blocks = problem.batch * problem.channels * len(walks)
    return Launch(kernel, blocks, threads, shared, 1, (row(case), *walks))


def _threads_of_row(case: Case) -> int:
    return -(-case.problem.width // (32 * EACH)) * 32


def _vertical_shared(case: Case, ring: int) -> int:
    """Four operands of rows in the ring, and two sets of edges."""
    threads = _threads_of_row(case)
    return ring * 4 * 16 * threads + 16 * (threads // 32 + 2)


def _vertical_kernel(macros: tuple[tuple[str, int], ...], threads: int, resident: int, ring: int) -> Kernel:
    macros = (*macros, ("THREADS", threads), ("MIN_BLOCKS", resident), ("RING", ring))
    return Kernel("planes_tiles_vertical.cu", "planes_tiles_vertical", macros)


def _threads(height: int, strips: int) -> int:
    """Of a block of a horizontal scan: its rows and those that it scans along."""
    rows = min(height, -(-height // strips) + HALO * min(2, strips - 1))
    return -(-rows // 32) * 32


def _together(case: Case, strips: int) -> int:
    """Channels that a horizontal scan takes together: two that share their taps."""
    shared, threads = case.problem.channels // case.problem.groups, _threads(case.problem.height, strips)
    fits = _horizontal_shared(case, 2, threads, strips) <= case.device.shared_memory
    return 2 if shared % 2 == 0 and fits else 1


def _horizontal(case: Case, channels: int, strips: int) -> Launch:
    """All walks over columns, a cluster each."""
    problem, walks = case.problem, _walks(case, "right", "left")
    threads = _threads(problem.height, strips)
    shared = _horizontal_shared(case, channels, threads, strips)
    resident = _resident(case, shared, MOST_RESIDENT[channels] // threads)
    kernel = _horizontal_kernel(_options(case, True), threads, resident, channels, strips)
    blocks = problem.batch * problem.channels // channels * len(walks) * strips
    knobs = (row(case), strips, -(-problem.height // strips), *walks)
    return Launch(kernel, blocks, threads, shared, strips, knobs)


def _horizontal_shared(case: Case, channels: int, threads: int, strips: int) -> int:
    """Tiles of x and lam, or dy and gate, and two weights; three sets of edges; rows of other blocks."""
    scaled = "lam" in case.views or (case.backward and "gate" in case.views)
    warps, tensors = threads // 32, 1 + scaled
    mail = 16 * channels * HALO + 32 if strips > 1 else 0
    return warps * (channels * tensors + 2) * 32 * PIECE + 24 * channels * (warps + 2) + mail


def _horizontal_kernel(
    macros: tuple[tuple[str, int], ...], threads: int, resident: int, channels: int, strips: int
) -> Kernel:
    macros = (*macros, ("THREADS", threads), ("MIN_BLOCKS", resident), ("CHANNELS", channels))
    return Kernel(
        "planes_tiles_horizontal.cu", "planes_tiles_horizontal", (*macros, ("SPLIT", int(strips > 1)))
    )


def _tiles(case: Case) -> Launch:
    """All gradients, a tile a block."""
    scans, shared = len(case.problem.directions), _tiles_shared(case, SHORTEST_RING)
    kernel = _tiles_kernel(_options(case, False), scans, _resident(case, shared, 2))
    return Launch(kernel, _blocks(case), 64 * scans, shared, 1, (row(case), _plane_of_borders(case)))


def _tiles_kernel(macros: tuple[tuple[str, int], ...], scans: int, resident: int) -> Kernel:
    return Kernel("planes_tiles.cu", "planes_tiles", (*macros, ("SCANS", scans), ("MIN_BLOCKS", resident)))


def _tiles_forward(case: Case, choice: Choice) -> Launch:
    """y, a tile and some channels of a group a block."""
    directions = case.problem.directions
    scaled = "lam" in case.views or "gate" in case.views
    stages = choice.stages or (SHORTEST_RING if scaled else SHORTEST_RING + 1)
    shared = _tiles_shared(case, stages)
    resident = _resident(case, shared, MOST_TILES)
    ways = (
        ("down" in directions) + 2 * ("up" in directions),
        ("right" in directions) + 2 * ("left" in directions),
    )
    kernel = _tiles_forward_kernel(_options(case, False), ways, stages, resident)
    scans = [directions.index(direction) for direction in DIRECTIONS if direction in directions]
    starts = [_starts(case, name, scans) for name in ("lam", "gate")]
    unused = [0] * (len(DIRECTIONS) - len(scans))
    channels = choice.channels or _channels_of_a_block(case, resident)
    all_starts = (*starts[0], *unused, *starts[1], *unused)
    knobs = (row(case), _plane_of_borders(case), *scans, *unused, *all_starts, channels)
    blocks = _blocks(case) * -(-(case.problem.channels // case.problem.groups) // channels)
    return Launch(kernel, blocks, 128, shared, 1, knobs)


def _channels_of_a_block(case: Case, resident: int) -> int:
    """All of a group, or a part of them where blocks would fill the device only a few times."""
    channels, blocks = case.problem.channels // case.problem.groups, _blocks(case)
    while blocks < FULL * resident * case.device.multiprocessors and channels >= 2 * SHARING:
        channels, blocks = -(-channels // 2), 2 * blocks
    return channels


def _starts(case: Case, name: str, scans: list[int]) -> list[int]:
    """Where the scans begin in lam or gate, in vectors."""
    return [scan * case.views[name].d // EACH if name in case.views else 0 for scan in scans]


def _tiles_forward_kernel(
    macros: tuple[tuple[str, int], ...], ways: tuple[int, int], stages: int, resident: int
) -> Kernel:
    """`ways` of each axis: bit 0 first to last, bit 1 last to first."""
    macros = (*macros, ("VERTICAL", ways[0]), ("HORIZONTAL", ways[1]), ("STAGES", stages))
    return Kernel("planes_tiles_forward.cu", "planes_tiles_forward", (*macros, ("MIN_BLOCKS", resident)))


def _tiles_shared(case: Case, stages: int) -> int:
    """Channels' tensors and borders, and beside them

    forward: the sums of one axis; backward: parts of dx, zeros and weights, or else gradients of weights.
    """
    scans = len(case.problem.directions)
    tensors = _passes(case) + scans * (("lam" in case.views) + ("gate" in case.views))
    borders = _passes(case) * scans * 2 * 4 * (SIDE + 2 * LINES)
    stage, part = SIDE * (2 * SIDE + 16) * tensors + borders, SIDE * (4 * SIDE + 4)
    if not case.backward:
        return stages * stage + part
    rest = scans * part + 4 * LINES + 2 * scans * 8 * SIDE * LINES
    return max(stages * stage + rest, 3 * scans * part)
