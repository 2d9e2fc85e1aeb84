"""Write the measured tables into README.md and docs/*.md, from the result files that are committed.

    python benchmarks/tables.py            replace what is between the markers
    python benchmarks/tables.py --check    change nothing; fail if a document is out of step

A document asks for a table with a pair of lines; what is between them is generated and never edited by hand::

    <!-- benchmark:operator -->
    <!-- /benchmark -->

Names: operator, operator-compact, memory, start, models, models-compact, technology. A table needs
benchmarks/results/cpu/NAME.json, and says under itself on what, when and how that was measured.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cpu"
Result = dict[str, Any]

OPEN = re.compile(r"<!-- benchmark:(\S+) -->")
CLOSE = "<!-- /benchmark -->"
_UNBROKEN = "\0"  # stands for a space where no line may be broken


class TableError(Exception):
    """A table that cannot be made; the message says why."""


def operator(result: Result) -> str:
    """Every case, forward and training, with the times behind the ratios."""
    rows = []
    for case in result["cases"]:
        forward, train = case["forward"], case["forward_and_backward"]
        rows.append(
            [
                _size(case["size"]),
                _yes(case["lam_and_gate"]),
                *(_ms(forward[name]["median_ms"]) for name in ("gspn2", "eager", "copy")),
                _times(case["forward_over_eager"]),
                _times(case["forward_over_loop"]),
                f"{case['forward_in_copies']:.2f}",
                *(_ms(train[name]["median_ms"]) for name in ("gspn2", "eager")),
                _times(case["train_over_eager"]),
                _times(case["train_over_loop"]),
            ]
        )
    heads = ["B, C, H, W", "lam, gate", "forward, ms", "batched loop, ms", "copy, ms"]
    heads += ["faster than the batched loop", "than the plain loop", "in copies", "with backward, ms"]
    heads += ["batched loop, ms", "faster than the batched loop", "than the plain loop"]
    return _table(heads, rows, left=2) + _note(
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
                    _size(case["size"]),
                    f"{_ms(forward['median_ms'])} ms",
                    _times(case["forward_over_eager"]),
                    f"{_ms(train['median_ms'])} ms",
                    _times(case["train_over_eager"]),
                ]
            )
    heads = ["B, C, H, W", "forward", "faster than a loop", "forward + backward", "faster than a loop"]
    return _table(heads, rows) + _note(
        result,
        f"{_problem(result)} With `lam` and `gate`; the loop is vectorised PyTorch over lines, all "
        "directions at once, and autograd.",
    )


def memory(result: Result) -> str:
    """What training holds beyond its inputs, outputs and gradients."""
    rows = [
        [
            _size(case["size"]),
            _yes(case["lam_and_gate"]),
            f"{case['inputs_and_gradients_bytes'] / 1e6:.1f} MB",
            f"{case['peak_extra_bytes'] / 1e6:.1f} MB",
            f"{case['extra_over_inputs_and_gradients']:.2f}",
        ]
        for case in result["cases"]
    ]
    heads = ["B, C, H, W", "lam, gate", "inputs and gradients", "extra at the peak", "ratio"]
    return _table(heads, rows, left=2) + _note(
        result,
        "One training step: the most resident memory beyond inputs, output and gradients.",
    )


def start(result: Result) -> str:
    """Import and first calls."""
    forward, backward = result["first_forward_seconds"], result["first_backward_seconds"]
    rows = [
        ["`import gspn2`, after `import torch`", _seconds(result["import_seconds_over_torch"]), ""],
        ["first forward", _seconds(forward["warm"]), _seconds(forward["cold"])],
        ["first backward", _seconds(backward["warm"]), _seconds(backward["cold"])],
    ]
    heads = ["", "compiled before", "nothing compiled yet"]
    return _table(heads, rows) + _note(result, "One process each; compiled code is kept on disk.")


def models(result: Result) -> str:
    """gspn2_tiny beside convnext_tiny, and the mixers' share of a large image."""
    return _table(*_models(result)) + _note(
        result,
        f"float32, inference, random weights. {_share(result)} Medians, taken in turns within one run.",
    )


