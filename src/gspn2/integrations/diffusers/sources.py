"""Where pictures with captions come from: folders, tar shards, data sets of the `datasets` library, streams.

A source lists its pictures once, in an order of its own, and later brings those that are asked for in that
order. What it lists is kept beside the latents, so that a large source is not read again by every run. A
picture is known by a digest of its bytes (in a folder by name, size and time), wherever it is stored.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from gspn2.training.checkpoint import replacing
from gspn2.training.errors import DataError
from gspn2.training.hub import STREAM, WHOLE, load_splits, stored_image, undecoded
from gspn2.training.samples import Source as Stored
from gspn2.training.samples import some
from gspn2.training.shards import ShardImage, grouped, shard_files

from .pairs import Picture

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
CAPTIONS = ("caption", "text", "prompt", "captions")
"""Columns, and entries of JSON files, that hold captions unless another is named."""
_ORIENTATION = 0x0112
_EVERY = 100  # pictures between reports


@dataclass(frozen=True)
class Options:
    """What to take of a source.

    Args:
        image_column: of a data set; None for the first that holds images.
        caption_column: of a data set, or entry of shards' JSON files; None for the first of `CAPTIONS`.
        pictures: the first so many; None for all.
    """

    image_column: str | None = None
    caption_column: str | None = None
    pictures: int | None = None


@dataclass(frozen=True)
class Fault:
    """A picture that is left out.

    Args:
        message: its name, and why.
    """

    message: str


class Source(Protocol):
    """Pictures with captions."""

    def identity(self) -> Any:
        """JSON that changes with what is listed; None where listing is quick and nothing has to be kept."""

    def rows(self) -> Iterator[Picture | Fault]:
        """All pictures."""

    def open(self, pictures: Sequence[Picture]) -> Iterator[Stored]:
        """Some of the pictures, in the order in which they were listed."""


@dataclass(frozen=True)
class Listing:
    """What a source holds; `faults` are pictures that are left out, each with its reason."""

    pictures: list[Picture]
    faults: list[str]


def find_source(data: str, options: Options) -> Source:
    """The source that `data` names: hf:NAME, hf-stream:NAME, tar shards, or a folder.

    Raises:
        DataError: there is no such thing, or it has no pictures or captions.
    """
    if data.startswith((WHOLE, STREAM)):
        return Hub(data, options)
    files = shard_files(data)
    return Shards(files, options) if files else Folder(Path(data))


def list_pictures(
    source: Source, data: str, options: Options, kept: Path, progress: Callable[[int], None]
) -> Listing:
    """What a source holds, as listed before where nothing has changed.

    Args:
        source: of `data` and `options`.
        data, options: as for `find_source`.
        kept: folder for lists.
        progress: told the number of pictures from time to time.

    Raises:
        DataError: there is not one picture with a caption, or the source is damaged.
    """
    identity = source.identity()
    path = None
    if identity is not None:
        named = json.dumps([1, identity, asdict(options)])
        path = kept / f"list-{hashlib.sha256(named.encode()).hexdigest()[:32]}.json"
        listing = _read_listing(path)
        if listing is not None:
            return listing
    listing = _listed(source.rows(), options.pictures, progress)
    if not listing.pictures:
        faults = f", but {len(listing.faults)} without: {listing.faults[0]}" if listing.faults else ""
        raise DataError(f"data: no readable picture with a caption in {data}{faults}")
    if path is not None:
        kept.mkdir(parents=True, exist_ok=True)
        with replacing(path) as draft:
            draft.write_text(json.dumps(asdict(listing)), encoding="utf-8")
    return listing


def _listed(rows: Iterator[Picture | Fault], limit: int | None, progress: Callable[[int], None]) -> Listing:
    pictures: list[Picture] = []
    faults: list[str] = []
    for row in rows:
        if isinstance(row, Fault):
            faults.append(row.message)
            continue
        pictures.append(row)
        if len(pictures) % _EVERY == 0:
            progress(len(pictures))
        if len(pictures) == limit:
            break
    return Listing(pictures, faults)


def _read_listing(path: Path) -> Listing | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Listing([Picture(**picture) for picture in found["pictures"]], found["faults"])
    except (OSError, ValueError, TypeError, KeyError):  # not there, or damaged: it is made anew
        return None


class Folder:
    """Pictures in a folder and those below it, by name; captions beside them: cat.jpg, cat.txt."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            why = "is a file, expected a folder or .tar files" if folder.exists() else "no such folder"
            raise DataError(f"data: {folder}: {why}")
        self.folder = folder

    def identity(self) -> None:
        """Nothing is kept: of a picture its header is read alone."""

    def rows(self) -> Iterator[Picture | Fault]:
        """All pictures.

        Raises:
            DataError: no picture, or a caption that is missing, empty or unreadable.
        """
        paths = self.folder.rglob("*")
        files = sorted(p for p in paths if p.suffix.lower() in IMAGES and not p.name.startswith("."))
        if not files:
            raise DataError(f"data: no picture ({', '.join(IMAGES)}) in {self.folder}")
        for file in files:
            caption = _caption_beside(file)
            try:
                about = file.stat()
                height, width = shown_size(file)
            except Exception as error:  # whatever a decoder says to damaged bytes
                yield Fault(f"{file}: {error}")
                continue
            relative = file.relative_to(self.folder).as_posix()
            key = f"{file.resolve()} {about.st_size} {about.st_mtime_ns}"
            label = f"{relative} {about.st_size}"
            yield Picture(str(file), str(file), key, label, caption, height, width)

    def open(self, pictures: Sequence[Picture]) -> Iterator[Stored]:
        """Their files."""
        return (picture.place for picture in pictures)


