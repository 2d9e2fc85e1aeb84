"""The pictures of a report, drawn with matplotlib: one function a picture, all from a result file alone."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from . import paper
from .ladder import RUNGS
from .results import Row, find, timed
from .terminal import digits, milliseconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# One that reads on white and on black, and apart for those who see fewer colours.
INK, FAINT = "#6e7681", "#6e768144"
COLOURS = ("#c4500a", "#0069a8", "#0a7f5c", "#8250df", "#b3123f", "#946200", "#1f9bb5", "#6639ba")
OURS, THEIRS = COLOURS[0], "#9aa3ad"
MARKS = "osD^vPX*"
MODEL_PASSES = (
    "inference",
    "train",
    "inference, compiled",
    "inference, blocks compiled",
    "train, compiled",
    "train, compiled, CUDA graphs",
    "train, compiled, one CUDA graph",
    "train, blocks compiled",
    "train, blocks compiled, one CUDA graph",
)
STYLE: Any = {
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.edgecolor": FAINT,
    "grid.color": FAINT,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "font.family": "sans-serif",
    "svg.fonttype": "none",
    "svg.hashsalt": "gspn2",
}
Rows = list[Row]


def draw(content: dict[str, Any]) -> Iterator[tuple[str, bytes, bytes]]:
    """Name, SVG and PNG of every picture that the results have numbers for."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    for name, picture in PICTURES.items():
        rows = [row for row in content["cases"] if timed(row)]
        with plt.rc_context(STYLE):
            figure = picture(rows)
            if figure is None:
                continue
            yield name, _bytes(figure, "svg"), _bytes(figure, "png")
            plt.close(figure)


def ladder(rows: Rows) -> Figure | None:
    """Bars of milliseconds, a panel a case; the paper's on the right where it has the size."""
    cases = of(rows, "ladder")
    if not cases:
        return None
    figure, panels = _panels(len(cases), width=5.8, height=3.2)
    for axes, row in zip(panels, cases, strict=True):
        names = [it["name"] for it in timed(row) if it["pass"] == "forward"]
        times = [_ms(row, name) or 0 for name in names]
        axes.barh(
            range(len(names)),
            times,
            color=[THEIRS if name.startswith("baseline") else OURS for name in names],
            height=0.62,
        )
        for y, (name, value) in enumerate(zip(names, times, strict=True)):
            told = f"{milliseconds(value)} ms" + (f", {times[0] / value:.1f}x" if y else "")
            theirs = _paper_rung(row, name)
            told += f" (paper {theirs:g} ms)" if theirs else ""
            _beside(axes, value, y, told, size=8.5)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        low, high = min(times), max(times)
        _logarithmic(axes, "x", low / 3, high * 60)
        axes.set_xlabel("milliseconds")
        axes.set_title(row["case"])
    return _finished(figure)


def throughput(rows: Rows) -> Figure | None:
    """GB/s at the sizes of the paper's table."""
    cases = of(rows, "throughput")
    if not cases:
        return None
    dtype = cases[0]["facts"]["dtype"]
    cases = [row for row in cases if row["facts"]["dtype"] == dtype]
    names = _names(cases)
    figure, panels = _panels(2, width=5.8, height=0.55 * len(cases) + 1.4)
    for axes, which in zip(panels, ("forward", "backward"), strict=True):
        for y, row in enumerate(cases):
            found = [it for it in timed(row) if it["pass"] == which]
            for i, it in enumerate(found):
                at = y + 0.8 * (i + 0.5) / len(found) - 0.4
                colour, thick = _colour(names.index(it["name"]), it["name"]), 0.7 / len(found)
                axes.barh(at, it["gb_per_s"], height=thick, color=colour, label=it["name"])
                inside = it["gb_per_s"] > 0.6 * row["copy_gb_per_s"]
                _beside(axes, it["gb_per_s"], at, digits(it["gb_per_s"]), size=7, inside=inside)
            axes.plot([row["copy_gb_per_s"]] * 2, [y - 0.42, y + 0.42], color=INK, lw=1.4, label="large copy")
        axes.set_yticks(range(len(cases)), ["x".join(map(str, row["facts"]["size"])) for row in cases])
        axes.set_xlim(right=1.12 * max(row["copy_gb_per_s"] for row in cases))
        axes.invert_yaxis()
        axes.set_xlabel("GB/s")
        axes.set_title(f"{which}, {dtype}")
    _legend(figure, panels)
    return _finished(figure)


