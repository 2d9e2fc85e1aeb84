"""Which images make which batch, and their way from the data to the training loop.

The order of an epoch is a function of (seed, epoch). A step's images are cut into parts of equal size, first
by process and then by accumulation, so that neither changes which images a step sees; images that are mixed
with each other always share a part.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .config import TrainConfig
from .distributed import World
from .errors import DataError, UserError
from .image_sets import ImageSet, StreamSet
from .rng import derive_seed
from .samples import shuffled

Item = tuple[Tensor | None, int, str | None]
TrainBatch = tuple[Tensor, Tensor, list[str]]
"""Inputs (N, in_chans, H, W), labels (N,), and what is wrong with images that could not be read."""


_LOOK_ON = 64
"""So many damaged images after one another are taken for data that cannot be read at all."""


class StepBatches(Sampler[list[Any]]):
    """Keys of this process's parts of every step, from any step of any epoch on.

    Args:
        images: how many an epoch has. The last, incomplete batch is left out, unless it is the only one.
        config: batch size, accumulation, mixing and seed.
        world: the processes that share a batch.
    """

    def __init__(self, images: int, config: TrainConfig, world: World) -> None:
        slices = world.size * config.accumulate
        mixes = config.mixup > 0 or config.cutmix > 0
        unit = slices * (2 if mixes else 1)
        if config.batch_size % unit:
            raise UserError(
                f"batch_size: {world.size} processes of {config.accumulate} parts each"
                f"{', mixed in pairs,' if mixes else ''} need a multiple of {unit}, got {config.batch_size}"
            )
        self.batch_size = min(config.batch_size, images // unit * unit)
        if self.batch_size == 0:
            raise UserError(f"batch_size: expected at least {unit} training images, got {images}")
        self.images = images
        self.seed = config.seed
        self.parts = range(world.rank * config.accumulate, (world.rank + 1) * config.accumulate)
        self.part_size = self.batch_size // slices
        self.epoch = 0
        self.start = 0

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return self.images // self.batch_size

    def __len__(self) -> int:
        return self.steps * len(self.parts)

    def __iter__(self) -> Iterator[list[Any]]:
        keys = self._keys()
        for _ in range(self.start, self.steps):
            batch = list(islice(keys, self.batch_size))
            for part in self.parts:
                yield _in_pairs(batch[part * self.part_size : (part + 1) * self.part_size])

    def _keys(self) -> Iterator[Any]:
        """What the data takes, from the first image of step `start` on."""
        raise NotImplementedError


class EpochBatches(StepBatches):
    """Keys (epoch, index) of a set whose images can be read in any order."""

    def __init__(self, images: ImageSet, config: TrainConfig, world: World) -> None:
        super().__init__(len(images), config, world)
        self._groups = images.groups
        self._pool = config.shuffle_buffer

    def _keys(self) -> Iterator[tuple[int, int]]:
        order = shuffled(self.images, derive_seed(self.seed, "order", self.epoch), self._groups, self._pool)
        return ((self.epoch, int(index)) for index in order[self.start * self.batch_size :])


class StreamBatches(StepBatches):
    """Keys (epoch, number, source, label) of a stream.

    Blocks of `shuffle_buffer` images are read ahead, undecoded, and shuffled one by one. To go on from a
    step, everything before its block is skipped.
    """

    def __init__(self, stream: StreamSet, config: TrainConfig, world: World) -> None:
        super().__init__(len(stream), config, world)
        self._stream = stream
        self._block = config.shuffle_buffer

    def _keys(self) -> Iterator[tuple[int, int, Any, int]]:
        skip = self.start * self.batch_size
        first, offset = divmod(skip, self._block)
        rows = self._stream.rows(skip=first * self._block)
        end = self.steps * self.batch_size
        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(lambda: list(islice(rows, self._block)))
            for block in range(first, -(-end // self._block)):
                held = ahead.result()
                ahead = reader.submit(lambda: list(islice(rows, self._block)))
                begin = block * self._block
                order = shuffled(len(held), derive_seed(self.seed, "block", self.epoch, block))
                for place in order[offset:]:
                    yield (self.epoch, begin + int(place), *held[place])
                offset = 0
                if begin + len(held) < min(begin + self._block, end):
                    had = begin + len(held)
                    raise DataError(f"train_images: the stream ended after {had}, expected {self.images}")


def _in_pairs(keys: list[Any]) -> list[Any]:
    """Neighbours in the order of the epoch, put where mixing pairs them: at equal distance from both ends.

    So the images that are mixed do not depend on how a batch is cut into parts.
    """
    return keys[::2] + keys[1::2][::-1]


class _Tolerant(Dataset[Item]):
    """A set whose images that cannot be read come as what is wrong with them."""

    def __init__(self, images: ImageSet | StreamSet) -> None:
        self.images = images

    def __getitem__(self, key: Any) -> Item:
        try:
            return (*self.images[key], None)
        except DataError as error:
            return None, -1, str(error)


class _Replacing(_Tolerant):
    """A set for training: a part of a batch without a sound image gets the next one of the data.

    Parts may be single images; elsewhere a neighbour in the part takes the place of a damaged one.
    """

    def __getitems__(self, keys: list[Any]) -> list[Item]:
        items = [self[key] for key in keys]
        if isinstance(self.images, ImageSet) and all(tensor is None for tensor, *_ in items):
            (epoch, index), fault = keys[-1], items[-1][2]
            for distance in range(1, min(_LOOK_ON, len(self.images))):
                tensor, label, _ = self[epoch, (index + distance) % len(self.images)]
                if tensor is not None:
                    return [*items[:-1], (tensor, label, fault)]
        return items


def _join_training(items: Sequence[Item]) -> TrainBatch:
    """A batch whose damaged images are replaced by the next sound one: its size stays what it is."""
    sound = [i for i, item in enumerate(items) if item[0] is not None]
    faults = [fault for *_, fault in items if fault is not None]
    if not sound:
        raise DataError(f"none of {len(items)} images in a row can be read; the first: {faults[0]}")
    chosen = [next((j for j in sound if j >= i), sound[0]) for i in range(len(items))]
    return (*_stack([items[i] for i in chosen]), faults)


def _join_sound(items: Sequence[Item]) -> tuple[Tensor, Tensor, list[str]] | tuple[None, None, list[str]]:
    """A batch without its damaged images; None where that leaves nothing."""
    faults = [fault for *_, fault in items if fault is not None]
    sound = [item for item in items if item[0] is not None]
    return (*_stack(sound), faults) if sound else (None, None, faults)


def _stack(items: Sequence[Item]) -> tuple[Tensor, Tensor]:
    inputs = torch.stack([tensor for tensor, *_ in items if tensor is not None])
    return inputs, torch.tensor([label for _, label, _ in items])


def train_loader(
    images: ImageSet | StreamSet, config: TrainConfig, device: torch.device, world: World | None = None
) -> tuple[DataLoader[TrainBatch], StepBatches]:
    """This process's parts of each step, and the sampler that decides which come next."""
    world = world or World()
    batches: StepBatches
    if isinstance(images, StreamSet):
        batches = StreamBatches(images, config, world)
    else:
        batches = EpochBatches(images, config, world)
    options = _loader_options(config.workers, device)
    loader: DataLoader[Any] = DataLoader(
        _Replacing(images), batch_sampler=batches, collate_fn=_join_training, **options
    )
    return loader, batches


