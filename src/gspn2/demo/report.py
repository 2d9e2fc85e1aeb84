"""The report: one HTML file that loads nothing, and the numbers behind it as JSON.

Every sentence with a figure in it is made here from what was measured; the template holds only the layout.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import math
import string
from collections.abc import Sequence
from html import escape
from pathlib import Path

import torch
from torch import Tensor

from .charts import (
    Series,
    accuracy_axis,
    duration,
    epoch_axis,
    error_decades,
    line_chart,
    linear_axis,
    side_axis,
    time_axis,
)
from .cost import PROXY, WIDTH, Cost
from .figures import confusion_svg, digit_uri, heat_gradient, map_row
from .material import LayerMaps, Material, Trained, results


def write(material: Material, out: Path) -> Path:
    """Write report.html and results.json into `out`; returns the path of the report."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results(material), indent=2) + "\n", encoding="utf-8")
    path = out / "report.html"
    path.write_text(html(material), encoding="utf-8")
    return path


def html(material: Material) -> str:
    """The whole page."""
    template = importlib.resources.files(__package__).joinpath("report.html.in").read_text(encoding="utf-8")
    gspn, attention = material.gspn, material.attention
    return string.Template(template).substitute(
        headline=f"{gspn.accuracy:.1f}% with propagation, {attention.accuracy:.1f}% with attention",
        lead=_lead(material),
        numbers=_numbers(material),
        training_text=_training_text(material),
        legend=_legend([("gspn", gspn.label), ("attention", attention.label)]),
        accuracy_chart=_accuracy_chart(gspn, attention),
        loss_chart=_loss_chart(gspn, attention),
        errors_text=_errors_text(material),
        gspn_label=f"{escape(gspn.label)}: {_wrong(gspn)} wrong",
        attention_label=f"{escape(attention.label)}: {_wrong(attention)} wrong",
        gspn_confusion=confusion_svg(gspn.confusion, "gspn", f"confusion matrix of {gspn.label}"),
        attention_confusion=confusion_svg(
            attention.confusion, "attention", f"confusion matrix of {attention.label}"
        ),
        predictions=_predictions(material),
        heat=heat_gradient(),
        maps_text=_maps_text(),
        maps="\n".join(_layer(layer, material.map_input) for layer in material.layers),
        cost_text=_cost_text(material.cost),
        cost_legend=_legend([(COST_STYLE[n][0], t) for n, t in material.cost.labels.items()], solid=True),
        cost_chart=_cost_chart(material.cost),
        cost_table=_cost_table(material.cost),
        cost_note=_cost_note(material.cost),
        limits="".join(f"<li>{item}</li>" for item in _limits(material)),
        about="".join(
            f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in material.about.items()
        ),
    )


def _lead(material: Material) -> str:
    gspn, attention = material.gspn, material.attention
    return (
        f"A small GSPN-2 ({_thousands(gspn.parameters)} parameters) and a transformer with full "
        f"self-attention ({_thousands(attention.parameters)}) learned scikit-learn's handwritten digits on "
        "this machine, with the same steps, recipe, seed and order of images. The accuracies are on "
        f"{len(material.labels)} test images that neither was trained on."
    )


def _training_text(material: Material) -> str:
    models = "<br>".join(
        f"<b>{escape(one.label)}</b>: {escape(one.description)}; {_thousands(one.parameters)} parameters, "
        f"trained in {one.seconds:.0f} s."
        for one in (material.gspn, material.attention)
    )
    return f"{models}</p><p>{escape(material.recipe)}"


def _numbers(material: Material) -> str:
    gspn, attention, cost = material.gspn, material.attention, material.cost
    side, ratio = cost.ratio("attention", "propagation")
    items = [
        (
            "own",
            f"{gspn.accuracy:.1f}%",
            f"GSPN-2, test accuracy ({_wrong(gspn)} of {len(material.labels)} wrong)",
        ),
        (
            "other",
            f"{attention.accuracy:.1f}%",
            f"attention, test accuracy ({_wrong(attention)} of {len(material.labels)} wrong)",
        ),
    ]
    if math.isfinite(ratio):
        items.append(
            (
                "",
                _times(ratio),
                f"attention's time over propagation's at {side} x {side} pixels, {WIDTH} channels",
            )
        )
    own, other = cost.exponent("propagation"), cost.exponent("attention")
    if math.isfinite(own) and math.isfinite(other):
        items.append(
            (
                "",
                f"N<sup>{own:.2f}</sup>",
                f"growth of propagation's time with N pixels; attention's: N<sup>{other:.2f}</sup>",
            )
        )
    return "".join(
        f'<li class="{kind}"><b>{value}</b><span>{text}</span></li>' for kind, value, text in items
    )