def sweep(rows: Rows) -> Figure | None:
    """Log-log lines, a row of panels a series, forward and backward."""
    cases = of(rows, "sweep")
    if not cases:
        return None
    series = list(dict.fromkeys(row["facts"]["series"] for row in cases))
    figure, panels = _panels(2 * len(series), width=5.4, height=3.0)
    for i, name in enumerate(series):
        mine = [row for row in cases if row["facts"]["series"] == name]
        for axes, which in zip(panels[2 * i : 2 * i + 2], ("forward", "backward"), strict=True):
            _lines(axes, mine, lambda row: row["facts"]["value"], which, _names(cases))
            axes.set_title(f"{name}: {which}")
            axes.set_xlabel("pixels of a side" if name == "resolution" else name)
    _legend(figure, panels)
    return _finished(figure)


def attention(rows: Rows) -> Figure | None:
    """Log-log lines of one layer of a ViT-B against its tokens."""
    cases = [
        row for row in of(rows, "attention") if row["case"].startswith("ViT-B") and "block" not in row["case"]
    ]
    if not cases:
        return None
    cases.sort(key=lambda row: row["facts"]["tokens"])
    figure, panels = _panels(2, width=5.8, height=3.8)
    for axes, which in zip(panels, ("forward", "train"), strict=True):
        _lines(axes, cases, lambda row: row["facts"]["tokens"], which, _names(cases))
        axes.set_title("inference" if which == "forward" else "forward and backward")
        axes.set_xlabel("tokens")
    _legend(figure, panels)
    return _finished(figure)


def models(rows: Rows) -> Figure | None:
    """Images per second against resolution, inference and training, eager and compiled, a row a size."""
    cases = [row for row in of(rows, "models") if "models" in row["facts"]]
    if not cases:
        return None
    sizes = dict.fromkeys(row["case"].split(",")[0] for row in cases)
    shown = [
        (size, which, mine)
        for size in sizes
        for which in MODEL_PASSES
        if (mine := [row for row in cases if row["case"].startswith(f"{size},") and _has(row, which)])
    ]
    figure, panels = _panels(len(shown), width=5.4, height=3.0)
    for axes, (size, which, mine) in zip(panels, shown, strict=True):
        _lines(axes, mine, lambda row: row["facts"]["pixels"], which, _names(cases), images_per_second)
        axes.set_ylabel("images per second")
        axes.set_title(f"size {size}: {which}")
        axes.set_xlabel("pixels of a side")
    _legend(figure, panels)
    return _finished(figure)


def proxies(rows: Rows) -> Figure | None:
    """Images per second by proxy channels, as a share of the first, beside the paper's."""
    row = next((row for row in of(rows, "models") if "proxies" in row["facts"]), None)
    if row is None:
        return None
    found = timed(row)
    counts = [int(it["name"].split(", ")[1].split(" ")[0]) for it in found]
    rates = [images_per_second(it) for it in found]
    figure, (axes,) = _panels(1, width=5.8, height=3.0)
    axes.plot(counts, [rate / rates[0] for rate in rates], marker="o", color=OURS, label="here")
    theirs = [paper.PROXIES[count] / paper.PROXIES[2] for count in counts if count in paper.PROXIES]
    axes.plot(counts[: len(theirs)], theirs, marker="s", color=THEIRS, label=f"paper, {paper.DEVICE}")
    for count, rate in zip(counts, rates, strict=True):
        axes.annotate(f"{digits(rate)} img/s", (count, rate / rates[0]), (0, 7), textcoords="offset points",
                      ha="center", fontsize=8)  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_ylim(0, 1.25)
    axes.set_xlabel("proxy channels")
    axes.set_ylabel("of the first one's images per second")
    axes.set_title("GSPN-2-T at 224")
    axes.legend(frameon=False, labelcolor=INK)
    return _finished(figure)


