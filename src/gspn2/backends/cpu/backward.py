"""The adjoint kernel: gradients of x, taps, lam and gate, for a range of tasks.

The forward pass stores nothing. A direction is scanned once to keep the state before every panel, then the
panels are taken last to first: the states inside a panel are computed again, and the adjoint runs through
its lines.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import staging
from .forward import restarts, scan_step, stage_channels, stage_taps
from .geometry import Lines, Operand, is_vertical, lines_of
from .jit import SOURCES, cached_jit, jit, jit_inline
from .rows import (
    adjoint_row,
    carry_row,
    clear_missing_taps,
    input_gradient_row,
    logit_gradient_row,
    start_row,
    tap_gradient_row,
    zero_fill,
)
from .simd import LANES, advance, is_double, pointer_to


@jit
def panel_size(plan: Any, lines: int) -> int:
    """Elements of scratch for the panels of one kind of scans, and for the states between its `lines`."""
    panel_rows = (5 * plan.channel_block + 9 * plan.group_block) * plan.lines
    panels = (lines + plan.lines - 1) // plan.lines
    return (panel_rows + plan.lines + (panels + 1) * plan.task_channels + 2) * plan.row


@jit
def scratch_size(plans: Any, sums: bool) -> int:
    """Elements of scratch for one thread; `sums` says whether dx needs sums in a wider type."""
    plan = plans[0]
    total = max(panel_size(plan, plan.height), panel_size(plans[1], plan.width))
    return total + (plan.task_channels * plan.height * plan.width + LANES if sums else 0)


@jit_inline
def keep_states(
    x: Any, taps: Any, stride_k: int, lam: Any, plan: Any, lines: int, places: int, c_low: int, c_high: int,
    states: Any, x_rows: Any, lam_rows: Any, h_rows: Any, w_rows: Any, itemsize: int, stored: Any, like: Any,
) -> None:  # fmt: skip
    """Scan, and keep for every panel but the first the state before it: (panels, channels) rows."""
    row, panel = plan.row, plan.lines * plan.row
    group_size = plan.channels // plan.groups
    has_lam = lam.address != 0
    last_group = (c_high - 1) // group_size
    task_channels = c_high - c_low
    for first in range(0, lines - plan.lines, plan.lines):
        before = advance(states, first // plan.lines * task_channels * row)
        after = advance(before, task_channels * row)
        for g in range(c_low // group_size, last_group + 1, plan.group_block):
            groups = min(plan.group_block, last_group + 1 - g)
            stage_taps(
                w_rows, None, panel, plan, taps, stride_k, g, groups, first, plan.lines, places, itemsize,
                stored, like,
            )  # fmt: skip
            stop = min(c_high, (g + groups) * group_size)
            for c in range(max(c_low, g * group_size), stop, plan.channel_block):
                channels = min(plan.channel_block, stop - c)
                stage_channels(
                    x_rows, panel, row, x, c, channels, first, plan.lines, places, itemsize, stored, like
                )
                if has_lam:
                    stage_channels(
                        lam_rows,
                        panel,
                        row,
                        lam,
                        c,
                        channels,
                        first,
                        plan.lines,
                        places,
                        itemsize,
                        stored,
                        like,
                    )
                for i in range(plan.lines):
                    restart = restarts(first + i, plan.chunk)
                    for k in range(channels):
                        at, channel = k * panel + i * row, (c + k - c_low) * row
                        previous = advance(before, channel) if i == 0 else advance(h_rows, at - row)
                        w = advance(w_rows, 3 * ((c + k) // group_size - g) * panel + i * row)
                        h, lam_row = advance(h_rows, at), advance(lam_rows, at)
                        scan_step(
                            h, previous, w, panel, advance(x_rows, at), lam_row, has_lam, restart, places
                        )
                        if i == plan.lines - 1:
                            start_row(advance(after, channel), h, None, places)


@jit_inline
def adjoint_channel(
    x: Any, lam: Any, has_lam: bool, gate: Any, has_gate: bool, dy: Any, h: Any, g: Any, w: Any, dw: Any,
    state: Any, carried: Any, plan: Any, first: int, count: int, places: int, like: Any,
) -> None:  # fmt: skip
    """One panel of one channel, last line to first; rows of x, lam and gate become their gradients.

    `carried` holds what the next panel hands back and receives what this one hands to the previous.
    """
    row, panel = plan.row, plan.lines * plan.row
    for i in range(count):
        at = i * row
        previous = state if i == 0 else advance(h, at - row)
        scan_step(
            advance(h, at), previous, advance(w, at), panel, advance(x, at), advance(lam, at), has_lam,
            restarts(first + i, plan.chunk), places,
        )  # fmt: skip
    for i in range(count - 1, -1, -1):
        at = i * row
        g_row, w_row = advance(g, at), advance(w, at)
        if has_gate:
            adjoint_row(g_row, carried, advance(dy, at), advance(gate, at), places)
        else:
            adjoint_row(g_row, carried, advance(dy, at), None, places)
        if restarts(first + i, plan.chunk):
            zero_fill(carried, places, like)
        else:
            previous = state if i == 0 else advance(h, at - row)
            tap_gradient_row(advance(dw, at), panel, g_row, previous, places)
            carry_row(carried, w_row, panel, g_row, places)
        x_row, lam_row, gate_row = advance(x, at), advance(lam, at), advance(gate, at)
        dy_row, h_row = advance(dy, at), advance(h, at)
        if has_lam and has_gate:
            input_gradient_row(x_row, lam_row, gate_row, dy_row, g_row, h_row, places)
        elif has_lam:
            input_gradient_row(x_row, lam_row, None, dy_row, g_row, h_row, places)
        elif has_gate:
            input_gradient_row(x_row, None, gate_row, dy_row, g_row, h_row, places)
        else:
            input_gradient_row(x_row, None, None, dy_row, g_row, h_row, places)


@jit_inline
def backward_direction(
    dy: Any, x: Any, taps: Any, stride_k: int, lam: Any, gate: Any, dx: Any, dx_itemsize: int, dtaps: Any,
    dtaps_stride_k: int, dlam: Any, dgate: Any, plan: Any, add: bool, lines: int, places: int, c_low: int,
    c_high: int, scratch: Any, itemsize: int, stored: Any, like: Any,
) -> None:  # fmt: skip
    """One direction of one image for channels c_low .. c_high - 1; all operands as `Lines`, absent at 0."""
    row, panel = plan.row, plan.lines * plan.row
    group_size = plan.channels // plan.groups
    task_channels = c_high - c_low
    block = plan.channel_block * panel
    x_rows = advance(scratch, LANES)
    lam_rows = advance(x_rows, block)
    gate_rows = advance(lam_rows, block)
    dy_rows = advance(gate_rows, block)
    h_rows = advance(dy_rows, block)
    g_rows = advance(h_rows, block)
    w_rows = advance(g_rows, panel)
    slope_rows = advance(w_rows, 3 * plan.group_block * panel)
    dw_rows = advance(slope_rows, 3 * plan.group_block * panel)
    carried = advance(dw_rows, 3 * plan.group_block * panel)
    states = advance(carried, plan.task_channels * row)
    has_lam, has_gate = lam.address != 0, gate.address != 0
    zero_fill(advance(carried, -LANES), task_channels * row, like)
    keep_states(
        x, taps, stride_k, lam, plan, lines, places, c_low, c_high, states, x_rows, lam_rows, h_rows, w_rows,
        itemsize, stored, like,
    )  # fmt: skip
    last_group = (c_high - 1) // group_size
    for first in range((lines - 1) // plan.lines * plan.lines, -1, -plan.lines):
        count = min(plan.lines, lines - first)
        before = advance(states, first // plan.lines * task_channels * row)
        for g in range(c_low // group_size, last_group + 1, plan.group_block):
            groups = min(plan.group_block, last_group + 1 - g)
            stage_taps(
                w_rows, slope_rows, panel, plan, taps, stride_k, g, groups, first, count, places, itemsize,
                stored, like,
            )  # fmt: skip
            zero_fill(advance(dw_rows, -LANES), 3 * groups * panel, like)
            stop = min(c_high, (g + groups) * group_size)
            for c in range(max(c_low, g * group_size), stop, plan.channel_block):
                channels = min(plan.channel_block, stop - c)
                stage_channels(
                    x_rows, panel, row, x, c, channels, first, count, places, itemsize, stored, like
                )
                stage_channels(
                    dy_rows, panel, row, dy, c, channels, first, count, places, itemsize, stored, like
                )
                if has_lam:
                    stage_channels(
                        lam_rows, panel, row, lam, c, channels, first, count, places, itemsize, stored, like
                    )
                if has_gate:
                    stage_channels(
                        gate_rows, panel, row, gate, c, channels, first, count, places, itemsize, stored, like
                    )
                for k in range(channels):
                    at, channel = k * panel, (c + k - c_low) * row
                    group = 3 * ((c + k) // group_size - g) * panel
                    adjoint_channel(
                        advance(x_rows, at), advance(lam_rows, at), has_lam, advance(gate_rows, at), has_gate,
                        advance(dy_rows, at), advance(h_rows, at), g_rows, advance(w_rows, group),
                        advance(dw_rows, group), advance(before, channel), advance(carried, channel), plan,
                        first, count, places, like,
                    )  # fmt: skip
                if dx.address != 0:
                    target = pointer_to(dx.address + dx_itemsize * ((c - c_low) * dx.c + first * dx.i), like)
                    if add:
                        staging.add(
                            x_rows, panel, row, target, channels, count, places, dx.c, dx.i, dx.j, like
                        )
                    else:
                        staging.write(
                            x_rows, panel, row, target, channels, count, places, dx.c, dx.i, dx.j, like
                        )
                if dlam.address != 0:
                    unstage(
                        lam_rows, panel, row, dlam, c, channels, first, count, places, itemsize, stored, like
                    )
                if dgate.address != 0:
                    unstage(
                        gate_rows,
                        panel,
                        row,
                        dgate,
                        c,
                        channels,
                        first,
                        count,
                        places,
                        itemsize,
                        stored,
                        like,
                    )
            if dtaps.address != 0:
                unstage_taps(
                    dw_rows, w_rows, slope_rows, plan, dtaps, dtaps_stride_k, g, groups, first, count, places,
                    itemsize, stored, like,
                )  # fmt: skip


@jit
def unstage(
    rows: Any, panel: int, row: int, tensor: Any, channel: int, channels: int, first: int, count: int,
    places: int, itemsize: int, stored: Any, like: Any,
) -> None:  # fmt: skip
    """Rows of some channels to lines first .. first + count - 1 of a tensor."""
    target = pointer_to(tensor.address + itemsize * (channel * tensor.c + first * tensor.i), stored)
    staging.write(rows, panel, row, target, channels, count, places, tensor.c, tensor.i, tensor.j, like)


@jit_inline
def unstage_taps(
    dw: Any, w: Any, slope: Any, plan: Any, dtaps: Any, stride_k: int, group: int, groups: int, first: int,
    count: int, places: int, itemsize: int, stored: Any, like: Any,
) -> None:  # fmt: skip
    """Rows dw, turned into gradients of the logits where the taps are logits, to a tensor.

    Those of missing neighbours are set to 0: 0 times what is not finite came out as NaN.
    """
    panel = plan.lines * plan.row
    for k in range(groups):
        rows = 3 * k * panel
        for i in range(count):
            at = rows + i * plan.row
            if plan.normalize != 0:
                logit_gradient_row(advance(dw, at), panel, advance(w, at), advance(slope, at), places)
            clear_missing_taps(advance(dw, at), panel, places, like)
        target = pointer_to(dtaps.address + itemsize * ((group + k) * dtaps.c + first * dtaps.i), stored)
        staging.write(
            advance(dw, rows), panel, plan.row, target, 3, count, places, stride_k, dtaps.i, dtaps.j, like
        )


@jit_inline
def run_tasks(
    dy: Any, x: Any, taps: Any, lam: Any, gate: Any, dx: Any, dtaps: Any, dlam: Any, dgate: Any, plans: Any,
    sums: bool, scratch_address: int, first_task: int, last_task: int, itemsize: int,
    stored: Any, like: Any,
) -> None:  # fmt: skip
    """Run tasks first_task .. last_task - 1.

    Args:
        dy, x, taps, lam, gate: operands as stored; lam and gate may be absent.
        dx: like y in `forward.forward`, or absent.
        dtaps, dlam, dgate: gradients as stored, each absent if nobody asked for it.
        sums, scratch_address, itemsize, stored, like: as in `forward.forward`.
    """
    wide = 8 if is_double(like) else 4
    scratch = pointer_to(scratch_address, like)
    plan = plans[0]  # for what both kinds of scans share
    plane = plan.height * plan.width
    sums_offset = scratch_size(plans, False)
    scanned_places = 0
    height, width = plan.height, plan.width
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
            lines, places = (height, width) if vertical else (width, height)
            scans = plans[0] if vertical else plans[1]
            if places != scanned_places:
                # What lies beyond the last place of a row must be 0, and longer lines may have been there.
                zero_fill(scratch, panel_size(scans, lines), like)
                scanned_places = places
            if dx.address == 0:
                out = Lines(0, 0, 0, 0)
            elif sums:
                address = scratch_address + wide * sums_offset
                out = lines_of(
                    Operand(address, 0, 0, plane, 0, width, 1), wide, 0, 0, direction, height, width
                )
            else:
                out = lines_of(dx, wide, b, split if plan.splits > 1 else 0, direction, height, width)
                out = Lines(out.address + wide * c_low * out.c, out.c, out.i, out.j)
            backward_direction(
                lines_of(dy, itemsize, b, 0, direction, height, width),
                lines_of(x, itemsize, b, 0, direction, height, width),
                lines_of(taps, itemsize, b, d, direction, height, width),
                taps.k,
                lines_of(lam, itemsize, b, d, direction, height, width),
                lines_of(gate, itemsize, b, d, direction, height, width),
                out,
                wide,
                lines_of(dtaps, itemsize, b, d, direction, height, width),
                dtaps.k,
                lines_of(dlam, itemsize, b, d, direction, height, width),
                lines_of(dgate, itemsize, b, d, direction, height, width),
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
        if sums and dx.address != 0:
            staging.write(
                advance(scratch, sums_offset), plane, width,
                pointer_to(dx.address + itemsize * (b * dx.b + c_low * dx.c), stored),
                c_high - c_low, height, width, dx.c, dx.h, dx.w, like,
            )  # fmt: skip


def _entry_point(sources: str) -> Callable[..., Any]:
    @cached_jit
    def backward(
    dy: Any, x: Any, taps: Any, lam: Any, gate: Any, dx: Any, dtaps: Any, dlam: Any, dgate: Any, plans: Any,
    sums: bool, scratch_address: int, first_task: int, last_task: int, itemsize: int,
    stored: Any, like: Any,
) -> None:  # fmt: skip
        sources  # noqa: B018 - closed over to be part of the cache's key
        run_tasks(
            dy, x, taps, lam, gate, dx, dtaps, dlam, dgate,
            plans, sums, scratch_address, first_task, last_task, itemsize, stored, like,
        )  # fmt: skip

    return backward


backward = _entry_point(SOURCES)
