"""`gspn2 draw`: self-attention and GSPN-2 in small models that learn to draw digits.

`generate` and `distill` need weights that somebody else trained; this trains models that draw from nothing.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .common import complain, guarded, positive

if TYPE_CHECKING:
    from gspn2.training.drawing import Progress, Run, Settings

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
    parser.add_argument("verb", nargs="?", choices=VERBS, default="run", help="what to do (default: run)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/draw"), metavar="DIR", help="(default: runs/draw)"
    )
    parser.add_argument(
        "--models", nargs="+", default=tuple(DRAWERS), metavar="NAME", help="(default: all five)"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, metavar="N", help="(default: 0 1 2)")
    parser.add_argument("--steps", type=positive, default=default.steps, metavar="N")
    parser.add_argument("--batch-size", type=positive, default=default.batch_size, metavar="N")
    parser.add_argument("--lr", type=float, default=default.lr, metavar="X", help="peak learning rate")
    parser.add_argument(
        "--samples", type=positive, default=default.samples, metavar="N", help="pictures in a judged set"
    )
    parser.add_argument(
        "--sampler-steps", type=positive, default=default.sampler_steps, metavar="N", help="of a sample"
    )
    parser.add_argument("--judge-steps", type=positive, default=default.judge_steps, metavar="N")
    parser.add_argument(
        "--tests", type=positive, default=default.tests, metavar="N", help="times that samples are judged"
    )
    parser.add_argument(
        "--minutes", type=float, default=default.minutes, metavar="X", help="of a run (default: 20)"
    )
    parser.add_argument("--amp", choices=("auto", "bf16", "off"), default=default.amp)
    parser.add_argument("--no-graph", action="store_true", help="launch kernels one by one on CUDA")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (default: auto)")
    parser.add_argument("--check", action="store_true", help="docs: write nothing, fail if out of step")


def run(args: argparse.Namespace) -> int:
    """Do what the verb says; returns the exit code."""
    jobs = {"run": _run, "judge": _judge, "list": _list, "docs": _docs}
    return guarded("draw", lambda: jobs[args.verb](args))


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


def _check_out(args: argparse.Namespace) -> None:
    from gspn2.training import UserError

    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"out: {args.out} is a file, expected a folder")


def _run(args: argparse.Namespace) -> int:
    from gspn2.training import Interrupted
    from gspn2.training.drawing import draw
    from gspn2.training.model import pick_device

    _check_out(args)
    runs, settings, device = _plan(args), _settings(args), pick_device(args.device)
    print(f"{len(runs)} runs of {settings.steps} steps, at most {settings.minutes:g} min each, on {device}")
    command = shlex.join(["gspn2", *sys.argv[1:]])
    try:
        results = draw(runs, settings, args.out, device=device, command=command, on_event=_show)
    except Interrupted as stop:
        print(f"stopped at {stop.where}; the same command goes on from there")
        return 128 + stop.signum
    lost = [result for result in results if result["ended"] == "diverged"]
    if lost:
        return complain("draw", f"{len(lost)} of {len(results)} runs diverged", 1)
    return 0


def _judge(args: argparse.Namespace) -> int:
    from gspn2.training.drawing import prepare
    from gspn2.training.model import pick_device

    _check_out(args)
    judge = prepare(_settings(args), args.out, device=pick_device(args.device)).judge
    print(
        f"{100 * judge.accuracy:.1f}% of held-out digits; distance of training digits {judge.floor:.2f}, "
        f"of noise {judge.noise:.0f}"
    )
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


def _docs(args: argparse.Namespace) -> int:
    from gspn2.training.drawing import document

    files = document.files(Path("docs"), args.out)
    stale = [path for path, content in files.items() if not path.exists() or path.read_bytes() != content]
    if args.check:
        if stale:
            return complain("draw", f"{stale[0]} is out of step with {args.out}: run this without --check", 1)
        return 0
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        print(f"wrote {path}")
    return 0
