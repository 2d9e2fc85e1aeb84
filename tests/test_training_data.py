"""Data of training: what is found, split, augmented and batched depends on (seed, epoch, index) alone."""

from __future__ import annotations

import dataclasses
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gspn2.training import (
    DataError,
    TrainConfig,
    UserError,
    eval_loader,
    load_data,
    load_test_data,
    open_image,
)
from gspn2.training.batches import EpochBatches, train_loader
from gspn2.training.distributed import World
from gspn2.training.folders import image_files
from gspn2.training.image_sets import ImageSet
from gspn2.training.samples import stratified_split
from gspn2.training.transforms import Preprocess, augmentation_for, preprocess_for
from training_helpers import make_images, settings

pytestmark = pytest.mark.usefixtures("one_thread")


def test_folder_is_split_by_class_and_stays_so(folder):
    config = TrainConfig(data=str(folder), model="test_efficientnet", split_fraction=0.25)
    data = load_data(config)
    assert data.class_names == ("blue", "green", "red")
    assert [data.test.labels.count(label) for label in range(3)] == [3, 3, 3]
    assert not set(data.train.sources) & set(data.test.sources)
    assert len(data.train) + len(data.test) == 36
    assert load_data(dataclasses.replace(config, seed=9)).test.sources == data.test.sources
    assert load_data(dataclasses.replace(config, split_seed=1)).test.sources != data.test.sources


def test_hidden_folders_and_links_back_hold_no_images_of_their_own(tmp_path):
    make_images(tmp_path / "train", per_class=2)
    shutil.copytree(tmp_path / "train" / "red", tmp_path / "train" / "red" / ".ipynb_checkpoints")
    (tmp_path / "train" / "red" / "up").symlink_to("..")
    shutil.move(tmp_path / "train" / "blue", tmp_path / "elsewhere")
    (tmp_path / "train" / "blue").symlink_to(tmp_path / "elsewhere")
    found = [Path(name).relative_to(tmp_path).as_posix() for name in image_files(tmp_path / "train")]
    assert found == [f"train/{color}/{i}.png" for color in ("blue", "green", "red") for i in (0, 1)]


def test_split_of_the_folder_itself_is_used(tmp_path):
    make_images(tmp_path / "train", per_class=4)
    make_images(tmp_path / "val", per_class=2)
    config = TrainConfig(data=str(tmp_path), model="test_efficientnet")
    data = load_data(config)
    assert (len(data.train), len(data.test)) == (12, 6)
    assert all("/val/" in Path(source).as_posix() for source in data.test.sources)
    everything = load_test_data(str(tmp_path), data.preprocess, data.class_names, config, "all")
    assert len(everything) == 18
    (tmp_path / "val" / "red").rename(tmp_path / "val" / "purple")
    with pytest.raises(DataError, match="purple is not among the training classes"):
        load_data(config)


@pytest.mark.parametrize(
    "names", [("train", "validation"), ("training", "testing"), ("Train", "Val"), ("train", "valid")]
)
def test_splits_have_several_names(tmp_path, names):
    for name, images in zip(names, (4, 2), strict=True):
        make_images(tmp_path / name, per_class=images)
    data = load_data(TrainConfig(data=str(tmp_path), model="test_efficientnet"))
    assert data.class_names == ("blue", "green", "red")
    assert (len(data.train), len(data.test)) == (12, 6)


def test_a_class_may_be_called_like_a_split(tmp_path):
    make_images(tmp_path, per_class=4, classes=("blue", "test"))
    assert load_data(TrainConfig(data=str(tmp_path), model="test_efficientnet")).class_names == (
        "blue",
        "test",
    )


def test_fewer_classes_are_matched_by_name(folder, tmp_path):
    config = TrainConfig(data=str(folder), model="test_efficientnet")
    data = load_data(config)
    make_images(tmp_path / "some", per_class=2, classes=("green", "red"))
    images = load_test_data(str(tmp_path / "some"), data.preprocess, data.class_names, config)
    assert images.labels == [1, 1, 2, 2]
    make_images(tmp_path / "other", per_class=1, classes=("pink",))
    with pytest.raises(DataError, match="no class pink"):
        load_test_data(str(tmp_path / "other"), data.preprocess, data.class_names, config)


