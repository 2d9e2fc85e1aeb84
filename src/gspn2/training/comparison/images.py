"""Generated images of a comparison: made once for all runs, kept in a file, held on the device."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..checkpoint import replacing
from ..rng import derive_seed
from ..tasks import Task, generate
from ..transforms import TASK_MEAN, TASK_STD

SHARD = 4096
"""Images that a process makes at a time, from a seed of their own."""


class Images(NamedTuple):
    """Images (N, 1, H, W), uint8, and labels (N,), int64, on a device."""

    pixels: Tensor
    labels: Tensor


def load(
    task: Task, split: str, count: int, folder: Path, device: torch.device, say: Callable[[str], None]
) -> Images:
    """Images of a task, from the folder or, the first time, made by all cores.

    Args:
        split: "train" or "test": different images. The seed of a run changes neither.
        count: how many.
    """
    path = folder / f"{task.kind}-{task.canvas}-{task.size}-{split}-{count}.npz"
    if not path.exists():
        say(f"generating {count} images: {path.stem}")
        folder.mkdir(parents=True, exist_ok=True)
        _write(path, *_generate(task, split, count))
    with np.load(path) as stored:
        pixels, labels = stored["pixels"], stored["labels"]
    return Images(torch.from_numpy(pixels)[:, None].to(device), torch.from_numpy(labels).to(device))


def _write(path: Path, pixels: np.ndarray, labels: np.ndarray) -> None:
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, pixels=pixels, labels=labels)


def _generate(task: Task, split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    shards = range(0, count, SHARD)
    sizes = [min(SHARD, count - start) for start in shards]
    seeds = [derive_seed("comparison", split, number) for number in range(len(sizes))]
    tasks = [task] * len(sizes)
    if len(sizes) == 1:
        made = [generate(task, sizes[0], seeds[0])]
    else:
        # Spawned: a fork of a process that uses a GPU or threads is not safe.
        context = torch.multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(len(sizes), os.cpu_count() or 1), mp_context=context) as pool:
            made = list(pool.map(generate, tasks, sizes, seeds))
    return np.concatenate([pixels for pixels, _ in made]), np.concatenate([labels for _, labels in made])


def inputs(pixels: Tensor) -> Tensor:
    """uint8 (N, 1, H, W) to normalised float32, as `gspn2 train` makes it from the same tasks."""
    return (pixels.float() / 255 - TASK_MEAN) / TASK_STD


def turned(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Each image (N, 1, H, H) in one of a square's eight positions, at random: labels stay true."""
    draws = torch.rand(3, len(pixels), 1, 1, 1, generator=generator).to(pixels.device) < 0.5
    pixels = torch.where(draws[0], pixels.flip(-1), pixels)
    pixels = torch.where(draws[1], pixels.flip(-2), pixels)
    return torch.where(draws[2], pixels.mT, pixels)
