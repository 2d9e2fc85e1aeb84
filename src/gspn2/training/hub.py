"""Data sets of the `datasets` library: local and on the hub, whole ("hf:") or as a stream ("hf-stream:")."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import DataError
from .samples import Parts, Samples, some
from .transforms import open_image

if TYPE_CHECKING:
    from PIL.Image import Image

WHOLE, STREAM = "hf:", "hf-stream:"
TEST_SPLITS = ("validation", "val", "valid", "test")


@dataclass(frozen=True)
class HubImage:
    """An image as a data set stores it: encoded, with or without a file's name."""

    name: str
    content: bytes | None
    path: str | None

    def read_image(self) -> Image:
        """The image; a DataError where it cannot be read."""
        if self.content is not None:
            return open_image(io.BytesIO(self.content), self.name)
        if self.path is None:
            raise DataError(f"{self.name}: no image in this row")
        return open_image(self.path)


@dataclass(frozen=True)
class Columns:
    """Where images and classes are in a row."""

    image: str
    label: str
    class_names: tuple[str, ...] | None


class HubImages(Sequence[HubImage]):
    """The images of a split, read from its files when they are needed."""

    def __init__(self, rows: Any, column: str, name: str) -> None:
        self._rows, self._column, self._name = rows, column, name

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return stored_image(self._rows[int(index)][self._column], f"{self._name}[{index}]")

    def take(self, indices: Sequence[int]) -> HubImages:
        """Some of them."""
        return HubImages(self._rows.select(indices), self._column, self._name)

    def names(self) -> Iterator[str]:
        """Rows have numbers, not names."""
        return (str(i) for i in range(len(self)))


class HubStream:
    """A split that is read from its beginning each time."""

    def __init__(self, rows: Any, columns: Columns, name: str) -> None:
        self._rows, self._columns, self._name = rows, columns, name

    def rows(self, skip: int = 0) -> Iterator[tuple[HubImage, int]]:
        """Images, still encoded, and classes, without the first `skip`."""
        names = self._columns.class_names or ()
        index = {name: i for i, name in enumerate(names)}
        rows = self._rows.skip(skip) if skip else self._rows
        for number, row in enumerate(rows, start=skip):
            name = f"{self._name}[{number}]"
            label = class_number(row[self._columns.label], index, name)
            yield stored_image(row[self._columns.image], name), label


def class_number(value: Any, index: dict[str, int], name: str, numbered: bool = True) -> int:
    """The number of a class that a row tells by number or name.

    Args:
        index: numbers by name.
        name: of the row, for messages.
        numbered: are numbers in the column those of classes? Otherwise they are names like others.

    Raises:
        DataError: there is no such class; rows that nobody labeled have -1, or nothing.
    """
    number = value if numbered and isinstance(value, int) else index.get(str(value), -1)
    if not 0 <= number < len(index):
        raise DataError(f"{name}: has class {value!r}, expected one of {some(tuple(index))}")
    return number


def stored_image(stored: Any, name: str) -> HubImage:
    """What a row holds in an undecoded column of images; `name` is for messages."""
    if not isinstance(stored, dict):
        return HubImage(name, None, None)
    path = stored.get("path")
    return HubImage(f"{name} ({path})" if path else name, stored.get("bytes"), path)


def find_hub(data: str) -> Parts:
    """A whole data set: its own split, or everything for us to divide."""
    name = data.removeprefix(WHOLE)
    splits = load_splits(name, stream=False)
    train, test = _roles(splits, data)
    columns = _columns(splits[train or test], data)
    parts, labels = {}, {}
    for split in filter(None, (train, test)):
        rows = splits[split]
        labels[split] = rows[columns.label]
        images = rows.select_columns([columns.image]).cast_column(columns.image, undecoded())
        parts[split] = HubImages(images, columns.image, f"{name}/{split}")
    told = columns.class_names
    names = told or tuple(sorted({str(v) for part in labels.values() for v in part if v is not None}))
    index = {value: i for i, value in enumerate(names)}
    samples: dict[str, Samples] = {}
    for split, values in labels.items():
        rows = (f"{name}/{split}[{i}]" for i in range(len(values)))
        numbers = [class_number(v, index, row, told is not None) for v, row in zip(values, rows, strict=True)]
        samples[split] = Samples(parts[split], numbers)
    if train and test:
        return Parts(names, train=samples[train], test=samples[test])
    if train:
        return Parts(names, whole=samples[train])
    return Parts(names, test=samples[str(test)], missing=f"{data}: has no split called train")


@dataclass(frozen=True)
class HubStreams:
    """A data set as streams; lengths are 0 where nobody says."""

    class_names: tuple[str, ...]
    train: HubStream | None
    test: HubStream | None
    train_length: int
    test_length: int


def find_streams(data: str) -> HubStreams:
    """A data set of which nothing is kept: it has to bring a split, and to name its classes."""
    name = data.removeprefix(STREAM)
    splits = load_splits(name, stream=True)
    train, test = _roles(splits, data)
    columns = _columns(splits[train or test], data)
    if columns.class_names is None:
        raise DataError(f"{data}: column {columns.label} does not name its classes: use {WHOLE}{name}")

    def stream(split: str | None) -> tuple[HubStream | None, int]:
        if split is None:
            return None, 0
        rows = splits[split].select_columns([columns.image, columns.label])
        info = (rows.info.splits or {}).get(split)
        images = rows.cast_column(columns.image, undecoded())
        return HubStream(images, columns, f"{name}/{split}"), info.num_examples or 0 if info else 0

    (ours, count), (theirs, tests) = stream(train), stream(test)
    return HubStreams(columns.class_names, ours, theirs, count, tests)


def load_splits(name: str, stream: bool) -> Any:
    """Splits by name, of NAME or NAME#CONFIG on the hub, of a folder, or of what `save_to_disk` wrote.

    Raises:
        DataError: it cannot be loaded, or the library is not there.
    """
    try:
        import datasets
    except ImportError:
        raise DataError(f'{name}: needs the library datasets (pip install "gspn2[datasets]")') from None

    path, _, config = name.partition("#")
    if not path:
        raise DataError(f"data: expected the name of a data set behind {STREAM if stream else WHOLE}")
    folder = Path(path)
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            found = datasets.load_from_disk(path)
            if not isinstance(found, dict):
                found = datasets.DatasetDict({"train": found})
            if not stream:
                return found
            return {split: rows.to_iterable_dataset() for split, rows in found.items()}
        return datasets.load_dataset(path, config or None, streaming=stream)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{name}: cannot be loaded: {str(error).splitlines()[0]}") from error


def _roles(splits: Any, data: str) -> tuple[str | None, str | None]:
    test = next((split for split in TEST_SPLITS if split in splits), None)
    train = "train" if "train" in splits else None
    if train is None and test is None:
        raise DataError(f"{data}: expected splits called train and validation, got {', '.join(splits)}")
    return train, test


def _columns(rows: Any, data: str) -> Columns:
    from datasets import ClassLabel, Image

    features = rows.features or {}
    images = [name for name, kind in features.items() if isinstance(kind, Image)]
    labels = [name for name, kind in features.items() if isinstance(kind, ClassLabel)]
    labels += [name for name in ("label", "labels", "class") if name in features and name not in labels]
    if not images or not labels:
        raise DataError(f"{data}: expected a column of images and one of classes, got {', '.join(features)}")
    kind = features[labels[0]]
    return Columns(images[0], labels[0], tuple(kind.names) if isinstance(kind, ClassLabel) else None)


def undecoded() -> Any:
    """The kind of a column whose images stay encoded."""
    from datasets import Image

    return Image(decode=False)