def _caption_beside(file: Path) -> str:
    text = file.with_suffix(".txt")
    try:
        caption = _plain(text.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"data: {file} has no caption, expected {text.name} beside it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data: cannot read {text}: {error}") from error
    if not caption:
        raise DataError(f"data: the caption {text} is empty")
    return caption


class Shards:
    """Samples of tar files, WebDataset's: an image, and its caption in .txt or .json.

    A sample is a run of members with one name up to the first dot. A caption column that is named is looked
    for in .json first.
    """

    def __init__(self, files: Sequence[str], options: Options) -> None:
        self.files, self.options = list(files), options

    def identity(self) -> Any:
        """Paths, sizes and times."""
        try:
            found = [(os.path.abspath(file), os.stat(file)) for file in self.files]
        except OSError as error:
            raise DataError(f"data: cannot be read: {error}") from error
        return ["shards", *([path, about.st_size, about.st_mtime_ns] for path, about in found)]

    def rows(self) -> Iterator[Picture | Fault]:
        """All pictures; samples without a caption are left out."""
        for number, file in enumerate(self.files):
            for tar, members in grouped(file):
                images = [m for m in members if m.name.lower().endswith(IMAGES)]
                if images:
                    yield self._row(number, tar, images[0], members)

    def _row(
        self, number: int, tar: tarfile.TarFile, image: tarfile.TarInfo, members: list[tarfile.TarInfo]
    ) -> Picture | Fault:
        name = f"{self.files[number]}/{image.name}"
        try:
            caption = self._caption(tar, members)
        except ValueError as error:
            return Fault(f"{name}: cannot read its caption: {error}")
        if not caption:
            return Fault(f"{name}: no caption")
        place = [number, image.name, image.offset_data, image.size]
        return _picture(name, place, caption, _content(tar, image))

    def _caption(self, tar: tarfile.TarFile, members: list[tarfile.TarInfo]) -> str:
        kinds = ("json", "txt") if self.options.caption_column else ("txt", "json")
        for kind in kinds:
            for member in members:
                if member.name.lower().endswith(f".{kind}"):
                    text = _content(tar, member).decode("utf-8")
                    caption = _plain(text) if kind == "txt" else self._entry(json.loads(text))
                    if caption:
                        return caption
        return ""

    def _entry(self, described: Any) -> str:
        wanted = (self.options.caption_column,) if self.options.caption_column else CAPTIONS
        if not isinstance(described, dict):
            return ""
        return next((text for name in wanted if (text := _plain(described.get(name)))), "")

    def open(self, pictures: Sequence[Picture]) -> Iterator[Stored]:
        """Their bytes in the shards."""
        for picture in pictures:
            number, member, offset, size = picture.place
            yield ShardImage(self.files[number], member, offset, size)