def cpu(rows: Rows) -> Figure | None:
    """Milliseconds on the CPU."""
    cases = of(rows, "cpu")
    if not cases:
        return None
    figure, panels = _panels(2, width=5.8, height=0.6 * len(cases) + 1.3)
    for axes, which in zip(panels, ("forward", "backward"), strict=True):
        for y, row in enumerate(cases):
            found = [it for it in timed(row) if it["pass"] == which]
            for it in found:
                i = ("gspn2", "loop in PyTorch", "SDPA").index(it["name"])
                at = y + 0.26 * (i - 1)
                axes.barh(at, it["ms"], height=0.24, color=_colour(i, it["name"]), label=it["name"])
                _beside(axes, it["ms"], at, milliseconds(it["ms"]), size=7.5)
        axes.set_yticks(range(len(cases)), [row["case"] for row in cases])
        axes.invert_yaxis()
        times = [it["ms"] for row in cases for it in timed(row) if it["pass"] == which]
        if times:
            _logarithmic(axes, "x", min(times) / 2, 2 * max(times))
        axes.set_xlabel("milliseconds")
        axes.set_title(which)
    _legend(figure, panels)
    return _finished(figure)


def t2i(rows: Rows) -> Figure | None:
    """Milliseconds of a step against the size of the picture."""
    cases = [row for row in of(rows, "t2i") if find(row, "GSPN-2", "step")]
    if not cases:
        return None
    passes = [which for which in ("step", "step, CUDA graph") if any(_has(row, which) for row in cases)]
    figure, panels = _panels(len(passes), width=5.8, height=3.8)
    for axes, which in zip(panels, passes, strict=True):
        mine = [{**row, "contenders": [it for it in timed(row) if it["pass"] == which]} for row in cases]
        some = [row for row in mine if timed(row)]
        _lines(axes, some, lambda row: row["facts"]["pixels"], which, _names(cases))
        axes.set_title(f"{cases[0]['facts']['model']}: {which}")
        axes.set_xlabel("pixels of a side")
    _legend(figure, panels)
    return _finished(figure)


def roofline(rows: Rows) -> Figure | None:
    """Share of copy bandwidth against the bytes that have to move: every pass of the operator."""
    parts = ("ladder", "throughput", "sweep")
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["bench"] not in parts:
            continue
        for it in timed(row):
            kind = "baseline" if it["name"].startswith("baseline") else "rungs"
            if "taps" in it["name"] or "proxy" in it["name"] or it["name"].startswith("shipped"):
                kind = f"gspn2, {it['pass']}"
            points.setdefault(kind, []).append((it["bytes"], 100 * it["share"]))
    if not points:
        return None
    figure, (axes,) = _panels(1, width=9.0, height=4.2)
    order = [kind for kind in ("baseline", "rungs", "gspn2, backward", "gspn2, forward") if kind in points]
    for kind in order:
        i = ("gspn2, forward", "gspn2, backward", "rungs", "baseline").index(kind)
        xs, ys = zip(*points[kind], strict=True)
        colour = THEIRS if kind == "baseline" else COLOURS[i]
        axes.plot(xs, ys, MARKS[i], color=colour, ms=5.5, alpha=0.75, mew=0, label=kind)
    axes.axhline(100, color=INK, lw=1.2)
    shares = [y for pairs in points.values() for _, y in pairs]
    axes.set_xscale("log")
    _logarithmic(axes, "y", min(shares) / 2, 200)
    axes.set_xlabel("bytes that have to move")
    axes.set_ylabel("share of copy bandwidth, %")
    axes.set_title("How near to copying")
    axes.legend(frameon=False, labelcolor=INK)
    return _finished(figure)


PICTURES: dict[str, Callable[[Rows], Any]] = {
    "ladder": ladder,
    "throughput": throughput,
    "sweep": sweep,
    "attention": attention,
    "models": models,
    "proxies": proxies,
    "cpu": cpu,
    "t2i": t2i,
    "roofline": roofline,
}


def of(rows: Rows, bench: str) -> Rows:
    """The rows of a part."""
    return [row for row in rows if row["bench"] == bench]


def _names(rows: Rows) -> list[str]:
    """Who has a time in any of the rows."""
    return list(dict.fromkeys(it["name"] for row in rows for it in timed(row)))


def images_per_second(it: Row) -> float:
    return it["images"] / it["ms"] * 1e3


