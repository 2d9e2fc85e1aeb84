"""Planes: lines over several warps and blocks, and taps that more channels share than a cluster has."""

from __future__ import annotations

from gspn2.backends.cuda.geometry import Device

from ..problems import BF16, FP16, OLD, Small

TIGHT = Device(shared_memory=24 * 2**10)
"""A GPU whose shared memory holds a part of a line only."""

CASES = (
    # Sums in scratch memory, whose rows are filled up to vectors.
    Small(14, 14, dtype=BF16, backward=False),
    Small(7, 10, channels=2, dtype=FP16, backward=False),
    # Backward: blocks that share a line, states kept or handed in.
    Small(
        19, 264, channels=2, groups=2, directions=("down",), chunk=11, device=TIGHT, dtype=BF16, forward=False
    ),
    Small(161, 24, channels=2, groups=2, directions=("left",), device=TIGHT, dtype=BF16, forward=False),
    Small(13, 264, channels=1, directions=("right", "up"), device=TIGHT, dtype=FP16, forward=False),
    Small(128, 12, channels=1, directions=("right",), device=TIGHT, gate=False, forward=False),
    Small(
        14,
        264,
        channels=1,
        directions=("up",),
        gate=False,
        hidden=True,
        normalize=False,
        device=TIGHT,
        dtype=BF16,
        forward=False,
    ),
    # Backward: shared taps, in one cluster, in parts, without clusters, and with blocks that share a line.
    Small(9, 40, channels=8, directions=("up",), dtype=BF16, forward=False),
    Small(17, 16, channels=11, directions=("left",), chunk=5, forward=False),
    Small(12, 24, channels=12, directions=("right", "down"), groups=2, device=OLD, dtype=FP16, forward=False),
    Small(10, 264, channels=5, directions=("down",), device=TIGHT, dtype=BF16, forward=False),
    Small(165, 16, channels=3, directions=("left",), device=TIGHT, dtype=BF16, forward=False),
)
