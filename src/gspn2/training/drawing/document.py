"""The section of docs/generation.md on models that learn to draw, and its pictures, from result files."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ...demo.charts import HEIGHT, WIDTH, Series, line_chart, linear_axis
from ..errors import UserError
from .objective import WEIGHTS
from .plan import DRAWERS, FREE
from .runner import read
from .samples import USES

Result = dict[str, Any]

PAGE = "generation.md"
BEGIN = "<!-- gspn2 draw docs: what follows is made from result files -->"
END = "<!-- gspn2 draw docs: end -->"
FOLDER = "images/generation"
CURVES = "curves.svg"

HEAD = """## Learning to draw: `gspn2 draw`

Small class-conditional models, trained from nothing on scikit-learn's 8 x 8 handwritten digits, which are
turned, scaled and shifted at random, enlarged to 32 x 32 and given edges: 1438 digits to learn from, 359
held out. A **UNet** (convolutions at full size; convolutions and blocks of mixer and FFN at a half and a
quarter) and a **DiT** (patches of 2 x 2, six blocks), each with self-attention and with GSPN-2 for its
mixers. The FFN makes up for what a mixer has less, so two models of a kind have equal parameters; they see
the same pictures and the same noise, with the same optimizer and steps. The DiT with self-attention is told
where its tokens lie; nothing else is. The **distilled** UNet is the trained one with self-attention, whose
mixers alone are replaced and learn, with the losses of `gspn2 distill`.