def test_broken_folders_are_named(tmp_path):
    def load(path):
        return load_data(TrainConfig(data=str(path), model="test_efficientnet"))

    with pytest.raises(DataError, match="nowhere: no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(DataError, match="found no folder"):
        load(tmp_path)
    make_images(tmp_path / "images", per_class=2)
    (tmp_path / "images" / "yellow").mkdir()
    with pytest.raises(DataError, match="yellow: class folder without images"):
        load(tmp_path / "images")


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_image_is_left_out_and_named(tmp_path, workers):
    images = make_images(tmp_path / "images", per_class=3)
    (images / "red" / "1.png").write_bytes((images / "red" / "1.png").read_bytes()[:200])
    data = load_data(TrainConfig(data=str(images), model="test_efficientnet", split_fraction=0.01))
    with pytest.raises(DataError, match=r"^\S+1\.png: cannot be read"):
        [data.train[i] for i in range(len(data.train))]
    loader = eval_loader(data.train, batch_size=2, workers=workers)
    assert sum(len(labels) for _, labels in loader) == len(data.train) - 1
    (fault,) = loader.faults
    assert "1.png: cannot be read" in fault
    assert "\n" not in fault


def test_stratified_split_keeps_one_image_of_each_class_for_training():
    kept, held_out = stratified_split([0, 0, 1, 2, 2, 2, 2], 0.5, seed=0)
    assert sorted(kept + held_out) == list(range(7))
    assert 2 in kept, "the only image of a class"
    assert len([i for i in held_out if i > 2]) == 2


def blank_set(images: int) -> ImageSet:
    return ImageSet([""] * images, [0] * images, lambda image: image)


def test_order_depends_on_seed_and_epoch_alone():
    def order(epoch, start=0, seed=0):
        batches = EpochBatches(blank_set(22), TrainConfig(batch_size=5, seed=seed), World())
        batches.epoch, batches.start = epoch, start
        return list(batches)

    assert len(order(0)) == 4
    assert order(1) == order(1)
    assert order(1, start=2) == order(1)[2:]
    assert [i for batch in order(0) for _, i in batch] != [i for batch in order(1) for _, i in batch]
    assert order(0, seed=1) != order(0)
    few = EpochBatches(blank_set(3), TrainConfig(batch_size=8), World())
    assert (few.steps, len(next(iter(few)))) == (1, 3), "a set smaller than a batch is one batch"


@pytest.mark.parametrize(("processes", "accumulate"), [(1, 2), (2, 1), (2, 2), (4, 1)])
def test_parts_of_a_batch_do_not_change_it_nor_its_pairs(processes, accumulate):
    def pairs(batch):
        return {frozenset((batch[i], batch[-1 - i])) for i in range(len(batch))}

    config = TrainConfig(batch_size=16, mixup=0.5)
    whole = list(EpochBatches(blank_set(50), config, World()))
    config = dataclasses.replace(config, accumulate=accumulate)
    shares = [list(EpochBatches(blank_set(50), config, World(rank, processes))) for rank in range(processes)]
    for step, batch in enumerate(whole):
        own = slice(step * accumulate, (step + 1) * accumulate)
        cut = [part for share in shares for part in share[own]]
        assert sorted(key for part in cut for key in part) == sorted(batch)
        assert set().union(*(pairs(part) for part in cut)) == pairs(batch)


def test_batches_that_cannot_be_shared_are_refused():
    with pytest.raises(UserError, match="need a multiple of 12, got 32"):
        EpochBatches(blank_set(50), TrainConfig(batch_size=32, accumulate=2, mixup=0.5), World(0, 3))
    with pytest.raises(UserError, match="at least 4 training images, got 3"):
        EpochBatches(blank_set(3), TrainConfig(batch_size=4, accumulate=4), World())


def test_augmentation_is_a_function_of_epoch_and_index(folder):
    data = load_data(settings(folder, Path("unused"), workers=0))
    first, label = data.train[1, 5]
    random.seed(1), torch.manual_seed(1), np.random.seed(1)  # noqa: NPY002
    draws = random.random(), torch.rand(1), np.random.rand()  # noqa: NPY002
    random.seed(1), torch.manual_seed(1), np.random.seed(1)  # noqa: NPY002
    again, _ = data.train[1, 5]
    assert torch.equal(first, again)
    assert label == data.train.labels[5]
    assert not torch.equal(first, data.train[2, 5][0])
    assert draws == (random.random(), torch.rand(1), np.random.rand()), "the caller's draws go on"  # noqa: NPY002


@pytest.mark.parametrize("policy", ["rand-m10-n15-inc1", "original-mstd5", "augmix-m10"])
def test_policies_at_full_strength_make_images(policy):
    """Posterize has no bits left then, which Pillow refuses from version 13 on."""
    preprocess = Preprocess((16, 16), 3, (0.5,) * 3, (0.2,) * 3)
    transform = augmentation_for(TrainConfig(data="images", auto_augment=policy), preprocess)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8))
    random.seed(0), np.random.seed(0)  # noqa: NPY002
    assert all(torch.isfinite(transform(image)).all() for _ in range(40))


def test_workers_change_no_image(folder):
    def epoch(workers):
        config = settings(folder, Path("unused"), workers=workers)
        loader, batches = train_loader(load_data(config).train, config, torch.device("cpu"))
        batches.epoch = 2
        return [inputs for inputs, *_ in loader]

    assert all(torch.equal(a, b) for a, b in zip(epoch(0), epoch(2), strict=True))


def test_digits_are_split_evenly_and_never_mirrored():
    data = load_data(TrainConfig(model="test_efficientnet"))
    assert (len(data.train), len(data.test)) == (1438, 359)
    assert data.class_names == tuple("0123456789")
    assert data.test[0][0].shape == (1, 32, 32)
    assert "Flip" not in str(data.train.transform)
    inputs = torch.stack([data.test[i][0] for i in range(len(data.test))])
    assert inputs.mean().abs() < 0.1
    assert 0.7 < inputs.std() < 1.1
    assert load_data(TrainConfig(model="test_efficientnet", in_chans=3)).train[0, 0][0].shape == (3, 32, 32)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16", "1"])
def test_every_image_mode_becomes_the_input(tmp_path, mode):
    grey = np.tile(np.linspace(0, 255, 48).astype(np.uint8), (40, 1))
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(grey).convert("RGB").convert(mode)
    assert image.mode == mode
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image.save(path)
    for chans in (1, 3):
        config = TrainConfig(data="x", model="test_efficientnet", image_size=(32, 32), in_chans=chans)
        out = preprocess_for(config)(open_image(path))
        assert out.shape == (chans, 32, 32)
        # A ramp from dark to light stays one: nothing is cut off at 8 bits.
        columns = out.mean((0, 1))
        assert columns[24] > columns[16] > columns[8]


def test_exif_orientation_is_followed(tmp_path):
    image = Image.new("RGB", (30, 20))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    assert open_image(tmp_path / "a.jpg").size == (20, 30)
