"""An SVG of boxes, arrows and words, for the pictures of docs/backends.md."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from xml.sax.saxutils import escape

WIDTH = 820
STYLE = """
.bg{fill:#fff}
.o{fill:#fff;stroke:#b6bcc6}
.p{fill:#cfe3fb;stroke:#6b8fb8}
.q{fill:#8fbdf0;stroke:#4f79a8}
.r{fill:#ffe3c2;stroke:#c98a3e}
.s{fill:#ffc98a;stroke:#b06f1f}
.t{fill:#d5eedb;stroke:#5f9c72}
.z{fill:#eceff3;stroke:#b6bcc6}
.dim{fill:none;stroke:#9aa3b0;stroke-dasharray:3 3}
.a{stroke:#333;stroke-width:1.5;fill:none;marker-end:url(#e)}
.k{stroke:#c2410c;stroke-width:2.2;fill:none;marker-end:url(#f)}
.l{stroke:#9aa3b0;stroke-width:1;fill:none}
text{font:13px system-ui,sans-serif;fill:#222}
.h{font-weight:600;font-size:15px}
.m{text-anchor:middle}
.f{fill:#667}
.w{fill:#c2410c}
"""
HEAD = """<defs>
<marker id="e" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">
<path d="M0 0L8 4L0 8z" fill="#333"/></marker>
<marker id="f" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="5" markerHeight="5" orient="auto">
<path d="M0 0L8 4L0 8z" fill="#c2410c"/></marker>
</defs>"""


class Picture:
    """An SVG that grows."""

    def __init__(self, title: str, height: int) -> None:
        self.title, self.height = title, height
        self.parts: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, kind: str = "o") -> None:
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" class="{kind}"/>')

    def boxes(
        self, x: float, y: float, size: tuple[float, float], columns: int, rows: int, kind: str = "o"
    ) -> None:
        width, height = size
        for row in range(rows):
            for column in range(columns):
                self.box(x + column * width, y + row * height, width, height, kind)

    def text(self, x: float, y: float, words: str, kind: str = "") -> None:
        self.parts.append(f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(words)}</text>')

    def paragraph(
        self, x: float, y: float, words: str, *, width: float = 780, kind: str = "", step: float = 18
    ) -> None:
        """Words that are broken into lines of about `width` pixels."""
        for number, line in enumerate(textwrap.wrap(words, int(width / 7.1))):
            self.text(x, y + number * step, line, kind)

    def path(self, points: Sequence[tuple[float, float]], kind: str = "a") -> None:
        steps = "L".join(f"{x:g} {y:g}" for x, y in points)
        self.parts.append(f'<path d="M{steps}" class="{kind}"/>')

    def svg(self) -> str:
        size = f'viewBox="0 0 {WIDTH} {self.height}" width="{WIDTH}" height="{self.height}"'
        opening = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{self.title}">'
        body = "\n".join(self.parts)
        ground = f'<rect class="bg" width="{WIDTH}" height="{self.height}"/>'
        parts = (
            opening,
            f"<title>{self.title}</title>",
            f"<style>{STYLE}</style>",
            HEAD,
            ground,
            body,
            "</svg>",
        )
        return "\n".join(parts) + "\n"
