"""The table of whole pictures on a GPU, out of a result file of `gspn2 bench t2i`, for `tables.py`."""

from __future__ import annotations

from typing import Any

import markdown_table as md
from step_table import PART, of_other_commits, star

Result = dict[str, Any]

NAME = "pictures"
DIRECT, PROGRESSIVE, IMAGE = "attention, direct", "GSPN-2, progressive", "image"
ABSENT = "*Not measured yet: `gspn2 bench t2i` on a GPU fills this table.*\n"


def make(result: Result) -> str:
    """A row for each size of picture that was made both ways; measured end to end rather than composed."""
    made: dict[int, dict[str, tuple[Result, Result]]] = {}
    for case in result["cases"]:
        for it in case["contenders"]:
            if case["bench"] == PART and it.get("pass") == IMAGE and "ms" in it:
                size = made.setdefault(case["facts"]["pixels"], {})
                if it["name"] not in size or star(size[it["name"]][1]):
                    size[it["name"]] = case, it
    rows, shown, how = [], [], []
    for pixels, size in sorted(made.items()):
        if DIRECT not in size or PROGRESSIVE not in size:
            continue
        (first, theirs), (second, ours) = size[DIRECT], size[PROGRESSIVE]
        shown += [first] if first is second else [first, second]
        how += [
            f"{it['name']}, {pixels}: {it['note'].removeprefix('composed: ')}"
            for it in (theirs, ours)
            if star(it)
        ]
        rows.append(
            [
                f"{pixels} x {pixels}",
                *(f"{it['ms'] / 1e3:.1f} s{star(it)}" for it in (theirs, ours)),
                md.times(theirs["ms"] / ours["ms"]),
                *(f"{ours[name] / 1e9:.1f} GB" for name in ("peak_bytes", "planned_bytes")),
            ]
        )
    heads = ["picture", "attention, in one pass", "GSPN-2, progressively", "faster", "memory of the latter"]
    heads += ["as stated before it began"]
    facts = shown[0]["facts"] if shown else {}
    told = (
        f"SDXL's configuration, random weights, bfloat16, with guidance: {facts.get('direct_steps')} steps "
        f"at the full size, or {facts.get('progressive_steps')} a stage as `gspn2 generate` takes them."
    )
    if how:
        told += f" * is composed: {'; '.join(how)}."
    return md.table(heads, rows) + md.note(result, told + of_other_commits(result, shown))
