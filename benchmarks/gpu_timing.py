"""Timing on a GPU: what `gspn2.bench` measures with, by the names that the scripts here use."""

from gspn2.bench.measure import (
    Work,
    bytes_per_ms,
    capture,
    copy,
    in_turn,
    milliseconds,
    prepare,
    rounded,
    spread,
)

__all__ = [
    "Work",
    "bytes_per_ms",
    "capture",
    "copy",
    "in_turn",
    "milliseconds",
    "prepare",
    "rounded",
    "spread",
]
