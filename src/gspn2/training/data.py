"""Images with labels: the built-in digits and folders of class folders, split, augmented and in batches."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .config import TrainConfig
from .errors import DataError
from .rng import derive_seed, seeded
from .transforms import Preprocess, Transform, augmentation_for, open_image, preprocess_for

if TYPE_CHECKING:
    from PIL.Image import Image

    Source = str | Image

SampleKey = int | tuple[int, int]
TEST_FOLDERS = ("val", "test")


class ImageSet(Dataset):
    """Images with labels under one transform.

    `images[index]` is (input, label) with the transform of epoch 0; `images[epoch, index]` that of any epoch.
    Both depend on nothing else, so that order, workers and interruptions cannot change an image.

    Args:
        sources: file names, or images.
        labels: class index of each.
        transform: image to tensor (in_chans, H, W).
        seed: of what is random in the transform.
    """

    def __init__(
        self, sources: Sequence[Source], labels: Sequence[int], transform: Transform, seed: int = 0
    ) -> None:
        self.sources = list(sources)
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
        source = self.sources[index]
        return open_image(source) if isinstance(source, str) else source

    def subset(self, indices: Sequence[int]) -> ImageSet:
        """These images, under the same transform."""
        return ImageSet(
            [self.sources[i] for i in indices], [self.labels[i] for i in indices], self.transform, self.seed
        )


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Shuffled batches of (epoch, index) keys, from any batch of any epoch on.

    Args:
        images: size of the set. The last, incomplete batch is left out, unless it is the only one.
        batch_size: images a batch.
        seed: of the order.
    """

    def __init__(self, images: int, batch_size: int, seed: int) -> None:
        self.images = images
        self.batch_size = min(batch_size, images)
        self.seed = seed
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        return self.images // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", self.epoch))
        order = torch.randperm(self.images, generator=generator).tolist()
        for batch in range(self.start, len(self)):
            chosen = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield [(self.epoch, index) for index in chosen]


@dataclass(frozen=True)
class Data:
    """A data set, ready for training and testing.

    Args:
        train, test: the two parts; `test` is under `preprocess`, `train` under the augmentation.
        class_names: in the order of the labels.
        preprocess: what an image goes through when nothing is random.
        fingerprint: changes when the list of images or labels does.
    """

    train: ImageSet
    test: ImageSet
    class_names: tuple[str, ...]
    preprocess: Preprocess
    fingerprint: str


def load_data(config: TrainConfig) -> Data:
    """The data set that `config` names, split and with its transforms.

    Raises:
        DataError: no such folder, no classes, a class without images, classes in `val/` that `train/` lacks.
    """
    preprocess = preprocess_for(config)
    augmentation = augmentation_for(config, preprocess)
    train, test, class_names = _split(config.data, config.split_fraction, config.split_seed)
    return Data(
        train=ImageSet(*train, augmentation, config.seed),
        test=ImageSet(*test, preprocess),
        class_names=class_names,
        preprocess=preprocess,
        fingerprint=_fingerprint(config.data, train, test),
    )


def load_test_data(
    data: str,
    preprocess: Preprocess,
    class_names: Sequence[str],
    config: TrainConfig,
    split: str | None = None,
) -> ImageSet:
    """Images to evaluate a trained model on, with labels in the order of its `class_names`.

    Args:
        data: "digits" or a folder; the class folders may be fewer than the model's classes, not others.
        config: of the training run: its split is kept apart from training images.
        split: "test", "train" or "all". None means "test" where there is a split: for the data the model was
            trained on and for folders that bring one; "all" for any other folder.

    Raises:
        DataError: as for `load_data`, and for classes that the model does not have.
    """
    if split is None:
        split = "test" if _brings_split(data) or _same_data(data, config.data) else "all"
    if split == "all" and not _brings_split(data):
        images, names = _everything(data)
    else:
        train, test, names = _split(
            data, config.split_fraction, config.split_seed, need_train=split != "test"
        )
        parts = {"train": train, "test": test, "all": (train[0] + test[0], train[1] + test[1])}
        images = parts[split]
    if not images[0]:
        raise DataError(f"{data}: no image in its {split} part")
    unknown = [name for name in names if name not in class_names]
    if unknown:
        raise DataError(
            f"{data}: the model has no class {', '.join(unknown[:5])}; it has {_some(class_names)}"
        )
    index = {name: i for i, name in enumerate(class_names)}
    return ImageSet(images[0], [index[names[label]] for label in images[1]], preprocess)