They learn flow matching and sample by Heun's method without guidance. A classifier of digits stands in for
Inception: *distance* is the Frechet distance of its features to those of *held-out* digits, which no model
saw (a model that copies its training set is as far as the training digits are), *class* the share of
samples that it takes for what was asked. *2x* and *4x* are pictures of 64 x 64 and 128 x 128 of a model
trained on 32 x 32, averaged down for the judge: *direct* from noise of that size, at times that are shifted
towards noise by the factor (arXiv 2403.03206); *dilated* like it, by a UNet whose inner 3 x 3 convolutions
reach as many times as far (arXiv 2310.07702); *enlarged* from its own smaller picture, as `gspn2 generate`
does it.

    gspn2 draw --out runs/draw
    mkdir -p benchmarks/results/generation
    cp runs/draw/*-s*.json runs/draw/*-s0-*.png benchmarks/results/generation/
    gspn2 draw docs --out benchmarks/results/generation

The first can be stopped at any time and goes on when it is given again; the last writes this section."""

NOTHING = "Nothing has been run yet: there is no result file, and nothing is claimed."

STYLE = """
text { font: 13px sans-serif; fill: #7d8590 }
.grid { stroke: #7d859044 } .axis { stroke: #7d8590 }
.curve { fill: none; stroke-width: 1.8 }
.attention .curve { stroke: #e8871e } .gspn2 .curve { stroke: #3b82f6 } .distilled .curve { stroke: #3fa45b }
text.attention { fill: #e8871e } text.gspn2 { fill: #3b82f6 } text.distilled { fill: #3fa45b }
"""
COLOURS = {"attention": "self-attention", "gspn2": "GSPN-2", "distilled": "GSPN-2 distilled"}
COLUMNS = {
    "1x": "32",
    "2x": "2x direct",
    "2x-dilated": "2x dilated",
    "2x-enlarged": "2x enlarged",
    "4x": "4x direct",
    "4x-dilated": "4x dilated",
    "4x-enlarged": "4x enlarged",
}


def load(folder: Path) -> list[Result]:
    """The results in a folder, by seed and in the order of `DRAWERS`; none if there is no such folder.

    Raises:
        UserError: a file is no result, or two of a seed have been judged by different judges.
    """
    results = [read(path) for path in sorted(folder.glob("*.json"))]
    judges: dict[int, str] = {}
    for result in results:
        seed, digest = result["run"]["seed"], result["judge"]["digest"]
        if judges.setdefault(seed, digest) != digest:
            raise UserError(f"{folder}: results of seed {seed} by different judges cannot be compared")
    order = list(DRAWERS)
    return sorted(results, key=lambda it: (it["run"]["seed"], order.index(it["run"]["model"])))


def files(docs: Path, folder: Path) -> dict[Path, bytes]:
    """The page with its section, the curves, and the grids of the first seed: contents by path."""
    results = load(folder)
    grids = {it: folder / it.name for it in _grids(results) if (folder / it.name).exists()}
    page = insert((docs / PAGE).read_text(encoding="utf-8"), section(results, set(map(str, grids))))
    found = {docs / PAGE: page.encode()}
    if any(_of(results, name) for name in DRAWERS):
        found[docs / FOLDER / CURVES] = curves(results).encode()
    return found | {docs / FOLDER / path.name: source.read_bytes() for path, source in grids.items()}


def insert(page: str, text: str) -> str:
    """The page with another section between the marks.

    Raises:
        UserError: the marks are not there.
    """
    head, begin, rest = page.partition(f"{BEGIN}\n")
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{PAGE}: expected the lines {BEGIN!r} and {END!r}")
    return f"{head}{begin}\n{text}\n\n{end}{tail}"


def section(results: Sequence[Result], grids: set[str]) -> str:
    """The section's text.

    Args:
        grids: names of the grids that there are.
    """
    if not _ended(results):
        return "\n\n".join([HEAD, NOTHING, *_lost(results)])
    seeds = sorted({it["run"]["seed"] for it in _ended(results)})
    told = f"Means over the seeds ({_values(seeds)}), in brackets the lowest and the highest."
    parts = [HEAD, "### Results", _table_of(results, "distance"), _table_of(results, "accuracy")]
    parts += [told if len(seeds) > 1 else f"One seed, {seeds[0]}.", _reference(results), *_lost(results)]
    parts += [_missing(results)]
    parts += [_pictures(results, grids), *_distillation(results)]
    name = "Distance against steps, training loss against steps, losses of the distillation against steps"
    parts += [f"![{name}]({FOLDER}/{CURVES})", _how(results)]
    return "\n\n".join(part for part in parts if part)


def _table_of(results: Sequence[Result], what: str) -> str:
    heads = [f"{'distance' if what == 'distance' else 'class'} at", "parameters", "seeds", "steps"]
    shown = _columns(results)
    heads += shown.values()
    rows = []
    for name, drawer in DRAWERS.items():
        mine = [it for it in _ended(results) if it["run"]["model"] == name]
        if mine:
            cells = [_cell([it["samples"] for it in mine], use, what) for use in shown]
            counts = [f"{mine[0]['parameters']:,}", str(len(mine)), _values(it["step"] for it in mine)]
            rows.append([drawer.label, *counts, *cells])
    return _table(heads, rows)


def _columns(results: Sequence[Result]) -> dict[str, str]:
    """Those of `COLUMNS` that any result has samples of."""
    return {
        use: label for use, label in COLUMNS.items() if any(use in it["samples"] for it in _ended(results))
    }


def _cell(samples: Sequence[dict[str, Any]], use: str, what: str) -> str:
    """Of the seeds that have such samples: DiTs and older results have none of dilated convolutions."""
    values = [it[use][what] for it in samples if use in it]
    seeds = "" if len(values) in (0, len(samples)) else f", {len(values)} of the seeds"
    return f"{_spread(values, what)}{seeds}" if values else "-"


def _spread(values: Sequence[float], what: str) -> str:
    def show(value: float) -> str:
        return f"{100 * value:.1f}%" if what == "accuracy" else f"{value:.1f}"

    mean = show(statistics.fmean(values))
    return mean if len(values) == 1 else f"{mean} ({show(min(values))} to {show(max(values))})"


def _reference(results: Sequence[Result]) -> str:
    judges = list({it["judge"]["digest"]: it["judge"] for it in _ended(results)}.values())
    floor = _values(f"{it['floor']:.1f}" for it in judges)
    noise = _values(f"{it['noise']:.0f}" for it in judges)
    accuracy = _values(f"{100 * it['accuracy']:.1f}%" for it in judges)
    own = " Seeds were judged by classifiers of their own, all models of a seed by one." * (len(judges) > 1)
    return _wrapped(
        f"For comparison: the training digits themselves are at a distance of {floor}, noise at {noise}; the "
        f"classifier tells {accuracy} of the held-out digits.{own}"
    )


def _missing(results: Sequence[Result]) -> str:
    """Models and columns without a result, and what is therefore not compared."""
    ended = {it["run"]["model"] for it in _ended(results)}
    names = [drawer.label for name, drawer in DRAWERS.items() if name not in ended]
    told = []
    if names:
        told.append(f"No run has come to its end yet of: {'; '.join(names)}. Nothing is claimed about them.")
    labels = [label for use, label in COLUMNS.items() if use not in _columns(results)]
    if labels:
        told.append(f"No samples have been judged yet of: {', '.join(labels)}.")
    return _wrapped(" ".join(told))


def _lost(results: Sequence[Result]) -> list[str]:
    """Runs that did not come to their last step, in words."""
    lines = []
    for result in results:
        name = f"{DRAWERS[result['run']['model']].label}, seed {result['run']['seed']}"
        where = f"at step {result['step']} of {result['settings']['steps']}"
        if result["ended"] == "diverged":
            lines.append(f"- {name}: the loss was no longer finite {where}; not in the tables.")
        elif result["ended"] == "time":
            lines.append(f"- {name}: its {result['settings']['minutes']:g} minutes were over {where}.")
    return ["\n".join(lines)] if lines else []


def _grids(results: Sequence[Result]) -> list[Path]:
    """Of the first seed of every model."""
    first: dict[str, int] = {}
    for result in _ended(results):
        first.setdefault(result["run"]["model"], result["run"]["seed"])
    return [Path(f"{name}-s{seed}-{use}.png") for name, seed in first.items() for use in USES]


def _pictures(results: Sequence[Result], grids: set[str]) -> str:
    """The grids: a column for each model, a row for each size."""
    names = list(dict.fromkeys(path.name.rsplit("-s", 1)[0] for path in _grids(results)))
    by_place = {
        (path.name.rsplit("-s", 1)[0], use): path.name
        for path in _grids(results)
        for use in USES
        if path.name.endswith(f"-{use}.png") and path.name in grids
    }
    parts = []
    for use, label in _columns(results).items():
        cells = [
            f"![{DRAWERS[name].label}, {label}]({FOLDER}/{by_place[name, use]})"
            if (name, use) in by_place
            else "-"
            for name in names
        ]
        parts.append([label, *cells])
    if not by_place:
        return ""
    title = (
        "Samples of the first seed, not chosen; all models start from the same noise. A column is a class."
    )
    return f"{_wrapped(title)}\n\n{_table(['', *(DRAWERS[name].label for name in names)], parts)}"


def _distillation(results: Sequence[Result]) -> list[str]:
    """Where mixers began, and where they came to."""
    mine = [it for it in _ended(results) if it["run"]["model"] == "unet-distilled"]
    began = [it["curve"][0] for it in mine if it["curve"] and it["curve"][0]["step"] == 0]
    if not mine or len(began) != len(mine):
        return []
    last = [it["curve"][-1] for it in mine]
    weights = ", ".join(f"{name} {value:g}" for name, value in WEIGHTS.items())
    return [
        _wrapped(
            f"Distillation: {mine[0]['learnt']:,} of the UNet's parameters learn (weights of the losses: "
            f"{weights}). Without its self-attention the teacher draws at a distance of "
            f"{statistics.fmean(it['distance'] for it in began):.1f} "
            f"({100 * statistics.fmean(it['accuracy'] for it in began):.1f}% right). At the last step the "
            f"relative error of the features is {statistics.fmean(it['features'] for it in last):.3f}, "
            "1 at the first."
        )
    ]


def _how(results: Sequence[Result]) -> str:
    """Settings, machines and versions; all that differ among the results are named."""
    settings = [result["settings"] for result in results]
    told = "; ".join(
        f"{name.replace('_', ' ')} {_values(it[name] for it in settings)}"
        for name in settings[0]
        if name not in FREE
    )
    machines = [result["machine"] for result in results]
    where = _values(it.get("device") or it["processor"] for it in machines)
    commits = _values(f"{it['commit']}{'+' if it['uncommitted_changes'] else ''}" for it in machines)
    return _wrapped(
        f"AdamW with a warm-up over a twentieth of the steps and half a cosine, a moving average of the "
        f"weights; {told}. On {where}, PyTorch {_values(it.get('torch', '-') for it in machines)}, "
        f"commit {commits}, "
        f"{_values(it['date'] for it in machines)}. Several runs shared the machine, so times are "
        "not compared."
    )


def curves(results: Sequence[Result]) -> str:
    """An SVG: distances and training losses of both kinds of models, and the losses of the distillation."""
    panels = [
        _panel("UNet: distance", results, ("unet-attention", "unet-gspn2", "unet-distilled"), "distance"),
        _panel("DiT: distance", results, ("dit-attention", "dit-gspn2"), "distance"),
        _panel(
            "UNet: loss against the velocity",
            results,
            ("unet-attention", "unet-gspn2", "unet-distilled"),
            "loss",
        ),
        _panel("DiT: loss against the velocity", results, ("dit-attention", "dit-gspn2"), "loss"),
        _panel("Distillation: error of the features", results, ("unet-distilled",), "features"),
        _panel("Distillation: error against the teacher", results, ("unet-distilled",), "teacher"),
    ]
    shown = [panel for panel in panels if panel]
    rows = (len(shown) + 1) // 2
    height = HEIGHT + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDTH} {rows * height + 30}" role="img" '
        'aria-label="Models that learn to draw: distances and losses against steps">',
        f"<style>{STYLE}</style>",
    ]
    for i, (style, label) in enumerate(COLOURS.items()):
        parts.append(f'<text class="{style}" x="{62 + 140 * i}" y="18">{escape(label)}</text>')
    for i, (title, chart) in enumerate(shown):
        left, top = i % 2 * WIDTH, 30 + i // 2 * height
        place = f'x="{left}" y="{top + 24}" width="{WIDTH}" height="{HEIGHT}" '
        parts.append(f'<text x="{left + 62}" y="{top + 18}">{escape(title)}</text>')
        parts.append(chart.replace("<svg ", f"<svg {place}", 1))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(title: str, results: Sequence[Result], names: Sequence[str], what: str) -> tuple[str, str] | None:
    series = []
    for result in results:
        run, name = result["run"], result["run"]["model"]
        points = [(it["step"], _value(it, what)) for it in result["curve"]]
        if what == "distance" and "samples" in result:
            points.append((result["step"], result["samples"]["1x"]["distance"]))
        found = [(step, value) for step, value in points if value is not None]
        if name in names and found:
            style = name.split("-")[1]
            label = f"{DRAWERS[name].label}, seed {run['seed']}"
            series.append(Series(style, label, [it[0] for it in found], [it[1] for it in found]))
    if not series:
        return None
    ends = [y for one in series for y in one.y]
    x = linear_axis("steps", 0, max(step for one in series for step in one.x), lambda value: f"{value:g}")
    # The first points of a loss would hide all others.
    high = max(ends) if what != "loss" else 3 * statistics.median(ends)
    y = linear_axis(what, 0, high, lambda value: f"{value:.2g}")
    return title, line_chart(title, x, y, series)


def _value(point: dict[str, float], what: str) -> float | None:
    """The loss that all models have is that against the velocity; a student calls it noise."""
    return point.get("noise", point.get("loss")) if what == "loss" else point.get(what)


def _of(results: Iterable[Result], model: str) -> list[Result]:
    return [it for it in results if it["run"]["model"] == model and it["curve"]]


def _ended(results: Iterable[Result]) -> list[Result]:
    """Results that have samples."""
    return [it for it in results if "samples" in it]


def _values(values: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values))


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---" if i < 1 else "---:" for i in range(len(heads))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rule, *lines))


def _wrapped(told: str) -> str:
    return textwrap.fill(told, 118, break_long_words=False, break_on_hyphens=False)