class Hub:
    """A data set of the `datasets` library, whole (hf:) or as a stream (hf-stream:): its training split.

    A stream is read for the list, and once more from the first picture that has no latents.
    """

    def __init__(self, data: str, options: Options) -> None:
        self.stream = data.startswith(STREAM)
        self.name = data.removeprefix(STREAM if self.stream else WHOLE)
        splits = load_splits(self.name, self.stream)
        self.split = "train" if "train" in splits else next(iter(splits))
        if len(splits) > 1 and self.split != "train":
            raise DataError(f"data: {data}: expected a split called train, got {', '.join(splits)}")
        rows = splits[self.split]
        self.image, self.caption = _columns(rows, data, options)
        self._rows = rows.select_columns([self.image, self.caption])
        if self._rows.features and type(self._rows.features[self.image]).__name__ == "Image":
            self._rows = self._rows.cast_column(self.image, undecoded())

    def identity(self) -> Any:
        """The name, and what the library knows a stored data set by. A stream is taken to stay the same."""
        known = None if self.stream else self._rows._fingerprint
        return ["stream" if self.stream else "whole", self.name, self.split, self.image, self.caption, known]

    def rows(self) -> Iterator[Picture | Fault]:
        """All pictures; rows without a caption are left out."""
        for number, row in enumerate(self._rows):
            name = self._named(number)
            caption = _plain(row[self.caption])
            if not caption:
                yield Fault(f"{name}: no caption")
                continue
            image = self._stored(row, number)
            try:
                content = image.content if image.content is not None else Path(image.path or "").read_bytes()
            except OSError as error:
                yield Fault(f"{name}: {error if image.path else 'no image in this row'}")
                continue
            yield _picture(name, number, caption, content)

    def open(self, pictures: Sequence[Picture]) -> Iterator[Stored]:
        """Their rows; of a stream all rows up to the last of them are read."""
        if not pictures:
            return
        if not self.stream:
            for picture in pictures:
                yield self._stored(self._rows[picture.place], picture.place)
            return
        first, last = pictures[0].place, pictures[-1].place
        wanted = {picture.place for picture in pictures}
        rows = self._rows.skip(first) if first else self._rows
        for number, row in enumerate(islice(rows, last + 1 - first), start=first):
            if number in wanted:
                wanted.remove(number)
                yield self._stored(row, number)
        if wanted:
            raise DataError(f"data: {self.name} has changed: it had a row {min(wanted)} when it was listed")

    def _named(self, number: int) -> str:
        return f"{self.name}/{self.split}[{number}]"

    def _stored(self, row: Any, number: int) -> Any:
        value = row[self.image]
        return stored_image({"bytes": value} if isinstance(value, bytes) else value, self._named(number))


def _columns(rows: Any, data: str, options: Options) -> tuple[str, str]:
    """Columns of images and of captions."""
    features = rows.features or dict.fromkeys(next(iter(rows), {}))
    images = [name for name, kind in features.items() if type(kind).__name__ == "Image"]
    chosen = {
        "image": (options.image_column, images, "images"),
        "caption": (options.caption_column, [n for n in CAPTIONS if n in features], "captions"),
    }
    found = []
    for kind, (named, candidates, what) in chosen.items():
        if named is not None and named not in features:
            raise DataError(f"{kind}_column: {data} has no column {named}, but {some(list(features))}")
        if named is None and not candidates:
            raise DataError(
                f"data: {data}: expected a column of {what}, got {some(list(features))}; name it with"
                f" --{kind}-column"
            )
        found.append(named or candidates[0])
    return found[0], found[1]


def _picture(name: str, place: Any, caption: str, content: bytes) -> Picture | Fault:
    """A picture by its bytes."""
    try:
        height, width = shown_size(io.BytesIO(content))
    except Exception as error:  # whatever a decoder says to damaged bytes
        return Fault(f"{name}: {error or type(error).__name__}")
    key = hashlib.blake2b(content, digest_size=16).hexdigest()
    return Picture(name, place, key, key, caption, height, width)


def shown_size(file: Any) -> tuple[int, int]:
    """Height and width of an image, turned as its EXIF tag says, from its header."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            width, height = image.size
            # The tag of a PNG may follow its pixels, which would all be read to look for it.
            late = image.format == "PNG" and "exif" not in image.info
            turned = not late and image.getexif().get(_ORIENTATION, 1) >= 5
    except UnidentifiedImageError:
        raise DataError("not an image") from None
    return (width, height) if turned else (height, width)


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return file.read() if file else b""


def _plain(text: Any) -> str:
    """A caption in one line; of several, the first."""
    if isinstance(text, list | tuple):
        text = text[0] if text else ""
    return " ".join(text.split()) if isinstance(text, str) else ""
