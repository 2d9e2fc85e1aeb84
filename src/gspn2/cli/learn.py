"""`gspn2 learn`: GSPN-2 beside a ViT and a ConvNet on tasks that need the whole image."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .common import complain, guarded, positive

if TYPE_CHECKING:
    from gspn2.training.comparison import Progress, Run, Settings

VERBS = ("run", "list", "pace", "docs")

EPILOG = """verbs:
  run      train what has no result in --out yet (the default)
  list     the runs, and which of them are done
  pace     what a step of each model takes alone on the device, into --out
  docs     docs/learning.md and its pictures from the result files in --out

examples:
  gspn2 learn
  gspn2 learn list
  gspn2 learn --jobs 16
  gspn2 learn --tasks maze --sizes 64 --contenders gspn2 vit --minutes 5
  gspn2 learn docs --out benchmarks/results/learning

Every run leaves a JSON file with its curves in --out. Ctrl-C saves the runs that are going on; the same
command resumes them and skips those that are done. Three contenders, each with as many parameters, and
ablations of GSPN-2 at the smallest size. Every run is also tested at twice its size, without further
training. --jobs shares all visible GPUs among so many runs at a time."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `gspn2 learn`."""
    from gspn2.training.comparison.plan import SEEDS, SIZES, TASKS, Settings

    default = Settings()
    parser.epilog = EPILOG
    parser.add_argument("verb", nargs="?", choices=VERBS, default="run", help="what to do (default: run)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/learn"), metavar="DIR", help="(default: runs/learn)"
    )
    parser.add_argument("--tasks", nargs="+", default=TASKS, metavar="NAME", help="pathfinder, maze, digits")
    parser.add_argument(
        "--sizes", nargs="+", type=positive, default=SIZES, metavar="N", help="pixels (default: 64 128)"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, metavar="N", help="(default: 0 1 2)")
    parser.add_argument(
        "--extra-seeds",
        type=int,
        default=1,
        metavar="N",
        help="how many of the seeds ablations and larger sizes take (default: 1)",
    )
    parser.add_argument("--jobs", type=positive, default=1, metavar="N", help="runs at a time (default: 1)")
    parser.add_argument("--contenders", nargs="+", metavar="NAME", help="models and ablations (default: all)")
    parser.add_argument("--steps", type=positive, default=default.steps, metavar="N")
    parser.add_argument("--batch-size", type=positive, default=default.batch_size, metavar="N")
    parser.add_argument("--lr", type=float, default=default.lr, metavar="X", help="peak learning rate")
    parser.add_argument(
        "--weight-decay", type=float, default=default.weight_decay, metavar="X", help="of AdamW"
    )
    parser.add_argument("--train-images", type=positive, default=default.train_images, metavar="N")
    parser.add_argument("--test-images", type=positive, default=default.test_images, metavar="N")
    parser.add_argument(
        "--tests", type=positive, default=default.tests, metavar="N", help="points of a curve (default: 10)"
    )
    parser.add_argument(
        "--minutes", type=float, default=default.minutes, metavar="X", help="of a run (default: 10)"
    )
    parser.add_argument("--amp", choices=("auto", "bf16", "off"), default=default.amp)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (default: auto)")
    parser.add_argument("--check", action="store_true", help="docs: write nothing, fail if out of step")


def run(args: argparse.Namespace) -> int:
    """Do what the verb says; returns the exit code."""
    jobs = {"run": _run, "list": _list, "pace": _pace, "docs": _docs}
    return guarded("learn", lambda: jobs[args.verb](args))


def _settings(args: argparse.Namespace) -> Settings:
    from gspn2.training.comparison import Settings

    return Settings(
        steps=args.steps,
        batch_size=args.batch_size,
        lr=args.lr,
        weight_decay=args.weight_decay,
        train_images=args.train_images,
        test_images=args.test_images,
        tests=args.tests,
        minutes=args.minutes,
        amp=args.amp,
    )


def _plan(args: argparse.Namespace) -> list[Run]:
    from gspn2.training.comparison import CONTENDERS, plan

    return plan(args.tasks, args.sizes, args.seeds, args.contenders or tuple(CONTENDERS), args.extra_seeds)


def _run(args: argparse.Namespace) -> int:
    from gspn2.training import Interrupted, UserError
    from gspn2.training.comparison import compare
    from gspn2.training.model import pick_device

    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"out: {args.out} is a file, expected a folder")
    runs, settings, device = _plan(args), _settings(args), pick_device(args.device)
    shared = f", {args.jobs} at a time" if args.jobs > 1 else ""
    told = f"{len(runs)} runs of {settings.steps} steps, at most {settings.minutes:g} min each"
    print(f"{told}, on {device}{shared}", flush=True)
    command = shlex.join(["gspn2", *sys.argv[1:]])
    try:
        results = compare(
            runs, settings, args.out, device=device, command=command, jobs=args.jobs, on_event=_show
        )
    except Interrupted as stop:
        print(f"stopped at {stop.where}; the same command goes on from there")
        return 128 + stop.signum
    lost = [result for result in results if result["ended"] == "diverged"]
    if lost:
        return complain("learn", f"{len(lost)} of {len(results)} runs diverged", 1)
    return 0


def _show(event: Progress[Run]) -> None:
    head = f"[{event.number}/{event.total}] {event.run.name}"
    if event.what == "point":
        print(f"{head}: step {event.step}: {event.text}", flush=True)
    elif event.what in ("skipped", "ends"):
        done = "there already" if event.what == "skipped" else "done"
        print(f"{head}: {done}: {event.text}", flush=True)
    else:
        print(f"{head}: {event.text}", flush=True)


def _list(args: argparse.Namespace) -> int:
    for one in _plan(args):
        if (args.out / f"{one.name}.json").exists():
            state = "done"
        else:
            state = "stopped" if (args.out / f"{one.name}.safetensors").exists() else "to do"
        print(f"{state:<8} {one.name}")
    return 0


def _pace(args: argparse.Namespace) -> int:
    from gspn2.training.comparison import pace
    from gspn2.training.model import pick_device

    def show(name: str, seconds: float) -> None:
        print(f"{name}: {1e3 * seconds:.2f} ms a step, {args.batch_size / seconds:.0f} images/s", flush=True)

    command = shlex.join(["gspn2", *sys.argv[1:]])
    pace.measure(_plan(args), _settings(args), args.out, pick_device(args.device), command, show)
    return 0


def _docs(args: argparse.Namespace) -> int:
    from gspn2.training.comparison import document, examples

    files = document.files(document.load(args.out), document.notes(args.out))
    stale = [
        Path("docs") / name
        for name, text in files.items()
        if not (Path("docs") / name).exists() or (Path("docs") / name).read_text(encoding="utf-8") != text
    ]
    if args.check:
        if stale:
            return complain(
                "learn", f"{stale[0]} is out of step with {args.out}: run this without --check", 1
            )
        return 0
    for name, text in files.items():
        path = Path("docs") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path}")
    examples.draw(Path("docs") / document.EXAMPLES)
    print(f"wrote docs/{document.EXAMPLES}")
    return 0
