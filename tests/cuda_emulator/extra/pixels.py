"""Where `pixels` has boundaries that the common cases do not meet."""

from __future__ import annotations

from ..problems import BF16, FP16, SMALL, Small

MANY = {"channels": 64, "device": SMALL, "backward": False}
"""Many blocks of channels: weights are made once for all."""

CASES = (
    # Rows of states that are no multiple of 16 bytes, before weights that are read 16 bytes at a time.
    Small(9, 37, channels=3, layout="channel_innermost"),
    Small(5, 21, channels=5, layout="channel_innermost", chunk=3),
    Small(12, 16, batch=2, layout="channels_last", dtype=BF16, **MANY),
    Small(13, 11, layout="channels_last", dtype=FP16, chunk=4, **MANY),
    Small(16, 15, layout="channel_innermost", dtype=BF16, groups=2, **MANY),
    # A block meets two groups.
    Small(12, 13, layout="channels_last", dtype=BF16, groups=8, **MANY),
    Small(9, 20, layout="channel_innermost", dtype=BF16, directions=("right", "left"), **MANY),
    Small(1, 6, layout="channels_last", dtype=BF16, directions=("up", "down"), lam=False, **MANY),
    Small(8, 1, layout="channels_last", dtype=BF16, directions=("left", "down", "right", "up"), **MANY),
    *(
        Small(11, 9, layout="channels_last", chunk=3, dtype=BF16, nan=n, **MANY)
        for n in ("x", "logits", "gate")
    ),
    Small(9, 10, layout="channels_last", chunk=5, dtype=BF16, nan="restarts", **MANY),
)
