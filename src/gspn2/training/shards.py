"""Tar shards, WebDataset's among them, read in any order through an index.

A sample is a run of members with one name up to the first dot: an image, and `.cls` (a number or a name),
`.json` (with "label", "cls" or "class") or, without either, its folder for the class. The index (where in the
file each image lies) is made once and kept in the user's cache folder. Shards have to be on a file system;
compressed ones cannot be read in any order.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import io
import json
import os
import re
import sys
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from .errors import DataError
from .folders import is_image_name
from .samples import Parts, Samples, some
from .transforms import open_image

if TYPE_CHECKING:
    from PIL.Image import Image

CLASS_NAMES = ("classes.txt", "classnames.txt")
_TRAIN, _TEST = re.compile(r"train", re.IGNORECASE), re.compile(r"val|test", re.IGNORECASE)
_LABEL_KEYS = ("label", "cls", "class")
_MOST_CLASSES = 10**6
"""Larger numbers are no classes but dates, identities and the like."""
Entry = tuple[str, int, int, str | int]
"""Name of a member, offset and size of its bytes, and the class as it was found."""


@dataclass(frozen=True)
class ShardImage:
    """One member of a tar file."""

    shard: str
    member: str
    offset: int
    size: int

    @property
    def name(self) -> str:
        """Shard and member."""
        return f"{self.shard}/{self.member}"

    def read_image(self) -> Image:
        """The image; a DataError where it cannot be read."""
        try:
            file = _opened(self.shard, os.getpid())
            file.seek(self.offset)
            content = file.read(self.size)
        except OSError as error:
            raise DataError(f"{self.name}: cannot be read: {error}") from error
        return open_image(io.BytesIO(content), self.name)


# By process: a position in a file that was inherited is shared with the parent.
@functools.lru_cache(maxsize=64)
def _opened(path: str, process: int) -> IO[bytes]:
    return open(path, "rb")


class ShardImages(Sequence[ShardImage]):
    """The images of some shards, a few bytes each.

    Args:
        shards: paths.
        groups: which shard each image is in.
        members: name of each.
        places: offset and size of each, (N, 2).
    """

    def __init__(self, shards: Sequence[str], groups: np.ndarray, members: Any, places: np.ndarray) -> None:
        self.shards = list(shards)
        self.groups = groups
        self.members = np.asarray(members, dtype=object)
        self.places = places

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: Any) -> Any:
        offset, size = self.places[index].tolist()
        return ShardImage(self.shards[self.groups[index]], self.members[index], offset, size)

    def take(self, indices: Sequence[int]) -> ShardImages:
        """Some of them."""
        chosen = np.asarray(indices, dtype=np.int64)
        return ShardImages(self.shards, self.groups[chosen], self.members[chosen], self.places[chosen])

    def names(self) -> Iterator[str]:
        """By which moved shards stay the same data."""
        stems = [Path(shard).name for shard in self.shards]
        for group, member in zip(self.groups, self.members, strict=True):
            yield f"{stems[group]}/{member}"


def shard_files(data: str) -> list[str]:
    """Tar files that `data` means: of a folder and the folders in it, a pattern or a range in braces."""
    path = Path(data)
    if path.is_dir():
        return sorted(str(p) for p in [*path.glob("*.tar"), *path.glob("*/*.tar")] if p.is_file())
    if not data.endswith(".tar"):
        return []
    found = [name for pattern in _braces(data) for name in sorted(glob.glob(pattern))]
    if not found:
        raise DataError(f"{data}: no such file")
    return found


def _braces(pattern: str) -> list[str]:
    """{000..127} and {a,b}, as shells and WebDataset write them."""
    inner = re.search(r"\{([^{}]*)\}", pattern)
    if not inner:
        return [pattern]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", inner[1])
    if numbers:
        first, last = numbers[1], numbers[2]
        choices = [f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1)]
    else:
        choices = inner[1].split(",")
    head, tail = pattern[: inner.start()], pattern[inner.end() :]
    return [name for choice in choices for name in _braces(head + choice + tail)]


def find_shards(data: str) -> Parts:
    """Training and test images of shards, told apart by "train", "val" or "test" in a path."""
    files = shard_files(data)
    with ThreadPoolExecutor(8) as readers:
        indexed = list(readers.map(shard_index, files))
    for file, entries in zip(files, indexed, strict=True):
        if not entries:
            raise DataError(f"{file}: no image with a class in this shard")
    names, labels = _classes(data, files, indexed)
    roles = [_role(data, file) for file in files]

    def part(*wanted: str) -> Samples | None:
        chosen = [i for i, role in enumerate(roles) if role in wanted]
        if not chosen:
            return None
        members = [entry[0] for i in chosen for entry in indexed[i]]
        places = np.array([entry[1:3] for i in chosen for entry in indexed[i]], dtype=np.int64)
        groups = np.repeat(np.arange(len(chosen)), [len(indexed[i]) for i in chosen])
        sources = ShardImages([files[i] for i in chosen], groups, members, places)
        return Samples(sources, [label for i in chosen for label in labels[i]])

    if "test" in roles:
        missing = f"{data}: has shards for testing but none for training"
        return Parts(names, train=part("train", "other"), test=part("test"), missing=missing)
    return Parts(names, whole=part("train", "other"))


def _role(data: str, file: str) -> str:
    path = Path(file)
    within = path.relative_to(data).as_posix() if Path(data).is_dir() else path.name
    if _TRAIN.search(within):
        return "train"
    return "test" if _TEST.search(within) else "other"


def _classes(
    data: str, files: list[str], indexed: list[list[Entry]]
) -> tuple[tuple[str, ...], list[list[int]]]:
    """Class names, and the class index of every entry."""
    found = {label for entries in indexed for *_, label in entries}
    listed = next((p for n in CLASS_NAMES if (p := Path(files[0]).parent / n).is_file()), None)
    if listed is None and Path(data).is_dir():
        listed = next((p for n in CLASS_NAMES if (p := Path(data) / n).is_file()), None)
    names = tuple(listed.read_text(encoding="utf-8").split("\n")) if listed else ()
    names = tuple(name.strip() for name in names if name.strip())
    if all(isinstance(label, int) for label in found):
        lowest, count = min(map(int, found)), max(map(int, found)) + 1
        if lowest < 0 or count > _MOST_CLASSES:
            wrong = lowest if lowest < 0 else count - 1
            raise DataError(f"{data}: expected classes from 0 to {_MOST_CLASSES - 1}, got {wrong}")
        names = names or tuple(str(i) for i in range(count))
        if count > len(names):
            raise DataError(f"{listed}: has {len(names)} names, but the shards have a class {count - 1}")
        return names, [[int(label) for *_, label in entries] for entries in indexed]
    names = names or tuple(sorted(str(label) for label in found))
    index = {name: i for i, name in enumerate(names)}
    unknown = sorted({str(label) for label in found} - set(names))
    if unknown:
        raise DataError(f"{data}: class {', '.join(unknown[:5])} is not among {some(names)}")
    return names, [[index[str(label)] for *_, label in entries] for entries in indexed]


def shard_index(path: str) -> list[Entry]:
    """The images of a shard, from the cache where it is up to date.

    Raises:
        DataError: not a tar file, a compressed or a damaged one.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    identity = f"2\0{os.path.abspath(path)}\0{status.st_size}\0{status.st_mtime_ns}"
    kept = _cache() / f"{hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()}.json"
    # A cache that cannot be used, for whatever reason, costs time and nothing else.
    with contextlib.suppress(OSError, ValueError, TypeError):
        return [tuple(entry) for entry in json.loads(kept.read_text(encoding="utf-8"))]
    entries = list(_scan(path))
    with contextlib.suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        draft = kept.with_suffix(f".{os.getpid()}.tmp")
        draft.write_text(json.dumps(entries), encoding="utf-8")
        os.replace(draft, kept)
    return entries


