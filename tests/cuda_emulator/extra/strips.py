"""Strips: columns that are cut over warps and blocks, weights as given."""

from __future__ import annotations

from ..problems import BF16, FP16, SMALL, Small

GIVEN = {"normalize": False, "gate": False, "backward": False, "device": SMALL}

CASES = (
    # A block for a plane, which has two in turn; a tile that ends inside a piece.
    Small(256, 264, channels=4, directions=("right",), dtype=BF16, chunk=100, nan="restarts", **GIVEN),
    # Restarts between exchanges, and a strip that is shorter than others, in two blocks and in four.
    Small(450, 260, channels=2, directions=("left",), chunk=7, **GIVEN),
    Small(897, 256, channels=1, directions=("left",), dtype=FP16, lam=False, chunk=30, **GIVEN),
    Small(1000, 256, channels=2, directions=("right",), dtype=BF16, nan="x", **GIVEN),
)
