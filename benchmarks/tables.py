"""Write the measured tables into README.md and docs/*.md, from the result files that are committed.

    python benchmarks/tables.py            replace what is between the markers
    python benchmarks/tables.py --check    change nothing; fail if a document is out of step

A document asks for a table with a pair of lines; what is between them is generated and never edited by hand::

    <!-- benchmark:operator -->
    <!-- /benchmark -->

Names: operator, operator-compact, memory, start, models, models-compact, technology; they need
benchmarks/results/cpu/NAME.json. And h200/NAME for a section of gpu.py, h200/summary, h200/summary-compact,
h200/scaling, from benchmarks/results/h200/*.json, and h200/backbones, h200/steps, h200/floor and
h200/pictures from bench.json there; until there are such files the place says so.
A table says under itself on what, when and how it was measured.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import backbone_table
import floor_table
import gpu_tables
import markdown_table as md
import picture_table
import scaling_table
import step_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
GPUS = ("h200",)
SCALING = "scaling"
BENCHED: dict[str, Any] = {it.NAME: it for it in (backbone_table, step_table, floor_table, picture_table)}
"""What is made from the result file of `gspn2 bench`: each takes the cases of its part."""
Result = dict[str, Any]

OPEN = re.compile(r"<!-- benchmark:(\S+) -->")
CLOSE = "<!-- /benchmark -->"


class TableError(Exception):
    """A table that cannot be made; the message says why."""


def operator(result: Result) -> str:
    """Every case, forward and training, with the times behind the ratios."""
    rows = []
    for case in result["cases"]:
        forward, train = case["forward"], case["forward_and_backward"]
        rows.append(
            [
                md.size(case["size"]),
                md.yes(case["lam_and_gate"]),
                *(md.ms(forward[name]["median_ms"]) for name in ("gspn2", "eager", "copy")),
                md.times(case["forward_over_eager"]),
                md.times(case["forward_over_loop"]),
                f"{case['forward_in_copies']:.2f}",
                *(md.ms(train[name]["median_ms"]) for name in ("gspn2", "eager")),
                md.times(case["train_over_eager"]),
                md.times(case["train_over_loop"]),
            ]
        )
    heads = ["B, C, H, W", "lam, gate", "forward, ms", "batched loop, ms", "copy, ms"]
    heads += ["faster than the batched loop", "than the plain loop", "in copies", "with backward, ms"]
    heads += ["batched loop, ms", "faster than the batched loop", "than the plain loop"]
    return md.table(heads, rows, left=2) + md.note(
        result,
        f"{_problem(result)} Medians, taken in turns within one run. The loops are vectorised PyTorch over "
        "lines, under autograd for the backward pass: the plain one takes the directions one after the "
        "other, the batched one (`benchmarks/eager.py`) all at once. The copy reads and writes as "
        "many bytes as the operator has to: every input once, the output once.",
    )


def operator_compact(result: Result) -> str:
    """The cases that a mixer runs, those with lam and gate."""
    rows = []
    for case in result["cases"]:
        if case["lam_and_gate"]:
            forward, train = case["forward"]["gspn2"], case["forward_and_backward"]["gspn2"]
            rows.append(
                [
                    md.size(case["size"]),
                    f"{md.ms(forward['median_ms'])} ms",
                    md.times(case["forward_over_eager"]),
                    f"{md.ms(train['median_ms'])} ms",
                    md.times(case["train_over_eager"]),
                ]
            )
    heads = ["B, C, H, W", "forward", "faster than a loop", "forward + backward", "faster than a loop"]
    return md.table(heads, rows) + md.note(
        result,
        f"{_problem(result)} With `lam` and `gate`; the loop is vectorised PyTorch over lines, all "
        "directions at once, and autograd.",
    )


def memory(result: Result) -> str:
    """What training holds beyond its inputs, outputs and gradients."""
    rows = [
        [
            md.size(case["size"]),
            md.yes(case["lam_and_gate"]),
            f"{case['inputs_and_gradients_bytes'] / 1e6:.1f} MB",
            f"{case['peak_extra_bytes'] / 1e6:.1f} MB",
            f"{case['extra_over_inputs_and_gradients']:.2f}",
        ]
        for case in result["cases"]
    ]
    heads = ["B, C, H, W", "lam, gate", "inputs and gradients", "extra at the peak", "ratio"]
    return md.table(heads, rows, left=2) + md.note(
        result,
        "One training step: the most resident memory beyond inputs, output and gradients.",
    )


def start(result: Result) -> str:
    """Import and first calls."""
    forward, backward = result["first_forward_seconds"], result["first_backward_seconds"]
    rows = [
        ["`import gspn2`, after `import torch`", md.seconds(result["import_seconds_over_torch"]), ""],
        ["first forward", md.seconds(forward["warm"]), md.seconds(forward["cold"])],
        ["first backward", md.seconds(backward["warm"]), md.seconds(backward["cold"])],
    ]
    heads = ["", "compiled before", "nothing compiled yet"]
    return md.table(heads, rows) + md.note(result, "One process each; compiled code is kept on disk.")


def models(result: Result) -> str:
    """gspn2_tiny beside convnext_tiny, and the mixers' share of a large image."""
    return md.table(*_models(result)) + md.note(
        result,
        f"float32, inference, random weights. {_share(result)} Medians, taken in turns within one run.",
    )


def models_compact(result: Result) -> str:
    """The same with a shorter note."""
    return md.table(*_models(result)) + md.note(result, f"float32, random weights. {_share(result)}")


