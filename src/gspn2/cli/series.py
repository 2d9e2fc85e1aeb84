"""What `gspn2 learn` and `gspn2 draw` share: series of runs, stopped and resumed at will."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .common import complain, positive, whole

if TYPE_CHECKING:
    from gspn2.training.series import Progress


class Named(Protocol):
    """A run: its name is that of its files."""

    @property
    def name(self) -> str: ...


def add_series_arguments(
    parser: argparse.ArgumentParser, verbs: tuple[str, ...], out: str, seeds: tuple[int, ...], default: Any
) -> None:
    """The options that every series has.

    Args:
        verbs: what the command can do; the first is the default.
        out: default of --out.
        seeds: default of --seeds.
        default: settings, for the other defaults.
    """
    numbers = " ".join(str(seed) for seed in seeds)
    parser.add_argument(
        "verb", nargs="?", choices=verbs, default=verbs[0], help=f"what to do (default: {verbs[0]})"
    )
    parser.add_argument("--out", type=Path, default=Path(out), metavar="DIR", help=f"(default: {out})")
    parser.add_argument(
        "--seeds", nargs="+", type=whole, default=seeds, metavar="N", help=f"(default: {numbers})"
    )
    add_numbers(
        parser,
        default,
        {
            "steps": "of the optimizer",
            "batch-size": "images a step",
            "tests": "points of a curve",
            "minutes": "of a run",
        },
    )
    parser.add_argument(
        "--amp", choices=("auto", "bf16", "off"), default=default.amp, help="(default: auto, bf16 on CUDA)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (default: auto)")
    parser.add_argument("--check", action="store_true", help="docs: write nothing, fail if out of step")


def add_numbers(parser: argparse.ArgumentParser, default: Any, options: dict[str, str]) -> None:
    """Options by name, with what they are: counts and numbers, as `default` has them."""
    for name, told in options.items():
        value = getattr(default, name.replace("-", "_"))
        kind, letter = (positive, "N") if isinstance(value, int) else (float, "X")
        told = f"{told} (default: {value:g})"
        parser.add_argument(f"--{name}", type=kind, default=value, metavar=letter, help=told)


def check_out(out: Path) -> None:
    """A UserError unless `out` is a folder or can become one."""
    from gspn2.training import UserError

    if out.exists() and not out.is_dir():
        raise UserError(f"out: {out} is a file, expected a folder")


def dispatch(args: argparse.Namespace, jobs: Mapping[str, Callable[[argparse.Namespace], int]]) -> int:
    """Do what the verb says; a UserError for --check beside one that would write: hours of training, say."""
    from gspn2.training import UserError

    if args.check and args.verb != "docs":
        raise UserError(f"--check: of docs only, got it with {args.verb}")
    return jobs[args.verb](args)


def with_results(results: list[Any], out: Path) -> list[Any]:
    """The results; a UserError if there are none, out of which documents would be made empty."""
    from gspn2.training import UserError

    if not results:
        raise UserError(f"out: no results in {out}")
    return results


def finish(command: str, run: Callable[[], list[dict[str, Any]]]) -> int:
    """Do the runs and return the exit code: of a signal that stopped them, 1 if some diverged, else 0."""
    from gspn2.training import Interrupted

    try:
        results = run()
    except Interrupted as stop:
        print(f"stopped at {stop.where}; the same command goes on from there")
        return 128 + stop.signum
    lost = [result for result in results if result["ended"] == "diverged"]
    return complain(command, f"{len(lost)} of {len(results)} runs diverged", 1) if lost else 0


def show(event: Progress[Any]) -> None:
    """Print what is reported of a run."""
    head = f"[{event.number}/{event.total}] {event.run.name}"
    if event.what == "point":
        print(f"{head}: step {event.step}: {event.text}", flush=True)
    elif event.what in ("skipped", "ends"):
        done = "there already" if event.what == "skipped" else "done"
        print(f"{head}: {done}: {event.text}", flush=True)
    else:
        print(f"{head}: {event.text}", flush=True)


def show_states(runs: Iterable[Named], out: Path) -> None:
    """Print which runs are done, stopped or still to do."""
    for one in runs:
        if (out / f"{one.name}.json").exists():
            state = "done"
        else:
            state = "stopped" if (out / f"{one.name}.safetensors").exists() else "to do"
        print(f"{state:<8} {one.name}")


def write_docs(command: str, files: dict[Path, bytes], out: Path, check: bool) -> int:
    """Write the files, or with `check` only look whether they are what `out` makes of them."""
    stale = [path for path, content in files.items() if not path.exists() or path.read_bytes() != content]
    if check:
        if stale:
            return complain(command, f"{stale[0]} is out of step with {out}: run this without --check", 1)
        return 0
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        print(f"wrote {path}")
    return 0
