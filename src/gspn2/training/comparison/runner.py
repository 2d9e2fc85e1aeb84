"""Runs of a comparison, one after the other or side by side: each leaves a JSON file, or a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..series import Progress, check_settings, read_result
from ..stopping import StopRequest
from .images import make
from .lanes import SCHEMA, Lanes
from .plan import Run, Settings
from .pool import Pool

OnProgress = Callable[[Progress[Run]], None]


def compare(
    runs: Sequence[Run],
    settings: Settings,
    out: Path,
    *,
    device: torch.device | str = "cpu",
    command: str = "",
    jobs: int = 1,
    on_event: OnProgress | None = None,
) -> list[dict[str, Any]]:
    """Do the runs that have no result in `out` yet; returns the results of all, in the order of `runs`.

    Leaves `NAME.json` for each run, images in `images/` and, of a run that was stopped, a checkpoint.

    Args:
        jobs: runs at a time, in processes over all devices; 1 does them in this one. Their seconds are then
            those of runs that share a device (`pace` measures what each takes alone).

    Raises:
        UserError: a result or checkpoint is there that had other settings.
        Interrupted: SIGINT or SIGTERM; the run goes on from its checkpoint next time.
    """
    device = torch.device(device)
    out.mkdir(parents=True, exist_ok=True)

    def tell(run: Run, what: str, text: str = "", step: int = 0) -> None:
        if what == "ends":
            result = read(out / f"{run.name}.json")
            text, step = summary(result), result["step"]
        if on_event is not None:
            on_event(Progress(run, runs.index(run) + 1, len(runs), what, text, step))

    waiting = []
    for run in runs:
        path = out / f"{run.name}.json"
        if path.exists():
            check_settings(path, read(path)["settings"], settings.decisive())
        else:
            waiting.append(run)
    for run in runs:
        if run not in waiting:
            tell(run, "skipped", summary(read(out / f"{run.name}.json")))
    if waiting and jobs > 1:
        Pool(settings, out, device, jobs, command, tell).run(waiting)
    elif waiting:
        _in_turn(waiting, settings, out, device, command, tell)
    return [read(out / f"{run.name}.json") for run in runs]


def _in_turn(
    runs: Sequence[Run],
    settings: Settings,
    out: Path,
    device: torch.device,
    command: str,
    tell: Callable[..., None],
) -> None:
    stop = StopRequest()
    lanes = Lanes(settings, out, device, command, 1, lambda: stop.signum)
    for run in runs:
        for source in run.sources(settings).values():
            if not source.there(out / "images"):
                tell(run, "note", f"making {source.images} images: {source.name}")
                make(source, out / "images")

        def say(what: str, text: str = "", step: int = 0, run: Run = run) -> None:
            tell(run, what, text, step)

        lanes.begin(run, say)
        with stop:
            while lanes.busy:
                lanes.turn()
        tell(run, "ends")


def read(path: Path) -> dict[str, Any]:
    """A result file; a UserError where it is none of this kind."""
    return read_result(path, SCHEMA, "this comparison")


def summary(result: dict[str, Any]) -> str:
    """A result in a line."""
    if result["ended"] == "diverged":
        return f"the loss was no longer finite at step {result['step']}"
    cut = "" if result["ended"] == "steps" else f" (time was up at step {result['step']})"
    moved = ", ".join(f"{name} {100 * it['accuracy']:.1f}%" for name, it in result["transfer"].items())
    return f"{100 * result['accuracy']:.1f}% in {result['seconds']:.0f} s{cut}; at twice the size: {moved}"
