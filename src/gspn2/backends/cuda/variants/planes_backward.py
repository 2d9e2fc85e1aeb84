"""Backward of planes: images whose columns are adjacent in memory, one launch a direction.

A block owns a plane with whole lines. It scans forward and keeps the state at every segment, then takes the
segments last to first: forward again with the states in shared memory, and back. `variants.planes` asks here for
backward.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..geometry import Case, Kernel, Launch, Plan, View, options

NAME = "planes"
SOURCE, FUNCTION = "planes_backward.cu", "planes_backward"

UNIT = 16
"""Bytes of an asynchronous copy; rows start at multiples of it."""

RESERVED = 1024
"""Bytes of shared memory that the device takes for itself, of every block."""


def why_not(case: Case) -> str | None:
    """It takes planes whose rows start at multiples of 16 bytes and whose lines fit in shared memory."""
    if not case.backward:
        return "it computes gradients only"
    for name, view in case.views.items():
        reason = _unsuitable(case, name, view)
        if reason is not None:
            return reason
    for direction in dict.fromkeys(case.problem.directions):
        if _cut(case, direction) is None:
            sizes = Sizes.of(case, direction)
            return (
                f"lines of {sizes.places} places in direction {direction!r} do not fit in shared memory: "
                f"{_longest(case, direction)} places do"
            )
    return None


def plan(case: Case) -> Plan:
    """One launch for each direction, in order: each adds its part of dx to that of those before."""
    problem = case.problem
    launches = []
    kept = taps = 0
    reasons = ["gradients of planes, one direction a launch"]
    for index, direction in enumerate(problem.directions):
        cut = _cut(case, direction)
        assert cut is not None
        sizes = cut.sizes
        line = 4 * cut.places * cut.threads
        segments = -(-sizes.lines // cut.segment)
        kept = max(kept, cut.blocks * segments * line)
        if _shares_taps(case):
            taps = max(taps, cut.blocks * sizes.lines * 3 * line)
        launches.append(
            Launch(
                Kernel(SOURCE, FUNCTION, _defines(case, cut)),
                cut.blocks,
                cut.threads,
                cut.shared,
                knobs=(index, cut.width, _sum_pitch(case)),
            )
        )
        reasons.append(
            f"{direction}: {cut.threads} threads a block with {cut.places} places each, a state kept every "
            f"{cut.segment} lines"
        )
    sums = 4 * problem.batch * problem.channels * problem.height * _sum_pitch(case)
    scratch = (sums if _has_partial_sums(case) else 0, kept, taps)
    return Plan(NAME, tuple(launches), scratch, tuple(reasons))


def representative_kernels() -> list[tuple[Kernel, bool]]:
    """Kernels that the tests compile, and whether each is hot (must not spill)."""
    return []


@dataclass(frozen=True)
class Sizes:
    """One direction: its orientation, number of lines, and places along each."""

    horizontal: bool
    reversed: bool
    lines: int
    places: int

    @staticmethod
    def of(case: Case, direction: str) -> Sizes:
        height, width = case.problem.height, case.problem.width
        horizontal = direction in ("right", "left")
        lines, places = (width, height) if horizontal else (height, width)
        return Sizes(horizontal, direction in ("up", "left"), lines, places)


@dataclass(frozen=True)
class Cut:
    """How one direction is cut over blocks and threads.

    Args:
        sizes: of the direction.
        places: of a thread.
        width: threads of a line.
        threads: of a block.
        blocks: of the grid.
        segment: lines of a segment.
        shared: bytes of shared memory of a block.
    """

    sizes: Sizes
    places: int
    width: int
    threads: int
    blocks: int
    segment: int
    shared: int


def _unsuitable(case: Case, name: str, view: View) -> str | None:
    problem, size = case.problem, case.itemsize
    if problem.width > 1 and view.w != 1:
        return f"{name}: columns are {view.w} elements apart, not adjacent"
    strides = [view.alignment // size]
    strides += [view.b] * (problem.batch > 1) + [view.d] * (len(problem.directions) > 1)
    strides += [view.c] * (problem.channels > 1) + [view.k, view.h * (problem.height > 1)]
    if problem.width * size % UNIT:
        return f"rows are {problem.width * size} bytes long, no multiple of {UNIT}"
    if any(stride * size % UNIT for stride in strides):
        return f"{name}: a row starts at an address that is no multiple of {UNIT} bytes"
    if view.h * (problem.height > 1) >= 2**31:
        return f"{name}: rows are {view.h} elements apart, more than 32 bits hold"
    return None


def _shares_taps(case: Case) -> bool:
    return case.problem.groups < case.problem.channels


def _has_partial_sums(case: Case) -> bool:
    return len(case.problem.directions) > 1 and case.itemsize < 4 and "dx" in case.views


def _sum_pitch(case: Case) -> int:
    """Elements of a row of partial sums: whole sectors, whichever way it is read."""
    return -(-case.problem.width // 16) * 16


def _operands(case: Case) -> tuple[int, int]:
    """Operands with two stages and with one, as DOUBLE and SINGLE in the kernel."""
    sums = 0 if len(case.problem.directions) == 1 else 1 if case.itemsize == 4 else 2
    return 4 + ("lam" in case.views), 1 + ("gate" in case.views) + sums


def _place_bytes(case: Case, segment: int) -> int:
    """Bytes of shared memory for one place in all lines of a segment."""
    double, single = _operands(case)
    return segment * ((2 * double + single) * case.itemsize + 4)


def _shared(case: Case, threads: int, places: int, segment: int) -> int:
    return _place_bytes(case, segment) * threads * places + 16 * (threads // 32 + 2)


def _candidates(case: Case, sizes: Sizes) -> list[tuple[int, int, list[int]]]:
    """(places of a thread, threads of a line, segments to choose from), best first."""
    size = case.itemsize
    found = []
    if sizes.horizontal:
        for places in (1, 2):
            width = -(-sizes.places // (32 * places)) * 32
            if width <= 512:
                found.append((places, width, [32 // size, 16 // size]))
        return found
    for places in (2, 4, 8) if size == 2 else (1, 2, 4):
        needed = -(-sizes.places // places)
        width = -(-needed // 32) * 32 if needed > 16 else 1 << (needed - 1).bit_length()
        batch = 16 // (places * size)
        segments = [segment for segment in range(16, 3, -1) if segment % batch == 0]
        if width * places * size >= UNIT and (width == 32 or width <= 512):
            found.append((places, width, segments))
    wide = [entry for entry in found if entry[1] > 256]
    return [entry for entry in found if entry not in wide] + wide


def _cut(case: Case, direction: str) -> Cut | None:
    """The best cut that fits, or None."""
    sizes = Sizes.of(case, direction)
    device = case.device
    slots = case.problem.batch * case.problem.groups
    for places, width, segments in _candidates(case, sizes):
        threads = max(width, 32)
        blocks = -(-slots // (threads // width))
        best: tuple[int, Cut] | None = None
        for segment in segments:
            shared = _shared(case, threads, places, segment)
            if shared > device.shared_memory:
                continue
            resident = (device.shared_memory + RESERVED) // (shared + RESERVED)
            waves = -(-blocks // (device.multiprocessors * min(resident, 32)))
            if best is None or waves < best[0]:
                best = waves, Cut(sizes, places, width, threads, blocks, segment, shared)
        if best is not None:
            return best[1]
    return None


def _longest(case: Case, direction: str) -> int:
    """Places of the longest line that fits."""
    sizes = Sizes.of(case, direction)
    segment = UNIT // case.itemsize if sizes.horizontal else 4
    most = 1024 if sizes.horizontal else 512 * UNIT // case.itemsize
    return min(most, case.device.shared_memory // _place_bytes(case, segment) // 32 * 32)


def _defines(case: Case, cut: Cut) -> tuple[tuple[str, int], ...]:
    sizes = cut.sizes
    return (
        *options(case),
        ("HORIZONTAL", int(sizes.horizontal)),
        ("REVERSED", int(sizes.horizontal and sizes.reversed)),
        ("PLACES", cut.places),
        ("SEGMENT", cut.segment),
        ("THREADS", max(128, 1 << (cut.threads - 1).bit_length())),
        ("MIN_BLOCKS", 1),
        ("WIDE", int(cut.width > 32)),
        ("RAGGED", int(sizes.places % cut.places != 0)),
        ("SHARED", int(_shares_taps(case))),
        ("HAS_SUMS", int(len(case.problem.directions) > 1)),
        ("HAS_HIDDEN", 0),
    )
