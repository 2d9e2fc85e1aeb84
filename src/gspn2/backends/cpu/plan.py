"""How a problem is cut: into tasks for threads, and inside a task into panels that fit the cache.

A task is one image, a block of its channels and all directions in order, so that threads share nothing and
the result does not depend on their number. Where that gives fewer tasks than threads a task is one
direction, and the directions' results are added afterwards, in the same order. A panel is `lines` lines of
a block of channels, brought into scratch, scanned, and written back. Scans of rows and of columns have panels
of their own: an image may be much longer one way.
"""

from __future__ import annotations

from typing import NamedTuple

from ..problem import DIRECTIONS, Problem
from .constants import LANES

# Lines of a panel: where consecutive lines are adjacent in memory, a cache line of float32 each.
MOST_LINES = 16
# Channels staged together: where channels are adjacent in memory, a cache line of float32.
MOST_CHANNELS = 16
# A panel should leave room in a second-level cache of 1 MiB, the smallest of current server cores.
PANEL_BYTES = 640 * 1024
# float32 sums of a 16-bit problem may take this share of the bytes of x and y.
SUMS_SHARE = 0.25


class Plan(NamedTuple):
    """Sizes a kernel needs, for scans of rows or of columns; all are ints: one compiled kernel serves all.

    directions: how many there are; direction_codes: their indices in `DIRECTIONS`, two bits each, the first
    lowest. task_channels: channels of a task. blocks: tasks along the channels. splits: tasks along the
    directions, 1 or their number. What differs between the two kinds of scans: row: elements between rows of
    scratch. lines: lines in a panel. channel_block, group_block: channels and groups staged together.
    """

    channels: int
    groups: int
    height: int
    width: int
    chunk: int
    normalize: int
    directions: int
    direction_codes: int
    task_channels: int
    blocks: int
    splits: int
    row: int = 0
    lines: int = 0
    channel_block: int = 0
    group_block: int = 0


def plan(problem: Problem, threads: int, strides: tuple[int, ...], backward: bool) -> tuple[Plan, Plan]:
    """Cut the problem for tensors laid out like x with these `strides` (B, C, H, W).

    Returns the plans of scans of rows (down, up) and of columns (right, left). They have the same tasks.
    """
    innermost = strides[1] == 1 and problem.channels > 1
    task_channels = _task_channels(problem, threads, backward)
    blocks = -(-problem.channels // task_channels)
    common = Plan(
        channels=problem.channels,
        groups=problem.groups,
        height=problem.height,
        width=problem.width,
        chunk=problem.chunk or 0,
        normalize=int(problem.normalize),
        directions=len(problem.directions),
        direction_codes=sum(DIRECTIONS.index(name) << 2 * d for d, name in enumerate(problem.directions)),
        task_channels=task_channels,
        blocks=blocks,
        splits=len(problem.directions) if problem.batch * blocks < threads else 1,
    )
    return (
        common._replace(**_panels(problem, problem.height, problem.width, innermost, backward)),
        common._replace(**_panels(problem, problem.width, problem.height, innermost, backward)),
    )


def _panels(problem: Problem, lines: int, places: int, innermost: bool, backward: bool) -> dict[str, int]:
    """Sizes of the panels of scans over so many lines of so many places."""
    row = LANES + -(-places // LANES) * LANES
    if row % 256 == 0:
        row += LANES  # rows a multiple of 1 KiB apart compete for the same cache sets
    group_size = problem.channels // problem.groups
    itemsize = 8 if problem.dtype.itemsize == 8 else 4

    def panel_bytes(channels: int, count: int) -> int:
        groups = max(1, channels // group_size)
        rows = 5 * channels + 9 * groups if backward else 4 * channels + 3 * groups
        return rows * count * row * itemsize

    # A panel of whole cache lines: planes need many lines for that, channels innermost need many channels.
    channel_block = min(problem.channels, MOST_CHANNELS)
    count = min(MOST_LINES, lines)
    if backward and not innermost and panel_bytes(1, lines) <= PANEL_BYTES:
        # The adjoint of a panel that is the whole image has no state to find again.
        channel_block, count = 1, lines
    while panel_bytes(channel_block, count) > PANEL_BYTES and (count if innermost else channel_block) > 1:
        if innermost:
            count = -(-count // 2)
        else:
            channel_block = -(-channel_block // 2)
    return {
        "row": row,
        "lines": count,
        "channel_block": channel_block,
        "group_block": max(1, channel_block // group_size),
    }


def _task_channels(problem: Problem, threads: int, backward: bool) -> int:
    """Channels of a task: all, cut as far as it takes to occupy the threads and to keep the sums small."""
    group_size = problem.channels // problem.groups
    # The gradient of a group's taps sums over its channels: the adjoint cannot cut inside a group.
    unit = group_size if backward else 1
    cuts = -(-threads // max(1, problem.batch))
    if problem.dtype.itemsize == 2:
        # threads * channels / cuts * 4 bytes of sums against batch * channels * 2 * 2 bytes of x and y
        cuts = max(cuts, int(threads / (SUMS_SHARE * max(1, problem.batch))))
    units = problem.channels // unit
    return unit * -(-units // min(cuts, units))