def train_loader(
    images: ImageSet, config: TrainConfig, device: torch.device
) -> tuple[DataLoader, EpochBatches]:
    """Batches (input (N, in_chans, H, W), label (N,)) and the sampler that decides which come next."""
    batches = EpochBatches(len(images), config.batch_size, config.seed)
    return DataLoader(images, batch_sampler=batches, **_loader_options(config.workers, device)), batches


def eval_loader(
    images: ImageSet, batch_size: int = 64, workers: int = 0, device: torch.device | str = "cpu"
) -> DataLoader:
    """All images in order, for `evaluate`."""
    return DataLoader(images, batch_size=batch_size, **_loader_options(workers, torch.device(device)))


def _loader_options(workers: int, device: torch.device) -> dict[str, Any]:
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


Samples = tuple[list[Any], list[int]]


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


def _split(
    data: str, fraction: float, seed: int, need_train: bool = True
) -> tuple[Samples, Samples, tuple[str, ...]]:
    if data != "digits" and _brings_split(data):
        root = Path(data)
        held_out = next(root / name for name in TEST_FOLDERS if (root / name).is_dir())
        if (root / "train").is_dir():
            train, names = _scan(root / "train")
            return train, _scan(held_out, names)[0], names
        if not need_train:
            test, names = _scan(held_out)
            return ([], []), test, names
        raise DataError(f"{data}: has {held_out.name}/ but no train/")
    samples, names = _everything(data)
    kept, test_indices = stratified_split(samples[1], fraction, seed)
    if not test_indices:
        raise DataError(f"{data}: a single image a class leaves none for testing")
    return _take(samples, kept), _take(samples, test_indices), names


def _take(samples: Samples, indices: list[int]) -> Samples:
    return [samples[0][i] for i in indices], [samples[1][i] for i in indices]


def _everything(data: str) -> tuple[Samples, tuple[str, ...]]:
    """Every image of data that brings no split."""
    if data == "digits":
        return _digits()
    root = Path(data)
    only_train = root.is_dir() and [p.name for p in root.iterdir() if p.is_dir()] == ["train"]
    return _scan(root / "train" if only_train else root)


def _brings_split(data: str) -> bool:
    """Is there `val/` or `test/`, alone or beside `train/`? Beside others it is the name of a class."""
    if data == "digits" or not Path(data).is_dir():
        return False
    folders = {p.name for p in Path(data).iterdir() if p.is_dir() and not p.name.startswith(".")}
    return bool(folders & set(TEST_FOLDERS)) and ("train" in folders or folders <= set(TEST_FOLDERS))


def _same_data(data: str, other: str) -> bool:
    if "digits" in (data, other):
        return data == other
    return Path(data).resolve() == Path(other).resolve()


def _digits() -> tuple[Samples, tuple[str, ...]]:
    from PIL import Image as module
    from sklearn.datasets import load_digits

    digits = load_digits()
    # Values go from 0 to 16.
    pixels = (digits.images * (255 / 16)).round().astype("uint8")
    return ([module.fromarray(image) for image in pixels], digits.target.tolist()), tuple("0123456789")


def _scan(root: Path, class_names: tuple[str, ...] | None = None) -> tuple[Samples, tuple[str, ...]]:
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
            f"{root}: class {', '.join(unknown[:5])} is not among the training classes {_some(names)}"
        )
    files: list[str] = []
    labels: list[int] = []
    for name in found:
        images = image_files(root / name)
        if not images:
            raise DataError(f"{root / name}: class folder without images")
        files += images
        labels += [names.index(name)] * len(images)
    return (files, labels), names


def image_files(root: str | Path) -> list[str]:
    """Files below `root` with the name of an image, sorted; links are followed, hidden files are not."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    return sorted(
        os.path.join(folder, name)
        for folder, _, names in os.walk(root, followlinks=True)
        for name in names
        if name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f", ... ({len(names)} in all)" if len(names) > 10 else "")


def _fingerprint(data: str, train: Samples, test: Samples) -> str:
    """Hash of relative file names and labels; a moved folder stays the same data."""
    digest = hashlib.blake2b(digest_size=16)
    for sources, labels in (train, test):
        for source, label in zip(sources, labels, strict=True):
            name = Path(source).relative_to(data).as_posix() if isinstance(source, str) else ""
            digest.update(f"{name}\0{label}\n".encode())
        digest.update(b"--\n")
    return digest.hexdigest()
