"""Small images: the operands of an image stay in shared memory, and all directions are scanned at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ...problem import DIRECTIONS
from ..geometry import Case, Kernel, Launch, Plan, View, options
from . import lines, resident_exchange, resident_pair, resident_straight, resident_straight_backward
from .resident_records import (
    BLOCK_OVERHEAD,
    LANES,
    MOST_PLACES,
    lane_places,
    longest,
    magic,
    record_bytes,
    record_has_x,
    up,
)

SPECIAL = (resident_pair, resident_exchange, resident_straight, resident_straight_backward)
"""With kernels of their own, by preference."""

RING = 3
"""Slabs of records on their way into shared memory."""

SLAB_PIXELS = 512
"""Pixels of a slab: enough work for the threads of a block between two barriers."""

MOST_THREADS = 640
"""Of a block of the forward kernel: more would leave a thread fewer registers than it needs."""

FEW_BYTES = 16
"""Bytes of a pixel's channels that are read in pieces without moving many bytes more."""


def why_not(case: Case) -> str | None:
    """Lines that a warp cannot hold, images that do not fit, and layouts that others read better."""
    problem = case.problem
    places = longest(case)
    if places > LANES * MOST_PLACES:
        return f"a line of {places} places is longer than the {LANES * MOST_PLACES} that a warp holds"
    if any(special.takes(case) for special in SPECIAL):
        return None
    if next(_layouts(case), None) is None:
        whole = "all channels of a tap group" if case.backward else "one channel"
        return (
            f"the operands of a {problem.height} x {problem.width} image, {whole}, do not fit in the "
            f"{case.device.shared_memory} bytes of shared memory of a block"
        )
    if _best(case).slab_rows:
        return None
    pixels = problem.channels > 1 and all(view.c == 1 for view in _images(case))
    if pixels and problem.channels * case.itemsize > FEW_BYTES:
        return "it would read a few bytes of each pixel at a time: lam, gate and taps are no dense records"
    if case.backward and (pixels or _aligned_rows(case)):
        return "its gradients are fast for dense records only, views of lam, gate and taps into one tensor"
    if problem.directions in (("right",), ("left",)) and lines.why_not(case) is None:
        return "a single scan along rows is faster where a thread holds a row"
    return None


