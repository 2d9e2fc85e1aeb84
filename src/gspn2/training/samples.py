"""What every kind of data comes down to: sources of images with labels, in parts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch

from .errors import DataError
from .rng import derive_seed
from .transforms import open_image

if TYPE_CHECKING:
    from PIL.Image import Image


class Stored(Protocol):
    """An image that is read when it is needed."""

    @property
    def name(self) -> str:
        """What a person would look for."""

    def read_image(self) -> Image:
        """The image; a DataError where it cannot be read."""


Source = Any
"""A file's name, an image, or a `Stored`."""


def read_source(source: Source) -> Image:
    """The image of a source as it was stored.

    Raises:
        DataError: it cannot be read; the message names it.
    """
    if isinstance(source, str):
        return open_image(source)
    return source.read_image() if hasattr(source, "read_image") else source


class Samples(NamedTuple):
    """Images and the class of each. A sequence of its own kind has `take(indices)`."""

    sources: Sequence[Source]
    labels: Sequence[int]

    def take(self, indices: Sequence[int]) -> Samples:
        """Some of them."""
        sources = self.sources
        chosen = sources.take(indices) if hasattr(sources, "take") else [sources[i] for i in indices]
        return Samples(chosen, [self.labels[i] for i in indices])


@dataclass(frozen=True)
class Parts:
    """A data set as it was found: divided into training and test images, or whole.

    Args:
        class_names: in the order of the labels.
        train, test: where the data brings a split.
        whole: where it does not.
        missing: why there is no `train`, where there is only `test`.
    """

    class_names: tuple[str, ...]
    train: Samples | None = None
    test: Samples | None = None
    whole: Samples | None = None
    missing: str = ""

    @property
    def brings_split(self) -> bool:
        """Were the test images somebody else's choice?"""
        return self.whole is None

    def divided(self, data: str, fraction: float, seed: int) -> tuple[Samples, Samples]:
        """Training and test images; without a split of its own, `fraction` of every class is held out."""
        if self.whole is not None:
            kept, held_out = stratified_split(self.whole.labels, fraction, seed)
            if not held_out:
                raise DataError(f"{data}: a single image a class leaves none for testing")
            return self.whole.take(kept), self.whole.take(held_out)
        if self.train is None or self.test is None:
            raise DataError(self.missing or f"{data}: expected training and test images")
        return self.train, self.test

    def all(self) -> list[Samples]:
        """Everything there is."""
        return [part for part in (self.whole, self.train, self.test) if part is not None]


def stratified_split(labels: Sequence[int], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices (kept, held out): `fraction` of every class held out, at least one image of two or more."""
    members: dict[int, list[int]] = {}
    for i, label in enumerate(labels):
        members.setdefault(label, []).append(i)
    kept: list[int] = []
    held_out: list[int] = []
    for label, indices in members.items():
        count = min(max(1, round(fraction * len(indices))), len(indices) - 1)
        generator = torch.Generator().manual_seed(derive_seed(seed, "split", label))
        order = torch.randperm(len(indices), generator=generator).tolist()
        held_out += [indices[i] for i in order[:count]]
        kept += [indices[i] for i in order[count:]]
    return sorted(kept), sorted(held_out)


def fingerprint(parts: Sequence[tuple[Iterator[str] | Sequence[str], Sequence[int]]]) -> str:
    """Hash of the names and labels of some parts, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for names, labels in parts:
        for name, label in zip(names, labels, strict=True):
            digest.update(f"{name}\0{label}\n".encode())
        digest.update(b"--\n")
    return digest.hexdigest()


def shuffled(count: int, seed: int, groups: np.ndarray | None = None, pool: int = 0) -> np.ndarray:
    """A random order of `count` images.

    Args:
        count: how many.
        seed: of the order.
        groups: number of the file that holds each image, where files are large: they are put in random order,
            and then images are shuffled among `pool` neighbours, so that reading stays in a few files.
        pool: images that are shuffled among themselves.
    """
    generator = torch.Generator().manual_seed(seed)
    if groups is None:
        return torch.randperm(count, generator=generator).numpy()
    files = torch.randperm(int(groups.max()) + 1, generator=generator).numpy()
    order = np.argsort(files[groups], kind="stable")
    for start in range(0, count, pool):
        block = order[start : start + pool].copy()
        order[start : start + pool] = block[torch.randperm(len(block), generator=generator).numpy()]
    return order


def some(names: Sequence[str]) -> str:
    """The first names of a list that may be long."""
    return ", ".join(names[:10]) + (f", ... ({len(names)} in all)" if len(names) > 10 else "")
