"""Memory throughput at the eight sizes of the paper's table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from .case import Case, Contender, Part
from .contenders import gspn1, operator
from .operator import Scan, Size, short

BOTH = ("forward", "backward")
# Batch, channels, height, width, and the paper's GB/s on an A100: GSPN-1, GSPN-2.
PAPER: dict[Size, tuple[int, int]] = {
    (32, 196, 32, 32): (114, 1832),
    (1, 768, 64, 64): (86, 1847),
    (1, 1152, 64, 64): (35, 1837),
    (1, 32, 64, 64): (125, 1830),
    (1, 32, 128, 128): (98, 1865),
    (1, 64, 256, 256): (76, 1842),
    (8, 64, 256, 256): (94, 1858),
    (1, 128, 512, 512): (64, 1840),
}
SMALL = [(4, 64, 32, 32), (1, 64, 64, 64)]
"""Of the sizes as they are cut for a CPU those that are measured first."""


def cases(device: torch.device) -> Iterator[Case]:
    """Every size in two dtypes; on a CPU a part of each, those that differ."""
    on_cpu = device.type == "cpu"
    posed = set()
    for whole, paper in PAPER.items():
        batch, channels, height, width = size = whole
        if on_cpu:
            size = (max(1, batch // 8), min(channels, 64), min(height, 96), min(width, 96))
        if size in posed:
            continue
        posed.add(size)
        for dtype in (torch.float32,) if on_cpu else (torch.bfloat16, torch.float32):
            scan = Scan(size, dtype, "per-channel", ("right",), scan=True, passes=BOTH)
            name = f"{'x'.join(map(str, size))} {short(dtype)}"
            facts = {
                "size": list(size),
                "paper_size": list(whole),
                "dtype": str(dtype).removeprefix("torch."),
                "paper_gb_per_s": list(paper),
                "input_sets": scan.sets,
            }
            yield Case(
                "throughput",
                name,
                facts,
                lambda device, scan=scan: contenders(scan, device),  # type: ignore[misc]
                first=size == SMALL[0] if on_cpu else dtype != torch.float32,
                extra=size not in SMALL if on_cpu else dtype == torch.float32,
                seconds=2.0,
            )


def contenders(scan: Scan, device: torch.device) -> list[Contender]:
    """The baseline, and the operator in the directions across and along memory."""
    down = replace(scan, directions=("down",))
    return [
        gspn1(scan, device),
        operator("per-channel taps, right", scan, device),
        operator("per-channel taps, down", down, device),
        operator("shared taps, right", replace(scan, taps="shared"), device),
    ]


PART = Part(
    "throughput",
    "Memory throughput",
    "One direction at the sizes of the paper's table (a part of each on a CPU): bytes that have to move over "
    "time, beside a large copy timed in turn. On a GPU input sets are rotated through more memory than the "
    "cache holds, so that a small problem is not read from the cache; what one launch moves may still fit "
    "there, and a small problem is limited by the time for a line, not by bandwidth.",
    cases,
)
