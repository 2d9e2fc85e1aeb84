"""Strips of rows: one warp, a block, and clusters that hold a line, weights as given."""

from __future__ import annotations

from gspn2.backends.cuda.geometry import Device

from ..problems import BF16, FP16, SMALL, Small

GIVEN = {"normalize": False, "gate": False, "backward": False}
FULL = GIVEN | {"device": SMALL}

CASES = (
    # A warp holds a line: the ring goes round, a tile ends behind the plane, restarts within tiles.
    Small(150, 120, channels=2, directions=("up",), dtype=BF16, chunk=30, **GIVEN),
    Small(83, 68, channels=4, groups=2, directions=("down",), nan="x", **GIVEN),
    # Strips of a block and of clusters, the last of them narrower; restarts where states are exchanged, too.
    Small(150, 248, channels=2, directions=("down",), dtype=BF16, chunk=16, nan="restarts", **GIVEN),
    Small(101, 500, channels=1, directions=("up",), chunk=7, **GIVEN),
    Small(99, 1000, channels=1, directions=("down",), dtype=FP16, lam=False, **GIVEN),
    # Two blocks on a multiprocessor, tiles of 8 lines.
    Small(45, 1000, channels=1, directions=("up",), dtype=BF16, device=Device(multiprocessors=4), **GIVEN),
    # A lane has two places of a line that is a single strip.
    Small(75, 56, channels=2, directions=("down",), dtype=BF16, chunk=20, nan="restarts", **GIVEN),
    Small(40, 64, channels=2, directions=("up",), nan="x", **GIVEN),
    # Planes that share taps have a block together, and a warp for each, or three; two groups, restarts.
    Small(138, 248, channels=8, groups=2, directions=("up",), dtype=BF16, chunk=20, nan="restarts", **FULL),
    Small(130, 256, channels=8, groups=2, directions=("down",), dtype=FP16, lam=False, **FULL),
    Small(133, 252, channels=8, groups=2, directions=("down",), chunk=18, nan="restarts", **FULL),
    Small(150, 224, channels=4, batch=2, directions=("up",), nan="x", **FULL),
    # And of images more than 2^31 elements apart.
    Small(131, 248, channels=4, batch=2, directions=("down",), dtype=BF16, layout="far", **FULL),
    # Fewer lines than a tile has.
    Small(9, 256, channels=2, directions=("up",), nan="x", **GIVEN),
)
