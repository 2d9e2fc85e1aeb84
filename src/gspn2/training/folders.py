"""Folders of class folders, and the built-in digits."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from .errors import DataError
from .samples import Parts, Samples, some

TRAIN_FOLDERS = ("train", "training")
TEST_FOLDERS = ("val", "valid", "validation", "test", "testing")


def find_folder(data: str) -> Parts:
    """What is in a folder: class folders, or `train/` and `val/` (or `test/`) of them."""
    root = Path(data)
    train_folder, held_out = split_folders(root)
    if held_out is None:
        samples, names = scan(train_folder or root)
        return Parts(names, whole=samples)
    if train_folder is not None:
        train, names = scan(train_folder)
        return Parts(names, train=train, test=scan(held_out, names)[0])
    test, names = scan(held_out)
    return Parts(names, test=test, missing=f"{data}: has {held_out.name}/ but no train/")


def split_folders(root: Path) -> tuple[Path | None, Path | None]:
    """The folders for training and testing, by any of their usual names; None for what is not there.

    Where neither has the other beside it, other folders say that it is the name of a class.
    """
    if not root.is_dir():
        return None, None
    folders = {p.name.lower(): p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")}
    train = next((folders[name] for name in TRAIN_FOLDERS if name in folders), None)
    test = next((folders[name] for name in TEST_FOLDERS if name in folders), None)
    split = train is not None and test is not None
    if not split and not set(folders) <= {*TRAIN_FOLDERS, *TEST_FOLDERS}:
        return None, None
    return train, test


def find_digits() -> Parts:
    """scikit-learn's handwritten digits."""
    from PIL import Image as module
    from sklearn.datasets import load_digits

    digits = load_digits()
    # Values go from 0 to 16.
    pixels = (digits.images * (255 / 16)).round().astype("uint8")
    samples = Samples([module.fromarray(image) for image in pixels], digits.target.tolist())
    return Parts(tuple("0123456789"), whole=samples)


def scan(root: Path, class_names: tuple[str, ...] | None = None) -> tuple[Samples, tuple[str, ...]]:
    """Image files below the class folders of `root`; labels in the order of `class_names` where given."""
    if not root.is_dir():
        raise DataError(f"{root}: {'is a file, expected a folder' if root.exists() else 'no such folder'}")
    found = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not found:
        raise DataError(f"{root}: expected class folders with images, found no folder")
    names = class_names or tuple(found)
    unknown = [name for name in found if name not in names]
    if unknown:
        raise DataError(
            f"{root}: class {', '.join(unknown[:5])} is not among the training classes {some(names)}"
        )
    index = {name: label for label, name in enumerate(names)}
    files: list[str] = []
    labels: list[int] = []
    for name in found:
        images = image_files(root / name)
        if not images:
            raise DataError(f"{root / name}: class folder without images")
        files += images
        labels += [index[name]] * len(images)
    return Samples(files, labels), names


def image_files(root: str | Path) -> list[str]:
    """Files below `root` with the name of an image, sorted.

    Links are followed, but not into a folder that the way there leads through; what is hidden is left out.
    """
    found: list[str] = []
    for folder, folders, names in os.walk(root, followlinks=True):
        here = os.path.realpath(folder)
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and not _contains(os.path.realpath(os.path.join(folder, name)), here)
        ]
        found += [os.path.join(folder, name) for name in names if is_image_name(name)]
    return sorted(found)


def _contains(outer: str, inner: str) -> bool:
    return inner == outer or inner.startswith(outer.rstrip(os.sep) + os.sep)


def is_image_name(name: str) -> bool:
    """Does a file's name end like an image's?"""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    return name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")


def relative_names(data: str, sources: Sequence[str]) -> list[str]:
    """Names by which a moved folder stays the same data."""
    return [Path(source).relative_to(data).as_posix() for source in sources]