def _lines(
    axes: Axes,
    rows: Rows,
    x: Callable[[Row], float],
    which: str,
    names: Sequence[str],
    y: Callable[[Row], float] = lambda it: it["ms"],
) -> None:
    """A line a contender through all rows that have it; log-log.

    Args:
        axes, rows: of a panel.
        x: of a row.
        which: pass.
        names: of the whole picture: the place there is a contender's colour and mark in every panel.
        y: of a timed pass.
    """
    from matplotlib.ticker import NullLocator

    for i, name in enumerate(names):
        points: dict[float, float] = {}
        for row in rows:
            if it := find(row, name, which):
                points.setdefault(x(row), y(it))  # who is in two cases of one size
        if points:
            xs, ys = zip(*sorted(points.items()), strict=True)
            width = 2.0 if name.startswith(("GSPN-2", "gspn2")) else 1.3
            style: Any = {"marker": MARKS[i % len(MARKS)], "ms": 4.5, "lw": width, "color": _colour(i, name)}
            axes.plot(xs, ys, label=name, **style)
    axes.set_xscale("log", base=2)
    values = [y(it) for row in rows for it in timed(row) if it["pass"] == which]
    if values:
        _logarithmic(axes, "y", min(values) / 1.25, 1.25 * max(values))
    ticks = sorted({x(row) for row in rows})
    axes.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks], rotation=0 if len(ticks) < 6 else 30)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("milliseconds")


def _logarithmic(axes: Axes, which: str, low: float, high: float) -> None:
    """A logarithmic axis over a range, with plain numbers, more of them where powers of ten are few."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis = axes.xaxis if which == "x" else axes.yaxis
    getattr(axes, f"set_{which}scale")("log")
    getattr(axes, f"set_{which}lim")(low, high)
    decades = math.log10(high / low)
    choices = {0.6: (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0), 1.7: (1.0, 2.0, 5.0), 2.5: (1.0, 3.0)}
    steps = next((it for most, it in choices.items() if decades < most), (1.0,))
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value < 1e6 else f"{value:.0e}"))
    axis.set_minor_locator(NullLocator())


def _beside(axes: Axes, x: float, y: float, text: str, size: float, inside: bool = False) -> None:
    """What a horizontal bar means, at its end: behind it, or within."""
    options: Any = {"textcoords": "offset points", "va": "center", "fontsize": size}
    if inside:
        axes.annotate(text, (x, y), (-3, 0), ha="right", color="white", **options)
    else:
        axes.annotate(text, (x, y), (3, 0), **options)


def _has(row: Row, which: str) -> bool:
    return any(it["pass"] == which for it in timed(row))


def _ms(row: Row, name: str) -> float | None:
    it = find(row, name, "forward")
    return None if it is None else it["ms"]


def _paper_rung(row: Row, name: str) -> float | None:
    batch, channels, height, _ = row["facts"]["size"]
    times = paper.LADDER.get((batch, channels)) if height == 1024 else None
    return None if times is None or name not in RUNGS else times[RUNGS.index(name)]


def _colour(i: int, name: str = "") -> str:
    """What is compared with is grey, what is ours has the first colour, the others one each."""
    if name.startswith(("baseline", "loop")):
        return THEIRS
    if name.startswith(("GSPN-2", "gspn2")):
        return OURS
    return COLOURS[1 + i % (len(COLOURS) - 1)]


def _panels(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    import matplotlib.pyplot as plt

    across = min(2, count)
    down = -(-count // across)
    figure, grid = plt.subplots(down, across, figsize=(width * across, height * down), squeeze=False)
    panels = list(grid.flat)
    for axes in panels:
        axes.grid(lw=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    for axes in panels[count:]:
        axes.set_visible(False)
    return figure, panels[:count]


def _legend(figure: Figure, panels: list[Axes]) -> None:
    """One legend above all panels."""
    entries = {
        label: handle
        for axes in panels
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        entries.values(),
        entries.keys(),
        frameon=False,
        labelcolor=INK,
        ncols=min(4, len(entries)),
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
    )


def _finished(figure: Figure) -> Figure:
    figure.tight_layout(w_pad=2.0, h_pad=1.6)
    return figure


def _bytes(figure: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else None
    options: dict[str, Any] = {"transparent": True} if kind == "svg" else {"facecolor": "white"}
    figure.savefig(buffer, format=kind, dpi=150, bbox_inches="tight", metadata=metadata, **options)
    return buffer.getvalue()
