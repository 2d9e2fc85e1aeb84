"""Pictures of the report: digits, propagation maps over them, and confusion matrices."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .maps import Pixel, PropagationMap

MAP_PIXELS = 192
"""Side of a map's bitmap: three screen pixels for each pixel it takes on a laptop page at most."""


def png_uri(pixels: np.ndarray) -> str:
    """A data URI of an (H, W) grey or (H, W, 3) colour bitmap of bytes."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def digit_uri(image: Tensor) -> str:
    """An (H, W) image of any range as a grey bitmap, bright ink on black as it was scanned."""
    return png_uri((_unit_range(image) * 255).round().byte().numpy())


def map_svg(strength: Tensor, image: Tensor, pixel: Pixel, name: str, spines: Sequence[Spine] = ()) -> str:
    """A map (H, W) as heat, the outline of the digit image (h, w) over it, the chosen pixel ringed.

    Heat is the square root of the strength over its largest value, which keeps faint tails visible. One unit
    of the SVG is one pixel of the map's grid.
    """
    height, width = strength.shape
    parts = [
        f'<svg class="map" viewBox="0 0 {width} {height}" role="img" aria-label="{name}">',
        f'<image width="{width}" height="{height}" preserveAspectRatio="none" href="{_heat_uri(strength)}"/>',
    ]
    stroke = width / 16
    parts += [
        f'<path class="outline" stroke-width="{0.11 * stroke:.3f}" d="{d}"/>'
        for d in _outline(image, height, width)
    ]
    for points in spines:
        path = " ".join(f"{column + 0.5:.2f},{row + 0.5:.2f}" for row, column in points)
        parts.append(f'<polyline class="spine" stroke-width="{0.2 * stroke:.3f}" points="{path}"/>')
    row, column = pixel[0] + 0.5, pixel[1] + 0.5
    for kind, thickness in (("halo", 0.5), ("source", 0.24)):
        parts.append(
            f'<circle class="{kind}" cx="{column}" cy="{row}" r="{0.62 * stroke:.3f}"'
            f' stroke-width="{thickness * stroke:.3f}"/>'
        )
    parts.append("</svg>")
    return "".join(parts)


Spine = list[tuple[float, float]]


def map_row(found: PropagationMap, image: Tensor, directions: Sequence[str]) -> list[tuple[str, str]]:
    """Captions and pictures of one pixel: what it sends in each direction and in all, what it receives."""
    at = f"row {found.pixel[0] + 1}, column {found.pixel[1] + 1}"
    tiles = []
    for name in directions:
        picture = map_svg(
            found.sent[name], image, found.pixel, f"sent {name} from {at}", [found.spines[name]]
        )
        tiles.append((name, picture))
    tiles.append(("all four", map_svg(found.sent["all"], image, found.pixel, f"sent everywhere from {at}")))
    tiles.append(("received", map_svg(found.received, image, found.pixel, f"received at {at}")))
    return tiles


def confusion_svg(matrix: Sequence[Sequence[int]], style: str, name: str) -> str:
    """Counts of true class (row) against predicted class (column), errors in the colour of warnings."""
    classes = len(matrix)
    cell, margin = 36, 40
    size = margin + classes * cell + 4
    worst = max((matrix[r][c] for r in range(classes) for c in range(classes) if r != c), default=0)
    parts = [f'<svg class="confusion {style}" viewBox="0 0 {size} {size}" role="img" aria-label="{name}">']
    middle = margin + classes * cell / 2
    parts.append(f'<text class="title" x="{middle}" y="13" text-anchor="middle">predicted</text>')
    parts.append(
        f'<text class="title" transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">true</text>'
    )
    for row in range(classes):
        at = margin + (row + 0.5) * cell
        parts.append(f'<text class="tick" x="{at}" y="{margin - 8}" text-anchor="middle">{row}</text>')
        parts.append(f'<text class="tick" x="{margin - 11}" y="{at + 5}" text-anchor="middle">{row}</text>')
        total = max(sum(matrix[row]), 1)
        for column in range(classes):
            count = matrix[row][column]
            right = row == column
            shade = count / total if right else (0.35 + 0.65 * count / worst if count else 0.0)
            parts.append(_cell(margin + column * cell, margin + row * cell, cell, count, shade, right))
    parts.append("</svg>")
    return "".join(parts)


def _cell(x: float, y: float, size: float, count: int, shade: float, right: bool) -> str:
    kind = "right" if right else "wrong"
    square = f'x="{x + 1}" y="{y + 1}" width="{size - 2}" height="{size - 2}" rx="3"'
    box = f'<rect class="empty" {square}/>'
    if count:
        strong = " strong" if shade > 0.55 else ""
        box += f'<rect class="{kind}" fill-opacity="{shade:.2f}" {square}/>'
        box += (
            f'<text class="count{strong}" x="{x + size / 2}" y="{y + size / 2 + 5}" '
            f'text-anchor="middle">{count}</text>'
        )
    return box


def heat_gradient() -> str:
    """The colours of the heat from none to strongest, as CSS stops."""
    from matplotlib import colormaps

    return ", ".join(_hex(colormaps["inferno"](i / 8)) for i in range(9))


def _hex(rgba: Sequence[float]) -> str:
    return "#" + "".join(f"{round(255 * value):02x}" for value in rgba[:3])


def _heat_uri(strength: Tensor) -> str:
    from matplotlib import colormaps

    scaled = (strength / strength.max().clamp_min(1e-30)).sqrt().numpy()
    colours = np.round(255 * colormaps["inferno"](scaled)[..., :3]).astype(np.uint8)
    # Enlarged here, to whole blocks: not every viewer draws small bitmaps without smoothing them.
    factor = max(1, MAP_PIXELS // max(strength.shape))
    return png_uri(colours.repeat(factor, axis=0).repeat(factor, axis=1))


def _outline(image: Tensor, height: int, width: int) -> list[str]:
    """Paths along the half-intensity contour of an image (h, w), in units of a height x width grid."""
    from contourpy import contour_generator

    values = torch.nn.functional.pad(_unit_range(image), (1, 1, 1, 1)).double().numpy()
    rows = (np.arange(values.shape[0]) - 0.5) * height / image.shape[0]
    columns = (np.arange(values.shape[1]) - 0.5) * width / image.shape[1]
    lines: Any = contour_generator(x=columns, y=rows, z=values).lines(0.5)
    return ["M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in line) for line in lines]


def _unit_range(image: Tensor) -> Tensor:
    image = image.detach().float().cpu()
    low, high = image.min(), image.max()
    return (image - low) / (high - low).clamp_min(1e-12)
