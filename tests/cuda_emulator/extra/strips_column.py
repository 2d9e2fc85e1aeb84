"""A warp that holds whole columns, weights as given."""

from __future__ import annotations

from ..problems import BF16, FP16, Small

GIVEN = {"normalize": False, "gate": False, "backward": False}

CASES = (
    # Two rows a lane: all lanes, and the last not; a tile that is not full, at either end of the scan.
    Small(64, 72, channels=3, directions=("right",), dtype=BF16, chunk=24, nan="restarts", **GIVEN),
    Small(38, 104, channels=4, groups=2, directions=("left",), dtype=FP16, nan="x", **GIVEN),
    Small(50, 36, channels=2, directions=("left",), lam=False, chunk=12, nan="restarts", **GIVEN),
    # Four: the ring goes round.
    Small(128, 172, channels=1, directions=("right",), nan="x", **GIVEN),
    Small(100, 100, channels=2, groups=1, directions=("left",), chunk=16, **GIVEN),
    Small(68, 328, channels=1, directions=("left",), dtype=BF16, lam=False, **GIVEN),
    # Images more than 2^31 elements apart.
    Small(64, 72, channels=2, batch=2, directions=("left",), dtype=BF16, layout="far", **GIVEN),
)
