"""Draw docs/images/propagation_maps.png from the results of `gspn2 demo`.

    gspn2 demo --out report
    python docs/images/propagation_maps.py report/results.json

A row for each of two pixels in the first mixer: what the pixel sends in each direction and in all four
together, and what its output receives, computed with the trained model's own taps, lam and gate.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from gspn2.training import TrainConfig, load_data

OUT = Path(__file__).with_suffix(".png")
INK, PAPER, SOURCE = "#5b6472", "#ffffff", "#4cd3ff"


def digit(index: int) -> np.ndarray:
    """A test image as it was scanned, 0 to 1."""
    image = load_data(TrainConfig(data="digits")).test.image(index)
    return np.asarray(image.convert("L"), dtype=float) / 255


def draw_map(axes: Axes, strength: np.ndarray, image: np.ndarray, pixel: list[int]) -> None:
    """Heat is the square root of the strength, as in the report: faint tails stay visible."""
    height, width = strength.shape
    axes.imshow(np.sqrt(strength / strength.max()), cmap="inferno", vmin=0, vmax=1)
    padded = np.pad(image, 1)
    rows = (np.arange(padded.shape[0]) - 0.5) * height / image.shape[0] - 0.5
    columns = (np.arange(padded.shape[1]) - 0.5) * width / image.shape[1] - 0.5
    axes.contour(columns, rows, padded, levels=[0.5 * image.max()], colors="white", linewidths=1, alpha=0.85)
    axes.plot(pixel[1], pixel[0], "o", mfc="none", mec=SOURCE, mew=2, ms=9)
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)
    frame(axes)


def frame(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_visible(False)


def draw(results: dict[str, Any]) -> plt.Figure:
    """The picture of a run's results."""
    layer = results["maps"]["layers"][0]
    image = digit(results["maps"]["test_image"])
    chosen = [layer["maps"][0], layer["maps"][2]]
    tiles = [*layer["directions"], "all"]
    figure, grid = plt.subplots(2, 7, figsize=(11.2, 3.55), facecolor=PAPER, layout="constrained")
    for row, found in zip(grid, chosen, strict=True):
        row[0].imshow(image, cmap="gray")
        scale = image.shape[0] / np.shape(found["received"])[0]
        place = [(p + 0.5) * scale - 0.5 for p in found["pixel"]]
        row[0].plot(place[1], place[0], "o", mfc="none", mec=SOURCE, mew=2, ms=9)
        frame(row[0])
        for axes, name in zip(row[1:6], tiles, strict=True):
            draw_map(axes, np.array(found["sent"][name]), image, found["pixel"])
        draw_map(row[6], np.array(found["received"]), image, found["pixel"])
    for axes, title in zip(grid[0], ["digit, pixel", *tiles[:-1], "all four", "received"], strict=True):
        axes.set_title(title, color=INK, fontsize=12)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="results.json of a demo")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    figure = draw(json.loads(args.results.read_text(encoding="utf-8")))
    figure.savefig(args.out, dpi=130)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
