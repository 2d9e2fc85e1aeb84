"""Time against resolution, batch, channels and both: the paper's runtime figures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from .case import Case, Contender, Part
from .contenders import gspn1, operator
from .operator import Scan, Size

BOTH = ("forward", "backward")
CHUNK = 16
"""Lines between restarts of the local variant."""
PROXY = 8
"""Channels of the input for each proxy channel."""
SERIES: dict[str, list[tuple[int, Size]]] = {
    "resolution": [(n, (1, 16, n, n)) for n in (64, 128, 256, 512, 1024, 2048, 4096)],
    "batch": [(n, (n, 8, 256, 256)) for n in (1, 4, 16, 64, 256)],
    "channels": [(n, (1, n, 256, 256)) for n in (1, 4, 16, 64, 256, 1152)],
    "batch x channels": [(n * n, (n, n, 128, 128)) for n in (1, 4, 16, 64)],
}
LONG = {2048: 8.0, 4096: 16.0}
"""Seconds of the largest images."""
SMALL: dict[str, list[tuple[int, Size]]] = {
    "resolution": [(n, (1, 8, n, n)) for n in (32, 64, 128, 256)],
    "batch": [(n, (n, 8, 32, 32)) for n in (1, 4, 16)],
    "channels": [(n, (1, n, 32, 32)) for n in (1, 16, 64)],
}


def cases(device: torch.device) -> Iterator[Case]:
    """Every value of every series."""
    on_cpu = device.type == "cpu"
    dtype = torch.float32 if on_cpu else torch.bfloat16
    for series, values in (SMALL if on_cpu else SERIES).items():
        for value, size in values:
            scan = Scan(size, dtype, "per-channel", ("right",), scan=True, passes=BOTH)
            facts = {
                "series": series,
                "value": value,
                "size": list(size),
                "dtype": str(dtype).removeprefix("torch."),
                "chunk": CHUNK,
            }
            yield Case(
                "sweep",
                f"{series} {value}",
                facts,
                lambda device, scan=scan: contenders(scan, device),  # type: ignore[misc]
                first=series == "resolution",
                extra=on_cpu and series != "resolution",
                rounds=5,
                seconds=LONG.get(value, 3.0) if series == "resolution" else 3.0,
            )


def contenders(scan: Scan, device: torch.device) -> list[Contender]:
    """The baseline, per-channel and shared taps, a compact proxy; whole scans, and restarted ones."""
    batch, channels, height, width = scan.size
    shared = replace(scan, taps="shared")
    proxy = replace(shared, size=(batch, max(1, channels // PROXY), height, width))
    return [
        gspn1(scan, device),
        operator("per-channel taps", scan, device),
        operator("shared taps", shared, device),
        operator("compact proxy", proxy, device),
        operator("per-channel taps, local", replace(scan, chunk=CHUNK), device),
        operator("shared taps, local", replace(shared, chunk=CHUNK), device),
    ]


PART = Part(
    "sweep",
    "Runtime against size",
    "One direction, forward and backward, against resolution, batch, channels and both at once; a case's "
    f"facts give its size. The compact proxy scans an {PROXY}th of the channels, without the projections; "
    f"the local variant restarts every {CHUNK} lines. The baseline runs whole scans.",
    cases,
)
