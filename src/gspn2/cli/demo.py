"""`gspn2 demo`: train a small GSPN-2 beside attention, look inside, and write a report."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from .common import complain, guarded, percent, plural, positive, whole

if TYPE_CHECKING:
    from rich.console import Console

    from gspn2.demo.material import Material

GATE = 97.0

EPILOG = """examples:
  gspn2 demo --out report
  gspn2 demo --seed 1 --epochs 30 --out longer
  gspn2 demo --quick --out check

The output folder gets report.html (one file that loads nothing), results.json (every number behind it), and
in gspn/ and attention/ the checkpoints and logs of both trainings, as `gspn2 train` writes them. A second
run replaces the first. Exit code 0 only if GSPN-2 reaches the accuracy of --gate."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `gspn2 demo`."""
    parser.epilog = EPILOG
    parser.add_argument("--out", type=Path, default=Path("report"), metavar="DIR", help="(default: report)")
    parser.add_argument("--epochs", type=positive, metavar="N", help="of both trainings (default: 14)")
    parser.add_argument("--batch-size", type=positive, metavar="N", help="images a step (default: 32)")
    parser.add_argument(
        "--seed", type=whole, default=0, metavar="N", help="of weights, order and augmentation (default: 0)"
    )
    parser.add_argument(
        "--gate",
        type=percent,
        metavar="PERCENT",
        help=f"test accuracy that GSPN-2 has to reach (default: {GATE:g}; none with --quick)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one epoch on smaller images and a short measurement: shows that everything runs, nothing more",
    )


def run(args: argparse.Namespace) -> int:
    """Run the demo; returns the exit code."""
    return guarded("demo", lambda: _demo(args))


def _demo(args: argparse.Namespace) -> int:
    from rich.console import Console

    from gspn2.demo import report
    from gspn2.demo.cost import WrongResultError
    from gspn2.training import Interrupted, UserError

    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"out: {args.out} is a file, expected a folder")
    began = time.perf_counter()
    console = Console(highlight=False, soft_wrap=True)
    try:
        material = _material(args, console, began)
    except Interrupted as stop:
        console.print(f"stopped at {stop.where}; saved {stop.checkpoint}")
        console.print("There is no report without both trainings: run the demo again.")
        return 128 + stop.signum
    except WrongResultError as error:
        return complain("demo", error, 1)
    path = report.write(material, args.out)
    return _conclude(material, path, time.perf_counter() - began, console)


def _material(args: argparse.Namespace, console: Console, began: float) -> Material:
    """Do everything that takes time."""
    from gspn2.demo import cost, experiment
    from gspn2.demo.about import about
    from gspn2.demo.material import Material
    from gspn2.demo.progress import DemoProgress
    from gspn2.training import load_data

    shared = experiment.settings(args.quick, args.seed, args.epochs, args.batch_size)
    data = load_data(shared)
    console.print(
        f"[bold]GSPN-2 beside attention[/bold] on {len(data.train)} handwritten digits, "
        f"{plural(shared.epochs, 'epoch')} each; test on {len(data.test)} others"
    )
    with DemoProgress(console) as progress:
        gspn, model = experiment.run(
            experiment.GSPN, experiment.GSPN.config(shared, args.out), progress.training("GSPN-2")
        )
        attention, _ = experiment.run(
            experiment.ATTENTION,
            experiment.ATTENTION.config(shared, args.out),
            progress.training("Attention"),
        )
        sides, budget = ((8, 16), 0.05) if args.quick else (cost.SIDES, 1.0)
        measured = cost.measure(
            sides, seconds_per_side=budget, seed=args.seed, on_point=progress.measuring("Cost", sides)
        )
        image = experiment.map_image(data, gspn.probabilities)
        layers = experiment.look_inside(model, data, image)
    gate = GATE if args.gate is None and not args.quick else args.gate
    command = shlex.join(["gspn2", *sys.argv[1:]])
    return Material(
        gspn=gspn,
        attention=attention,
        images=experiment.raw_images(data),
        labels=experiment.labels(data),
        map_image=image,
        map_input=data.test[image][0].mean(0),
        layers=layers,
        cost=measured,
        recipe=experiment.recipe(shared, data),
        gate=gate,
        about=about(command, args.seed, time.perf_counter() - began),
    )


def _conclude(material: Material, path: Path, seconds: float, console: Console) -> int:
    """Print what came out; the exit code says whether the gate was reached."""
    gspn, attention, cost = material.gspn, material.attention, material.cost
    for one in (gspn, attention):
        console.print(
            f"{one.label:<16} {one.accuracy:6.2f}% of {len(material.labels)} test images, "
            f"{one.parameters:,} parameters, trained in {one.seconds:.0f} s"
        )
    for name, what in (("propagation", "propagation"), ("proxy", "propagation at the proxy's width")):
        side, ratio = cost.ratio("attention", name)
        console.print(f"At {side} x {side} pixels attention takes {ratio:.1f}x the time of {what}.")
    console.print(f"Report: [bold]{path}[/bold]  ({seconds:.0f} s in all)")
    if material.gate is not None and gspn.accuracy < material.gate:
        reached = f"GSPN-2 reached {gspn.accuracy:.2f}% on the test images"
        return complain("demo", f"{reached}, expected at least {material.gate:g}%", 1)
    return 0
