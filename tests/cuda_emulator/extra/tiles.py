"""Images that are large for a small GPU."""

from __future__ import annotations

from dataclasses import replace

from ..problems import BF16, NEW, Small

DEVICE = replace(NEW, shared_memory=104 * 2**10, cache=2**14, multiprocessors=2)
LARGE = Small(81, 83, channels=8, dtype=BF16, layout="channels_last", device=DEVICE)

CASES = (
    LARGE,
    replace(LARGE, groups=8),
    replace(LARGE, groups=8, layout="records", chunk=29),
    *(replace(LARGE, groups=8, height=84, width=80, nan=nan) for nan in ("x", "logits", "dy", "restarts")),
    *(
        replace(LARGE, height=84, width=80, chunk=chunk, nan=nan)
        for chunk, nan in ((20, "x"), (None, "logits"), (33, "dy"))
    ),
)
