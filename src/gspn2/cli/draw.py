"""`gspn2 draw`: self-attention and GSPN-2 in small models that learn to draw digits.

`generate` and `distill` need weights that somebody else trained; this trains models that draw from nothing.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .common import guarded, plural
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
    from gspn2.training.drawing import Run, Settings

VERBS = ("run", "judge", "list", "docs")

EPILOG = """verbs:
  run      train what has no result in --out yet (the default)
  judge    train the judge of samples only, so that several commands can then share --out
  list     the runs, and which of them are done
  docs     the section of docs/generation.md and its pictures from the result files in --out

examples:
  gspn2 draw
  gspn2 draw --models unet-attention unet-gspn2 unet-distilled --seeds 0
  gspn2 draw docs --out benchmarks/results/generation

Models: unet-attention, unet-gspn2, dit-attention, dit-gspn2, unet-distilled (taught by unet-attention).
Every run leaves a JSON file with its curves, and grids of samples, in --out. Ctrl-C saves the run that is
going on; the same command resumes it and skips those that are done."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `gspn2 draw`."""
    from gspn2.training.drawing import DRAWERS, Settings
    from gspn2.training.drawing.plan import SEEDS

    default = Settings()
    parser.epilog = EPILOG
    add_series_arguments(parser, VERBS, "runs/draw", SEEDS, default)
    parser.add_argument(
        "--models", nargs="+", default=tuple(DRAWERS), metavar="NAME", help="(default: all five)"
    )
    add_numbers(
        parser,
        default,
        {
            "lr": "peak learning rate",
            "samples": "pictures in a judged set",
            "sampler-steps": "of a sample",
            "judge-steps": "of the judge's training",
        },
    )
    parser.add_argument("--no-graph", action="store_true", help="launch kernels one by one on CUDA")


def run(args: argparse.Namespace) -> int:
    """Do what the verb says; returns the exit code."""
    jobs = {"run": _run, "judge": _judge, "list": _list, "docs": _docs}
    return guarded("draw", lambda: dispatch(args, jobs))


def _settings(args: argparse.Namespace) -> Settings:
    from gspn2.training.drawing import Settings

    return Settings(
        steps=args.steps,
        batch_size=args.batch_size,
        lr=args.lr,
        samples=args.samples,
        sampler_steps=args.sampler_steps,
        judge_steps=args.judge_steps,
        tests=args.tests,
        minutes=args.minutes,
        amp=args.amp,
        graph=not args.no_graph,
    )


def _plan(args: argparse.Namespace) -> list[Run]:
    from gspn2.training.drawing import plan

    return plan(args.models, args.seeds)


def _run(args: argparse.Namespace) -> int:
    from gspn2.training.drawing import draw
    from gspn2.training.model import pick_device

    check_out(args.out)
    runs, settings, device = _plan(args), _settings(args), pick_device(args.device)
    told = f"{plural(len(runs), 'run')} of {plural(settings.steps, 'step')}"
    print(f"{told}, at most {settings.minutes:g} min each, on {device}", flush=True)
    command = shlex.join(["gspn2", *sys.argv[1:]])
    return finish(
        "draw", lambda: draw(runs, settings, args.out, device=device, command=command, on_event=show)
    )


def _judge(args: argparse.Namespace) -> int:
    from gspn2.training.drawing import prepare
    from gspn2.training.model import pick_device

    check_out(args.out)
    judge = prepare(_settings(args), args.out, device=pick_device(args.device)).judge
    print(
        f"{100 * judge.accuracy:.1f}% of held-out digits; distance of training digits {judge.floor:.2f}, "
        f"of noise {judge.noise:.0f}"
    )
    return 0


def _list(args: argparse.Namespace) -> int:
    show_states(_plan(args), args.out)
    return 0


def _docs(args: argparse.Namespace) -> int:
    from gspn2.training.drawing import document

    with_results(document.load(args.out), args.out)
    return write_docs("draw", document.files(Path("docs"), args.out), args.out, args.check)
