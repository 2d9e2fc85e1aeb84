"""The table of backbones on a GPU, out of a result file of `gspn2 bench models`, for `tables.py`."""

from __future__ import annotations

from typing import Any

import markdown_table as md

Result = dict[str, Any]

NAME = "backbones"
PART = "models"
OURS = "gspn2_tiny"
COMPILED = ", compiled"
"""In the name of a pass: whole models, not their blocks alone."""
ABSENT = "*Not measured yet: `gspn2 bench models` on a GPU fills this table.*\n"


def make(result: Result) -> str:
    """A row for each case and each other model, compiled; eager ones are in docs/benchmarks.md."""
    rows, others = [], {}
    commit = result["machine"]["commit"]
    for case in result["cases"]:
        timed = [it for it in case["contenders"] if case["bench"] == PART and COMPILED in it.get("pass", "")]
        timed = [it for it in timed if "ms" in it]
        rates = {(it["name"], it["pass"]): 1e3 * it["images"] / it["ms"] for it in timed}
        for (name, which), rate in rates.items():
            if name != OURS and (OURS, which) in rates:
                ours = rates[OURS, which]
                pixels = case["facts"]["pixels"]
                if case.get("commit", commit) != commit:
                    others[case["case"]] = case["commit"]
                rows.append(
                    [
                        f"{pixels} x {pixels}, {which}, batch {case['facts']['batches'][which]}",
                        f"{ours:.0f}",
                        f"`{name}` {rate:.0f}",
                        f"{ours / rate:.2f}",
                    ]
                )
    found = "; ".join(f"{case} ({other})" for case, other in others.items())
    heads = ["images/s", f"`{OURS}`", "beside it (timm)", "ratio"]
    return md.table(heads, rows, words=(2,)) + md.note(
        result,
        "Random weights, channels_last, bfloat16 (training: mixed precision), compiled by `torch.compile`; "
        "inference as CUDA graphs, in turn with each other."
        + (f" At other commits: {found}." if found else ""),
    )
