"""docs/benchmarks.md, made from result files by `gspn2 bench docs`; never edited by hand."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from . import beside, paper
from .case import parts
from .figures import images_per_second, of
from .ladder import RUNGS
from .results import Row, broken, find, timed
from .t2i_image import DIRECT, IMAGE, PROGRESSIVE
from .t2i_step import ATTENTION, CUT, GRAPH, MIXERS, STEP
from .tables import beaten, busy, far, method, rate_texts, where
from .terminal import digits, milliseconds

HEAD = """# Benchmarks

Every figure on this page comes from a result file in `benchmarks/results/`; `gspn2 bench docs` writes the
page, and a test keeps the two in step. To measure your own machine:

```
pip install "gspn2[bench]"
gspn2 bench all --out bench
```

That takes 15 minutes on a GPU, 2 on a laptop without one, and ends with `bench/report.html`: all numbers,
pictures, and the paper's figures beside them. What each part is known for is measured first, and what there
was no time for is told. `gspn2 bench list` shows the cases, `gspn2 bench ladder throughput` runs some of
them, `--resume` goes on where a run was stopped, or its time was up, and `gspn2 bench compare
before/results.json bench/results.json` says what has become slower. On a GPU `gspn2[fla]` brings linear
attention and a state-space scan, `gspn2[diffusers]` text to image.
"""

BASELINE = """## The baseline

GSPN-1 launches a kernel for each line: a flat grid of 512 threads over planes with W contiguous, scanned
along W, with the state in memory in the storage type. The bench has its own kernels for that, forward and
backward, written from the description (`src/gspn2/bench/kernels/gspn1.cu`), so that everybody can measure
against it. That it is no straw man is checked against times measured from the released kernel on an H200:
wherever the bench runs on such a GPU it prints its own times as a fraction of those, and says where they are
more than 15% away. Small images often are: their lines take less time than Python needs to launch a kernel.
Without a GPU a loop over lines in PyTorch stands in for the baseline, and is called so.
"""


def text(contents: Sequence[dict[str, Any]]) -> str:
    """The document, a section a result file; GPUs come first."""
    ordered = sorted(contents, key=lambda it: "device" not in it["machine"])
    titles = _titles(ordered)
    listed = "\n".join(f"- [{title}](#{_anchor(title)})" for title in titles)
    sections, told = [], dict[str, str]()
    for title, content in zip(titles, ordered, strict=True):
        how = method(content)
        # The same words once: a machine may have several files.
        again = f"Measured as told [above](#{_anchor(told[how])})." if how in told else how
        told.setdefault(how, title)
        sections.append(_section(content, title, again))
    return "\n".join([HEAD, f"{listed}\n", BASELINE, *sections])


def _titles(contents: Sequence[dict[str, Any]]) -> list[str]:
    """Of each file its machine; with the parts that it has where others are of that machine, too."""
    names = [str(it["machine"].get("device") or it["machine"]["processor"]) for it in contents]
    held = [", ".join(name for name in parts() if of(it["cases"], name)) for it in contents]
    return [
        f"{name} ({parts_of})" if names.count(name) > 1 else name
        for name, parts_of in zip(names, held, strict=True)
    ]


def _anchor(title: str) -> str:
    """What a link to the heading names, as hosts of Markdown make it."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def _section(content: dict[str, Any], title: str, how: str) -> str:
    rows = content["cases"]
    told = f"`{content['run']['command']}` on {where(content['machine'])}. {how}"
    found = [f"## {title}", _wrapped(told), _wrapped(busy(content)), _rates(content)]
    found += [_wrapped(_older(content)), _wrapped(beaten(content)), _wrapped(far(content))]
    for part in parts().values():
        mine = of(rows, part.name)
        if mine:
            found += [f"### {part.title}", _wrapped(part.about), _TABLES[part.name](mine)]
            found.append(_beside(part.name, mine))
    problems = [f"{row['bench']}: {row['case']}: {it}" for row in rows for it in broken(row)]
    if problems:
        found += ["### Without a result", "\n".join(f"- {it}" for it in problems)]
    left_out = content["run"].get("left_out") or []
    if left_out:
        found.append(_wrapped(f"Left out when time was up: {'; '.join(left_out)}."))
    return "\n\n".join(it.rstrip() for it in found if it) + "\n"