def models_compact(result: Result) -> str:
    """The same with a shorter note."""
    return _table(*_models(result)) + _note(result, f"float32, random weights. {_share(result)}")


def technology(result: Result) -> str:
    """The candidates for the native backend on one problem."""
    rows = [
        [
            row["name"],
            _or_none(_ms, row["forward_ms"]),
            _or_none(_seconds, row["first_call_seconds"]),
            row["note"],
        ]
        for row in result["rows"]
    ]
    heads = ["technology", "forward, ms", "first call", "note"]
    return _table(heads, rows, words=(3,)) + _note(result, f"Problem: {result['problem']}.")


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
            f"{_ms(case['gspn2_tiny']['median_ms'])} ms",
            f"{_ms(case['convnext_tiny']['median_ms'])} ms",
            f"{case['over_convnext']:.2f}",
        ]
        for case in result["at_224"]
    ]
    return ["forward", "`gspn2_tiny`", "`convnext_tiny` (timm)", "ratio"], rows


def _share(result: Result) -> str:
    large = result["at_1024"]
    return (
        f"At 1024 x 1024, batch {large['batch']}, `gspn2_tiny` takes {_seconds(large['model_seconds'])}; "
        f"its mixers, projections included, are {100 * large['mixer_share']:.1f}% of that."
    )


def _problem(result: Result) -> str:
    directions = {4: "All four directions"}.get(result["directions"], f"{result['directions']} directions")
    return f"{directions}, {result['taps']} taps, {result['dtype']}."


def _table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1, words: Sequence[int] = ()
) -> str:
    """Markdown; numbers to the right, the first `left` columns and those in `words` to the left."""
    rule = ["---" if i < left or i in words else "---:" for i in range(len(heads))]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (heads, rule, *rows))


def _note(result: Result, text: str) -> str:
    """What the table shows, and what it was measured on, with and how."""
    on = result["machine"]
    versions = [f"Python {on['python']}", f"PyTorch {on['torch']}"]
    versions += [f"{name} {on[name]}" for name in ("numba", "timm") if name in on]
    commit = f"commit {on['commit']}" + (" with uncommitted changes" if on["uncommitted_changes"] else "")
    command = on["command"].replace(" ", _UNBROKEN)
    text = (
        f"{text} Measured on {on['processor']}, {on['threads']} threads, {on['system']}, "
        f"{', '.join(versions)}, {commit}, {on['date']}: `{command}`."
    )
    lines = textwrap.fill(text, 118, break_long_words=False, break_on_hyphens=False)
    return f"\n{lines.replace(_UNBROKEN, ' ')}\n"


def _size(size: Sequence[int]) -> str:
    return ", ".join(str(n) for n in size)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _ms(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _seconds(value: float) -> str:
    return f"{1e3 * value:.0f} ms" if value < 0.1 else f"{value:.2f} s" if value < 10 else f"{value:.1f} s"


def _times(value: float) -> str:
    return f"{value:.1f}x"


def _or_none(text: Callable[[float], str], value: float | None) -> str:
    return "-" if value is None else text(value)


def table(name: str) -> str:
    """The table called `name`, from its result file.

    Raises:
        TableError: there is no such table, or its result file is missing, damaged or of another kind.
    """
    if name not in TABLES:
        raise TableError(f"no table is called {name!r}, only {', '.join(TABLES)}")
    path = RESULTS / f"{name.removesuffix('-compact')}.json"
    shown = path.relative_to(ROOT)
    if not path.exists():
        raise TableError(f"table {name!r} needs {shown}, which is missing: measure it first (make bench)")
    try:
        return TABLES[name](json.loads(path.read_text(encoding="utf-8")))
    except json.JSONDecodeError as error:
        raise TableError(f"{shown} is not JSON: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
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
