"""What backward of planes keeps in scratch memory, and which way gradients of shared taps go.

`variants.planes_backward` asks here before it cuts anything over blocks.
"""

from __future__ import annotations

import torch

from ..geometry import Case

WEIGHING = 4
"""Channels of a group at least for which weights are made once."""

CHAINED_LINES = 512
"""Of large images: gradients of shared taps are not summed in clusters, and channels may form chains."""

COLUMNS = 64
"""Their widths are multiples of it."""

LONGEST_CHAIN = 16
"""Channels that add to one sum; twice as many where such sums would be more than `SUMS` of all tensors."""

PARTS, SUMS = 0.28, 0.08
"""Of the memory of all tensors, what parts of gradients may take: more are summed by chains."""

SCRATCH = 0.25
"""Of the memory of all tensors, what scratch may take: horizontal scans take fewer planes at once for it."""

LOOSE = 0.75
"""The same where parts and sums alone are more than that."""

MOST_WAVES = 3
"""Launches for that, at most: with fewer planes multiprocessors would be idle."""


def sums_channels(case: Case) -> bool:
    """Is the gradient of the taps a sum over channels?"""
    return case.problem.groups < case.problem.channels and "dtaps" in case.views


def is_large(case: Case) -> bool:
    """Do gradients of shared taps go other ways than in small images? Whole tiles, as has been measured."""
    height, width = case.problem.height, case.problem.width
    return min(height, width) >= CHAINED_LINES and width % COLUMNS == 0


def row(case: Case) -> int:
    """Elements of a row of scratch planes: whole sectors, whichever way it is read."""
    return -(-case.problem.width // 16) * 16


def has_partial_sums(case: Case) -> bool:
    """Are there sums of dx over directions whose lower halves dx has no room for?"""
    return len(case.problem.directions) > 1 and case.itemsize < 4 and "dx" in case.views


def has_weights(case: Case) -> bool:
    """Are weights made from logits once for all channels that share them, by a launch of their own?

    They are float16, which is finer than bfloat16 logits are, and no finer than float16 ones.
    """
    problem = case.problem
    several = len(problem.directions) > 1 and problem.normalize and problem.dtype == torch.bfloat16
    shared = sums_channels(case) and problem.channels // problem.groups >= WEIGHING
    return several and shared and is_large(case)


def bytes_of_weights(case: Case) -> int:
    """Of one direction: the next one's take their place."""
    problem = case.problem
    places = problem.batch * problem.groups * problem.height * row(case)
    return 2 * case.itemsize * places * has_weights(case)


def chains(case: Case) -> int:
    """Sums of a group that its channels add to, one after another; 0 where each leaves a part.

    With many planes parts are faster: what a channel has left is no longer in the cache when the next one
    comes for it. But they may take too much memory.
    """
    problem = case.problem
    if not sums_channels(case) or not is_large(case) or case.device.capability < (9, 0):
        return 0
    per_group, planes = problem.channels // problem.groups, problem.batch * problem.channels
    each = 12 // case.itemsize  # float32 of three weights, in numbers of storage
    if each * planes <= PARTS * _tensors(case):
        return 0
    found = -(-per_group // LONGEST_CHAIN)
    if each * found * problem.batch * problem.groups > SUMS * _tensors(case):
        found = -(-found // 2)
    return found if per_group > found else 0


def room_for_states(case: Case) -> int:
    """Planes whose states are in memory at a time: horizontal scans take so many in a launch.

    All of them, if scratch memory then is `SCRATCH` of all tensors; `LOOSE`, if it is more in any case.
    """
    problem, planes = case.problem, case.problem.batch * case.problem.channels
    plane, per_group = 4 * problem.height * row(case), problem.channels // problem.groups
    if plane * planes <= case.device.cache:
        return planes
    rest = plane // 2 * planes * has_partial_sums(case) + bytes_of_weights(case)
    rest += 3 * plane * problem.batch * problem.groups * (chains(case) or sums_channels(case) * per_group)
    pixel = problem.height * problem.width * case.itemsize
    room = (int(SCRATCH * _tensors(case) * pixel) - rest) // plane
    if room <= 0:
        room = (int((LOOSE * _tensors(case) - (1 + LOOSE) * planes) * pixel) - rest) // plane
    waves = -(-planes // max(room, -(-planes // MOST_WAVES)))
    return -(-planes // waves)


def _tensors(case: Case) -> int:
    """Numbers that inputs, output and gradients have for each pixel."""
    problem = case.problem
    planes = problem.batch * problem.channels
    found = planes  # the output
    for name in case.views.keys() - {"y"}:
        count = 3 * problem.batch * problem.groups if name in ("taps", "dtaps") else planes
        found += count if name in ("x", "dy", "dx") else count * len(problem.directions)
    return found