def _beside(part: str, rows: Sequence[Row]) -> str:
    """The paper's figures, where the table of the part has no column for them."""
    found = beside.table(part, rows) if part not in ("ladder", "throughput") else None
    return f"{found.title}:\n\n{_table(found.heads, found.lines, left=found.words)}" if found else ""


def _older(content: dict[str, Any]) -> str:
    """The cases that were measured with another commit than the last ones, or ""."""
    commit = content["machine"]["commit"]
    by_commit: dict[str, list[str]] = {}
    for row in content["cases"]:
        if row.get("commit", commit) != commit:
            by_commit.setdefault(row["commit"], []).append(f"{row['bench']}: {row['case']}")
    return " ".join(f"With commit {name}: {'; '.join(cases)}." for name, cases in by_commit.items())


def _rates(content: dict[str, Any]) -> str:
    told = [
        f"{text} on the {'GPU' if kind == 'cuda' else 'CPU'}" for kind, text in rate_texts(content).items()
    ]
    # Cases of other commits are of other runs, whose rates the file does not have.
    when = f"with commit {content['machine']['commit']}" if _older(content) else "in the same run"
    return f"Measured {when}: {'; '.join(told)}." if told else ""


def _ladder(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        forward = [it for it in timed(row) if it["pass"] == "forward"]
        size = row["facts"]["size"]
        theirs = paper.LADDER.get((size[0], size[1])) if size[2] == 1024 else None
        for it in forward:
            old = theirs[RUNGS.index(it["name"])] if theirs and it["name"] in RUNGS else None
            lines.append(
                [
                    row["case"],
                    it["name"],
                    milliseconds(it["ms"]),
                    f"{forward[0]['ms'] / it['ms']:.1f}x",
                    f"{100 * it['share']:.1f}%",
                    f"{it['ms'] / it['released_ms']:.2f}" if "released_ms" in it else "-",
                    f"{old:g}" if old else "-",
                    f"{theirs[0] / old:.1f}x" if theirs and old else "-",
                ]
            )
    heads = ["B x C x H x W", "rung", "ms", "over the first", "of copy", "of the released kernel's time"]
    return _table([*heads, f"paper ({paper.DEVICE}), ms", "over the first"], lines, left=2)


def _throughput(rows: Sequence[Row]) -> str:
    lines = [
        [
            row["case"] if row["facts"]["size"] == row["facts"]["paper_size"] else _size(row),
            it["name"],
            it["pass"],
            milliseconds(it["ms"]),
            digits(it["gb_per_s"]),
            f"{100 * it['share']:.1f}%",
            _yes(it.get("fits_in_cache")),
            " / ".join(map(str, row["facts"]["paper_gb_per_s"])),
        ]
        for row in rows
        for it in timed(row)
    ]
    heads = ["B x C x H x W", "", "pass", "ms", "GB/s", "of copy", "would fit in the cache"]
    return _table([*heads, f"paper ({paper.DEVICE}): GSPN-1 / GSPN-2 GB/s at the full size"], lines, left=3)


def _times(rows: Sequence[Row]) -> str:
    """A row a case and pass, a column a contender."""
    names = list(dict.fromkeys(it["name"] for row in rows for it in timed(row)))
    lines = []
    for row in rows:
        for which in dict.fromkeys(it["pass"] for it in timed(row)):
            found = [find(row, name, which) for name in names]
            lines.append(
                [row["case"], which, *("-" if it is None else milliseconds(it["ms"]) for it in found)]
            )
    absent = dict.fromkeys(
        f"{it['name']} ({it['absent']})" for row in rows for it in row.get("contenders", []) if "absent" in it
    )
    note = (
        f"\n{_wrapped('Milliseconds. Not there: ' + '; '.join(absent) + '.')}\n"
        if absent
        else "\nMilliseconds.\n"
    )
    return _table(["", "pass", *names], lines, left=2) + note


def _models(rows: Sequence[Row]) -> str:
    lines = [
        [
            row["case"],
            it["name"],
            it["pass"],
            f"{it['images']}",
            digits(images_per_second(it)),
            f"{it['peak_bytes'] / 2**30:.2f} GiB" if "peak_bytes" in it else "-",
        ]
        for row in rows
        for it in timed(row)
    ]
    return _table(["", "model", "", "batch", "images/s", "peak memory"], lines, left=3)


def _t2i(rows: Sequence[Row]) -> str:
    steps = [[row["case"].split(", ")[1], *cells] for row in rows for cells in _steps(row)]
    images = [_image(pixels, found) for pixels, found in _pictures(rows).items()]
    heads = ["", "pass", ATTENTION, MIXERS, CUT, "over the floor", "of attention", "peak memory"]
    shown = [_table(heads, steps, left=2) + "\nMilliseconds a step.\n"] if steps else []
    heads = ["", DIRECT, PROGRESSIVE, "faster", "peak memory", "stated before"]
    shown += [_table(heads, images, left=1) + "\nSeconds a picture; * is composed.\n"] if images else []
    notes = [
        f"- {row['case']}, {it['name']}: {it['note']}"
        for row in rows
        for it in timed(row)
        if it["pass"] in (STEP, IMAGE) and "note" in it
    ]
    return "\n".join([*shown, *notes])


def _steps(row: Row) -> Iterator[list[str]]:
    """Lines of a case: ours over the floor, and over attention."""
    for which in (STEP, GRAPH):
        found = [find(row, name, which) for name in (ATTENTION, MIXERS, CUT)]
        if found[1] is None:
            continue
        other, ours, floor = found
        yield [
            which,
            *("-" if it is None else _starred(it, 1e3) for it in found),
            f"{ours['ms'] / floor['ms']:.3f}x" if ours and floor else "-",
            f"{ours['ms'] / other['ms']:.3f}x" if ours and other else "-",
            _gigabytes(ours, "peak_bytes"),
        ]


def _pictures(rows: Sequence[Row]) -> dict[int, dict[str, Row]]:
    """Whole pictures by their side in pixels and who made them: measured end to end rather than composed."""
    found: dict[int, dict[str, Row]] = {}
    for row in rows:
        for it in timed(row):
            if it["pass"] == IMAGE:
                made = found.setdefault(row["facts"]["pixels"], {})
                if it["name"] not in made or made[it["name"]]["method"] == "composed":
                    made[it["name"]] = it
    return found


def _image(pixels: int, made: dict[str, Row]) -> list[str]:
    other, ours = (made.get(name) for name in (DIRECT, PROGRESSIVE))
    return [
        f"{pixels} pixels",
        *("-" if it is None else _starred(it, 1.0) for it in (other, ours)),
        f"{other['ms'] / ours['ms']:.1f}x" if ours and other else "-",
        _gigabytes(ours, "peak_bytes"),
        _gigabytes(ours, "planned_bytes"),
    ]


def _starred(it: Row, unit: float) -> str:
    """A time, with a star if it is composed; unit is 1000 for milliseconds."""
    return milliseconds(it["ms"] / 1e3 * unit) + ("*" if it["method"] == "composed" else "")


def _gigabytes(it: Row | None, name: str) -> str:
    return "-" if it is None or name not in it else f"{it[name] / 1e9:.1f} GB"


_TABLES = {
    "ladder": _ladder,
    "throughput": _throughput,
    "sweep": _times,
    "cpu": _times,
    "attention": _times,
    "models": _models,
    "t2i": _t2i,
}


def _yes(value: bool | None) -> str:
    return "-" if value is None else "yes" if value else "no"


def _size(row: Row) -> str:
    return "x".join(map(str, row["facts"]["size"]))


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]], left: int) -> str:
    rule = ["---" if i < left else "---:" for i in range(len(heads))]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (heads, rule, *lines))


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 118, break_long_words=False, break_on_hyphens=False)