class EvalLoader(DataLoader):
    """Batches (input, label) of all images in order, for `evaluate`; what cannot be read is left out.

    Attributes:
        faults: what is wrong with the images that were left out, by now.
    """

    def __init__(self, images: ImageSet | StreamSet, batch_size: int, **options: Any) -> None:
        super().__init__(_Tolerant(images), collate_fn=_join_sound, **options)
        self.faults: list[str] = []

    def __iter__(self) -> Any:
        for inputs, labels, faults in super().__iter__():
            self.faults += [fault for fault in faults if fault not in self.faults]
            if inputs is not None:
                yield inputs, labels


class _Shared(Sampler[list[Any]]):
    """Keys of every n-th image, in batches."""

    def __init__(self, images: ImageSet | StreamSet, batch_size: int, world: World) -> None:
        self.images, self.batch_size, self.world = images, batch_size, world

    def __len__(self) -> int:
        share = len(range(self.world.rank, len(self.images), self.world.size))
        return -(-share // self.batch_size)

    def __iter__(self) -> Iterator[list[Any]]:
        keys = islice(self.images.eval_keys(), self.world.rank, None, self.world.size)
        while batch := list(islice(keys, self.batch_size)):
            yield batch


def eval_loader(
    images: ImageSet | StreamSet,
    batch_size: int = 64,
    workers: int = 0,
    device: torch.device | str = "cpu",
    world: World | None = None,
) -> EvalLoader:
    """All images in order (this process's share of them), for `evaluate`."""
    sampler = _Shared(images, batch_size, world or World())
    options = _loader_options(workers, torch.device(device))
    return EvalLoader(images, batch_size, batch_sampler=sampler, **options)


def _loader_options(workers: int, device: torch.device) -> dict[str, Any]:
    if workers < 0:
        raise UserError(f"workers: expected at least 0, got {workers}")
    return {
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "pin_memory": device.type == "cuda",
        "worker_init_fn": _leave_signals_to_the_parent if workers else None,
        # Its own, or starting an iterator would draw from the global one.
        "generator": torch.Generator(),
    }


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C and a batch system's SIGTERM reach the whole process group; the parent decides what they mean.

    On SIGTERM a worker has to end, because that is how the parent ends it on its way out. It does so with
    exit code 0: a death by signal would raise an error in the middle of whatever the parent is doing.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda signum, frame: os._exit(0))
