"""Draw docs/images/h200_speed.svg from benchmarks/results/h200: shares of copy, and times beside GSPN-1.

    python benchmarks/figures.py [--results FOLDER] [--out FILE.svg or FILE.png]

Colours read on light and on dark pages; the background is left out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

import gpu_tables
import markdown_table as md
from common import RESULTS, ROOT

INK, FAINT = "#7d8590", "#7d859055"
PLANES, PIXELS = "#3b82f6", "#e8871e"
Result = dict[str, Any]


def load(folder: Path) -> dict[str, Result]:
    names = ("line_scan", "gspn1", "propagate")
    return {name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in names}


def shares(axes: Axes, results: dict[str, Result]) -> None:
    """A row for each bandwidth target, a dot for each case."""
    goals = [goal for goal in gpu_tables.goals() if goal.section in ("line_scan", "propagate")]
    for y, goal in enumerate(goals):
        for case in results[goal.section]["cases"]:
            if "error" in case or not goal.among(case):
                continue
            it = case[goal.part]
            colour = PLANES if case["layout"] == "planes" else PIXELS
            shift = -0.13 if case["layout"] == "planes" else 0.13
            axes.plot(100 * it["share"], y + shift, "o", ms=5.5, color=colour, alpha=0.6, mew=0)
            target = 100 * it["target"]["value"]
            axes.plot([target, target], [y - 0.38, y + 0.38], color=INK, lw=1.6)
    labels = [goal.what.replace("`", "").replace(", four directions", "") for goal in goals]
    axes.set_yticks(range(len(goals)), labels)
    axes.set_ylim(len(goals) - 0.5, -0.5)
    axes.set_xlim(min(50, axes.get_xlim()[0]), 102)
    axes.set_xlabel("share of copy bandwidth, %")
    axes.set_title("Large problems: bandwidth", loc="left")
    for colour, name in ((PLANES, "planes"), (PIXELS, "channels innermost")):
        axes.plot([], [], "o", color=colour, label=name, ms=5.5, mew=0)
    axes.plot([], [], "|", color=INK, label="target", ms=11, mew=1.6)
    legend(axes)


def against_gspn1(axes: Axes, result: Result) -> None:
    """Forward in bfloat16 at the sizes of GSPN-1's table, scanned to the right as GSPN-1 does."""
    cases = [
        case
        for case in result["cases"]
        if "error" not in case and case["dtype"] == "bfloat16" and case["directions"] == ["right"]
    ]
    cases.sort(key=lambda case: -case["forward"]["bytes"])
    for y, case in enumerate(cases):
        it = case["forward"]
        axes.plot([it["ms"], it["gspn1_ms"]], [y, y], color=FAINT, lw=1.5, zorder=0)
        axes.plot(it["gspn1_ms"], y, "s", color=INK, ms=5.5, mew=0)
        axes.plot(it["copy_us"] / 1e3, y, "|", color=INK, ms=11, mew=1.6)
        axes.plot(it["ms"], y, "o", color=PLANES, ms=6.5, mew=0)
        told = f"{it['factor']:.0f}x, {1e3 * it['us_per_line']:.0f} ns a line"
        axes.annotate(told, (it["gspn1_ms"], y), (7, 0), textcoords="offset points", va="center", color=INK)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(low, high * 400)
    axes.set_yticks(range(len(cases)), [md.size(case["size"]) for case in cases])
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.set_xlabel("milliseconds, forward, one direction, bfloat16")
    axes.set_title("Beside GSPN-1's kernel, at B, C, H, W", loc="left")
    marks = ((INK, "s", "GSPN-1"), (PLANES, "o", "gspn2"), (INK, "|", "copying as many bytes"))
    for colour, mark, name in marks:
        axes.plot(
            [], [], mark, color=colour, label=name, ms=11 if mark == "|" else 6, mew=1.6 * (mark == "|")
        )
    legend(axes)


def legend(axes: Axes) -> None:
    axes.legend(
        frameon=False, labelcolor=INK, ncols=3, loc="lower left", bbox_to_anchor=(-0.02, 1.06),
        handletextpad=0.2, columnspacing=1.2,
    )  # fmt: skip


def draw(results: dict[str, Result]) -> plt.Figure:
    style = {
        "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
        "axes.edgecolor": FAINT, "grid.color": FAINT, "font.size": 10, "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "font.family": "sans-serif",
    }  # fmt: skip
    with plt.rc_context(style):
        figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.9), width_ratios=(1, 1.2))
        shares(left, results)
        against_gspn1(right, results["gspn1"])
        for axes in (left, right):
            axes.grid(axis="x", lw=0.6)
            axes.set_axisbelow(True)
            axes.tick_params(length=0)
            for side in ("top", "right", "left"):
                axes.spines[side].set_visible(False)
        figure.tight_layout(w_pad=2.5)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS / "h200")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "h200_speed.svg")
    args = parser.parse_args()
    metadata = {"Date": None} if args.out.suffix == ".svg" else None
    figure = draw(load(args.results))
    with plt.rc_context({"svg.hashsalt": "gspn2"}):
        figure.savefig(args.out, transparent=True, dpi=150, metadata=metadata)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
