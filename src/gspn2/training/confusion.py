"""The confusion matrix, as text and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

TABLE_CLASSES = 12
NUMBERED_CLASSES = 20
NAMED_CLASSES = 60


def table(confusion: Tensor, class_names: Sequence[str]) -> str:
    """Counts (classes, classes) in columns; for many classes the pairs that are mixed up most."""
    if len(class_names) > TABLE_CLASSES:
        return _worst_pairs(confusion, class_names)
    names = [_short(name, 12) for name in class_names]
    counts = [[str(count) if count else "." for count in row] for row in confusion.tolist()]
    side = max(4, *(len(name) for name in names))
    widths = [max(len(names[j]), *(len(row[j]) for row in counts)) for j in range(len(names))]
    header = " " * side + "  " + " ".join(name.rjust(w) for name, w in zip(names, widths, strict=True))
    lines = [f"{'true'.ljust(side)}  predicted", header]
    for name, row in zip(names, counts, strict=True):
        cells = " ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True))
        lines.append(f"{name.rjust(side)}  {cells}")
    return "\n".join(lines)


def _worst_pairs(confusion: Tensor, class_names: Sequence[str], count: int = 10) -> str:
    wrong = confusion.clone()
    wrong.fill_diagonal_(0)
    values, places = wrong.flatten().topk(count)
    lines = ["mixed up most (true -> predicted)"]
    for value, place in zip(values.tolist(), places.tolist(), strict=True):
        if value:
            true, predicted = divmod(place, len(class_names))
            lines.append(f"{value:>6}  {class_names[true]} -> {class_names[predicted]}")
    return "\n".join(lines) if len(lines) > 1 else "no image is taken for another class"


def save_picture(confusion: Tensor, class_names: Sequence[str], path: str | Path) -> None:
    """Write a PNG: each row colored by its shares, with the counts where they fit."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    classes = len(class_names)
    side = min(14.0, 3.2 + 0.42 * classes)
    # No pyplot: it would look for a display and keep every figure.
    figure = Figure(figsize=(side + 0.8, side), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shares = confusion / confusion.sum(dim=1, keepdim=True).clamp(min=1)
    image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02)
    bar.set_label("share of the true class")
    bar.outline.set_visible(False)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    total = int(confusion.sum())
    axes.set_title(f"{100 * int(confusion.trace()) / max(1, total):.2f}% of {total} images", fontsize=11)
    if classes <= NAMED_CLASSES:
        names = [_short(name, 18) for name in class_names]
        long = max(len(name) for name in names) > 2
        axes.set_xticks(range(classes), names, rotation=90 if long else 0)
        axes.set_yticks(range(classes), names)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if classes <= NUMBERED_CLASSES:
        for i, row in enumerate(confusion.tolist()):
            for j, count in enumerate(row):
                if count:
                    color = "white" if shares[i, j] > 0.55 else "#1a1a1a"
                    axes.text(j, i, str(count), ha="center", va="center", color=color, fontsize=9)
    figure.savefig(path, bbox_inches="tight", pad_inches=0.15)


def _short(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1] + "\N{HORIZONTAL ELLIPSIS}"
