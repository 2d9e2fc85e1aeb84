"""Line charts as hand-written SVG: small, sharp on any screen, and coloured by the page's own style sheet, so
that they follow its light and dark themes. Coordinates inside are those of a 440 x 290 box.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 440, 290
LEFT, RIGHT, TOP, BOTTOM = 62, 22, 14, 48


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Args:
        style: name of the style sheet's colour for it: "gspn", "attention" or "proxy".
        label: for people who hover or listen.
        x, y: the points.
        low, high: the ends of each point's error bar; empty for none.
        marker: "dot", "square" or "diamond" at each point, or "" for a bare line.
        dashed: draws the line dashed.
        line: joins the points at all.
    """

    style: str
    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    marker: str = ""
    dashed: bool = False
    line: bool = True


@dataclass(frozen=True)
class Axis:
    """A scale with its ticks: `low` and `high` bound the values, `ticks` pairs a value with its text."""

    title: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    log: bool = False

    def place(self, value: float) -> float:
        """Where the value lies between low (0) and high (1); values outside are clipped to the edge."""
        low, high, value = self.low, self.high, min(max(value, self.low), self.high)
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return (value - low) / (high - low)


def line_chart(name: str, x: Axis, y: Axis, series: Sequence[Series]) -> str:
    """An SVG of the series; `name` says what it shows to those who cannot see it."""
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(name)}">',
        *_grid(x, y),
    ]
    for one in series:
        parts += _draw(one, x, y)
    parts.append("</svg>")
    return "\n".join(parts)


def _x(axis: Axis, value: float) -> float:
    return LEFT + axis.place(value) * (WIDTH - LEFT - RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - axis.place(value) * (HEIGHT - TOP - BOTTOM)


def _grid(x: Axis, y: Axis) -> list[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for value, text in y.ticks:
        at = _y(y, value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{at + 4.5:.1f}" text-anchor="end">{text}</text>')
    for value, text in x.ticks:
        at = _x(x, value)
        parts.append(f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text class="tick" x="{at:.1f}" y="{bottom + 19}" text-anchor="middle">{text}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    middle = (LEFT + right) / 2
    parts.append(
        f'<text class="title" x="{middle:.0f}" y="{HEIGHT - 7}" text-anchor="middle">{escape(x.title)}</text>'
    )
    return parts


def _draw(series: Series, x: Axis, y: Axis) -> list[str]:
    points = [(_x(x, a), _y(y, b)) for a, b in zip(series.x, series.y, strict=True)]
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
    dash = ' stroke-dasharray="6 4"' if series.dashed else ""
    parts = [f'<g class="series {series.style}"><title>{escape(series.label)}</title>']
    for (at, _), low, high in zip(points, series.low, series.high, strict=False):
        parts.append(
            f'<line class="bar" x1="{at:.1f}" x2="{at:.1f}" y1="{_y(y, low):.1f}" y2="{_y(y, high):.1f}"/>'
        )
    if series.line and len(points) > 1:
        parts.append(f'<polyline class="curve" points="{path}"{dash}/>')
    marker = series.marker or ("dot" if len(points) == 1 else "")
    if marker:
        parts += [MARKERS[marker](a, b) for a, b in points]
    parts.append("</g>")
    return parts


def _polygon(*corners: tuple[float, float]) -> str:
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in corners)
    return f'<polygon class="marker" points="{points}"/>'


# Shapes as well as colours, for readers who do not tell the colours apart.
MARKERS: dict[str, Callable[[float, float], str]] = {
    "dot": lambda a, b: f'<circle class="marker" cx="{a:.1f}" cy="{b:.1f}" r="4.5"/>',
    "square": lambda a, b: f'<rect class="marker" x="{a - 4:.1f}" y="{b - 4:.1f}" width="8" height="8"/>',
    "diamond": lambda a, b: _polygon((a, b - 5.5), (a + 5.5, b), (a, b + 5.5), (a - 5.5, b)),
}


def linear_axis(title: str, low: float, high: float, text: Callable[[float], str], steps: int = 5) -> Axis:
    """Round ticks, about `steps` of them, over a range widened to them."""
    span = high - low or 1.0
    rough = span / steps
    scale = 10.0 ** math.floor(math.log10(rough))
    step = next(m * scale for m in (1, 2, 2.5, 5, 10) if m * scale >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    ticks = [(i * step, text(i * step)) for i in range(first, last + 1)]
    return Axis(title, first * step, last * step, ticks)


# Accuracies in percent whose errors are about equally far apart on a logarithmic scale.
ACCURACIES = (0, 50, 80, 90, 95, 98, 99, 99.5, 99.8, 99.9)


def error_decades(accuracy: float) -> float:
    """Where an accuracy in percent lies on `accuracy_axis`; from 99.9 on all are at its end."""
    return -math.log10(max(100.0 - accuracy, 0.1))


def accuracy_axis(title: str, low: float, high: float) -> Axis:
    """Accuracies in percent on a scale that is logarithmic in the error, so that 98 and 99 are told apart."""
    below = max(a for a in ACCURACIES[:-1] if a <= low)
    above = min((a for a in ACCURACIES if a >= high and a > below), default=ACCURACIES[-1])
    ticks = [(error_decades(a), f"{a:g}") for a in ACCURACIES if below <= a <= above]
    return Axis(title, ticks[0][0], ticks[-1][0], ticks)


def epoch_axis(epochs: int) -> Axis:
    """Whole epochs from 1, at most seven of them labelled."""
    every = next((n for n in (1, 2, 5, 10, 20, 50, 100) if epochs / n <= 7), epochs)
    labelled = [1, *(e for e in range(every, epochs + 1, every) if e - 1 > every / 2)]
    return Axis("epoch", 1, max(epochs, 2), [(e, str(e)) for e in labelled])


def time_axis(title: str, low: float, high: float) -> Axis:
    """Logarithmic seconds, with a tick at every power of ten."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    ticks = [(10.0**n, duration(10.0**n)) for n in range(first, last + 1)]
    return Axis(title, 10.0**first, 10.0**last, ticks, log=True)


def side_axis(title: str, sides: Sequence[int]) -> Axis:
    """Logarithmic image sides; labels only powers of two, which never crowd each other."""
    ticks = [(s, str(s)) for s in sides if s & (s - 1) == 0]
    return Axis(title, min(sides) / 1.15, max(sides) * 1.15, ticks, log=True)


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them: "3.2 ms"."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        # Rounded to three figures first: 0.9999 ms is 1 ms, not 1000 µs.
        if float(f"{seconds:.3g}") >= scale:
            return f"{seconds / scale:.3g} {unit}" if seconds < 999.5 else f"{seconds:.0f} s"
    return f"{seconds / 1e-9:.3g} ns"