def technology(result: Result) -> str:
    """The candidates for the native backend on one problem."""
    rows = [
        [
            row["name"],
            md.or_none(md.ms, row["forward_ms"]),
            md.or_none(md.seconds, row["first_call_seconds"]),
            row["note"],
        ]
        for row in result["rows"]
    ]
    heads = ["technology", "forward, ms", "first call", "note"]
    return md.table(heads, rows, words=(3,)) + md.note(result, f"Problem: {result['problem']}.")


TABLES: dict[str, Callable[[Result], str]] = {
    "operator": operator,
    "operator-compact": operator_compact,
    "memory": memory,
    "start": start,
    "models": models,
    "models-compact": models_compact,
    "technology": technology,
}


def _models(result: Result) -> tuple[list[str], list[list[str]]]:
    rows = [
        [
            f"224 x 224, batch {case['batch']}",
            f"{md.ms(case['gspn2_tiny']['median_ms'])} ms",
            f"{md.ms(case['convnext_tiny']['median_ms'])} ms",
            f"{case['over_convnext']:.2f}",
        ]
        for case in result["at_224"]
    ]
    return ["forward", "`gspn2_tiny`", "`convnext_tiny` (timm)", "ratio"], rows


def _share(result: Result) -> str:
    large = result["at_1024"]
    return (
        f"At 1024 x 1024, batch {large['batch']}, `gspn2_tiny` takes {md.seconds(large['model_seconds'])}; "
        f"its mixers, projections included, are {100 * large['mixer_share']:.1f}% of that."
    )


def _problem(result: Result) -> str:
    directions = {4: "All four directions"}.get(result["directions"], f"{result['directions']} directions")
    return f"{directions}, {result['taps']} taps, {result['dtype']}."


def table(name: str) -> str:
    """The table called `name`, from its result files.

    Raises:
        TableError: there is no such table, or its result file is missing, damaged or of another kind.
    """
    folder, _, gpu = name.partition("/")
    if gpu in gpu_tables.NAMES and folder in GPUS:
        paths = {section: RESULTS / folder / f"{section}.json" for section in gpu_tables.needs(gpu)}
        if not all(path.exists() for path in paths.values()):
            return gpu_tables.absent(gpu)
        text = _made(name, paths, lambda results: gpu_tables.make(gpu, results))
        picture = ROOT / "docs" / "images" / f"{folder}_speed.svg"  # drawn by figures.py
        if gpu == "summary" and picture.exists():
            text += f"\n![{gpu_tables.PICTURE}](images/{picture.name})\n"
        return text
    if gpu == SCALING and folder in GPUS:
        path = RESULTS / folder / f"{gpu}.json"
        if not path.exists():
            return scaling_table.ABSENT
        return _made(name, {gpu: path}, lambda results: scaling_table.make(results[gpu]))
    if gpu in BENCHED and folder in GPUS:
        maker = BENCHED[gpu]
        path = RESULTS / folder / "bench.json"
        if not path.exists():
            return maker.ABSENT
        return _made(name, {gpu: path}, lambda results: maker.make(results[gpu]))
    if name not in TABLES:
        more = (*gpu_tables.NAMES, SCALING, *BENCHED)
        known = [*TABLES, *(f"{gpu}/{name}" for gpu in GPUS for name in more)]
        raise TableError(f"no table is called {name!r}, only {', '.join(known)}")
    path = RESULTS / "cpu" / f"{name.removesuffix('-compact')}.json"
    if not path.exists():
        shown = path.relative_to(ROOT)
        raise TableError(f"table {name!r} needs {shown}, which is missing: measure it first (make bench)")
    return _made(name, {name: path}, lambda results: TABLES[name](results[name]))


def _made(name: str, paths: dict[str, Path], make: Callable[[dict[str, Result]], str]) -> str:
    results = {}
    for key, path in paths.items():
        try:
            results[key] = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise TableError(f"{path.relative_to(ROOT)} is not JSON: {error}") from error
    try:
        return make(results)
    except (KeyError, TypeError, AttributeError) as error:
        shown = ", ".join(str(path.relative_to(ROOT)) for path in paths.values())
        raise TableError(
            f"{shown} does not hold what table {name!r} needs: {error!r}; measure it again"
        ) from error


def filled(text: str) -> str:
    """A document with every table in it made anew.

    Raises:
        TableError: a marker is not closed, closes nothing, or asks for a table that cannot be made.
    """
    lines: list[str] = []
    inside: str | None = None
    for line in text.splitlines(keepends=True):
        marker = line.strip()
        opened = OPEN.fullmatch(marker)
        if opened and inside is not None:
            raise TableError(f"{marker} stands within table {inside!r}, which is not closed")
        if opened:
            inside = opened[1]
            lines += [line, "\n", table(inside), "\n"]
        elif marker == CLOSE:
            if inside is None:
                raise TableError(f"{CLOSE} closes no table")
            inside = None
            lines.append(line)
        elif inside is None:
            lines.append(line)
    if inside is not None:
        raise TableError(f"table {inside!r} is not closed by {CLOSE}")
    return "".join(lines)


def documents() -> list[Path]:
    """What may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing, fail if a document is out of step"
    )
    check = parser.parse_args().check
    failed = False
    for path in documents():
        name = path.relative_to(ROOT)
        text = path.read_text(encoding="utf-8")
        try:
            new = filled(text)
        except TableError as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed = True
            continue
        if new == text:
            continue
        if check:
            print(
                f"{name}: out of step with benchmarks/results: run `python benchmarks/tables.py`",
                file=sys.stderr,
            )
            failed = True
        else:
            path.write_text(new, encoding="utf-8")
            print(f"wrote {name}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
