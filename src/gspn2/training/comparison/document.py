"""docs/learning.md and its pictures, made from result files by `gspn2 learn docs`; never edited by hand."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ...demo.charts import HEIGHT, WIDTH, Axis, Series, line_chart, linear_axis
from . import pace, rates
from .contenders import CONTENDERS, MAIN, PARAMETERS
from .plan import DIGITS, TASKS, Run
from .runner import read

Result = dict[str, Any]
Case = tuple[str, int]
"""Task and size."""

EXAMPLES = "images/learning_examples.png"
HEAD = f"""# Does it learn?

Tasks whose answer is nowhere in particular: whether two marks are joined, by one dashed contour among others
(*pathfinder*, the idea of [arXiv 1805.08315](https://arxiv.org/abs/1805.08315)) or by a way through a maze
that walls divide in two (*maze*). The distance between the marks has the same distribution in both classes,
and both are equally frequent, so guessing is right half of the time; where the marks of a maze lie tells a
little by itself, enough for 60%. Models answer for every pixel and are asked at the marks alone; accuracy is
the share of the marks' pixels that are right. *Aligned* asks for no way, only for reach: whether the one
other mark in the row or column of a grey mark, in tests half of the image away or more, is bright or dark; it
tells whether scans carry anything that far, and they are made for it. scikit-learn's handwritten *digits*,
enlarged, are an ordinary task beside them, with one answer for an image.

![Four pictures of marks that are apart, then four of marks that are joined: pathfinder and maze at 64 and at
128 pixels; below both, marks that are aligned; and digits]({EXAMPLES})

GSPN-2 runs beside a ViT and a ConvNet (ConvNeXt's blocks), all with the same convolutional stem, 128 channels
at every 4 x 4 pixels and {PARAMETERS / 1e6:.2f} M parameters within 2.5%, on the same images in the same
order, with the same optimizer, schedule and number of steps. Each takes that learning rate, out of the same
few, at which its first seed is best on validation images; ablations take GSPN-2's. Each image is turned and
mirrored at random, digits are not. Ablations change one thing about GSPN-2; what that saves in parameters
goes to the FFN. After training every model is tested at twice its size: *scaled*, the same scenes on more
pixels, and *larger*, scenes of twice the extent. The ViT's position embedding is interpolated for that.

Runs are short, a matter of minutes on a GPU for all of them, so training begins with what is easy: contours
of two dashes and nothing else, marks side by side in mazes without other walls than those between the two
parts, aligned marks side by side. In three quarters of its steps it comes to the longest contours among all
distractors, and to marks anywhere among 70% of a maze's walls. Tests are hard from the beginning. At larger
sizes, and for ablations, there is one seed, unless `--extra-seeds` says otherwise.

```
gspn2 learn --jobs 16 --out runs/learn
gspn2 learn pace --out runs/learn
mkdir -p benchmarks/results/learning && cp runs/learn/*.json benchmarks/results/learning/
gspn2 learn docs --out benchmarks/results/learning
```

The first command shares all visible GPUs among so many runs at a time, can be stopped whenever one likes and
goes on when it is given again; the second measures what a step takes when a model has a GPU to itself; the
last writes this page.
"""

NOTES = "notes.md"
TRANSFERS = ("scaled", "larger")
NOTHING = """## Results

Nothing has been run yet: there is no result file, and nothing is claimed.
"""

STYLE = """
text { font: 13px sans-serif; fill: #7d8590 }
.grid { stroke: #7d859044 } .axis { stroke: #7d8590 }
.curve { fill: none; stroke-width: 1.8 }
.gspn2 .curve { stroke: #3b82f6 } .vit .curve { stroke: #e8871e } .convnet .curve { stroke: #3fa45b }
.gspn2 .marker { fill: #3b82f6 } .vit .marker { fill: #e8871e } .convnet .marker { fill: #3fa45b }
text.gspn2 { fill: #3b82f6 } text.vit { fill: #e8871e } text.convnet { fill: #3fa45b }
"""
COLOURED = "Colours as in the names above the curves; a curve for each seed."


def load(folder: Path) -> list[Result]:
    """The results in a folder, by name; none if there is no such folder.

    Where `pace.json` tells what a step takes alone, seconds are steps times that: those of runs that shared a
    device say as much about their neighbours.

    Raises:
        UserError: a file is no result of a comparison.
    """
    results = [read(path) for path in sorted(folder.glob("*.json")) if path.name != pace.FILE]
    seconds = pace.read(folder).get("seconds", {})
    for result in results:
        step = seconds.get(pace.name_of(Run(**result["run"])))
        if step is not None:
            for timed in (result, *result["curve"]):
                timed["seconds"] = step * timed["step"]
    return results


def notes(folder: Path) -> str:
    """What somebody who has seen the results wrote about them: NOTES in their folder, Markdown."""
    path = folder / NOTES
    return path.read_text(encoding="utf-8").strip() if path.exists() else ""


def files(results: Sequence[Result], told: str = "") -> dict[str, str]:
    """The document and its pictures: text by path inside docs/."""
    settled = _settled(results)
    pictures = {
        f"images/{_picture(case)}": curves(case, _of(settled, case))
        for case in _cases(settled)
        if any(_tested(result) for result in _of(settled, case) if result["run"]["contender"] in MAIN)
    }
    return {"learning.md": text(results, told), **pictures}


def text(results: Sequence[Result], told: str = "") -> str:
    """The document; `told` is prose to put between the goal and the tables."""
    if not results:
        return f"{HEAD}\n{NOTHING}"
    tried, results = results, _settled(results)
    sections = [HEAD.rstrip(), "## The goal", _goal(results), *([told] if told else [])]
    for case in _cases(results):
        mine = _of(results, case)
        sections += [f"## {case[0].capitalize()}, {case[1]} pixels", _comparison(mine)]
        if any(_tested(result) for result in mine if result["run"]["contender"] in MAIN):
            name = f"Accuracy against steps and seconds, and training loss, {case[0]} at {case[1]} pixels"
            sections += [f"![{name}](images/{_picture(case)})", COLOURED]
        ablations = _ablations(mine)
        if ablations:
            sections += ["Ablations, beside GSPN-2 as above:", ablations]
        sections += _losses(mine)
    if len(tried) > len(results):
        sections += ["## Learning rates", _rates(tried)]
    return "\n\n".join([*sections, "## How", _how(tried)]) + "\n"


def _settled(results: Sequence[Result]) -> list[Result]:
    """Those at the learning rate of their family, without what was run to choose it.

    Where there is none at that rate, as at a larger size with a rate of its own, what there is.
    """
    choice = rates.choose(results)
    named = [(Run(**result["run"]), result) for result in results]
    chosen = [run for run, _ in named if choice.get((run.task, run.family), run.lr) == run.lr]
    there = {(run.task, run.size, run.contender) for run in chosen}
    return [
        result for run, result in named if run in chosen or (run.task, run.size, run.contender) not in there
    ]


def _rates(results: Sequence[Result]) -> str:
    """Validation accuracy of each family at the rates that were tried, the chosen ones marked."""
    choice = rates.choose(results)
    columns = sorted({result["run"]["lr"] for result in results})
    rows = []
    for (task, family), chosen in sorted(choice.items(), key=lambda it: TASKS.index(it[0][0])):
        row = [task, CONTENDERS[family].label]
        for rate in columns:
            found = rates.trial(results, task, family, rate)
            told = "-" if found is None else "diverged"
            if found is not None and "validation" in found:
                told = _percent(found["validation"]["accuracy"])
            row.append(f"**{told}**" if rate == chosen else told)
        rows.append(row)
    told = "Accuracy on validation images, first seed, at each peak learning rate; in bold what was taken."
    table = _table(["task", "", *(f"{rate:g}" for rate in columns)], rows, left=2)
    return f"{_wrapped(told)}\n\n{table}"


def _goal(results: Sequence[Result]) -> str:
    """What was asked for, and whether it came out, case by case."""
    rows = []
    for case in _cases(results):
        ours, vit = (_ended(_of(results, case), name) for name in ("gspn2", "vit"))
        # A cut run, or a seed that only one of them has, compares nothing.
        common = _ways(ours) & _ways(vit)
        ours, vit = ([it for it in some if _ways([it]) <= common] for some in (ours, vit))
        if not common:
            continue
        guess = _guess(case[0])
        target = _mean(vit, "accuracy")
        soon, theirs = _time_to(ours, target), _mean(vit, "seconds")
        moved = [(_transfer(ours, name), _transfer(vit, name)) for name in TRANSFERS]
        rows.append(
            [
                f"{case[0]}, {case[1]}",
                str(len(common)),
                _verdict(_mean(ours, "accuracy") >= target, _mean(ours, "accuracy"), target, guess),
                _sooner(soon, theirs, target, guess),
                *(
                    _verdict(mine > other, mine, other, guess) if mine and other else "-"
                    for mine, other in moved
                ),
            ]
        )
    told = "At least the ViT's accuracy at the same steps, in less time, and better at twice the size: GSPN-2"
    if not rows:
        return _wrapped(
            f"{told} against the ViT. There are no runs of both with the same seeds and steps yet."
        )
    heads = ["task, pixels", "seeds", "accuracy", "time to the ViT's accuracy", "scaled", "larger"]
    told += ' first, then the ViT; means over the seeds that both have; "neither" where both guess.'
    return f"{_wrapped(told)}\n\n{_table(heads, rows)}"


def _comparison(results: Sequence[Result]) -> str:
    vit = _ended(results, "vit")
    target = _mean(vit, "accuracy") if vit else None
    if target is not None and target < _guess(results[0]["run"]["task"]) + 0.05:
        # Anybody is there from the beginning.
        target = None
    rows = []
    for name in MAIN:
        mine = _ended(results, name)
        if mine:
            soon = None if target is None else _time_to(mine, target)
            rows.append([*_row(name, mine), "-" if soon is None else f"{soon:.0f} s"])
    return _table([*_HEADS, "to the ViT's accuracy"], rows) if rows else "No run of the three has ended."


def _guess(task: str) -> float:
    """Accuracy of who follows nothing; where the marks of a maze lie tells a little."""
    return {DIGITS: 0.1, "maze": 0.59}.get(task, 0.5)


_HEADS = ["", "parameters", "seeds", "steps", "accuracy", "lowest to highest", "training", "scaled", "larger"]


def _row(name: str, mine: Sequence[Result]) -> list[str]:
    accuracies = [result["accuracy"] for result in mine]
    steps = sorted({result["step"] for result in mine})
    return [
        CONTENDERS[name].label if name in CONTENDERS else name,
        f"{mine[0]['parameters']:,}",
        str(len(mine)),
        " to ".join(dict.fromkeys((str(steps[0]), str(steps[-1])))),
        _percent(statistics.fmean(accuracies)),
        f"{_percent(min(accuracies))} to {_percent(max(accuracies))}",
        f"{_mean(mine, 'seconds'):.0f} s",
        *("-" if it is None else _percent(it) for it in (_transfer(mine, name) for name in TRANSFERS)),
    ]


def _ablations(results: Sequence[Result]) -> str:
    names = [name for name in CONTENDERS if name not in MAIN]
    rows = [
        [CONTENDERS[name].question, *_row(name, mine)] for name in names if (mine := _ended(results, name))
    ]
    return _table(["of", *_HEADS], rows, left=2) if rows else ""


def _losses(results: Sequence[Result]) -> list[str]:
    """Runs that did not come to their last step, in words."""
    lines = []
    for result in results:
        run, where = result["run"], f"at step {result['step']} of {result['steps']}"
        name = f"{run['contender']}, seed {run['seed']}"
        if result["ended"] == "diverged":
            lines.append(f"- {name}: the loss was no longer finite {where}; not in the table.")
        elif result["ended"] == "time":
            lines.append(f"- {name}: its {result['settings']['minutes']:g} minutes were over {where}.")
    return ["\n".join(lines)] if lines else []


def _how(results: Sequence[Result]) -> str:
    """Settings, machines and versions; all that differ among the results are named."""
    settings = [result["settings"] for result in results]
    told = "; ".join(
        f"{name.replace('_', ' ')} {_values(it.get(name, 'not told') for it in settings)}"
        for name in settings[0]
    )
    told = f"peak learning rate {_values(sorted({it['run']['lr'] for it in results}))}; {told}"
    machines = [result["machine"] for result in results]
    where = _values(it.get("device") or it["processor"] for it in machines)
    versions = ", ".join(
        f"{label} {_values(it.get(name, '-') for it in machines)}"
        for name, label in (("python", "Python"), ("torch", "PyTorch"), ("timm", "timm"))
    )
    commits = _values(f"{it['commit']}{'+' if it['uncommitted_changes'] else ''}" for it in machines)
    dates = _values(it["date"] for it in machines)
    return _wrapped(
        f"AdamW with a warm-up over a twentieth of the steps and half a cosine, a quarter of the steps for "
        f"digits; {told}. Seconds are steps times what a step takes on a GPU that does nothing else, without "
        f"testing and compilation (where that was not measured, those of the run). On {where}, {versions}, "
        f"commit {commits}, {dates}."
    )


def curves(case: Case, results: Sequence[Result]) -> str:
    """An SVG: accuracy against steps, accuracy against seconds, training loss against steps."""
    mine = [it for it in results if it["run"]["contender"] in MAIN and it["curve"]]
    steps = max(it["step"] for it in mine)
    seconds = max(it["seconds"] for it in mine)
    worst = max(point["train_loss"] for it in mine for point in it["curve"])
    lowest = min(
        (point["accuracy"] for it in mine for point in it["curve"] if "accuracy" in point), default=1.0
    )
    over_steps = linear_axis("steps", 0, steps, lambda value: f"{value:g}")
    over_time = linear_axis("seconds of training", 0, seconds, lambda value: f"{value:g}")
    accuracy = linear_axis("accuracy, %", min(40, 100 * lowest), 100, lambda value: f"{value:g}", steps=6)
    loss = linear_axis("training loss", 0, worst, lambda value: f"{value:.2g}")
    panels = [
        ("Accuracy, %, against steps", over_steps, accuracy, "step", "accuracy", 100.0),
        ("Accuracy, %, against seconds", over_time, accuracy, "seconds", "accuracy", 100.0),
        ("Training loss against steps", over_steps, loss, "step", "train_loss", 1.0),
    ]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {3 * WIDTH} {HEIGHT + 50}" role="img" '
        f'aria-label="{escape(f"{case[0]} at {case[1]} pixels")}">',
        f"<style>{STYLE}</style>",
    ]
    for i, name in enumerate(MAIN):
        parts.append(f'<text class="{name}" x="{62 + 90 * i}" y="18">{escape(CONTENDERS[name].label)}</text>')
    for i, (title, x, y, across, up, factor) in enumerate(panels):
        parts.append(f'<text x="{62 + i * WIDTH}" y="44">{escape(title)}</text>')
        place = f'x="{i * WIDTH}" y="50" width="{WIDTH}" height="{HEIGHT}" '
        parts.append(_panel(title, x, y, mine, across, up, factor).replace("<svg ", f"<svg {place}", 1))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(
    title: str, x: Axis, y: Axis, results: Sequence[Result], across: str, up: str, factor: float
) -> str:
    series = []
    for result in results:
        points = [point for point in result["curve"] if up in point]
        if points:
            run = result["run"]
            label = f"{run['contender']}, seed {run['seed']}"
            values = [factor * point[up] for point in points]
            series.append(Series(run["contender"], label, [point[across] for point in points], values))
    return line_chart(title, x, y, series)


def _cases(results: Iterable[Result]) -> list[Case]:
    found = {(result["run"]["task"], result["run"]["size"]) for result in results}
    return sorted(found, key=lambda case: (TASKS.index(case[0]), case))


def _of(results: Iterable[Result], case: Case) -> list[Result]:
    return [result for result in results if (result["run"]["task"], result["run"]["size"]) == case]


def _ended(results: Iterable[Result], contender: str) -> list[Result]:
    """The contender's results that have an accuracy."""
    return [it for it in results if it["run"]["contender"] == contender and "accuracy" in it]


def _tested(result: Result) -> bool:
    return any("accuracy" in point for point in result["curve"])


def _picture(case: Case) -> str:
    return f"learning_{case[0]}_{case[1]}.svg"


def _mean(results: Sequence[Result], name: str) -> float:
    return statistics.fmean(result[name] for result in results)


def _transfer(results: Sequence[Result], name: str) -> float | None:
    """Mean accuracy at twice the size; None for a task that does not come like that."""
    if not all(name in result["transfer"] for result in results):
        return None
    return statistics.fmean(result["transfer"][name]["accuracy"] for result in results)


def _time_to(results: Sequence[Result], accuracy: float) -> float | None:
    """Mean seconds to the first test at an accuracy; None if a seed never came to it."""
    times = [
        next((p["seconds"] for p in result["curve"] if p.get("accuracy", -1.0) >= accuracy), None)
        for result in results
    ]
    reached = [time for time in times if time is not None]
    return statistics.fmean(reached) if len(reached) == len(times) else None


def _ways(results: Sequence[Result]) -> set[tuple[int, int]]:
    """Seeds, and how many steps they were trained."""
    return {(result["run"]["seed"], result["step"]) for result in results}


def _sooner(ours: float | None, theirs: float, accuracy: float, guess: float) -> str:
    """Yes or no, unless what is to be reached is guessing."""
    if accuracy < guess + 0.05:
        return "nothing to reach"
    return "no, never" if ours is None else f"{_yes(ours < theirs)}, {ours:.0f} s, {theirs:.0f} s"


def _verdict(met: bool, ours: float, theirs: float, guess: float) -> str:
    """Yes or no, unless both are within 5 points of guessing: then there is nothing to compare."""
    answer = "neither" if max(ours, theirs) < guess + 0.05 else _yes(met)
    return f"{answer}, {_percent(ours)}, {_percent(theirs)}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _values(values: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values))


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1) -> str:
    rule = ["---" if i < left else "---:" for i in range(len(heads))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rule, *lines))


def _wrapped(told: str) -> str:
    return textwrap.fill(told, 118, break_long_words=False, break_on_hyphens=False)
