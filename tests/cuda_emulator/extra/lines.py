"""Lines: what the planner cuts over clusters, and rows too short for its widest vectors."""

from __future__ import annotations

from ..problems import BF16, FP16, OLD, SMALL, Small

CASES = (
    # Long columns: 2 and 4 blocks, of which the last holds fewer rows, tiles that end inside a piece, and
    # restarts between exchanges.
    Small(263, 24, channels=1, directions=("right",), gate=False, dtype=BF16, backward=False),
    Small(520, 20, channels=1, directions=("left",), chunk=7, normalize=False, gate=False, backward=False),
    # Long rows: the same, with restarts where states are exchanged.
    Small(37, 520, channels=1, directions=("up",), lam=False, gate=False, dtype=FP16, backward=False),
    Small(33, 264, channels=1, directions=("down",), chunk=16, gate=False, backward=False),
    # Both, summed in scratch memory or in y itself; one plane a block or all blocks a plane.
    Small(280, 40, channels=3, directions=("down", "left"), groups=3, dtype=BF16, backward=False),
    Small(140, 72, channels=2, directions=("right", "up"), chunk=48, device=SMALL, backward=False),
    # Vectors of 4 and 8 bytes, lines without a full warp.
    Small(19, 6, channels=2, directions=("down",), lam=False, gate=False, dtype=BF16, backward=False),
    Small(5, 1, channels=2, directions=("up",), gate=False, backward=False),
    Small(18, 12, directions=("up",), batch=2, groups=2, dtype=FP16, backward=False),
    # No clusters.
    Small(300, 16, channels=1, directions=("left",), gate=False, device=OLD, dtype=BF16, backward=False),
)
