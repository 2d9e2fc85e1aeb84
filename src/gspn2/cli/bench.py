"""`gspn2 bench`: measure, check, compare and draw."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import complain, guarded, make_folder, not_negative, plural, positive

if TYPE_CHECKING:
    import torch

    from gspn2.bench.case import Case
    from gspn2.bench.results import Results

PARTS = ("ladder", "throughput", "sweep", "cpu", "attention", "models", "t2i")
VERBS = ("all", "list", "compare", "report", "docs")
TAKES = {
    "list": ("only", "device"),
    "compare": ("tolerance",),
    "report": ("out",),
    "docs": ("out", "check"),
    "parts": ("out", "only", "resume", "device", "rounds", "minutes", "no_report", "in_process"),
}
"""The options that have a meaning for each verb, and for parts to measure."""
MINUTES = {"cuda": 14.5, "cpu": 2.0}
"""For `all`, by device; then what is left is left out, and the report is written."""
COMPILING = 0.3
"""Of the limit that models are compiled ahead for at most; what is not ready then, its case compiles."""
MOST_RESTARTS = 12
OUT, BEFORE = Path("bench"), "results.before.json"
NO_MATPLOTLIB = 'it needs matplotlib: pip install "gspn2[bench]"'
DONE, WRONG, USAGE = 0, 1, 2

EPILOG = f"""names:
  {", ".join(PARTS)}   a part of the bench; several may be given
  all                       every part, in 15 minutes on a GPU, in 2 on a CPU
  list                      what would be measured; after it, of which parts
  compare A.json B.json     what became slower or faster
  report                    pictures and report.html from results.json in --out
  docs A.json B.json        docs/benchmarks.md from result files; with --check after them, is it in step?

examples:
  gspn2 bench all --out bench
  gspn2 bench ladder throughput
  gspn2 bench attention --only SigLIP --resume
  gspn2 bench compare before/results.json bench/results.json --tolerance 0.1

