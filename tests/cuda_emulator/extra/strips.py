"""Strips: columns that are cut over warps and blocks, weights as given."""

from __future__ import annotations

from gspn2.backends.cuda.geometry import Device

from ..problems import BF16, FP16, SMALL, Small

FEW = {"normalize": False, "gate": False, "backward": False}
GIVEN = FEW | {"device": SMALL}
CUT = FEW | {"device": Device(multiprocessors=14)}  # three clusters of four

CASES = (
    # A block for a plane, which has two in turn; a tile that ends inside a piece.
    Small(256, 264, channels=4, directions=("right",), dtype=BF16, chunk=100, nan="restarts", **GIVEN),
    # Restarts between exchanges, and a strip that is shorter than others, in two blocks and in four.
    Small(450, 260, channels=2, directions=("left",), chunk=7, **GIVEN),
    Small(897, 256, channels=1, directions=("left",), dtype=FP16, lam=False, chunk=30, **GIVEN),
    # Taps that channels share.
    Small(1000, 264, channels=2, directions=("right",), dtype=BF16, nan="x", **GIVEN),
    Small(920, 260, channels=2, directions=("right",), chunk=50, nan="restarts", **GIVEN),
    # The last planes are cut: one in three parts; two into shares of which one has the end of a plane and the
    # beginning of the next. Restarts at cuts and elsewhere.
    Small(897, 256, channels=4, directions=("right",), dtype=BF16, chunk=64, nan="restarts", **CUT),
    Small(900, 260, channels=8, directions=("left",), chunk=50, **CUT),
    # The same of images more than 2^31 elements apart.
    Small(900, 256, channels=2, batch=2, directions=("left",), dtype=BF16, layout="far", **CUT),
    # Few planes: clusters of eight; the first tile of a scan is the narrow one.
    Small(1000, 264, channels=2, directions=("left",), dtype=BF16, chunk=16, nan="restarts", **FEW),
    # The same in float32, whose tiles are narrower: the ring of three goes round.
    Small(1000, 260, channels=1, directions=("right",), chunk=36, **FEW),
)
