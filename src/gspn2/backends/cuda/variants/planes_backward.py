"""Backward of planes: images whose columns are adjacent in memory, one launch a direction.

A block owns a plane with whole lines, or the blocks of a cluster share a line. It scans forward and keeps the
state at every segment, then takes the segments last to first: forward again with the states in shared memory,
and back. Where forward kept the states (the output of a single scan is its state), only the way back is left.
`variants.planes` asks here for backward.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..geometry import Case, Kernel, Launch, Plan, options
from . import planes_backward_memory as memory
from . import planes_backward_pieces
from .planes_backward_cuts import (
    THREADS,
    UNIT,
    WARP,
    Cut,
    Sizes,
    best,
    has_hidden,
    is_at_hand,
    is_direct,
    longest,
    min_blocks,
    most_blocks,
    unsuitable,
)
from .planes_backward_cuts import cuts as cuts
from .planes_backward_pieces import Pieces, Walk

NAME = "planes"
SOURCE, FUNCTION = "planes_backward.cu", "planes_backward"

GRADIENTS = ("dx", "dtaps", "dlam", "dgate")
"""In the order of the bits of the macro WANTS."""


def why_not(case: Case) -> str | None:
    """It takes planes whose rows start at multiples of 16 bytes and whose lines fit in shared memory."""
    if not case.backward:
        return "it computes gradients only"
    for name, view in case.views.items():
        reason = None if name == "y" else unsuitable(case, name, view)
        if reason is not None:
            return reason
    for direction in dict.fromkeys(case.problem.directions):
        if _best_pieces(case, direction) is None and best(case, direction) is None:
            places = Sizes.of(case, direction).places
            most = most_blocks(case)
            blocks = "a block" if most == 1 else f"{most} blocks"
            return (
                f"lines of {places} places in direction {direction!r} do not fit in the threads and the "
                f"shared memory of {blocks}, which hold {longest(case, direction)} at most"
            )
    return None


def plan(case: Case, choice: Mapping[str, Cut | tuple[Pieces, ...]] | None = None) -> Plan:
    """One launch for each direction, in order: each adds its part of dx to that of those before.

    Args:
        case: one that is taken.
        choice: for some directions another cut out of `cuts` than the one expected to be fastest, or, of
            those of `walks`, one out of `planes_backward_pieces.pieces` each.
    """
    problem = case.problem
    launches: list[Launch] = []
    kept = parts = states = flags = 0
    room = memory.room_for_states(case)
    weights = memory.bytes_of_weights(case)
    first_flag = weights // 4
    reasons = ["gradients of planes, one direction after another"]
    for index, direction in enumerate(problem.directions):
        cut = (choice or {}).get(direction) or _best_pieces(case, direction) or best(case, direction)
        assert cut is not None
        if isinstance(cut, tuple):
            launches += _weights(case, index)
            launches += planes_backward_pieces.launches(case, index, cut, first_flag + flags, room)
            reasons += planes_backward_pieces.reasons(direction, cut)
            flags += problem.batch * problem.channels * cut[-1].strips * (memory.chains(case) > 0)
            if len(cut) > 1:
                pitch = planes_backward_pieces.row_of_states(case, cut)
                states = max(states, 4 * room * problem.height * pitch)
            if memory.sums_channels(case):
                number = memory.chains(case) or problem.channels // problem.groups
                parts = max(parts, number)
                launches.append(_add_parts(case, index, number))
            continue
        if not has_hidden(case, cut.sizes.horizontal):
            line = 4 * cut.kept
            segments = -(-cut.sizes.lines // cut.segment)
            kept = max(kept, problem.batch * problem.channels * segments * line)
        direct = is_direct(case, cut.sizes, cut.strips, cut.together, cut.width)
        chains = memory.chains(case) * direct
        knobs = (
            index,
            cut.width,
            memory.row(case),
            cut.strips,
            cut.own,
            cut.together,
            chains,
            0,
            first_flag + flags,
        )
        if direct:
            launches += _weights(case, index)
        kernel = Kernel(SOURCE, FUNCTION, _defines(case, cut))
        threads = cut.threads + WARP * (chains > 0)
        launches.append(Launch(kernel, cut.blocks, threads, cut.shared, cut.cluster, knobs))
        flags += problem.batch * problem.channels * cut.strips * (chains > 0)
        if cut.parts > 1:
            number = chains or cut.parts
            parts = max(parts, number)
            launches.append(_add_parts(case, index, number))
        reasons.append(
            f"{direction}: {cut.strips} blocks a line and {cut.together} channels in a cluster, "
            f"{cut.threads} threads with {cut.places} places each, segments of {cut.segment} lines"
        )
    plane = 4 * problem.batch * problem.height * memory.row(case)
    sums = plane // 2 * problem.channels if memory.has_partial_sums(case) else 0  # the other half is in dx
    scratch = (sums, weights + 4 * flags, parts * 3 * plane * problem.groups, max(kept, states))
    if flags:
        start = Kernel("planes_backward_start.cu", "planes_backward_start", options(case))
        launches.insert(
            0,
            Launch(start, min(-(-flags // 256), case.device.multiprocessors), 256, 0, 1, (flags, first_flag)),
        )
    return Plan(NAME, tuple(launches), scratch, tuple(reasons))


def walks(case: Case, direction: str) -> list[Walk]:
    """The walks over a horizontal scan in long pieces of rows."""
    return planes_backward_pieces.walks(
        case,
        direction,
        at_hand=is_at_hand(case),
        shared=memory.sums_channels(case),
        row=memory.row(case),
        chains=memory.chains(case),
        weights=memory.has_weights(case),
    )


def _best_pieces(case: Case, direction: str) -> tuple[Pieces, ...] | None:
    """How they are cut; None of vertical scans, and where short pieces have to do."""
    if direction in ("down", "up"):
        return None
    return planes_backward_pieces.best(case, walks(case, direction))


def _weights(case: Case, index: int) -> list[Launch]:
    """The launch that makes them, if there is one."""
    if not memory.has_weights(case):
        return []
    problem = case.problem
    kernel = Kernel("planes_backward_weights.cu", "planes_backward_weights", options(case))
    blocks = -(
        -problem.batch * problem.groups * problem.height * problem.width * case.itemsize // (UNIT * 256)
    )
    return [
        Launch(kernel, min(blocks, 16 * case.device.multiprocessors), 256, 0, 1, (index, memory.row(case), 1))
    ]


def _add_parts(case: Case, index: int, parts: int) -> Launch:
    """The launch that adds what the channels of a group, or chains of them, made of the gradient of taps."""
    problem = case.problem
    kernel = Kernel("planes_backward_taps.cu", "planes_backward_taps", options(case))
    blocks = -(-problem.batch * problem.groups * problem.height * problem.width // (4 * 256))
    return Launch(
        kernel, min(blocks, 16 * case.device.multiprocessors), 256, 0, knobs=(index, parts, memory.row(case))
    )


def _defines(case: Case, cut: Cut) -> tuple[tuple[str, int], ...]:
    sizes = cut.sizes
    direct = is_direct(case, cut.sizes, cut.strips, cut.together, cut.width)
    chained = direct and memory.chains(case) > 0
    threads = next(number for number in (*THREADS, 640) if number >= cut.threads + WARP * chained)
    return (
        *options(case),
        ("HORIZONTAL", int(sizes.horizontal)),
        ("REVERSED", int(sizes.horizontal and sizes.reversed)),
        ("PLACES", cut.places),
        ("SEGMENT", cut.segment),
        ("THREADS", threads),
        ("MIN_BLOCKS", min_blocks(case, cut, threads)),
        ("WIDE", int(cut.width > 32)),
        ("RAGGED", int(sizes.places % cut.places != 0)),
        ("SHARED", int(memory.sums_channels(case))),
        ("HAS_SUMS", int(len(case.problem.directions) > 1)),
        ("WANTS", sum(1 << i for i, name in enumerate(GRADIENTS) if name in case.views)),
        ("HAS_HIDDEN", int(has_hidden(case, sizes.horizontal))),
        ("SPLIT", int(cut.strips > 1)),
        ("CLUSTER", int(cut.cluster > 1)),
        ("CHAIN", int(chained)),
        ("DIRECT", int(direct)),
        ("WEIGHTS", int(direct and memory.has_weights(case))),
    )


def representative_kernels() -> list[tuple[Kernel, bool]]:
    """Kernels that the tests compile, and whether each is hot (must not spill)."""
    scan = {"STORAGE": 1, "NORMALIZE": 0, "HAS_LAM": 1, "HAS_GATE": 0, "HORIZONTAL": 0, "REVERSED": 0}
    scan |= {"PLACES": 4, "SEGMENT": 8, "THREADS": 256, "MIN_BLOCKS": 1, "WIDE": 1, "RAGGED": 0, "SHARED": 0}
    scan |= {"HAS_SUMS": 0, "WANTS": 7, "HAS_HIDDEN": 0, "SPLIT": 0, "CLUSTER": 0}
    many = scan | {"NORMALIZE": 1, "HAS_GATE": 1, "HAS_SUMS": 1, "WANTS": 15}
    across = {"HORIZONTAL": 1, "PLACES": 1, "SEGMENT": 16, "THREADS": 320}
    hot = [
        scan,
        scan | {"STORAGE": 0, "HAS_HIDDEN": 1},
        scan | across,
        scan | across | {"REVERSED": 1},
        many,
        many | {"SEGMENT": 4, "SHARED": 1, "HAS_HIDDEN": 1},
        many | across,
        many
        | across
        | {"HAS_SUMS": 0, "PLACES": 2, "SEGMENT": 8, "THREADS": 32, "MIN_BLOCKS": 12, "WIDE": 0}
        | {"SHARED": 1, "CLUSTER": 1},
        many | {"SEGMENT": 4, "THREADS": 160, "MIN_BLOCKS": 2, "SHARED": 1, "SPLIT": 1, "CLUSTER": 1},
        many | {"SEGMENT": 4, "THREADS": 320, "SHARED": 1, "HAS_HIDDEN": 1, "CHAIN": 1},
        many | {"SEGMENT": 6, "THREADS": 320, "SHARED": 1, "CHAIN": 1, "WEIGHTS": 1},
        many | {"SHARED": 1, "DIRECT": 1, "WEIGHTS": 1},
    ]
    cold = [
        many | {"PLACES": 8, "THREADS": 32, "MIN_BLOCKS": 1, "WIDE": 0},
        many | across | {"PLACES": 2, "SEGMENT": 8, "RAGGED": 1},
        many | {"STORAGE": 2, "SHARED": 1},
        many | across | {"STORAGE": 0, "SHARED": 1, "SEGMENT": 8},
    ]
    found = [(Kernel(SOURCE, FUNCTION, tuple(macros.items())), True) for macros in hot]
    found += [(Kernel(SOURCE, FUNCTION, tuple(macros.items())), False) for macros in cold]
    found += planes_backward_pieces.representative_kernels()
    storage = tuple((name, scan[name]) for name in ("STORAGE", "NORMALIZE", "HAS_LAM", "HAS_GATE"))
    logits = tuple((name, many[name]) for name, _ in storage)
    small = (("taps", storage), ("start", storage), ("weights", logits))
    return [
        *found,
        *((Kernel(f"planes_backward_{n}.cu", f"planes_backward_{n}", macros), False) for n, macros in small),
    ]
