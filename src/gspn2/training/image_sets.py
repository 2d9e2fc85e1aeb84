"""Images with labels under one transform: sets that can be read in any order, and streams."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from .rng import derive_seed, seeded
from .samples import Source, read_source
from .transforms import Transform

if TYPE_CHECKING:
    from PIL.Image import Image

SampleKey = int | tuple[int, int]


class ImageSet(Dataset):
    """Images with labels under one transform.

    `images[index]` is (input, label) with the transform of epoch 0; `images[epoch, index]` that of any epoch.
    Both depend on nothing else, so that order, workers and interruptions cannot change an image.

    Args:
        sources: file names, images, or anything with `read_image()` and `name`.
        labels: class index of each.
        transform: image to tensor (in_chans, H, W).
        seed: of what is random in the transform.
    """

    def __init__(
        self, sources: Sequence[Source], labels: Sequence[int], transform: Transform, seed: int = 0
    ) -> None:
        self.sources = sources
        self.labels = [int(label) for label in labels]
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, key: SampleKey) -> tuple[Tensor, int]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        image = self.image(index)
        with seeded(derive_seed(self.seed, "image", epoch, index)):
            return self.transform(image), self.labels[index]

    def image(self, index: int) -> Image:
        """The image as it was stored."""
        return read_source(self.sources[index])

    @property
    def groups(self) -> np.ndarray | None:
        """Number of the large file that holds each image; None where each has its own."""
        return getattr(self.sources, "groups", None)

    def eval_keys(self) -> Iterator[int]:
        """What to ask for to get every image, as it is tested."""
        return iter(range(len(self)))

    def subset(self, indices: Sequence[int]) -> ImageSet:
        """These images, under the same transform."""
        sources = [self.sources[i] for i in indices]
        return ImageSet(sources, [self.labels[i] for i in indices], self.transform, self.seed)


class Stream(Protocol):
    """Sources with labels that can only be read one after the other."""

    def rows(self, skip: int = 0) -> Iterator[tuple[Source, int]]:
        """All of them in order, without the first `skip`."""


class StreamSet(Dataset):
    """Images of a stream under one transform. A key brings its image along, unread.

    Args:
        stream: where they come from.
        length: images of a pass; 0 where nobody knows.
        transform: image to tensor (in_chans, H, W).
        seed: of what is random in the transform.
        names: class index of a label; None where labels are indices.
    """

    def __init__(
        self,
        stream: Stream,
        length: int,
        transform: Transform,
        seed: int = 0,
        relabel: Sequence[int] | None = None,
    ) -> None:
        self._stream = stream
        self.length = length
        self.transform = transform
        self.seed = seed
        self._relabel = relabel

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: tuple[int, int, Source, int]) -> tuple[Tensor, int]:
        epoch, number, source, label = key
        image = read_source(source)
        with seeded(derive_seed(self.seed, "image", epoch, number)):
            return self.transform(image), label

    def __getstate__(self) -> dict[str, Any]:
        # Workers get their images from the keys: an open stream is of no use to them.
        return {**self.__dict__, "_stream": None}

    def rows(self, skip: int = 0) -> Iterator[tuple[Source, int]]:
        """Sources and class indices in order."""
        for source, label in self._stream.rows(skip):
            yield source, label if self._relabel is None else self._relabel[label]

    def eval_keys(self) -> Iterator[tuple[int, int, Source, int]]:
        """What to ask for to get every image, as it is tested."""
        return ((0, number, *row) for number, row in enumerate(self.rows()))