Nothing is timed before its result is found right. The output folder gets results.json, written after every
case, report.html (one file that loads nothing) and the pictures in it as SVG and PNG; results.before.json has
what an earlier run without --resume had measured there. Exit code 1 if a result was wrong, a case failed or,
for compare, something became slower."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `gspn2 bench`."""
    parser.epilog = EPILOG
    parser.add_argument("names", nargs="+", metavar="NAME", help="what to do, see below")
    parser.add_argument(
        "--out",
        type=Path,
        default=OUT,
        metavar="PATH",
        help=f"folder (default: {OUT}); of docs, a file (default: docs/benchmarks.md)",
    )
    parser.add_argument("--only", metavar="REGEX", default="", help="cases whose name matches")
    parser.add_argument(
        "--resume", action="store_true", help="keep what --out holds of this commit and machine"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (default: auto)")
    parser.add_argument("--rounds", type=positive, default=9, metavar="N", help="samples (default: 9)")
    parser.add_argument(
        "--minutes",
        type=not_negative,
        metavar="X",
        help="begin no case that would end later (default for all: 14.5, on a CPU 2)",
    )
    parser.add_argument(
        "--tolerance", type=not_negative, default=0.05, metavar="X", help="of compare (default: 0.05)"
    )
    parser.add_argument("--check", action="store_true", help="docs: write nothing, fail if out of step")
    parser.add_argument("--no-report", action="store_true", help="measure only")
    parser.add_argument("--in-process", type=float, metavar="BEGAN", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Do what the names say; returns the exit code."""
    return guarded("bench", lambda: _bench(args))


def _bench(args: argparse.Namespace) -> int:
    from gspn2.bench.results import ResultsError

    verb, *rest = args.names
    _refuse_others(verb, args)
    try:
        if verb == "compare":
            return _compare(rest, args.tolerance)
        if verb == "docs":
            return _docs(rest, args)
        if verb == "report":
            return _report(args.out, rest)
        device = _device(args.device)
        if verb == "list":
            return _list(_cases(_names(rest or ["all"]), device, args.only), device)
        return _measure(_names(args.names), device, args)
    except ResultsError as error:
        return complain("bench", error, USAGE)


def _refuse_others(verb: str, args: argparse.Namespace) -> None:
    """No option is dropped in silence: a UserError if one was given that the verb has no use for."""
    from gspn2.training.errors import UserError

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    takes = TAKES.get(verb, TAKES["parts"])
    for name in dict.fromkeys(it for names in TAKES.values() for it in names):
        if name not in takes and getattr(args, name) != parser.get_default(name):
            whose = " and ".join(it for it, names in TAKES.items() if name in names)
            raise UserError(f"--{name.replace('_', '-')}: of {whose} only, got it with {verb}")


def _names(names: list[str]) -> list[str]:
    """The parts that are asked for, in order."""
    from gspn2.training.errors import UserError

    for name in names:
        if name in VERBS and name != "all":
            raise UserError(f"{name} comes first, and without parts to measure: gspn2 bench {name} ...")
        if name not in (*PARTS, "all"):
            raise UserError(f"expected one of {', '.join((*PARTS, *VERBS))}, got {name!r}")
    return list(PARTS) if "all" in names else [name for name in PARTS if name in names]


def _device(name: str) -> torch.device:
    import torch

    from gspn2.training.errors import UserError

    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device: expected auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: expected a CUDA device, found none")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _cases(names: list[str], device: torch.device, only: str) -> list[Case]:
    from gspn2.bench.case import parts
    from gspn2.bench.runner import chosen
    from gspn2.training.errors import UserError

    try:
        matches = re.compile(only).search
    except re.error as error:
        raise UserError(f"--only: expected a regular expression, got {only!r}: {error}") from error
    found = list(chosen(parts(), names, device, matches))
    if not found:
        raise UserError(f"--only: expected a part of a case's name (gspn2 bench list), got {only!r}")
    return found


def _list(cases: list[Case], device: torch.device) -> int:
    """The cases in the order in which they run, with the seconds that they take on an H200."""
    from gspn2.bench.schedule import ordered

    told = {0: "", 1: "", 2: "  (if there is time)"}
    for case in ordered(cases):
        seconds = f"{case.seconds:4.0f} s  " if device.type == "cuda" else ""
        print(f"{seconds}{case.key}{told[case.turn]}")
    return DONE


def _measure(names: list[str], device: torch.device, args: argparse.Namespace) -> int:
    """Measure, then report. On a GPU in a process that may be lost, and is started anew for what is left."""
    cases = _cases(names, device, args.only)
    if args.in_process is not None:
        return _run(cases, device, args, args.in_process)
    make_folder(args.out)
    if not args.no_report and find_spec("matplotlib") is None:
        print(f"there will be no report: {NO_MATPLOTLIB}; gspn2 bench report draws it later", flush=True)
    began = time.monotonic()
    path = args.out / "results.json"
    if not args.resume:
        _set_aside(path)
    try:
        if device.type == "cuda":
            held = _results(device, args)
            missing = [case for case in cases if not held.holds(case.bench, case.name)]
            code = _supervise(missing, path, began, _minutes(device, args))
        else:
            code = _run(cases, device, args, began)
    except KeyboardInterrupt:
        out = shlex.quote(str(args.out))
        print(f"\n--resume goes on from here; gspn2 bench report --out {out} draws what there is by now")
        raise
    if not args.no_report and path.exists():
        _report(args.out)
    return code


def _set_aside(path: Path) -> None:
    """Make room for new results; those of a run that came to its end stay beside them, to compare with.

    What another command has written there is nobody's to delete: a UserError.
    """
    from gspn2.bench.results import Foreign, ResultsError, load
    from gspn2.training.errors import UserError

    if not path.exists():
        return
    try:
        content = load(path)
    except Foreign as error:
        raise UserError(f"--out: expected a folder for results of gspn2 bench: {error}") from error
    except ResultsError:
        content = {"run": {}, "cases": []}
    if content["run"].get("complete") and content["cases"]:
        before = path.with_name(BEFORE)
        path.replace(before)
        print(f"the results of the run before are kept in {before}", flush=True)
    else:
        path.unlink()


def _minutes(device: torch.device, args: argparse.Namespace) -> float | None:
    if args.minutes is None and "all" in args.names:
        return MINUTES[device.type]
    return args.minutes


def _supervise(cases: list[Case], path: Path, began: float, minutes: float | None) -> int:
    """Compile what the cases need, then run them in another process, again and again until all are done.

    Args:
        cases: that no earlier run has measured.
        path: of the result file.
        began: `time.monotonic` at the start of the run.
        minutes: of the run, or None for no limit.
    """
    from gspn2.bench import ahead
    from gspn2.bench.results import give_up, load

    count, failed = ahead.compile_all(cases, 0)
    told = f", {failed} do not compile" if failed else ""
    print(f"{count} kernels ready after {time.monotonic() - began:.0f} s{told}", flush=True)
    models, failed = ahead.compile_models(cases, seconds=minutes and 60 * minutes * COMPILING)
    if models:
        told = f", {failed} are not ready" if failed else ""
        print(f"{models} models compiled after {time.monotonic() - began:.0f} s{told}", flush=True)
    command = [sys.executable, "-m", "gspn2", *_typed(), "--in-process", str(began)]
    code, before = DONE, -1
    for attempt in range(MOST_RESTARTS):
        done = subprocess.run([*command, *(["--resume"] if attempt else [])], check=False)
        content = load(path) if path.exists() else None
        if content is not None and content["run"]["complete"]:
            return code | done.returncode
        code, held = WRONG, 0 if content is None else len(content["cases"])
        if done.returncode == USAGE or held <= before:
            return USAGE if done.returncode == USAGE else WRONG
        before = held
        for text in give_up(path) if content is not None else []:
            print(f"FAILED  {text}", flush=True)
    return code


def _typed() -> list[str]:
    """The arguments of this process, from the subcommand on."""
    return sys.argv[1:]


def _run(cases: list[Case], device: torch.device, args: argparse.Namespace, began: float) -> int:
    from gspn2.bench import runner, schedule, terminal
    from gspn2.bench.results import beaten_floors, broken

    settings = runner.Settings(device, args.rounds, minutes=_minutes(device, args))
    results = _results(device, args)
    with terminal.Terminal() as shown:
        runner.run(cases, settings, results, shown, began)
    print(
        f"\n{results.path}: {plural(len(results.rows), 'case')} in {results.content['run']['seconds']:.0f} s"
    )
    run = results.content["run"]
    if note := schedule.left_out(run["left_out"], run["command"], shlex.quote(str(args.out))):
        print(note)
    for text in beaten_floors(results.rows):
        print(f"faster than its floor  {text}")
    # Also what was found before --resume, or in a process that has died: it is not measured again.
    bad = [f"{row['bench']}: {row['case']}: {text}" for row in results.rows for text in broken(row)]
    for text in bad:
        print(f"WRONG  {text}")
    return WRONG if bad else DONE


def _results(device: torch.device, args: argparse.Namespace) -> Results:
    from gspn2.bench.about import machine
    from gspn2.bench.results import Results

    command = shlex.join(["gspn2", *_shown(_typed())])
    run: dict[str, Any] = {"command": command, "device": device.type, "rounds": args.rounds}
    if args.in_process is not None:
        # By this a process that goes on where another died knows that it is the same run.
        run["began"] = args.in_process
    results = Results(args.out / "results.json", machine(device, command), run)
    dropped = results.resume() if args.resume else ""
    if dropped and args.in_process is None:
        print(dropped, flush=True)
    return results


def _shown(words: Sequence[str]) -> list[str]:
    """The command line without what is nobody's business: folders, and how it was run."""
    shown, left = [], iter(words)
    for word in left:
        if word in ("--out", "--in-process"):
            next(left, None)
        elif word != "--resume" and not word.startswith(("--out=", "--in-process=")):
            shown.append(word)
    return shown


def _report(out: Path, more: Sequence[str] = ()) -> int:
    from gspn2.bench import report
    from gspn2.bench.results import load
    from gspn2.training.errors import UserError

    if more:
        raise UserError(f"report: expected nothing after it, got {more[0]!r}; the folder is --out")
    content = load(out / "results.json")
    try:
        path = report.write(content, out)
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        return complain("bench", f"no report: {NO_MATPLOTLIB}", WRONG)
    print(f"report: {path}")
    return DONE


def _compare(paths: list[str], tolerance: float) -> int:
    from gspn2.bench import compare
    from gspn2.bench.results import load
    from gspn2.training.errors import UserError

    if len(paths) != 2:
        raise UserError(f"compare: expected two result files, got {len(paths)}")
    found = compare.compare(*(load(Path(path)) for path in paths))
    print("\n".join(compare.lines(found, tolerance)))
    return WRONG if found.slower(tolerance) or found.lost else DONE


def _docs(paths: list[str], args: argparse.Namespace) -> int:
    from gspn2.bench import document
    from gspn2.bench.results import load
    from gspn2.training.errors import UserError

    if not paths:
        raise UserError("docs: expected result files, got none")
    path = Path("docs") / "benchmarks.md" if args.out == OUT else args.out
    if path.suffix != ".md":
        raise UserError(f"--out: docs writes a file, expected a name that ends in .md, got {path}")
    text = document.text([load(Path(it)) for it in paths])
    if args.check:
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            return complain(
                "bench", f"{path} is out of step with its result files: run this without --check", WRONG
            )
        return DONE
    path.write_text(text, encoding="utf-8")
    print(f"wrote {path}")
    return DONE
