"""The report: one HTML file that loads nothing, and its pictures as SVG and PNG.

Every sentence with a figure in it is made here from the result file; the template holds only the layout.
"""

from __future__ import annotations

import importlib.resources
import re
import statistics
import string
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from . import beside, figures
from .case import Part, parts
from .figures import images_per_second, of
from .results import Row, broken, find, timed
from .schedule import left_out
from .t2i_image import DIRECT, IMAGE, PROGRESSIVE
from .tables import HEADS, beaten, busy, cells, facts_of, far, method, rate_texts, where
from .terminal import digits

FIGURES = {
    "ladder": ["ladder"],
    "throughput": ["throughput", "roofline"],
    "sweep": ["sweep"],
    "cpu": ["cpu"],
    "attention": ["attention"],
    "models": ["models", "proxies"],
    "t2i": ["t2i"],
}
"""Pictures of each part."""


def write(content: dict[str, Any], out: Path) -> Path:
    """Write report.html and the pictures into `out`; returns the path of the report.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    out.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, str] = {}
    for name, svg, png in figures.draw(content):
        (out / f"{name}.svg").write_bytes(svg)
        (out / f"{name}.png").write_bytes(png)
        pictures[name] = _inline(name, svg.decode())
    path = out / "report.html"
    path.write_text(html(content, pictures), encoding="utf-8")
    return path


def html(content: dict[str, Any], pictures: dict[str, str]) -> str:
    """The whole page.

    Args:
        content: of a result file.
        pictures: SVG elements by name.
    """
    template = importlib.resources.files(__package__).joinpath("report.html.in").read_text(encoding="utf-8")
    rows = content["cases"]
    sections = [_section(part, of(rows, part.name), pictures) for part in parts().values()]
    return string.Template(template).substitute(
        title=escape(_device(content["machine"])),
        headline=escape(f"GSPN-2 on {_device(content['machine'])}"),
        lead=escape(_lead(content)),
        numbers="".join(
            f"<li><b>{escape(value)}</b><span>{escape(text)}</span></li>" for value, text in headlines(rows)
        ),
        problems=_problems(rows),
        beaten="".join(
            f'<p class="soft">{escape(text)}</p>' for text in (beaten(content), far(content)) if text
        ),
        contents="".join(
            f'<a href="#{part.name}">{escape(part.title)}</a>'
            for part in parts().values()
            if of(rows, part.name)
        ),
        sections="\n".join(section for section in sections if section),
        method=escape(method(content)),
        about="".join(
            f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>"
            for name, value in {**content["machine"], **_rates(content)}.items()
        ),
    )


def headlines(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The few numbers to remember, and what they are."""
    found: list[tuple[str, str]] = []
    for row in of(list(rows), "ladder")[:1]:
        first = next((it for it in timed(row) if it["name"].startswith("baseline")), None)
        last = find(row, "shipped", "forward")
        if first and last:
            what = "GSPN-1's way" if first["name"] == "baseline" else "a loop over lines in PyTorch"
            size = _size(row)
            found.append((f"{first['ms'] / last['ms']:.0f}x", f"as fast as {what}, forward at {size}"))
    shares = [
        (it["share"], row)
        for row in rows
        if row["bench"] in ("ladder", "throughput", "sweep")
        for it in timed(row)
        if it["pass"] == "forward" and not it["name"].startswith("baseline")
    ]
    if shares:
        share, row = max(shares, key=lambda pair: pair[0])
        why = "; memory that is mostly read is faster than a copy" if share > 1 else ""
        half = 100 * statistics.median(it for it, _ in shares)
        told = f"of copy bandwidth at best, forward at {_size(row)}{why}"
        found.append((f"{100 * share:.0f}%", f"{told}; half of these times are below {half:.0f}%"))
    found += _beside_attention(rows)
    found += [
        (digits(images_per_second(it)), f"images per second, {it['name']}, {row['case'].split(', ')[1]}")
        for row in of(list(rows), "models")
        if "models" in row["facts"] and row["facts"]["pixels"] == 224
        for it in timed(row)
        if it["name"] == "gspn2_tiny" and it["pass"] == "inference"
    ][:1]
    found += _pictures(rows)
    return found[:4]