def plan(case: Case) -> Plan:
    """One task for each image and its channels; blocks take one after the other."""
    for special in SPECIAL:
        if special.takes(case):
            return special.plan(case)
    layout = _best(case)
    threads = _threads(case, layout)
    blocks = max(1, min(_fitting_blocks(case, layout.shared), _thread_room(case, layout) // threads))
    tasks = case.problem.batch * case.problem.channels // layout.channels
    grid = min(tasks, max(1, case.device.multiprocessors * blocks // layout.split)) * layout.split
    name = "resident_backward" if case.backward else "resident_forward"
    kernel = Kernel(f"{name}.cu", name, _macros(case, layout, threads, 1 << blocks.bit_length() - 1))
    knobs = _knobs(case, layout, tasks)
    launch = Launch(kernel, grid, threads, layout.shared, layout.split, knobs)
    return Plan("resident", (launch,), (), _reasons(case, layout, blocks))


def _macros(case: Case, layout: Layout, threads: int, blocks: int) -> tuple[tuple[str, int], ...]:
    """Macros of the kernels (`resident.cuh`, `resident_records.cuh`)."""
    names = case.problem.directions
    directions = sum(DIRECTIONS.index(name) << 4 * d for d, name in enumerate(names))
    one = layout.channels == layout.pack and _groups(case, layout.channels) == 1
    macros = {
        "THREADS": threads,
        "BLOCKS": blocks,
        "SCANS": len(names),
        "DIRECTIONS": directions,
        "PACK": layout.pack,
        "PLACES": layout.places,
        "ONE": int(one),
        "SPLIT": layout.split,
        "RECORDS": int(layout.slab_rows > 0),
    }
    if case.backward:
        macros["PASSES"] = layout.passes
    else:
        macros["DIRECT"] = int(_writes_lines(case, layout.pack))
    if layout.slab_rows:
        macros |= {"RECORD_X": int(record_has_x(case)), "RING": RING}
    return (*options(case), *macros.items())


def _knobs(case: Case, layout: Layout, tasks: int) -> tuple[int, ...]:
    """In the order of the kernels' enumeration (`resident.cuh`)."""
    problem = case.problem
    units, taps = zip(
        *(_plane(case, layout.pack, places) for places in _places(case, layout.pitches)), strict=True
    )
    lines = max(problem.height, problem.width)
    return (
        *(layout.channels, tasks, problem.channels // layout.channels, _groups(case, layout.channels)),
        *(*layout.pitches, *units, *taps),
        *(layout.slab_rows, layout.slab, layout.slab_x, layout.planes + layout.sums),
        layout.planes,
        *(magic(problem.width), magic(min(problem.chunk or lines, lines))),
    )


def representative_kernels() -> list[tuple[Kernel, bool]]:
    """Kernels that the tests compile, and whether each is hot (must not spill)."""
    plain = (("STORAGE", 1), ("NORMALIZE", 1), ("HAS_LAM", 1), ("HAS_GATE", 1))
    given = (("STORAGE", 0), ("NORMALIZE", 0), ("HAS_LAM", 1), ("HAS_GATE", 0))
    every = (("SCANS", 4), ("DIRECTIONS", 0x3210))
    records = (
        *every,
        *(("THREADS", 512), ("BLOCKS", 1), ("PACK", 2), ("PLACES", 2), ("ONE", 1), ("SPLIT", 1)),
        *(("RECORDS", 1), ("RECORD_X", 0), ("RING", RING)),
    )
    planes = (("THREADS", 256), ("BLOCKS", 2), ("PACK", 1), ("PLACES", 4), ("ONE", 1), ("RECORDS", 0))
    one = (("SCANS", 1), ("DIRECTIONS", 0), ("SPLIT", 1))
    line = (*given, *planes, *one)
    forward = [(*plain, *records, ("DIRECT", 0)), (*line, ("DIRECT", 1))]
    backward = [
        (*plain, *records, ("PASSES", 2)),
        (*plain, *records, ("PASSES", 1)),
        (*line, ("PASSES", 1)),
    ]
    return [
        *(kernel for special in SPECIAL for kernel in special.representative_kernels()),
        *((Kernel("resident_forward.cu", "resident_forward", macros), True) for macros in forward),
        *((Kernel("resident_backward.cu", "resident_backward", macros), True) for macros in backward),
    ]


@dataclass(frozen=True)
class Layout:
    """Shared memory of a block.

    Args:
        channels: channels of a task.
        pack: channels in a unit.
        places: places of a line in a lane.
        pitches: of vertical and horizontal lines, in units.
        split: blocks that share a task, by directions.
        passes: parts of a block's directions, one after the other.
        planes: bytes of operands in order.
        sums: bytes of the sums of dx.
        slab_rows: rows of records that arrive together; 0 if operands are no records.
        slab: bytes of these rows, with those of images.
        slab_x: bytes of a slab before the images.
    """

    channels: int
    pack: int
    places: int
    pitches: tuple[int, int]
    split: int
    passes: int
    planes: int
    sums: int
    slab_rows: int
    slab: int
    slab_x: int

    @property
    def shared(self) -> int:
        return self.planes + self.sums + (RING * self.slab if self.slab_rows else 0)


def _best(case: Case) -> Layout:
    """The most channels that still leave two tasks for every multiprocessor, or else the most tasks."""
    layouts = list(_layouts(case))
    for layout in layouts:
        tasks = case.problem.batch * case.problem.channels // layout.channels
        if layout.slab_rows or tasks * layout.split >= 2 * case.device.multiprocessors:
            return layout
    return layouts[-1]


def _layouts(case: Case) -> Iterator[Layout]:
    """What fits, the most channels first. Records are read once, for all channels."""
    problem = case.problem
    per_group = problem.channels // problem.groups
    innermost = case.itemsize == 2 and case.views["x"].c == 1 and problem.channels > 1
    pack = 2 if innermost and per_group % 2 == 0 else 1
    record = record_bytes(case)
    if record:
        yield from _fitting(case, problem.channels, pack, 1, record)
    # Gradients of shared taps are sums over the channels of their group.
    for channels in range(per_group, per_group - 1 if case.backward else 0, -1):
        if per_group % channels == 0 and channels % pack == 0:
            yield from _fitting(case, channels, pack, _split(case, channels), 0)


def _split(case: Case, channels: int) -> int:
    """Blocks for the directions of a task, where there are few tasks."""
    problem, device = case.problem, case.device
    tasks = problem.batch * problem.channels // channels
    split = 1
    if device.capability >= (9, 0):
        while 2 * split <= len(problem.directions) and 2 * split * tasks <= 2 * device.multiprocessors:
            split *= 2
    return split


def _fitting(case: Case, channels: int, pack: int, split: int, record: int) -> Iterator[Layout]:
    """The layout with the fewest passes that fits, if one does; `record`: bytes of a pixel, or 0."""
    directions = len(case.problem.directions)
    for passes in (1, 2, 4) if case.backward else (1,):
        if passes == 1 or passes * split <= directions:
            layout = _layout(case, channels, pack, split, passes, record)
            if layout is not None:
                yield layout
                return


def _layout(case: Case, channels: int, pack: int, split: int, passes: int, record: int) -> Layout | None:
    """The layout with these numbers, or None if it does not fit."""
    problem = case.problem
    height, width = problem.height, problem.width
    places = lane_places(case)
    vertical = up(width, places)
    # Pixels of a row go to different lines: an odd number of lane widths spreads them over the banks.
    horizontal = up(height, places)
    horizontal += places * (horizontal // places % 2 == 0)
    pitches = vertical, horizontal
    planes = max(
        _plane_bytes(case, channels, pack, pitches, part, split * passes) for part in range(split * passes)
    )
    summed = case.backward and split * passes > 1 and "dx" in case.views
    sums = summed * channels * (4 // case.itemsize) // pack * up(height * width * pack * case.itemsize, 16)
    slab_rows = slab = slab_x = 0
    if record:
        slab_rows = _slab_rows(case, planes + sums, record)
        if slab_rows < 1:
            return None
        slab, slab_x = _slab(case, slab_rows, record)
    layout = Layout(channels, pack, places, pitches, split, passes, planes, sums, slab_rows, slab, slab_x)
    return layout if layout.shared <= case.device.shared_memory else None


def _slab_rows(case: Case, planes: int, record: int) -> int:
    """Rows that arrive together: as many as a block has threads for, if that leaves room for enough blocks.

    0 if not even one row fits.
    """
    problem = case.problem
    wanted = max(1, min(4, -(-problem.batch // case.device.multiprocessors)))
    most = min(problem.height, -(-SLAB_PIXELS // problem.width))
    best = (0, 0)
    for rows in range(1, most + 1):
        blocks = _fitting_blocks(case, planes + RING * _slab(case, rows, record)[0])
        if blocks:
            best = max(best, (min(blocks, wanted) if rows * problem.width >= 128 else 1, rows))
    return best[1]


def _slab(case: Case, rows: int, record: int) -> tuple[int, int]:
    """Bytes of so many rows of records and images, and of the records alone."""
    problem = case.problem
    pixels = rows * problem.width
    images = (not record_has_x(case)) + case.backward
    # A word more than the pixels: logits are read by words.
    records = up(pixels * record + 4, 16)
    return records + images * up(pixels * problem.channels * case.itemsize, 16), records


def _fitting_blocks(case: Case, shared: int) -> int:
    """Blocks with that much shared memory that a multiprocessor holds."""
    device = case.device
    return (
        (device.shared_memory + BLOCK_OVERHEAD) // (shared + BLOCK_OVERHEAD)
        if shared <= device.shared_memory
        else 0
    )


def _thread_room(case: Case, layout: Layout) -> int:
    """Threads of a multiprocessor that leave each as many registers as the kernel needs."""
    if case.backward:
        return 512
    return 1024 if layout.pack * layout.places <= 2 else 768 if layout.pack * layout.places <= 4 else 512


def _plane_bytes(
    case: Case, channels: int, pack: int, pitches: tuple[int, int], part: int, parts: int
) -> int:
    """Bytes of operands for part `part` of the directions (`memory_of` in the kernel)."""
    results = 2 if case.itemsize == 2 else 1
    operands = ("lam" in case.views) + ("gate" in case.views)
    per_unit = 2 * results if case.backward else max(operands, 0 if _writes_lines(case, pack) else results)
    units = channels // pack
    names = case.problem.directions
    mine = names[part * len(names) // parts : (part + 1) * len(names) // parts]
    total = 0
    for axis, places in zip((("down", "up"), ("right", "left")), _places(case, pitches), strict=True):
        count = sum(name in axis for name in mine)
        unit, taps = _plane(case, pack, places)
        total += units * unit if count and not case.backward else 0
        total += count * (units * per_unit * unit + _groups(case, channels) * taps)
    return total


def _places(case: Case, pitches: tuple[int, int]) -> tuple[int, int]:
    """Places of a plane, for vertical and for horizontal scans."""
    return case.problem.height * pitches[0], case.problem.width * pitches[1]


def _plane(case: Case, pack: int, places: int) -> tuple[int, int]:
    """Bytes of a plane of units, and of the weights of a tap group."""
    if case.problem.normalize and case.itemsize == 2:
        taps = up(places * 4, 16)
    else:
        taps = 3 * up(places * case.itemsize, 16)
    return up(places * pack * case.itemsize, 16), taps


def _groups(case: Case, channels: int) -> int:
    """Tap groups of so many channels."""
    return max(1, channels * case.problem.groups // case.problem.channels)


def _images(case: Case) -> list[View]:
    return [view for name, view in case.views.items() if name not in ("taps", "dtaps")]


def _aligned_rows(case: Case) -> bool:
    """Are all tensors planes of rows that begin at multiples of 4 bytes?"""
    return all(
        (view.w == 1 or case.problem.width == 1)
        and view.alignment >= 4
        and all(stride * case.itemsize % 4 == 0 for stride in (view.b, view.d, view.c, view.k, view.h))
        for view in case.views.values()
    )


def _writes_lines(case: Case, pack: int) -> bool:
    """Can the one scan write its lines to y as it goes: whole vectors of neighbouring places?"""
    problem, y = case.problem, case.views["y"]
    places = lane_places(case)
    vector = places * case.itemsize
    strides = (y.b if problem.batch > 1 else 0, y.c if problem.channels > 1 else 0, y.h)
    return (
        len(problem.directions) == 1
        and problem.directions[0] in ("down", "up")
        and pack == 1
        and y.w == 1
        and problem.width % places == 0
        and y.alignment % min(vector, 16) == 0
        and all(stride * case.itemsize % min(vector, 16) == 0 for stride in strides)
    )


def _threads(case: Case, layout: Layout) -> int:
    """A warp for every scan, and enough threads to bring the operands."""
    problem = case.problem
    scans = -(-len(problem.directions) // (layout.split * layout.passes))
    warps = scans * layout.channels // layout.pack * (1 + case.backward)
    # A block that has its multiprocessor for itself has as many threads as that feeds.
    alone = _fitting_blocks(case, layout.shared) == 1
    # Two threads unpack a pixel of a slab.
    unpacking = 2 * up(layout.slab_rows * problem.width, LANES)
    if alone and not case.backward and 512 <= unpacking <= MOST_THREADS:
        return unpacking
    most = 512 if alone else 256
    pixels = problem.height * problem.width * warps
    threads = 128
    while threads < most and (threads < LANES * warps or threads * 8 < pixels):
        threads *= 2
    return threads


def _reasons(case: Case, layout: Layout, blocks: int) -> tuple[str, ...]:
    return (
        f"{layout.channels} of {case.problem.channels} channels of an image fit in {layout.shared} bytes of "
        f"shared memory; {blocks} blocks a multiprocessor",
        *(("pixels are dense records: copied whole",) if layout.slab_rows else ()),
        *((f"few tasks: their directions go to {layout.split} blocks",) if layout.split > 1 else ()),
        *((f"directions in {layout.passes} passes",) if layout.passes > 1 else ()),
    )
