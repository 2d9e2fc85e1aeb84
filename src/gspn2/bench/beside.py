"""The paper's figures beside those of a result file, as tables of cells: for the report and the document."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import paper
from .figures import images_per_second
from .ladder import RUNGS
from .results import Row, find, timed
from .terminal import digits, milliseconds

SIGLIP = "SigLIP2-B, 1024 pixels, batch 32"
"""The case of ours that the paper has, too."""


@dataclass(frozen=True)
class Table:
    """Cells below headings.

    Args:
        title, heads, lines: as shown.
        words: columns from the left that hold words.
    """

    title: str
    heads: Sequence[str]
    lines: Sequence[Sequence[str]]
    words: int = 1


def table(part: str, rows: Sequence[Row]) -> Table | None:
    """The paper's figures for a part of the bench, or None where it has none for what was measured."""
    found = _TABLES[part](rows) if part in _TABLES else None
    return found if found is not None and found.lines else None


def _ladder(rows: Sequence[Row]) -> Table:
    lines = []
    for row in rows:
        times = paper.LADDER.get(tuple(row["facts"]["size"][:2]))
        if times is None or row["facts"]["size"][2] != 1024:
            continue
        first = find(row, RUNGS[0], "forward")
        for rung, theirs in zip(RUNGS, times, strict=True):
            ours = find(row, rung, "forward")
            here = f"{milliseconds(ours['ms'])}" if ours else "-"
            factor = f"{first['ms'] / ours['ms']:.1f}x" if ours and first else "-"
            lines.append([row["case"], rung, f"{theirs:g}", f"{times[0] / theirs:.1f}x", here, factor])
    heads = ["", "rung", "paper, ms", "paper, factor", "here, ms", "here, factor"]
    return Table(f"Beside the paper's ladder ({paper.DEVICE})", heads, lines, words=2)


def _throughput(rows: Sequence[Row]) -> Table:
    lines = []
    for row in rows:
        old, new = row["facts"]["paper_gb_per_s"]
        if row["facts"]["size"] != row["facts"]["paper_size"]:
            continue
        ours = [it for it in timed(row) if it["pass"] == "forward"]
        found = {it["name"]: f"{digits(it['gb_per_s'])} ({100 * it['share']:.1f}%)" for it in ours}
        baseline = next((text for name, text in found.items() if name.startswith("baseline")), "-")
        taps = [found.get(f"per-channel taps, {direction}", "-") for direction in ("right", "down")]
        lines.append([row["case"], f"{old}", f"{new}", baseline, *taps])
    heads = ["B x C x H x W", "paper GSPN-1", "paper GSPN-2", "here, baseline", "here, right", "here, down"]
    return Table(f"GB/s beside the paper's table ({paper.DEVICE}; share of copy)", heads, lines)


def _sweep(rows: Sequence[Row]) -> Table:
    """Factors over the baseline; there is none without a GPU."""
    names = ("per-channel taps", "shared taps", "compact proxy")
    lines = []
    for row in rows:
        for which, theirs in paper.SWEEP.get(row["case"], {}).items():
            first = find(row, "baseline", which)
            ours = [find(row, name, which) for name in names]
            if first:
                here = [f"{first['ms'] / it['ms']:.1f}x" if it else "-" for it in ours]
                lines.append([row["case"], which, f"{theirs:g}x", *here])
    heads = ["", "pass", f"paper ({paper.DEVICE})", *(f"here, {name}" for name in names)]
    return Table("Over GSPN-1, beside what the paper's text says of its sweeps", heads, lines, words=2)


def _attention(rows: Sequence[Row]) -> Table:
    lines = []
    for row in rows:
        if row["case"] != SIGLIP:
            continue
        attention = [
            it["ms"] for it in timed(row) if it["name"].startswith("SDPA") and it["pass"] == "forward"
        ]
        pairs = {
            "module": (min(attention, default=None), _forward(row, "GSPN-2, scan")),
            "block": (_forward(row, "attention, block"), _forward(row, "GSPN-2, block")),
        }
        for what, (theirs, ours) in pairs.items():
            old, new = paper.SIGLIP[what]
            here = ["-" if it is None else milliseconds(it) for it in (theirs, ours)]
            factor = f"{theirs / ours:.1f}x" if theirs and ours else "-"
            lines.append([what, f"{old:g}", f"{new:g}", f"{old / new:.1f}x", *here, factor])
    times = ["attention, ms", "propagation, ms", "factor"]
    heads = ["", f"paper ({paper.DEVICE}): {times[0]}", *times[1:], f"here: {times[0]}", *times[1:]]
    return Table("SigLIP2-Base, 1024 pixels, batch 32, beside the paper", heads, lines)


def _models(rows: Sequence[Row]) -> Table:
    names = {"gspn2_tiny": "GSPN-2-T", "deit_small_patch16_224": "DeiT-S", "convnext_tiny": "ConvNeXt-T"}
    lines = []
    for row in [row for row in rows if row["case"] == "T, 224 pixels"]:
        for name, theirs in names.items():
            it = find(row, name, "inference")
            here = digits(images_per_second(it)) if it else "-"
            lines.append([theirs, str(paper.BACKBONES[theirs]), here])
    heads = ["", f"paper ({paper.DEVICE}), images/s", "here, images/s"]
    return Table("Inference at 224 beside the paper's figure", heads, lines)


def _forward(row: Row, name: str) -> float | None:
    it = find(row, name, "forward")
    return None if it is None else it["ms"]


_TABLES: dict[str, Callable[[Sequence[Row]], Table]] = {
    "ladder": _ladder,
    "throughput": _throughput,
    "sweep": _sweep,
    "attention": _attention,
    "models": _models,
}