def _cache() -> Path:
    named = os.environ.get("GSPN2_CACHE_DIR")
    if named:
        return Path(named) / "shards"
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "gspn2" / "shards"


def _scan(path: str) -> Iterator[Entry]:
    """Read a shard's headers, and of its contents the classes alone."""
    for tar, members in grouped(path):
        yield from _sample(tar, members)


def grouped(path: str) -> Iterator[tuple[tarfile.TarFile, list[tarfile.TarInfo]]]:
    """The samples of a shard: the open file, and the members of each.

    Raises:
        DataError: not a tar file, a compressed or a damaged one.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            key: str | None = None
            group: list[tarfile.TarInfo] = []
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                if base.startswith("."):
                    continue
                this = f"{folder}/{base.partition('.')[0]}"
                if this != key and group:
                    yield tar, group
                    group = []
                key = this
                group.append(member)
            _check_end(tar)
            if group:
                yield tar, group
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{path}: not an uncompressed tar file, or a damaged one: {error}") from error


def _check_end(tar: tarfile.TarFile) -> None:
    """A ReadError unless the file ends as tar files do: tarfile takes a damaged header for an end."""
    assert tar.fileobj is not None, "it is open"
    tar.fileobj.seek(tar.offset)
    if any(block := tar.fileobj.read(tarfile.BLOCKSIZE)) or len(block) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"no member and no end of the archive at byte {tar.offset}")


def _sample(tar: tarfile.TarFile, members: list[tarfile.TarInfo]) -> Iterator[Entry]:
    images = [m for m in members if is_image_name(m.name.rpartition("/")[2])]
    label = _label(tar, members)
    if label is None and images:
        label = images[0].name.rpartition("/")[0].rpartition("/")[2] or None
    if images and label is not None:
        yield images[0].name, images[0].offset_data, images[0].size, label


def _label(tar: tarfile.TarFile, members: list[tarfile.TarInfo]) -> str | int | None:
    for member in members:
        kind = member.name.rpartition("/")[2].partition(".")[2].lower()
        if kind not in ("cls", "json"):
            continue
        file = tar.extractfile(member)
        try:
            text = file.read().decode("utf-8").strip() if file else ""
            described: Any = text if kind == "cls" else json.loads(text)
        except ValueError as error:  # bytes that are no text, or text that is no JSON
            raise DataError(f"{tar.name!s}/{member.name}: cannot be read: {error}") from error
        if kind == "cls":
            return int(text) if re.fullmatch(r"-?[0-9]+", text) else text or None
        keys = _LABEL_KEYS if isinstance(described, dict) else ()
        value = next((described[k] for k in keys if k in described), None)
        if isinstance(value, int | str):
            return value
    return None