def _legend(entries: Sequence[tuple[str, str]], solid: bool = False) -> str:
    items = "".join(f'<li class="{style}"><i></i>{escape(label)}</li>' for style, label in entries)
    return f'<ul class="legend{" solid" if solid else ""}">{items}</ul>'


def _accuracy_chart(gspn: Trained, attention: Trained) -> str:
    values = [row["test_top1"] for one in (gspn, attention) for row in one.epochs]
    series = [_curve(one, "test_top1") for one in (attention, gspn)]
    series = [dataclasses.replace(s, y=[error_decades(accuracy) for accuracy in s.y]) for s in series]
    y = accuracy_axis("", min(values), max(values))
    return line_chart("Test accuracy in percent by epoch", epoch_axis(len(gspn.epochs)), y, series)


def _loss_chart(gspn: Trained, attention: Trained) -> str:
    keys = ("train_loss", "test_loss")
    values = [row[key] for one in (gspn, attention) for row in one.epochs for key in keys]
    y = linear_axis("", 0.0, max(values), lambda v: f"{v:.2g}")
    series = [_curve(one, "train_loss") for one in (attention, gspn)]
    series += [_dots(one, "test_loss") for one in (attention, gspn)]
    return line_chart("Training and test loss by epoch", epoch_axis(len(gspn.epochs)), y, series)


def _curve(one: Trained, key: str) -> Series:
    x, y = [row["epoch"] for row in one.epochs], [row[key] for row in one.epochs]
    return Series(one.key, f"{one.label}, {key}", x, y, dashed=one.key == "attention")


def _dots(one: Trained, key: str) -> Series:
    x, y = [row["epoch"] for row in one.epochs], [row[key] for row in one.epochs]
    marker = "dot" if one.key == "gspn" else "square"
    return Series(one.key, f"{one.label}, {key}", x, y, marker=marker, line=False)


def _wrong(one: Trained) -> int:
    return sum(sum(row) - row[i] for i, row in enumerate(one.confusion))


def _errors_text(material: Material) -> str:
    guesses = [one.probabilities.argmax(1) for one in (material.gspn, material.attention)]
    both = ((guesses[0] != material.labels) & (guesses[1] != material.labels)).sum().item()
    return (
        f"Of {len(material.labels)} test images, GSPN-2 gets {_wrong(material.gspn)} wrong and attention "
        f"{_wrong(material.attention)}, {both} of which both get wrong. Below the matrices are "
        "GSPN-2's most confident errors and, to compare, images it gets right, drawn by chance."
    )


