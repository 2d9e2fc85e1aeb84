"""`gspn2 learn`: GSPN-2 beside a ViT and a ConvNet on tasks that need the whole image."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import guarded, plural, positive, whole
from .series import (
    add_numbers,
    add_series_arguments,
    check_out,
    dispatch,
    finish,
    show,
    show_states,
    with_results,
    write_docs,
)

if TYPE_CHECKING:
    from gspn2.training.comparison import Run, Settings

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
    from gspn2.training.comparison.rates import RATES

    default = Settings()
    parser.epilog = EPILOG
    add_series_arguments(parser, VERBS, "runs/learn", SEEDS, default)
    tasks, sizes = " ".join(TASKS), " ".join(map(str, SIZES))
    parser.add_argument("--tasks", nargs="+", default=TASKS, metavar="NAME", help=f"(default: {tasks})")
    parser.add_argument(
        "--sizes", nargs="+", type=positive, default=SIZES, metavar="N", help=f"pixels (default: {sizes})"
    )
    parser.add_argument("--contenders", nargs="+", metavar="NAME", help="models and ablations (default: all)")
    parser.add_argument(
        "--extra-seeds",
        type=whole,
        default=1,
        metavar="N",
        help="how many of the seeds ablations and larger sizes take (default: 1)",
    )
    parser.add_argument("--jobs", type=positive, default=1, metavar="N", help="runs at a time (default: 1)")
    rates = " ".join(f"{rate:g}" for rate in RATES)
    parser.add_argument(
        "--lr",
        nargs="+",
        type=float,
        default=RATES,
        metavar="X",
        help=f"peak learning rates, of which each family takes the best for a task (default: {rates})",
    )
    parser.add_argument("--compile", action="store_true", help="run training steps through torch.compile")
    images = {"train-images": "made for a run", "test-images": "for each of its tests"}
    add_numbers(parser, default, {"weight-decay": "of AdamW", **images})


def run(args: argparse.Namespace) -> int:
    """Do what the verb says; returns the exit code."""
    jobs = {"run": _run, "list": _list, "pace": _pace, "docs": _docs}
    return guarded("learn", lambda: dispatch(args, jobs))


def _settings(args: argparse.Namespace) -> Settings:
    from gspn2.training.comparison import Settings

    return Settings(
        steps=args.steps,
        batch_size=args.batch_size,
        weight_decay=args.weight_decay,
        train_images=args.train_images,
        test_images=args.test_images,
        tests=args.tests,
        minutes=args.minutes,
        amp=args.amp,
        compile=args.compile,
    )


def _plan(args: argparse.Namespace) -> list[Run]:
    from gspn2.training.comparison import CONTENDERS, plan

    return plan(args.tasks, args.sizes, args.seeds, args.contenders or tuple(CONTENDERS), args.extra_seeds)


def _run(args: argparse.Namespace) -> int:
    from gspn2.training.comparison import compare, rates
    from gspn2.training.model import pick_device

    check_out(args.out)
    runs, settings, device = _plan(args), _settings(args), pick_device(args.device)
    tried = rates.trials(runs, args.lr)
    told = f"{plural(len(runs), 'run')} of {plural(settings.steps, 'step')}"
    told += f", at most {settings.minutes:g} min each"
    first = f", after {len(tried)} to choose learning rates" if tried else ""
    shared = f", {args.jobs} at a time" if args.jobs > 1 else ""
    print(f"{told}{first}, on {device}{shared}", flush=True)
    command = shlex.join(["gspn2", *sys.argv[1:]])

    def train(runs: list[Run]) -> list[dict[str, Any]]:
        return compare(
            runs, settings, args.out, device=device, command=command, jobs=args.jobs, on_event=show
        )

    def both() -> list[dict[str, Any]]:
        found = train(tried)
        choice = rates.choose(found)
        for (task, family), rate in choice.items():
            print(f"{task}, {family}: learning rate {rate:g}", flush=True)
        return [*found, *train(_settled(args, runs, choice))]

    return finish("learn", both)


def _settled(args: argparse.Namespace, runs: list[Run], choice: dict[tuple[str, str], float]) -> list[Run]:
    """The runs at the rates of the choice, or at the only one that there is."""
    from gspn2.training.comparison import rates

    only = {(run.task, run.family): args.lr[0] for run in runs}
    return rates.settle(runs, choice or only)


def _list(args: argparse.Namespace) -> int:
    from gspn2.training.comparison import rates
    from gspn2.training.comparison.runner import read

    runs = _plan(args)
    tried = rates.trials(runs, args.lr)
    show_states(tried, args.out)
    paths = [args.out / f"{run.name}.json" for run in tried]
    if not all(path.exists() for path in paths):
        print("then     the others, at the learning rates that are best")
        return 0
    choice = rates.choose([read(path) for path in paths])
    show_states([run for run in _settled(args, runs, choice) if run not in tried], args.out)
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

    texts = document.files(with_results(document.load(args.out), args.out), document.notes(args.out))
    files = {Path("docs") / name: text.encode() for name, text in texts.items()}
    code = write_docs("learn", files, args.out, args.check)
    if not args.check:
        examples.draw(Path("docs") / document.EXAMPLES)
        print(f"wrote docs/{document.EXAMPLES}")
    return code
