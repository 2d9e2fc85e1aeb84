"""The forward kernel: y = sum over directions of gate_d h_d, for a range of tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import staging
from .geometry import Lines, Operand, is_vertical, lines_of
from .jit import SOURCES, cached_jit, jit, jit_inline
from .rows import (
    clear_missing_taps,
    gate_row,
    normalize_taps,
    scan_line,
    scan_row,
    start_row,
    zero_fill,
)
from .simd import LANES, advance, is_double, pointer_to


@jit
def panel_size(plan: Any) -> int:
    """Elements of scratch for the panels of one kind of scans."""
    rows = (4 * plan.channel_block + 3 * plan.group_block) * plan.lines + 2 * plan.task_channels
    return (rows + 2) * plan.row


@jit
def scratch_size(plans: Any, sums: bool) -> int:
    """Elements of scratch for one thread; `sums` says whether y needs sums in a wider type."""
    plan = plans[0]
    total = max(panel_size(plan), panel_size(plans[1]))
    return total + (plan.task_channels * plan.height * plan.width + LANES if sums else 0)


@jit
def stage_taps(
    w: Any, slope: Any, tap: int, plan: Any, taps: Any, stride_k: int, group: int, groups: int, first: int,
    count: int, places: int, itemsize: int, stored: Any, like: Any,
) -> None:  # fmt: skip
    """Weights of lines first .. first + count - 1 of some groups: 3 times `tap` elements of rows a group."""
    for g in range(groups):
        source = pointer_to(taps.address + itemsize * ((group + g) * taps.c + first * taps.i), stored)
        target = advance(w, 3 * g * tap)
        staging.read(target, tap, plan.row, source, 3, count, places, stride_k, taps.i, taps.j, like)
        for i in range(count):
            row = advance(target, i * plan.row)
            if plan.normalize == 0:
                clear_missing_taps(row, tap, places, like)
            elif slope is None:
                normalize_taps(row, tap, None, places, like)
            else:
                normalize_taps(row, tap, advance(slope, 3 * g * tap + i * plan.row), places, like)


@jit
def stage_channels(
    target: Any, panel: int, row: int, tensor: Any, channel: int, channels: int, first: int, count: int,
    places: int, itemsize: int, stored: Any, like: Any,
) -> None:  # fmt: skip
    """Lines first .. first + count - 1 of some channels, `panel` elements of rows a channel."""
    source = pointer_to(tensor.address + itemsize * (channel * tensor.c + first * tensor.i), stored)
    staging.read(target, panel, row, source, channels, count, places, tensor.c, tensor.i, tensor.j, like)


@jit
def restarts(line: int, chunk: int) -> bool:
    """Does the state start at 0 on this line?"""
    return line == 0 or (chunk > 0 and line % chunk == 0)


@jit
def scan_step(
    h: Any, previous: Any, w: Any, tap: int, x: Any, lam: Any, has_lam: bool, restart: bool, places: int
) -> None:
    """One line of one channel. `lam` is read only where `has_lam`."""
    if restart:
        if has_lam:
            start_row(h, x, lam, places)
        else:
            start_row(h, x, None, places)
    elif has_lam:
        scan_row(h, previous, w, tap, x, lam, places)
    else:
        scan_row(h, previous, w, tap, x, None, places)


@jit
def scan_in_place(
    x: Any, lam: Any, gate: Any, y: Any, y_itemsize: int, c: int, c_low: int, states: Any, w: Any, plan: Any,
    add: bool, first: int, count: int, places: int, itemsize: int, stored: Any, like: Any,
) -> None:  # fmt: skip
    """Lines first .. first + count - 1 of channel c where places are adjacent in memory: nothing is staged.

    `states` has two rows: an even line's state is in the first, an odd line's in the second.
    """
    has_lam, has_gate = lam.address != 0, gate.address != 0
    for i in range(first, first + count):
        x_line = pointer_to(x.address + itemsize * (c * x.c + i * x.i), stored)
        lam_line = pointer_to(lam.address + itemsize * (c * lam.c + i * lam.i), stored)
        gate_line = pointer_to(gate.address + itemsize * (c * gate.c + i * gate.i), stored)
        y_line = pointer_to(y.address + y_itemsize * ((c - c_low) * y.c + i * y.i), like)
        h = advance(states, (i & 1) * plan.row)
        previous = advance(states, (1 - (i & 1)) * plan.row)
        scan_line(
            y_line, add, h, previous, advance(w, (i - first) * plan.row), plan.lines * plan.row, x_line,
            lam_line, has_lam, gate_line, has_gate, restarts(i, plan.chunk), places, like,
        )  # fmt: skip


@jit_inline
def forward_direction(
    x: Any, taps: Any, stride_k: int, lam: Any, gate: Any, y: Any, y_itemsize: int, plan: Any, add: bool,
    lines: int, places: int, c_low: int, c_high: int, scratch: Any, itemsize: int, stored: Any,
    like: Any,
) -> None:  # fmt: skip
    """One direction of one image for channels c_low .. c_high - 1; all operands as `Lines`, absent at 0."""
    row, panel = plan.row, plan.lines * plan.row
    group_size = plan.channels // plan.groups
    x_rows = advance(scratch, LANES)
    lam_rows = advance(x_rows, plan.channel_block * panel)
    gate_rows = advance(lam_rows, plan.channel_block * panel)
    h_rows = advance(gate_rows, plan.channel_block * panel)
    w_rows = advance(h_rows, plan.channel_block * panel)
    states = advance(w_rows, 3 * plan.group_block * panel)
    has_lam, has_gate = lam.address != 0, gate.address != 0
    last_group = (c_high - 1) // group_size
    direct = x.j == 1 and y.j == 1 and (not has_lam or lam.j == 1) and (not has_gate or gate.j == 1)
    for first in range(0, lines, plan.lines):
        count = min(plan.lines, lines - first)
        for g in range(c_low // group_size, last_group + 1, plan.group_block):
            groups = min(plan.group_block, last_group + 1 - g)
            stage_taps(
                w_rows, None, panel, plan, taps, stride_k, g, groups, first, count, places, itemsize, stored,
                like,
            )  # fmt: skip
            stop = min(c_high, (g + groups) * group_size)
            if direct:
                for c in range(max(c_low, g * group_size), stop):
                    scan_in_place(
                        x, lam, gate, y, y_itemsize, c, c_low, advance(states, 2 * (c - c_low) * row),
                        advance(w_rows, 3 * (c // group_size - g) * panel), plan, add, first, count, places,
                        itemsize, stored, like,
                    )  # fmt: skip
                continue
            for c in range(max(c_low, g * group_size), stop, plan.channel_block):
                channels = min(plan.channel_block, stop - c)
                stage_channels(
                    x_rows, panel, row, x, c, channels, first, count, places, itemsize, stored, like
                )
                if has_lam:
                    stage_channels(
                        lam_rows, panel, row, lam, c, channels, first, count, places, itemsize, stored, like
                    )
                if has_gate:
                    stage_channels(
                        gate_rows, panel, row, gate, c, channels, first, count, places, itemsize, stored, like
                    )
                # Channels inside lines: one line's weights serve all of them from the first-level cache.
                for i in range(count):
                    restart = restarts(first + i, plan.chunk)
                    for k in range(channels):
                        at = k * panel + i * row
                        h, lam_row = advance(h_rows, at), advance(lam_rows, at)
                        previous = advance(states, 2 * (c + k - c_low) * row) if i == 0 else advance(h, -row)
                        w = advance(w_rows, 3 * ((c + k) // group_size - g) * panel + i * row)
                        scan_step(
                            h, previous, w, panel, advance(x_rows, at), lam_row, has_lam, restart, places
                        )
                for k in range(channels):
                    last = advance(h_rows, k * panel + (count - 1) * row)
                    start_row(advance(states, 2 * (c + k - c_low) * row), last, None, places)
                    if has_gate:
                        for i in range(count):
                            h = advance(h_rows, k * panel + i * row)
                            gate_row(h, advance(gate_rows, k * panel + i * row), h, places)
                target = pointer_to(y.address + y_itemsize * ((c - c_low) * y.c + first * y.i), like)
                if add:
                    staging.add(h_rows, panel, row, target, channels, count, places, y.c, y.i, y.j, like)
                else:
                    staging.write(h_rows, panel, row, target, channels, count, places, y.c, y.i, y.j, like)


@jit_inline
def run_tasks(
    x: Any, taps: Any, lam: Any, gate: Any, y: Any, plans: Any, sums: bool, scratch_address: int,
    first_task: int, last_task: int, itemsize: int, stored: Any, like: Any,
) -> None:  # fmt: skip
    """Run tasks first_task .. last_task - 1.

    Args:
        x, taps, lam, gate: operands as stored; lam and gate may be absent.
        y: the output, in the arithmetic type; with its d axis one partial sum for each direction when the
            plan splits directions. With `sums`, the output as stored, to be rounded from sums in scratch.
        scratch_address: `scratch_size` elements of this thread's own.
        plans: of scans of rows and of scans of columns.
        itemsize: bytes of a stored element.
        stored, like: scalars of the storage type and of the arithmetic type.
    """
    wide = 8 if is_double(like) else 4
    scratch = pointer_to(scratch_address, like)
    plan = plans[0]  # for what both kinds of scans share
    plane = plan.height * plan.width
    sums_offset = scratch_size(plans, False)
    scanned_places = 0
    for task in range(first_task, last_task):
        split = task % plan.splits
        b = task // plan.splits // plan.blocks
        c_low = task // plan.splits % plan.blocks * plan.task_channels
        c_high = min(plan.channels, c_low + plan.task_channels)
        for d in range(plan.directions):
            if plan.splits > 1 and d != split:
                continue
            direction = plan.direction_codes >> (2 * d) & 3
            vertical = is_vertical(direction)
            scans = plans[0] if vertical else plans[1]
            lines, places = (plan.height, plan.width) if vertical else (plan.width, plan.height)
            if places != scanned_places:
                # What lies beyond the last place of a row must be 0, and longer lines may have been there.
                zero_fill(scratch, panel_size(scans), like)
                scanned_places = places
            if sums:
                address = scratch_address + wide * sums_offset
                out = lines_of(
                    Operand(address, 0, 0, plane, 0, plan.width, 1),
                    wide,
                    0,
                    0,
                    direction,
                    plan.height,
                    plan.width,
                )
            else:
                out = lines_of(
                    y, wide, b, split if plan.splits > 1 else 0, direction, plan.height, plan.width
                )
                out = Lines(out.address + wide * c_low * out.c, out.c, out.i, out.j)
            forward_direction(
                lines_of(x, itemsize, b, 0, direction, plan.height, plan.width),
                lines_of(taps, itemsize, b, d, direction, plan.height, plan.width),
                taps.k,
                lines_of(lam, itemsize, b, d, direction, plan.height, plan.width),
                lines_of(gate, itemsize, b, d, direction, plan.height, plan.width),
                out,
                wide,
                scans,
                d > 0 and plan.splits == 1,
                lines,
                places,
                c_low,
                c_high,
                scratch,
                itemsize,
                stored,
                like,
            )
        if sums:
            staging.write(
                advance(scratch, sums_offset), plane, plan.width,
                pointer_to(y.address + itemsize * (b * y.b + c_low * y.c), stored),
                c_high - c_low, plan.height, plan.width, y.c, y.h, y.w, like,
            )  # fmt: skip


def _entry_point(sources: str) -> Callable[..., Any]:
    @cached_jit
    def forward(
    x: Any, taps: Any, lam: Any, gate: Any, y: Any, plans: Any, sums: bool, scratch_address: int,
    first_task: int, last_task: int, itemsize: int, stored: Any, like: Any,
) -> None:  # fmt: skip
        sources  # noqa: B018 - closed over to be part of the cache's key
        run_tasks(
            x, taps, lam, gate, y, plans, sums, scratch_address,
            first_task, last_task, itemsize, stored, like,
        )  # fmt: skip

    return forward


forward = _entry_point(SOURCES)
