"""Where `pixels` has boundaries that the common cases do not meet."""

from __future__ import annotations

from ..problems import Small

CASES = (
    # Rows of states that are no multiple of 16 bytes, before weights that are read 16 bytes at a time.
    Small(9, 37, channels=3, layout="channel_innermost"),
    Small(5, 21, channels=5, layout="channel_innermost", chunk=3),
)