def _predictions(material: Material, cards: int = 8) -> str:
    """At most half of the cards for the errors, most confident first; the rest for right ones by chance."""
    probabilities, labels = material.gspn.probabilities, material.labels
    confidence, guess = probabilities.max(1)
    wrong = (guess != labels).nonzero().flatten()
    wrong = wrong[confidence[wrong].argsort(descending=True)][: cards // 2]
    right = (guess == labels).nonzero().flatten()
    chosen = torch.randperm(len(right), generator=torch.Generator().manual_seed(0))[: cards - len(wrong)]
    return "".join(_prediction(material, i) for i in [*wrong.tolist(), *right[chosen].tolist()])


def _prediction(material: Material, index: int) -> str:
    probabilities, label = material.gspn.probabilities[index], int(material.labels[index])
    top = probabilities.topk(3)
    guess = int(top.indices[0])
    verdict = f"{guess}, right" if guess == label else f"{guess}, is {label}"
    rows = "".join(
        f'<div class="guess{" true" if k == label else ""}"><span>{k}</span>'
        f'<u><s style="width:{100 * p:.1f}%"></s></u><em>{100 * p:.1f}%</em></div>'
        for p, k in zip(top.values.tolist(), top.indices.tolist(), strict=True)
    )
    return (
        f'<li><img alt="a handwritten {label}" src="{digit_uri(material.images[index])}">'
        f'<div><p class="verdict {"good" if guess == label else "bad"}">{verdict}</p>{rows}</div></li>'
    )


def _maps_text() -> str:
    return (
        "One pixel of a propagation's input is raised by one and the change of its output is measured, with "
        "the trained model's own taps, input scales and gates on a test digit (white outline). The ring is "
        "the pixel, the blue line the centre of the flow, line by line, as far as a line gets 1% of the "
        "strongest one. <b>Down, up, right, left</b> show what one scan carries away from the pixel; "
        "<b>all four</b> shows their sum, which is what the mixer sends on; <b>received</b> shows the "
        "reverse, how much each pixel contributes to the output at the ring. An untrained mixer sends two "
        "of its scans straight ahead, two along one diagonal each; whatever bends or ends a path was learned."
    )


def _layer(layer: LayerMaps, image: Tensor) -> str:
    rows = []
    for name, found in zip(layer.names, layer.maps, strict=True):
        tiles = "".join(
            f"<figure{' class=all' if title == 'all four' else ''}>{picture}"
            f"<figcaption>{title}</figcaption></figure>"
            for title, picture in map_row(found, image, layer.directions)
        )
        text = (
            f"reaches {100 * found.coverage:.0f}% of the grid with at least 1% of its strongest response; "
            f"on average the signal goes {found.mean_distance:.1f} grid pixels far"
        )
        rows.append(
            f'<div class="map-row"><h3>{escape(name)} <span>&middot; {text}.</span></h3>'
            f'<div class="maps">{tiles}</div></div>'
        )
    return (
        f'<div class="layer card"><h3>{escape(layer.title)}</h3>'
        f'<p class="soft">{escape(layer.text)}</p>{"".join(rows)}</div>'
    )


# Colour and marker of a contender.
COST_STYLE = {
    "attention": ("attention", "square"),
    "propagation": ("gspn", "dot"),
    "proxy": ("proxy", "diamond"),
}


def _cost_chart(cost: Cost) -> str:
    sides = sorted({p.side for p in cost.points})
    low = min(p.quartiles[0] for p in cost.points)
    high = max(p.quartiles[1] for p in cost.points)
    series = []
    for name, label in cost.labels.items():
        points = cost.of(name)
        style, marker = COST_STYLE[name]
        series.append(
            Series(
                style,
                label,
                [p.side for p in points],
                [p.seconds for p in points],
                [p.quartiles[0] for p in points],
                [p.quartiles[1] for p in points],
                marker,
            )
        )
    x = side_axis("side of the grid in pixels (both axes logarithmic)", sides)
    return line_chart("Forward time against image size", x, time_axis("", low, high), series)


def _cost_table(cost: Cost) -> str:
    names = list(cost.labels)
    short = {"attention": "attention", "propagation": "propa&shy;gation", "proxy": f"{PROXY} proxy channels"}
    head = "".join(f"<th>{short[name]}</th>" for name in names)
    rows = []
    for side in sorted({p.side for p in cost.points}):
        times = {p.contender: p.seconds for p in cost.points if p.side == side}
        cells = "".join(f"<td>{duration(times[n]) if n in times else '&ndash;'}</td>" for n in names)
        rows.append(f"<tr><td>{side}&sup2;</td>{cells}</tr>")
    return f"<table><thead><tr><th>grid</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _cost_text(cost: Cost) -> str:
    text = (
        f"Mixing one image's pixels in a layer of {WIDTH} channels: attention as one head of {WIDTH} through "
        f"PyTorch's SDPA; propagation in four directions with shared taps, once at all {WIDTH} channels and "
        f"once at {PROXY} proxy channels, the way GSPN-2 models use it. Projections are left out of both. "
    )
    parts = []
    for name, what in (("propagation", "propagation"), ("proxy", "the proxy"), ("attention", "attention")):
        exponent = cost.exponent(name)
        if math.isfinite(exponent):
            sides = [p.side for p in cost.fitted(name)]
            parts.append(
                f"{what} with pixels<sup>{exponent:.2f}</sup> ({sides[0]}&sup2; to {sides[-1]}&sup2;)"
            )
    if parts:
        text += f"Measured here, time grows as follows: {', '.join(parts)}. "
    for name, what in (("propagation", f"propagation at {WIDTH} channels"), ("proxy", "the proxy")):
        side, ratio = cost.ratio("attention", name)
        if math.isfinite(ratio):
            text += f"At {side} x {side}, attention takes {_times(ratio)} the time of {what}. "
    return text


def _cost_note(cost: Cost) -> str:
    text = (
        f"Float32 on {cost.threads} CPU threads, batch 1, medians of interleaved rounds; bars span the "
        f"quartiles. Every result was first checked against float64 (largest relative error "
        f"{max(p.error for p in cost.points):.0e}). Propagation ran on the {cost.backend!r} backend. "
    )
    for name, reason in cost.stopped.items():
        text += f"{cost.labels[name]} was stopped: {reason}. "
    return escape(text)


def _limits(material: Material) -> list[str]:
    return [
        f"Digits of 8 x 8 pixels are an easy task and a small one: one of {len(material.labels)} test images "
        f"is {100 / len(material.labels):.2f}%, and one run with one seed does not rank two architectures.",
        "The models differ in more than the mixer: both are small relatives of published backbones, with "
        "their own stems, grids and blocks. The shared recipe was settled on GSPN-2 and not tuned for "
        "attention.",
        "The cost is that of the mixing step alone, forward, on this machine's CPU. Whole models also spend "
        "time in projections and feed-forward layers, and a GPU has another balance.",
        "A propagation map is one layer's: what the convolutions around it spread and what other layers add "
        "is not in the picture.",
    ]


def _times(ratio: float) -> str:
    return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.1f}x"


def _thousands(count: int) -> str:
    return f"{count:,}".replace(",", "\u202f")
