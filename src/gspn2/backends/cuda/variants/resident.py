"""Small images: the operands of an image stay in shared memory, and all directions are scanned at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..geometry import Case, Kernel, Launch, Plan, options

LANES = 32
MOST_PLACES = 8
"""Places of a line that a lane can hold: one warp holds a whole line."""

RING = 3
"""Slabs of records on their way into shared memory."""

BLOCK_OVERHEAD = 1024
"""Bytes of shared memory that the system takes of each block."""


def why_not(case: Case) -> str | None:
    """Lines that a warp cannot hold, and images that do not fit."""
    if case.backward:
        return "it has no backward yet"
    problem = case.problem
    longest = max(problem.width * _any(case, "down", "up"), problem.height * _any(case, "right", "left"))
    if longest > LANES * MOST_PLACES:
        return f"a line of {longest} places is longer than the {LANES * MOST_PLACES} that a warp holds"
    if next(_layouts(case), None) is None:
        return (
            f"the operands of a {problem.height} x {problem.width} image do not fit in the "
            f"{case.device.shared_memory} bytes of shared memory of a block"
        )
    return None


def plan(case: Case) -> Plan:
    """One task for each image and its channels; blocks take one after the other."""
    layout = _best(case)
    problem, device = case.problem, case.device
    tasks = problem.batch * problem.channels // layout.channels
    threads = _threads(layout)
    fitting = (device.shared_memory + BLOCK_OVERHEAD) // (layout.shared + BLOCK_OVERHEAD)
    blocks = max(1, min(fitting, 1024 // threads))
    bound = 1 << blocks.bit_length() - 1
    defines = (
        *options(case),
        *(("THREADS", threads), ("BLOCKS", bound), ("PACK", layout.pack), ("PLACES", layout.places)),
        *(("RECORDS", int(layout.slab_rows > 0)), ("RING", RING), ("SPLIT", layout.split)),
    )
    grid = min(tasks, max(1, device.multiprocessors * blocks // layout.split)) * layout.split
    knobs = (layout.channels, tasks, *layout.pitches, layout.slab_rows, layout.slab, layout.planes)
    kernel = Kernel("resident_forward.cu", "resident_forward", defines)
    launch = Launch(kernel, grid, threads, layout.shared, layout.split, knobs)
    return Plan("resident", (launch,), (), _reasons(case, layout, blocks))


@dataclass(frozen=True)
class Layout:
    """Shared memory of a block.

    Args:
        channels: channels of a task.
        pack: channels in a unit.
        places: places of a line in a lane.
        pitches: of vertical and horizontal lines, in units.
        split: blocks that share a task, by directions.
        planes: bytes of operands in order.
        slab_rows: rows of records that arrive together; 0 if operands are no records.
        slab: bytes of these rows.
        pixels: of the image, times directions of a block.
    """

    channels: int
    pack: int
    places: int
    pitches: tuple[int, int]
    split: int
    planes: int
    slab_rows: int
    slab: int
    pixels: int

    @property
    def shared(self) -> int:
        return self.planes + RING * self.slab if self.slab_rows else self.planes


def _best(case: Case) -> Layout:
    """The most channels that still leave a task for every multiprocessor, or else the most tasks."""
    layouts = list(_layouts(case))
    parallel = [layout for layout in layouts if _tasks(case, layout) >= 2 * case.device.multiprocessors]
    return parallel[0] if parallel else layouts[-1]


def _tasks(case: Case, layout: Layout) -> int:
    return case.problem.batch * case.problem.channels // layout.channels * layout.split


def _layouts(case: Case) -> Iterator[Layout]:
    """What fits, most channels first. Records are read once, for all channels."""
    problem = case.problem
    per_group = problem.channels // problem.groups
    innermost = case.itemsize == 2 and case.views["x"].c == 1 and problem.channels > 1
    pack = 2 if innermost and per_group % 2 == 0 else 1
    record = _record(case)
    if record:
        layout = _layout(case, problem.channels, pack, 1, record)
        if layout is not None:
            yield layout
    for channels in range(per_group, 0, -1):
        if per_group % channels or channels % pack:
            continue
        layout = _layout(case, channels, pack, _split(case, channels), 0)
        if layout is not None:
            yield layout


def _split(case: Case, channels: int) -> int:
    """Blocks for the directions of a task, where there are few tasks."""
    problem, device = case.problem, case.device
    tasks = problem.batch * problem.channels // channels
    if device.capability < (9, 0):
        return 1
    split = 1
    while 2 * split <= len(problem.directions) and 2 * split * tasks <= 2 * device.multiprocessors:
        split *= 2
    return split


def _layout(case: Case, channels: int, pack: int, split: int, record: int) -> Layout | None:
    """The layout for tasks of that many channels, if it fits; `record`: bytes of a pixel, or 0."""
    problem = case.problem
    height, width = problem.height, problem.width
    longest = max(width * _any(case, "down", "up"), height * _any(case, "right", "left"))
    places = 2
    while LANES * places < longest:
        places *= 2
    vertical = _up(width, places)
    # Pixels of a row go to different lines: an odd number of lane widths spreads them over the banks.
    horizontal = _up(height, places)
    horizontal += places * (horizontal // places % 2 == 0)
    units = channels // pack
    groups = max(1, channels * problem.groups // problem.channels)
    needed = 0
    directions = [name in ("down", "up") for name in problem.directions]
    for rank in range(split):
        mine = directions[rank * len(directions) // split : (rank + 1) * len(directions) // split]
        size = 0
        for is_vertical, places_ in ((True, height * vertical), (False, width * horizontal)):
            unit, direction = _plane_bytes(case, units, pack, groups, places_)
            count = mine.count(is_vertical)
            size += (units * unit if count else 0) + count * direction
        needed = max(needed, size)
    slab_rows = slab = 0
    if record:
        room = (case.device.shared_memory - needed) // RING - 16
        # Enough pixels for the threads of a block, and enough bytes on their way.
        slab_rows = min(height, room // (width * record), max(1, -(-1024 // width)))
        if slab_rows < 1:
            return None
        slab = _up(slab_rows * width * record + 4, 16)
    pixels = height * width * -(-len(directions) // split)
    layout = Layout(channels, pack, places, (vertical, horizontal), split, needed, slab_rows, slab, pixels)
    return layout if layout.shared <= case.device.shared_memory else None


def _plane_bytes(case: Case, units: int, pack: int, groups: int, places: int) -> tuple[int, int]:
    """Bytes of a plane of units, and of all that belongs to a direction (`planes_of` in the kernel)."""
    pair = case.problem.normalize and case.itemsize == 2
    unit = _up(places * pack * case.itemsize, 16)
    taps = _up(places * 4, 16) if pair else 3 * _up(places * case.itemsize, 16)
    operands = ("lam" in case.views) + ("gate" in case.views)
    return unit, units * max(operands, 2 if case.itemsize == 2 else 1) * unit + groups * taps


def _record(case: Case) -> int:
    """Bytes of a pixel if lam, gate and taps can be views of one tensor of dense records; else 0."""
    problem, views = case.problem, case.views
    taps = views["taps"]
    scans, channels = len(problem.directions), problem.channels
    per_pixel = [views[name] for name in ("lam", "gate") if name in views]
    elements = scans * (len(per_pixel) * channels + 3 * problem.groups)
    if taps.w not in (elements, elements + channels) or taps.w * case.itemsize % 4:
        return 0
    if (taps.d, taps.c, taps.k) != (3 * problem.groups, 3, 1):
        return 0
    if any((view.d, view.c) != (channels, 1) for view in per_pixel):
        return 0
    inside = [taps, *per_pixel, *((views["x"],) if taps.w > elements else ())]
    if taps.w > elements and views["x"].c != 1:
        return 0
    row, image = problem.width * taps.w, problem.height * problem.width * taps.w
    dense = all(
        (view.w, view.h if problem.height > 1 else row, view.b if problem.batch > 1 else image)
        == (taps.w, row, image)
        for view in inside
    )
    return taps.w * case.itemsize if dense else 0


def _threads(layout: Layout) -> int:
    """Every direction a warp, and enough threads to bring the operands."""
    threads = 128
    while threads < 512 and threads * 8 < layout.pixels:
        threads *= 2
    return threads


def _any(case: Case, *directions: str) -> bool:
    return any(name in case.problem.directions for name in directions)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _reasons(case: Case, layout: Layout, blocks: int) -> tuple[str, ...]:
    return (
        f"{layout.channels} of {case.problem.channels} channels of an image fit in {layout.shared} bytes of "
        f"shared memory; {blocks} blocks a multiprocessor",
        *(("pixels are dense records: copied whole",) if layout.slab_rows else ()),
        *((f"few tasks: their directions go to {layout.split} blocks",) if layout.split > 1 else ()),
    )


def representative_kernels() -> list[tuple[Kernel, bool]]:
    """Kernels that the tests compile, and whether each is hot (must not spill)."""
    plain = (("STORAGE", 1), ("NORMALIZE", 1), ("HAS_LAM", 1), ("HAS_GATE", 1))
    given = (("STORAGE", 0), ("NORMALIZE", 0), ("HAS_LAM", 1), ("HAS_GATE", 0))
    records = (("THREADS", 512), ("BLOCKS", 1), ("PACK", 2), ("PLACES", 2), ("RECORDS", 1), ("RING", RING))
    planes = (("THREADS", 256), ("BLOCKS", 2), ("PACK", 1), ("PLACES", 4), ("RECORDS", 0), ("RING", RING))
    return [
        (Kernel("resident_forward.cu", "resident_forward", (*plain, *records, ("SPLIT", 1))), True),
        (Kernel("resident_forward.cu", "resident_forward", (*given, *planes, ("SPLIT", 1))), True),
    ]
