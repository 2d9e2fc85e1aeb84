"""Images of a comparison: made once for all runs, kept in files, held on the device."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..checkpoint import replacing
from ..rng import derive_seed
from ..tasks import Task, answered
from ..transforms import DIGITS_MEAN, DIGITS_STD, TASK_MEAN, TASK_STD

SHARD = 2048
"""Images that a process makes at a time, from a seed of their own."""
DIGITS_TESTS = 360
"""Of scikit-learn's 1797 digits, and as many for validation; the others are for training."""
Arrays = tuple[NDArray[np.uint8], NDArray[np.uint8] | NDArray[np.int64]]


class Images(NamedTuple):
    """Images (N, 1, H, W), uint8, on a device; does mirroring keep the labels true?

    Labels are classes (N,), int64, or of every pixel (N, 1, H, W), uint8: 0 does not count, 1 no, 2 yes.
    """

    pixels: Tensor
    labels: Tensor
    mirrored: bool = True


class Source(NamedTuple):
    """A set of images by what it is made of.

    Args:
        task: kind and size.
        split: "train", "validation" or "test": different images. The seed of a run changes neither.
        images: how many.
    """

    task: Task
    split: str
    images: int

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.task.kind}-{self.task.canvas}-{self.task.size}-{self.split}-{self.images}"

    def files(self, folder: Path) -> tuple[Path, Path]:
        """Of pixels and of labels; the pixels come last, so that they are only there with their labels."""
        return folder / f"{self.name}.npy", folder / f"{self.name}.labels.npy"

    def there(self, folder: Path) -> bool:
        """Has it been made?"""
        return self.files(folder)[0].exists()

    @property
    def labels(self) -> tuple[type[np.generic], tuple[int, ...]]:
        """Type and shape of the labels."""
        if self.task.kind == "digits":
            return np.int64, (self.images,)
        return np.uint8, (self.images, self.task.size, self.task.size)

    @property
    def shards(self) -> range:
        """First image of each."""
        return range(0, self.images, SHARD)


def make(source: Source, folder: Path) -> None:
    """Make the files of a source on all cores."""
    if len(source.shards) == 1:
        with making(source, folder, None):
            return
    with workers(min(len(source.shards), os.cpu_count() or 1)) as pool, making(source, folder, pool) as parts:
        for part in parts:
            part.result()


def workers(count: int) -> ProcessPoolExecutor:
    """Processes that make images. Spawned: a fork of a process that uses a GPU or threads is not safe."""
    return ProcessPoolExecutor(count, mp_context=torch.multiprocessing.get_context("spawn"))


@contextlib.contextmanager
def making(
    source: Source, folder: Path, pool: ProcessPoolExecutor | None
) -> Iterator[Sequence[Future[None]]]:
    """The parts of a source, as they are made; its files are there when the block ends well.

    Args:
        pool: who makes them; None makes them here and now.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pixels, labels = source.files(folder)
    side = source.task.size
    with replacing(pixels) as first, replacing(labels) as second:
        for path, dtype, shape in (
            (first, np.uint8, (source.images, side, side)),
            (second, *source.labels),
        ):
            np.lib.format.open_memmap(path, "w+", dtype, shape).flush()
        if pool is None:
            for number in range(len(source.shards)):
                _make_shard(source, number, first, second)
            yield ()
        else:
            yield [
                pool.submit(_make_shard, source, number, first, second)
                for number in range(len(source.shards))
            ]


def _make_shard(source: Source, number: int, pixels: Path, labels: Path) -> None:
    """Make a shard straight into its place in the files."""
    start = source.shards[number]
    end = min(start + SHARD, source.images)
    seed = derive_seed("comparison", source.split, number)
    made, truth = _made(source, start, end, seed)
    for path, values in ((pixels, made), (labels, truth)):
        table = np.lib.format.open_memmap(path, "r+")
        table[start:end] = values
        table.flush()


def _made(source: Source, start: int, end: int, seed: int) -> Arrays:
    if source.task.kind == "digits":
        return digits(source, end - start, seed)
    levels = (start / source.images, end / source.images) if source.split == "train" else None
    return answered(source.task, end - start, seed, levels)


def digits(source: Source, count: int, seed: int) -> Arrays:
    """scikit-learn's digits, enlarged; for training a little turned, moved and scaled, more than once."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    rng = np.random.default_rng(seed)
    tests, validation, training = np.split(order, (DIGITS_TESTS, 2 * DIGITS_TESTS))
    if source.split == "train":
        chosen = training[rng.integers(0, len(training), count)]
    else:
        chosen = (tests if source.split == "test" else validation)[:count]
    small = torch.from_numpy(found.images[chosen][:, None]).float() * (255 / 16)
    side = source.task.size
    large = nn.functional.interpolate(small, (side, side), mode="bilinear", align_corners=False)
    if source.split == "train":
        large = _moved(large, rng)
    return large[:, 0].round().clamp(0, 255).byte().numpy(), found.target[chosen].astype(np.int64)


def _moved(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Each turned by up to 10 degrees, moved and scaled by up to a tenth, as in `gspn2 train`."""
    count = len(images)
    angle = rng.uniform(-math.pi / 18, math.pi / 18, count)
    scale = 1 / rng.uniform(0.9, 1.1, count)
    shift = rng.uniform(-0.2, 0.2, (2, count))  # of half the side
    cosine, sine = scale * np.cos(angle), scale * np.sin(angle)
    maps = np.stack((cosine, -sine, shift[0], sine, cosine, shift[1]), axis=1).reshape(count, 2, 3)
    grid = nn.functional.affine_grid(torch.from_numpy(maps).float(), list(images.shape), align_corners=False)
    return nn.functional.grid_sample(images, grid, align_corners=False)


def load(source: Source, folder: Path, device: torch.device) -> Images:
    """A source that has been made."""
    pixels, labels = (np.load(path, mmap_mode="c") for path in source.files(folder))
    mirrored = source.task.kind != "digits"
    truth = torch.from_numpy(labels if labels.ndim == 1 else labels[:, None]).to(device)
    return Images(torch.from_numpy(pixels)[:, None].to(device), truth, mirrored)


def inputs(images: Images, pixels: Tensor) -> Tensor:
    """uint8 (N, 1, H, W) to normalised float32, as `gspn2 train` makes it from the same tasks."""
    mean, std = (TASK_MEAN, TASK_STD) if images.mirrored else (DIGITS_MEAN, DIGITS_STD)
    return (pixels.float() / 255 - mean) / std


def poses(count: int, generator: torch.Generator) -> Tensor:
    """For each of `count` images one of a square's eight positions, at random: (3, count), bool."""
    return torch.rand(3, count, generator=generator) < 0.5


def posed(pixels: Tensor, poses: Tensor) -> Tensor:
    """Each image (N, 1, H, H) mirrored left to right, top to bottom and in its diagonal, where `poses` (3, N)
    says so: labels stay true.
    """
    across, down, diagonal = poses[:, :, None, None, None]
    pixels = torch.where(across, pixels.flip(-1), pixels)
    pixels = torch.where(down, pixels.flip(-2), pixels)
    return torch.where(diagonal, pixels.mT, pixels)
