"""What a training step takes when a model has the device to itself, which runs side by side cannot tell."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ...bench.about import machine
from ..checkpoint import write_json
from .images import Images
from .plan import DIGITS, Run, Settings
from .single import make_trainer
from .trainer import Block

FILE = "pace.json"
IMAGES = 2048
BLOCK = 30
ROUNDS = 3


def measure(
    runs: Sequence[Run],
    settings: Settings,
    out: Path,
    device: torch.device,
    command: str,
    tell: Callable[[str, float], None],
    block: int = BLOCK,
) -> dict[str, float]:
    """Seconds of a step of each model of `runs` at each size, on noise; written to `pace.json`, too.

    The median of a few rounds of `block` steps, of which the first does not count.

    Args:
        settings: batch size, precision, compilation.
        out: folder of the file.
        device: where.
        command: the command line, for the file.
        tell: takes a name and its seconds.
    """
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    out.mkdir(parents=True, exist_ok=True)
    about = {
        "batch_size": settings.batch_size,
        "amp": settings.amp,
        "compile": settings.compile,
        "machine": machine(device, command),
    }
    found: dict[str, float] = {}
    for run in runs:
        if name_of(run) not in found:
            found[name_of(run)] = _seconds(run, settings, device, block)
            tell(name_of(run), found[name_of(run)])
            write_json(out / FILE, {"seconds": found, **about})
    return found


def name_of(run: Run) -> str:
    """What runs have in common whose steps are the same work."""
    return f"{run.contender}-{run.size}{'' if run.dense else '-' + run.task}"


def _seconds(run: Run, settings: Settings, device: torch.device, block: int) -> float:
    draws = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (IMAGES, 1, run.size, run.size), generator=draws, dtype=torch.uint8)
    if run.dense:
        labels = torch.randint(3, pixels.shape, generator=draws, dtype=torch.uint8)
    else:
        labels = torch.randint(run.classes, (IMAGES,), generator=draws)
    images = Images(pixels.to(device), labels.to(device), run.task != DIGITS)
    trainer, _ = make_trainer(run, settings, images, device, block)
    trainer.prepare()
    size = settings.batch_size
    chosen = torch.randint(IMAGES, (block, size), generator=draws)
    steps = Block(chosen, torch.rand(block, 3, size, generator=draws) < 0.5, torch.full((block,), 1e-6))
    times = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        trainer.run(steps).sum().item()
        times.append((time.perf_counter() - began) / block)
    return statistics.median(times[1:])


def read(folder: Path) -> dict[str, Any]:
    """The file, or {} where there is none."""
    import json

    path = folder / FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
