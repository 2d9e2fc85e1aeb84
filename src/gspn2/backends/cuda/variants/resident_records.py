"""What the planners of `resident` share: lines and lanes, and operands that are dense records."""

from __future__ import annotations

from ..geometry import Case, View

LANES = 32
MOST_PLACES = 8
"""Places of a line that a lane can hold: one warp holds a whole line."""

BLOCK_OVERHEAD = 1024
"""Bytes of shared memory that the system takes of each block."""


def record_has_x(case: Case) -> bool:
    return case.views["x"].w == case.views["taps"].w


def record_bytes(case: Case) -> int:
    """Bytes of a pixel if lam, gate and taps can be views of one tensor of dense records; else 0.

    The kernel sees by the addresses whether they are.
    """
    problem, views = case.problem, case.views
    taps = views["taps"]
    scans, channels = len(problem.directions), problem.channels
    per_pixel = [views[name] for name in ("lam", "gate") if name in views]
    elements = scans * (len(per_pixel) * channels + 3 * problem.groups)
    inside, images = [taps, *per_pixel], [views["dy"]] if case.backward else []
    if record_has_x(case):
        elements += channels
        inside.append(views["x"])
    else:
        images.append(views["x"])
    # Images are copied by words.
    if channels * case.itemsize % 4 or any(view.alignment < 4 for view in images) or views["x"].c != 1:
        return 0
    if taps.w != elements or taps.w * case.itemsize % 4:
        return 0
    if (taps.d, taps.c, taps.k) != (3 * problem.groups, 3, 1):
        return 0
    if any((view.d, view.c) != (channels, 1) for view in per_pixel):
        return 0
    dense = all(is_dense(case, view, elements) for view in inside) and all(
        view.c == 1 and is_dense(case, view, channels) for view in images
    )
    return taps.w * case.itemsize if dense else 0


def is_dense(case: Case, view: View, elements: int) -> bool:
    """Are pixels of so many elements adjacent, rows and images, too?"""
    problem = case.problem
    row = problem.width * elements
    return (
        (view.w == elements or problem.width == 1)
        and (view.h == row or problem.height == 1)
        and (view.b == row * problem.height or problem.batch == 1)
    )


def longest(case: Case) -> int:
    """Places of the longest line."""
    names = case.problem.directions
    vertical = any(name in ("down", "up") for name in names)
    horizontal = any(name in ("right", "left") for name in names)
    return max(case.problem.width * vertical, case.problem.height * horizontal)


def lane_places(case: Case) -> int:
    """Places of a line in a lane."""
    places = 2
    while LANES * places < longest(case):
        places *= 2
    return places


def up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def magic(divisor: int) -> int:
    """For division by a multiplication (`Divisor` in the kernel), as a signed number."""
    magic = 2**32 // divisor + 1 if divisor > 1 else 0
    return magic - 2**32 if magic >= 2**31 else magic
