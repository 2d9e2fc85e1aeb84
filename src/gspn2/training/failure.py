"""What a run keeps of what went wrong: images that cannot be read, and the batch without a sane loss."""

from __future__ import annotations

import dataclasses
import json
from itertools import islice
from pathlib import Path

from torch import Tensor

from .batches import train_loader
from .checkpoint import replacing, write_safetensors
from .image_sets import ImageSet, StreamSet
from .learner import Learner
from .log import FAULTS

FAILED_BATCH = "failed_batch.safetensors"


def write_faults(folder: Path, faults: list[str]) -> str:
    """List unreadable images in `unreadable.txt`; returns a sentence about them."""
    with replacing(folder / FAULTS) as temporary:
        temporary.write_text("".join(f"{' '.join(fault.split())}\n" for fault in faults), encoding="utf-8")
    images = (
        "1 image cannot be read and is"
        if len(faults) == 1
        else f"{len(faults)} images cannot be read and are"
    )
    return f"{images} left out; see {folder / FAULTS}"


def save_failed_batch(
    folder: Path,
    images: ImageSet | StreamSet,
    learner: Learner,
    epoch: int,
    step: int,
    loss: float,
    norm: float,
) -> Path:
    """Make a step's batch once more and keep it as the model saw it: `inputs` and `targets`.

    Every process keeps its own share. Nothing is random about a batch but its seed, so nothing had to be kept
    before it was needed.

    Args:
        epoch, step: both counted from 0; steps of the whole run.
        loss, norm: as they came out.
    """
    config = dataclasses.replace(learner.config, workers=0)
    loader, batches = train_loader(images, config, learner.device, learner.world)
    batches.epoch, batches.start = epoch, step - epoch * batches.steps
    tensors: dict[str, Tensor] = {}
    for number, (inputs, labels, _) in enumerate(islice(loader, config.accumulate)):
        mixed, targets = learner.prepare(step, number, (inputs, labels))
        tensors |= {f"inputs.{number}": mixed, f"targets.{number}": targets, f"labels.{number}": labels}
    rank = learner.world.rank
    path = folder / (FAILED_BATCH if rank == 0 else FAILED_BATCH.replace(".", f".process{rank}.", 1))
    about = {"epoch": epoch + 1, "step": step + 1, "loss": str(loss), "grad_norm": str(norm)}
    write_safetensors(path, tensors, {"gspn2": json.dumps(about)})
    return path
