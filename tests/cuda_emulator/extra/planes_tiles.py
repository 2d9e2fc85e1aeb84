"""Tiles: more than one in either direction, ragged ones, restarts within and between segments."""

from __future__ import annotations

from gspn2.backends.cuda.geometry import Device

from ..problems import BF16, Small

ONE = Device(multiprocessors=1)
"""A GPU on which a few tiles are enough to do."""

CASES = (
    Small(64, 96, channels=5, device=ONE, dtype=BF16, forward=False),
    Small(61, 120, channels=4, chunk=13, directions=("left", "up"), device=ONE, dtype=BF16, forward=False),
    Small(
        95,
        64,
        channels=8,
        groups=2,
        directions=("right", "down", "left"),
        lam=False,
        device=ONE,
        dtype=BF16,
        forward=False,
    ),
    Small(96, 64, channels=4, batch=2, gate=False, chunk=33, device=ONE, dtype=BF16, forward=False),
)
