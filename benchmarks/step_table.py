"""The table of a text-to-image step on a GPU, out of a result file of `gspn2 bench t2i`, for `tables.py`."""

from __future__ import annotations

from typing import Any

import markdown_table as md

Result = dict[str, Any]

NAME = "steps"
PART = "t2i"
THEIRS, OURS, STEP = "attention", "GSPN-2", "step"
ABSENT = "*Not measured yet: `gspn2 bench t2i` on a GPU fills this table.*\n"


def make(result: Result) -> str:
    """A row for each size of picture that has a step both ways."""
    rows, shown = [], []
    composed = False
    for case in sorted(result["cases"], key=lambda case: case["facts"].get("pixels", 0)):
        timed = {(it["name"], it["pass"]): it for it in case["contenders"] if "ms" in it}
        if case["bench"] != PART or (OURS, STEP) not in timed or (THEIRS, STEP) not in timed:
            continue
        theirs, ours = timed[THEIRS, STEP], timed[OURS, STEP]
        composed |= bool(star(theirs))
        pixels = case["facts"]["pixels"]
        shown.append(case)
        factor = md.times(theirs["ms"] / ours["ms"])
        rows.append(
            [f"{pixels} x {pixels}", f"{theirs['ms']:.0f} ms{star(theirs)}", f"{ours['ms']:.0f} ms", factor]
        )
    told = (
        "SDXL's configuration, random weights, bfloat16, batch 1; attention by the faster of PyTorch's flash "
        "and cuDNN backends. Small pictures wait for the host, not the GPU."
    )
    if composed:
        told += " * is the step without self-attention and the time of each self-attention, measured singly."
    heads = ["one step of the UNet", "with self-attention", "with GSPN-2 in its place", "faster"]
    return md.table(heads, rows) + md.note(result, told + of_other_commits(result, shown))


def star(it: Result) -> str:
    """Marks a time that was put together from others."""
    return "*" if it["method"] == "composed" else ""


def of_other_commits(result: Result, cases: list[Result]) -> str:
    """Which sizes were measured at another commit than the file's, as a sentence, or ""."""
    commit = result["machine"]["commit"]
    others: dict[int, list[str]] = {}
    for case in cases:
        if case.get("commit", commit) != commit:
            others.setdefault(case["facts"]["pixels"], []).append(case["commit"])
    found = [f"{pixels} x {pixels} ({', '.join(commits)})" for pixels, commits in others.items()]
    return f" At other commits: {', '.join(found)}." if found else ""
