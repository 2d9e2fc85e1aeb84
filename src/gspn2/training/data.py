"""Data by name: digits, folders, tar shards, the `datasets` library, generated images; split, transformed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import TrainConfig
from .errors import DataError
from .folders import find_digits, find_folder, relative_names
from .hub import STREAM, WHOLE, HubStream, find_hub, find_streams
from .image_sets import ImageSet, StreamSet
from .rng import derive_seed
from .samples import Parts, Samples, fingerprint, some
from .shards import find_shards, shard_files
from .tasks import CLASSES, generate, is_task, parse_task
from .transforms import Preprocess, Transform, augmentation_for, preprocess_for

TASK_IMAGES, TASK_TESTS = 20_000, 2_000
_PHOTO_SETTINGS = ("crop_scale", "hflip", "color_jitter", "auto_augment")
_TEACHER_SETTINGS = ("teacher_weight", "teacher_temperature", "teacher_hard")


@dataclass(frozen=True)
class Data:
    """A data set, ready for training and testing.

    Args:
        train, test: the two parts, each an `ImageSet` or a `StreamSet`; `test` is under `preprocess`, `train`
            under the augmentation.
        class_names: in the order of the labels.
        preprocess: what an image goes through when nothing is random.
        fingerprint: changes when the list of images or labels does.
    """

    train: Any
    test: Any
    class_names: tuple[str, ...]
    preprocess: Preprocess
    fingerprint: str


def load_data(config: TrainConfig) -> Data:
    """The data set that `config` names, split and with its transforms.

    Raises:
        DataError: no such data, no classes, a class without images, test classes that training lacks.
    """
    preprocess = preprocess_for(config)
    augmentation = augmentation_for(config, preprocess)
    if config.data.startswith(STREAM):
        return _load_streams(config, preprocess, augmentation)
    parts = find(config.data, config)
    train, test = parts.divided(config.data, config.split_fraction, config.split_seed)
    return Data(
        train=ImageSet(*train, augmentation, config.seed),
        test=ImageSet(*test, preprocess),
        class_names=parts.class_names,
        preprocess=preprocess,
        fingerprint=_fingerprint(config.data, (train, test)),
    )


def unused(config: TrainConfig) -> list[str]:
    """Settings that were changed and that this kind of data, or the lack of a teacher, makes no use of."""
    task = is_task(config.data)
    texts = []
    if config.train_images is not None and not (task or config.data.startswith(STREAM)):
        texts.append(f"{config.data} says itself how many images it has: train_images changes nothing")
    if config.augment and (task or config.data == "digits"):
        names = _changed(config, (*_PHOTO_SETTINGS, "random_erasing") if task else _PHOTO_SETTINGS)
        how = "is not augmented" if task else "has an augmentation of its own"
        texts += [f"{config.data} {how}: {', '.join(names)} changes nothing"] if names else []
    if config.teacher is None and (names := _changed(config, _TEACHER_SETTINGS)):
        texts.append(f"there is no teacher: {', '.join(names)} changes nothing")
    return texts


def _changed(config: TrainConfig, names: Sequence[str]) -> list[str]:
    return [name for name in names if getattr(config, name) != getattr(TrainConfig, name)]


def _load_streams(config: TrainConfig, preprocess: Preprocess, augmentation: Transform) -> Data:
    found = find_streams(config.data)
    if found.train is None or found.test is None:
        raise DataError(f"{config.data}: a stream needs splits called train and validation")
    length = config.train_images or found.train_length
    if not length:
        raise DataError(f"{config.data}: does not say how many images it has: give train_images")
    return Data(
        train=StreamSet(found.train, length, augmentation, config.seed),
        test=StreamSet(found.test, found.test_length, preprocess),
        class_names=found.class_names,
        preprocess=preprocess,
        fingerprint=fingerprint([(found.class_names, range(len(found.class_names))), ([str(length)], [0])]),
    )


def find(data: str, config: TrainConfig) -> Parts:
    """The data of this name, as they were found."""
    if not data:
        raise DataError("data: expected a name, got none")
    if data == "digits":
        return find_digits()
    if is_task(data):
        return _generated(data, config)
    if data.startswith(WHOLE):
        return find_hub(data)
    if shard_files(data):
        return find_shards(data)
    if not Path(data).exists():
        kinds = f"digits, tar shards, {WHOLE}NAME, {STREAM}NAME, {', '.join(f'{it}:SIZE' for it in CLASSES)}"
        raise DataError(f"data: {data}: no such folder; expected one, or {kinds}")
    return find_folder(data)


def _generated(data: str, config: TrainConfig) -> Parts:
    """Images that are made up; those for testing do not depend on how many there are for training."""
    from PIL import Image as module

    task = parse_task(data)

    def samples(count: int, part: str) -> Samples:
        images, labels = generate(task, count, derive_seed(config.split_seed, part))
        return Samples([module.fromarray(image) for image in images], labels.tolist())

    train = samples(config.train_images or TASK_IMAGES, "train")
    return Parts(CLASSES[task.kind], train=train, test=samples(TASK_TESTS, "test"))


def load_test_data(
    data: str,
    preprocess: Preprocess,
    class_names: Sequence[str],
    config: TrainConfig,
    split: str | None = None,
) -> ImageSet | StreamSet:
    """Images to evaluate a trained model on, with labels in the order of its `class_names`.

    Args:
        data: as for training; the classes may be fewer than the model's, not others.
        config: of the training run: its split is kept apart from training images.
        split: "test", "train" or "all". None means "test" where there is a split: for the data the model was
            trained on and for data that bring one; "all" for any other.

    Raises:
        DataError: as for `load_data`, and for classes that the model does not have.
    """
    if data.startswith(STREAM):
        return _test_stream(data, preprocess, class_names, split or "test")
    parts = find(data, config)
    if split is None:
        split = "test" if parts.brings_split or _same_data(data, config.data) else "all"
    chosen = _part(parts, data, config, split)
    relabel = _relabel(data, parts.class_names, class_names)
    if len(chosen) == 1:
        sources, labels = chosen[0]
    else:
        sources = [source for part in chosen for source in part.sources]
        labels = [label for part in chosen for label in part.labels]
    if not len(sources):
        raise DataError(f"{data}: no image in its {split} part")
    return ImageSet(sources, [relabel[label] for label in labels], preprocess)


def _part(parts: Parts, data: str, config: TrainConfig, split: str) -> list[Samples]:
    if split == "all":
        return parts.all()
    if split == "test" and parts.test is not None:
        return [parts.test]
    train, test = parts.divided(data, config.split_fraction, config.split_seed)
    return [test if split == "test" else train]


def _test_stream(data: str, preprocess: Preprocess, class_names: Sequence[str], split: str) -> StreamSet:
    found = find_streams(data)
    streams: dict[str, tuple[HubStream | None, int]] = {
        "test": (found.test, found.test_length),
        "train": (found.train, found.train_length),
    }
    stream, length = streams.get(split, (None, 0))
    if stream is None:
        raise DataError(f"{data}: the stream has no {split} part")
    return StreamSet(stream, length, preprocess, relabel=_relabel(data, found.class_names, class_names))


def _relabel(data: str, names: Sequence[str], class_names: Sequence[str]) -> list[int]:
    """For each class of the data its index in `class_names`."""
    index = {name: i for i, name in enumerate(class_names)}
    unknown = [name for name in names if name not in index]
    if unknown:
        raise DataError(
            f"{data}: the model has no class {', '.join(unknown[:5])}; it has {some(class_names)}"
        )
    return [index[name] for name in names]


def _same_data(data: str, other: str) -> bool:
    if data == other:
        return True
    return Path(data).exists() and Path(other).exists() and Path(data).resolve() == Path(other).resolve()


def _fingerprint(data: str, parts: Sequence[Samples]) -> str:
    def names(samples: Samples) -> Sequence[str]:
        sources = samples.sources
        if hasattr(sources, "names"):
            return list(sources.names())
        return relative_names(data, sources) if isinstance(sources[0], str) else [""] * len(sources)

    return fingerprint([(names(samples), samples.labels) for samples in parts])