def _beside_attention(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """At the most tokens that attention was measured with."""
    best: tuple[int, float, str] | None = None
    for row in of(list(rows), "attention"):
        ours = find(row, "GSPN-2, sub-layer", "forward")
        other = find(row, "attention, sub-layer", "forward")
        if ours and other and (best is None or row["facts"]["tokens"] > best[0]):
            best = (row["facts"]["tokens"], other["ms"] / ours["ms"], row["case"])
    if best is None:
        return []
    tokens, ratio, name = best
    return [
        (f"{digits(ratio)}x", f"as fast as attention, sub-layers with projections, {tokens} tokens ({name})")
    ]


def _pictures(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """A whole picture at the largest size that has one."""
    found = [
        (row["facts"]["pixels"], other["ms"] / ours["ms"])
        for row in of(list(rows), "t2i")
        if (ours := find(row, PROGRESSIVE, IMAGE)) and (other := find(row, DIRECT, IMAGE))
    ]
    if not found:
        return []
    side, ratio = max(found)
    return [(f"{digits(ratio)}x", f"as fast as 50 steps with attention, a picture of {side} x {side} pixels")]


def _section(part: Part, rows: Sequence[Row], pictures: dict[str, str]) -> str:
    if not rows:
        return ""
    shown = "".join(
        f'<figure class="card">{pictures[name]}</figure>' for name in FIGURES[part.name] if name in pictures
    )
    theirs = _beside(beside.table(part.name, rows))
    tables = "".join(_case(row) for row in rows)
    return (
        f'<section id="{part.name}"><h2>{escape(part.title)}</h2><p>{escape(part.about)}</p>{shown}{theirs}'
        f"<details><summary>All numbers ({len(rows)})</summary>{tables}</details></section>"
    )


def _case(row: Row) -> str:
    """A case's table, and what has no number."""
    head = f"<h3>{escape(row['case'])} <small>{escape(facts_of(row))}</small></h3>"
    if "began" in row:
        return f'{head}<p class="soft">Interrupted.</p>'
    if "failed" in row:
        return f'{head}<p class="bad">Failed: {escape(row["failed"])}</p>'
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>" for line in cells(row))
    heads = "".join(f"<th>{escape(name)}</th>" for name in HEADS)
    notes = "".join(
        f'<p class="bad">{escape(it["name"])} {escape(it.get("pass", ""))}: wrong, so no speed: '
        f"{escape(it['wrong'])}</p>"
        if "wrong" in it
        else f'<p class="soft">{escape(it["name"])}: {escape(it["absent"])}</p>'
        for it in row["contenders"]
        if "ms" not in it
    )
    table = f'<div class="wide"><table class="all"><tr>{heads}</tr>{body}</table></div>' if body else ""
    return head + table + notes


def _beside(table: beside.Table | None) -> str:
    """The paper's figures beside ours."""
    if table is None:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in table.heads)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>" for line in table.lines)
    kind = "words" if table.words > 1 else "figures"
    return (
        f'<h3>{escape(table.title)}</h3><div class="wide"><table class="{kind}"><tr>{head}</tr>{body}'
        "</table></div>"
    )


def _problems(rows: Sequence[Row]) -> str:
    found = [f"{row['bench']}: {row['case']}: {text}" for row in rows for text in broken(row)]
    if not found:
        return ""
    items = "".join(f"<li>{escape(text)}</li>" for text in found)
    return f'<section class="problems"><h2>Not right</h2><ul>{items}</ul></section>'


def _lead(content: dict[str, Any]) -> str:
    rows = content["cases"]
    times = sum(len(timed(row)) for row in rows)
    run = content["run"]
    text = (
        f"{times} times in {len(rows)} cases, measured with {run['command']} on {where(content['machine'])}."
    )
    if busy(content):
        text += f" {busy(content)}"
    told = left_out(run.get("left_out") or [], run["command"])
    return f"{text} {told}." if told else text


def _rates(content: dict[str, Any]) -> dict[str, str]:
    return {f"rates, {kind}": text for kind, text in rate_texts(content).items()}


def _device(machine: dict[str, Any]) -> str:
    return str(machine.get("device") or machine["processor"])


def _size(row: Row) -> str:
    return " x ".join(map(str, row["facts"].get("size", [row["case"]])))


def _inline(name: str, svg: str) -> str:
    """The SVG element alone, in the page's ink, with ids of its own: a page's pictures must not share any."""
    svg = svg[svg.index("<svg") :].replace(figures.INK, "var(--soft)")
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'(xlink:href="#|href="#|url\(#)(?=[\w-])', rf"\g<1>{name}-", svg)
    head, rest = svg.split(">", 1)
    size = re.search(r'viewBox="0 0 ([\d.]+)', head)
    # As wide as the page allows, but never blown up.
    style = f' style="max-width: {1.3 * float(size[1]):.0f}px"' if size else ""
    return re.sub(r' (width|height)="[^"]+"', "", head) + style + ">" + rest
