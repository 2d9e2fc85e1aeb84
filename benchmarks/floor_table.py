"""The table of what a step of a UNet can gain, out of a result file of `gspn2 bench t2i`, for `tables.py`."""

from __future__ import annotations

from typing import Any

import markdown_table as md
from step_table import OURS, PART, STEP, THEIRS, of_other_commits, star

Result = dict[str, Any]

NAME = "floor"
CUT, GRAPH = "no self-attention", "step, CUDA graph"
ABSENT = "*Not measured yet: `gspn2 bench t2i` on a GPU fills this table.*\n"


def make(result: Result) -> str:
    """A row for each size of picture, launched either way, whose step was measured all three ways."""
    rows, shown = [], []
    for case in sorted(result["cases"], key=lambda case: case["facts"].get("pixels", 0)):
        timed = {(it["name"], it["pass"]): it for it in case["contenders"] if "ms" in it}
        for which in (STEP, GRAPH):
            if case["bench"] != PART or not all((name, which) in timed for name in (THEIRS, OURS, CUT)):
                continue
            shown.append(case)
            theirs, ours, floor = (timed[name, which] for name in (THEIRS, OURS, CUT))
            pixels = case["facts"]["pixels"]
            rows.append(
                [
                    f"{pixels} x {pixels}{', CUDA graph' if which == GRAPH else ''}",
                    *(f"{md.ms(it['ms'])}{star(it)}" for it in (theirs, ours, floor)),
                    f"{ours['ms'] / floor['ms']:.3f}",
                    md.times(theirs["ms"] / ours["ms"]),
                    md.times(theirs["ms"] / floor["ms"]),
                ]
            )
    heads = ["one step of diffusers' UNet, ms", "self-attention", "GSPN-2", "neither", "GSPN-2 over neither"]
    heads += ["faster with GSPN-2", "at most"]
    told = (
        "SDXL's configuration, random weights, bfloat16, batch 1. *Neither* has nothing in the place of "
        "self-attention: no mixer can be faster, and what it gains is what any could at most. Without a CUDA "
        "graph the host launches every kernel, and the GPU waits for it at small sizes."
    )
    if any("*" in cell for row in rows for cell in row):
        told += " * is neither and the time of each self-attention, measured singly."
    return md.table(heads, rows) + md.note(result, told + of_other_commits(result, shown))
