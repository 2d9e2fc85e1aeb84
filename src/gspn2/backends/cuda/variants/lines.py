"""Aligned planes: a block holds a line of a plane, or a cluster of blocks does.

The fast path of planes, forward only: see `kernels/lines.cuh`. Rows go through rings that belong to single
threads, columns through tiles that belong to single warps, so that data needs no barrier.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from ..geometry import Case, Kernel, Launch, Plan, options
from .lines_layout import HALO, STRIP, Columns, Layout, Rows, has_sums
from .planes_layout import LANES, VECTOR_BYTES, alignment_of

Macros = tuple[tuple[str, int], ...]

FEW_CHANNELS = 4
"""Of a group: with fewer, each makes weights from logits anew."""


def why_not(case: Case) -> str | None:
    """It needs aligned rows of adjacent elements, and lines that a block or a cluster can hold."""
    if case.backward:
        return "it has no backward"
    problem = case.problem
    for name, view in case.views.items():
        if view.w != 1 and problem.width > 1:
            return f"columns of {name} are {view.w} elements apart, not adjacent"
    if any(abs(view.h) >= 2**31 for view in case.views.values()):
        return "rows are further apart than 32 bits can tell"
    alignment = alignment_of(case)
    vector = _vector_bytes(case)
    if alignment < vector or problem.width * case.itemsize % vector:
        return f"rows do not start and end at multiples of {vector} bytes"
    if best_layout(case) is None:
        return f"lines of {max(problem.height, problem.width)} places are too long for a block"
    return None


def plan(case: Case) -> Plan:
    """As `best_layout` says."""
    launches = axis_by_axis(case)
    if launches:
        return plan_of(*launches)
    layout = best_layout(case)
    assert layout is not None
    return plan_of(layout)


def representative_kernels() -> list[tuple[Kernel, bool]]:
    """Kernels that the tests compile, and whether each is hot (must not spill).

    The first runs on every device, clusters on sm_90 and newer.
    """

    def cut(
        threads: int,
        cluster: int,
        split: int,
        channels: int = 1,
        blocks: int = 1,
        pair: int = 0,
        prepared: int = 0,
    ) -> Macros:
        macros = {"THREADS": threads, "BLOCKS": blocks, "CLUSTER": cluster, "VSPLIT": split, "VHALO": 32}
        return (*macros.items(), ("CHANNELS", channels), ("PAIR", pair), ("PREPARED", prepared))

    def rows(threads: int, places: int, lines: int, ring: int) -> Macros:
        return (("VTHREADS", threads), ("VPLACES", places), ("VLINES", lines), ("VRING", ring))

    def columns(piece: int, buffers: int) -> Macros:
        return (("HPIECE", piece), ("HBUFFERS", buffers))

    no_rows, no_columns = rows(0, 0, 1, 3), columns(0, 1)
    kernels = []
    for storage, most, least in ((1, 8, 2), (0, 4, 1)):
        scan = (("STORAGE", storage), ("NORMALIZE", 0), ("HAS_LAM", 1), ("HAS_GATE", 0), ("SUMS", 0))
        four = (("STORAGE", storage), ("NORMALIZE", 1), ("HAS_LAM", 1), ("HAS_GATE", 1), ("SUMS", 1))
        kernels += [
            (*scan, *cut(128, 1, 0), *rows(128, most, 2, 4), *no_columns),
            (*scan, *cut(160, 8, 1), *rows(160, least, 8, 6), *no_columns),
            (*scan, *cut(64, 8, 2), *rows(64, 4, 8, 4), *no_columns),
            (*scan, *cut(256, 1, 0), *no_rows, *columns(32, 2)),
            (*scan, *cut(288, 4, 0), *no_rows, *columns(64, 2)),
            (*four, *cut(256, 1, 0), *rows(256, most, 2, 4), *columns(32, 2)),
            (*four, *cut(288, 4, 0), *rows(128, most, 2, 4), *columns(64, 2)),
            (*scan, *cut(160, 8, 0, channels=2, blocks=3), *no_rows, *columns(64, 1)),
            (*four, *cut(160, 8, 1, channels=2, blocks=2), *rows(64, 4, 4, 3), *columns(32, 2)),
            (*four, *cut(160, 8, 1), *rows(160, least, 8, 6), *columns(64, 2)),
            (*four, *cut(128, 2, 0, blocks=2, pair=1, prepared=1), *rows(128, most, 2, 4), *no_columns),
            (*four, *cut(160, 8, 0, blocks=3, prepared=1), *no_rows, *columns(64, 1)),
            (*four, *cut(160, 8, 0, blocks=2), *no_rows, *columns(64, 1)),
        ]
    # Columns of 1024 rows over two blocks leave 96 registers: a few addresses are spilled, once in a tile.
    tall = [
        (("STORAGE", 1), *four[1:], *cut(544, 2, 0), *rows(256, 4, 4, 3), *columns(64, 1)),
        (("STORAGE", 0), *four[1:], *cut(544, 2, 0), *rows(256, 4, 2, 4), *columns(64, 1)),
    ]
    weights = [Kernel("lines_weights.cu", "lines_weights", macros[:4]) for macros in tall]
    hot = [_kernel(macros) for macros in kernels] + weights
    return [(kernel, True) for kernel in hot] + [(_kernel(macros), False) for macros in tall]


def plan_of(*layouts: Layout) -> Plan:
    """The plan of a layout, or of those of the two axes, in order."""
    case, problem = layouts[0].case, layouts[0].case.problem
    launches = [_weights(case)] if layouts[0].prepared else []
    for number, layout in enumerate(layouts):
        rows = layout.rows or Rows(0, 1, 3)
        columns = layout.columns or Columns(0, 1)
        kernel = _kernel(
            (
                *options(case),
                ("THREADS", layout.threads),
                ("BLOCKS", layout.blocks),
                ("CLUSTER", layout.cluster),
                ("CHANNELS", layout.channels),
                ("VSPLIT", int(layout.split) + (rows.warps > 0)),
                ("VHALO", rows.halo),
                ("PAIR", int(layout.pair)),
                ("PREPARED", int(layout.prepared)),
                ("SUMS", int(has_sums(case)) * (2 if len(layouts) > 1 else 1)),
                ("VTHREADS", layout.row_threads),
                ("VPLACES", rows.places),
                ("VLINES", rows.lines),
                ("VRING", rows.ring),
                ("HPIECE", columns.piece),
                ("HBUFFERS", columns.buffers),
            )
        )
        scans = (*layout.scans, 0, 0, 0, 0)[:4]
        state = (int(number > 0), int(number + 1 == len(layouts)))
        knobs = (layout.planes, layout.own_rows, layout.own_columns, len(layout.scans), *scans, *state)
        shape = (layout.grid, layout.threads, layout.shared)
        launches.append(Launch(kernel, *shape, cluster=layout.cluster, knobs=knobs))
    tiles = -(-problem.width // STRIP) * -(-problem.height // STRIP)
    sums = 4 * STRIP**2 * tiles * problem.batch * problem.channels if has_sums(case) else 0
    scratch = (sums, _bytes_of_weights(case)) if layouts[0].prepared else (sums,)
    reasons = tuple(reason for layout in layouts for reason in _reasons(layout))
    return Plan("lines", tuple(launches), scratch, reasons)


def _bytes_of_weights(case: Case) -> int:
    problem = case.problem
    places = problem.batch * len(problem.directions) * problem.groups * problem.height * problem.width
    return 2 * case.itemsize * places


def _weights(case: Case) -> Launch:
    """Weights from logits, for all channels of a group."""
    threads = 256
    vectors = _bytes_of_weights(case) // (2 * VECTOR_BYTES)
    blocks = min(-(-vectors // threads), 8 * case.device.multiprocessors)
    kernel = Kernel("lines_weights.cu", "lines_weights", options(case))
    return Launch(kernel, blocks, threads, 0)


def _reasons(layout: Layout) -> tuple[str, ...]:
    line = "a whole line" if layout.cluster == 1 or layout.pair else "their part of a line"
    reasons = [f"rows are contiguous and aligned; {layout.threads} threads hold {line}"]
    if layout.rows is not None:
        rows = layout.rows
        cut = f" over {layout.row_strips} warps" if rows.warps else ""
        reasons.append(
            f"rows{cut}: {rows.places} places a thread, {rows.lines} lines at once, ring of {rows.ring}"
        )
    if layout.columns is not None:
        columns = layout.columns
        cut = f" over {layout.cluster} blocks" if layout.cluster > 1 else ""
        reasons.append(
            f"columns{cut}: {columns.piece} bytes of a row at once, {columns.buffers} tiles a warp"
        )
    return tuple(reasons)


def layouts(case: Case) -> Iterator[Layout]:
    """Every way worth a thought that fits."""
    for cluster in (1, 2, 4, 8) if case.device.capability >= (9, 0) else (1,):
        for split in (False, True) if cluster > 1 and _vertical(case) else (False,):
            if cluster > 1 and not split and not _horizontal(case):
                continue
            for channels in _channels(case):
                # Rows of planes of their own keep all blocks busy.
                planes = cluster if _vertical(case) and not split else 1
                for rows in (*_rows(case), *(_strips(case) if split and channels == 1 else ())):
                    for columns in _columns(case):
                        layout = Layout(case, cluster, split, channels, planes, rows, columns)
                        if layout.fits():
                            yield layout


def _channels(case: Case) -> tuple[int, ...]:
    """How many channels may share a thread, and with it taps."""
    return (1, 2) if case.problem.channels // case.problem.groups % 2 == 0 else (1,)


def best_layout(case: Case) -> Layout | None:
    """The one to run; None if none fits."""
    return min(layouts(case), key=_rank, default=None)


def axis_by_axis(case: Case) -> tuple[Layout, ...]:
    """Launches for down and up, and for right and left, of large planes in four directions; else none.

    Down and up run at the same time, in a block each: the planes are then enough to keep the device busy.
    """
    problem, device = case.problem, case.device
    planes = problem.batch * problem.channels
    large = min(problem.height, problem.width) >= 256 and 5 * planes >= device.multiprocessors
    if device.capability < (9, 0) or len(problem.directions) != 4 or not large:
        return ()
    if problem.height % 8 or problem.width * case.itemsize % VECTOR_BYTES:
        return ()
    shared = problem.channels // problem.groups >= FEW_CHANNELS
    prepared = problem.normalize and shared and _bytes_of_weights(case) < 2**34
    return next(
        (
            (down_up, right_left)
            for down_up in _pairs(case, prepared)
            for right_left in _tall(case, prepared)
            if down_up.fits() and right_left.fits()
        ),
        (),
    )


def _pairs(case: Case, prepared: bool) -> Iterator[Layout]:
    """Down and up at the same time, best first: with two blocks on a multiprocessor where these find room."""
    found = []
    for lines, ring in ((2, 4), (2, 3), (1, 6), (1, 5), (1, 4)):
        for places in (VECTOR_BYTES // case.itemsize, VECTOR_BYTES // case.itemsize // 2):
            rows = Rows(places, lines, ring)
            found.append(Layout(case, 2, False, 1, 1, rows, None, pair=True, prepared=prepared))
    yield from sorted(found, key=lambda layout: layout.room < 2)


def _tall(case: Case, prepared: bool) -> Iterator[Layout]:
    """Right and left of large planes, best first: small blocks, as many as fill a multiprocessor."""
    height = case.problem.height
    for cluster in (8, 4, 2) if height >= 1024 else (2, 4, 8) if height > 256 else (1, 2, 4, 8):
        for columns in (Columns(64, 1), Columns(32, 1)):
            yield Layout(case, cluster, False, 1, 1, None, columns, prepared=prepared)


def _rank(layout: Layout) -> tuple[float, ...]:
    """How far a layout is from what was fastest on an H200 (docs/backends.md), least first."""
    case, problem = layout.case, layout.case.problem
    planes, processors, sums = problem.batch * problem.channels, case.device.multiprocessors, has_sums(case)
    busy = 4 * planes >= 3 * processors  # one plane a block keeps the device busy
    pairs = _channels(case)[-1] > 1 and (
        not _vertical(case) or (sums and not busy and 2 * planes >= processors)
    )
    # Rows of a plane of its own keep a block busy if there are planes enough; else all share every plane.
    alone = busy or (sums and not pairs and 2 * planes >= processors)
    score = [
        abs(layout.channels - 1 - pairs),
        float(_vertical(case) and layout.cluster > 1 and layout.split == alone),
    ]
    if layout.columns is not None:
        tall = problem.height > 512 and not sums
        own = 512 if sums and alone and problem.height > 512 else 256 if alone and not tall else 128
        score.append(abs(layout.own_rows / own - 1) if problem.height > own else layout.cluster)
        once = problem.height <= 64 or own == 512 or (pairs and not sums)
        piece = 32 if pairs and sums else 64
        score += [abs(layout.columns.buffers - (1 if once else 2)), abs(layout.columns.piece - piece)]
    if layout.rows is not None:
        own = layout.own_columns
        # Long rows of few planes: the time of a line is all that counts, and weights are there.
        strips = not (sums or problem.normalize) and 4 * planes <= processors and problem.width > 256
        score.append(float(strips != (layout.rows.warps > 0)))
        if layout.rows.warps:
            score += [abs(own / 64 - 1), abs(layout.rows.warps - 2), -layout.rows.lines]
        elif not busy and not sums:
            score.append(abs(own / 128 - 1) if problem.width > 256 else layout.cluster)
        lanes = LANES if pairs else LANES * (8 if sums else 1 if planes >= 3 * processors else 4)
        places = min(VECTOR_BYTES // case.itemsize, max(4 // case.itemsize, own // lanes))
        few = layout.rows.lines * 24 > problem.height or (sums and layout.rows.lines > 2)
        # Shared taps come from the cache, and less is on its way to memory. More there than memory needs
        # serves multiprocessors unevenly, and the last one ends later.
        shared = problem.channels > problem.groups
        ring = 3 if few else 6 if busy and shared and not sums else 4
        if layout.rows.warps == 2 and layout.grid > processors:
            ring = 3
        score += [abs(layout.rows.places - places), abs(layout.rows.ring - ring)]
    return tuple(score)


def _rows(case: Case) -> Iterator[Rows | None]:
    if not _vertical(case):
        yield None
        return
    alignment = alignment_of(case)
    for places in (8, 4, 2, 1):
        size = places * case.itemsize
        if size > VECTOR_BYTES or size < 4 or alignment < size or case.problem.width % places:
            continue
        least = max(1, VECTOR_BYTES * 2 // size)
        # Four lines of sums are 128 bytes.
        for lines in {least, max(4, least)} if has_sums(case) else {least}:
            for ring in (3, 4, 6, 8):
                if ring > 3 and (ring - 1) * lines >= case.problem.height:
                    break
                yield Rows(places, lines, ring)


def _strips(case: Case) -> Iterator[Rows]:
    """Rows for warps that never meet, in a single direction down or up."""
    if has_sums(case) or not _vertical(case):
        return
    if alignment_of(case) >= 4 * case.itemsize and case.problem.width % 4 == 0:
        for lines, ring, warps in product((8, 4), (4, 3), (1, 2, 4)):
            yield Rows(4, lines, ring, warps, 2 * HALO)


def _columns(case: Case) -> Iterator[Columns | None]:
    if not _horizontal(case):
        yield None
        return
    for piece in (128, 64, 32):
        if piece > 32 and piece // 2 >= case.problem.width * case.itemsize:
            continue
        for buffers in (2, 1):
            yield Columns(piece, buffers)


def _vertical(case: Case) -> bool:
    return any(direction in ("down", "up") for direction in case.problem.directions)


def _horizontal(case: Case) -> bool:
    return any(direction in ("right", "left") for direction in case.problem.directions)


def _vector_bytes(case: Case) -> int:
    """Rows are read in vectors of this size: in horizontal scans always the largest."""
    return VECTOR_BYTES if _horizontal(case) or has_sums(case) else 4


def _kernel(defines: Macros) -> Kernel:
    return Kernel("lines_forward.cu", "lines_forward", defines)
