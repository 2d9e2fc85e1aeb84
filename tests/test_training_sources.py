"""Where images come from: shards, the `datasets` library, streams, tasks; and what cannot be read."""

from __future__ import annotations

import dataclasses
import io
import json
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gspn2.training import (
    DataError,
    TrainConfig,
    TrainingFailed,
    eval_loader,
    evaluate,
    load_checkpoint,
    load_data,
    load_test_data,
    train,
)
from gspn2.training.batches import train_loader
from gspn2.training.hub import class_number
from gspn2.training.shards import shard_index
from gspn2.training.tasks import generate, parse_task
from training_helpers import assert_same_run, make_images, run_killed, settings

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("GSPN2_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "cache"))


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_shards(root: Path, folder: Path, shards: int, label) -> list[Path]:
    """A folder's images in WebDataset's form; `label(class name, index)` gives a name's end and a text."""
    files = sorted(folder.glob("*/*.png"))
    names = sorted({file.parent.name for file in files})
    root.mkdir(parents=True)
    for number in range(shards):
        with tarfile.open(root / f"part-{number:03d}.tar", "w") as tar:
            for file in files[number::shards]:
                key = f"{file.parent.name}_{file.stem}"
                add(tar, f"{key}.png", file.read_bytes())
                end, text = label(file.parent.name, names.index(file.parent.name))
                add(tar, f"{key}.{end}", text.encode())
    return sorted(root.glob("*.tar"))


LABELS = {
    "numbers": lambda name, index: ("cls", str(index)),
    "names": lambda name, index: ("cls", name),
    "json": lambda name, index: ("json", json.dumps({"id": 7, "label": index})),
}


# -- shards


@pytest.mark.parametrize("kind", LABELS)
def test_shards_hold_what_the_folder_holds(folder, tmp_path, kind):
    write_shards(tmp_path / "shards", folder, 3, LABELS[kind])
    config = TrainConfig(data=str(tmp_path / "shards"), model="test_efficientnet", image_size=(32, 32))
    data = load_data(config)
    expected = load_data(dataclasses.replace(config, data=str(folder)))
    assert data.class_names == (("blue", "green", "red") if kind == "names" else ("0", "1", "2"))
    assert sorted(data.train.labels + data.test.labels) == sorted(
        expected.train.labels + expected.test.labels
    )
    images = {(label, image.tobytes()) for image, label in everything(data)}
    assert images == {(label, image.tobytes()) for image, label in everything(expected)}


def everything(data):
    for part in (data.train, data.test):
        yield from ((part.image(i), part.labels[i]) for i in range(len(part)))


def test_shards_name_their_classes_and_their_split(folder, tmp_path):
    write_shards(tmp_path / "all" / "train", folder, 2, LABELS["numbers"])
    write_shards(tmp_path / "all" / "val", folder, 1, LABELS["numbers"])
    (tmp_path / "all" / "classes.txt").write_text("azure\nlime\nruby\n")
    data = load_data(TrainConfig(data=str(tmp_path / "all"), model="test_efficientnet"))
    assert data.class_names == ("azure", "lime", "ruby")
    assert (len(data.train), len(data.test)) == (36, 36)
    pattern = str(tmp_path / "all" / "train" / "part-{000..001}.tar")
    assert len(load_data(TrainConfig(data=pattern, model="test_efficientnet", split_fraction=0.5)).test) == 18


@pytest.mark.parametrize("name", ["VAL", "Test", "validation"])
def test_shards_for_testing_are_never_trained_on(folder, tmp_path, name):
    write_shards(tmp_path / "all" / "Train", folder, 2, LABELS["numbers"])
    write_shards(tmp_path / "all" / name, folder, 1, LABELS["numbers"])
    data = load_data(TrainConfig(data=str(tmp_path / "all"), model="test_efficientnet"))
    assert {Path(shard).parent.name for shard in data.test.sources.shards} == {name}
    assert {Path(shard).parent.name for shard in data.train.sources.shards} == {"Train"}


def test_tar_of_class_folders(folder, tmp_path):
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        tar.add(folder, "images")
    data = load_data(TrainConfig(data=str(tmp_path / "all.tar"), model="test_efficientnet"))
    assert data.class_names == ("blue", "green", "red")
    assert len(data.train) + len(data.test) == 36


def test_index_is_kept_until_the_shard_changes(folder, tmp_path, monkeypatch):
    (shard,) = write_shards(tmp_path / "shards", folder, 1, LABELS["names"])
    entries = shard_index(str(shard))
    assert len(entries) == 36

    def refuse(*args, **kwargs):
        raise AssertionError("read again")

    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", refuse)
        assert shard_index(str(shard)) == entries
    with tarfile.open(shard, "a") as tar:
        add(tar, "new.png", (folder / "red" / "0.png").read_bytes())
        add(tar, "new.cls", b"red")
    assert len(shard_index(str(shard))) == 37


def test_shards_that_cannot_be_used_are_named(folder, tmp_path):
    (tmp_path / "a.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(DataError, match=r"a\.tar: not an uncompressed tar file"):
        load_data(TrainConfig(data=str(tmp_path), model="test_efficientnet"))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "a.txt", b"text")
    with pytest.raises(DataError, match=r"a\.tar: no image with a class"):
        load_data(TrainConfig(data=str(tmp_path), model="test_efficientnet"))
    with pytest.raises(DataError, match="no such file"):
        load_data(TrainConfig(data=str(tmp_path / "b-*.tar"), model="test_efficientnet"))


def test_damaged_shards_are_refused_wherever_they_are_cut(folder, tmp_path):
    """A copy that broke off must not pass for a smaller data set."""
    (shard,) = write_shards(tmp_path / "whole", folder, 1, LABELS["names"])
    content = shard.read_bytes()
    with tarfile.open(shard) as tar:
        header = tar.getmembers()[40].offset
    cuts = {"in a header": header + 100, "between": header, "in an image": header + 512 + 700}
    shards = {name: content[:length] for name, length in cuts.items()}
    shards["damaged header"] = content[:header] + b"\1" * 512 + content[header + 512 :]
    for name, damaged in shards.items():
        path = tmp_path / f"{name}.tar"
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="or a damaged one"):
            shard_index(str(path))


def test_classes_that_are_none_are_refused(folder, tmp_path):
    for name, label, message in (
        ("bytes", ("cls", b"\xff\xfe"), "cannot be read"),
        ("json", ("json", b"{label"), "cannot be read"),
        ("negative", ("cls", b"-1"), "expected classes from 0 to 999999, got -1"),
        ("date", ("json", b'{"label": 20261123}'), "got 20261123"),
        ("list", ("json", b"[1]"), "no image with a class"),
        ("nothing", ("cls", b""), "no image with a class"),
    ):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            add(tar, "0.png", (folder / "red" / "0.png").read_bytes())
            add(tar, f"0.{label[0]}", label[1])
        with pytest.raises(DataError, match=message):
            load_data(TrainConfig(data=str(tmp_path / f"{name}.tar"), model="test_efficientnet"))


def test_shards_are_read_in_pools(folder, tmp_path):
    write_shards(tmp_path / "shards", folder, 6, LABELS["names"])
    config = settings(tmp_path / "shards", tmp_path / "out", shuffle_buffer=12, workers=0)
    data = load_data(config)
    _, batches = train_loader(data.train, config, torch.device("cpu"))

    def order(epoch):
        batches.epoch, batches.start = epoch, 0
        return [index for batch in batches for _, index in batch]

    assert order(0) != order(1)
    assert len(set(order(0))) == len(order(0)) == 28
    shards = data.train.groups[order(0)]
    assert max(len(set(shards[i : i + 12])) for i in (0, 12)) <= 4, "a pool of 12 spans few shards of 5"


def test_killed_run_on_shards_resumes_to_the_same_bits(folder, tmp_path):
    write_shards(tmp_path / "shards", folder, 4, LABELS["names"])
    whole = train(settings(tmp_path / "shards", tmp_path / "whole", shuffle_buffer=12))
    parts = settings(tmp_path / "shards", tmp_path / "parts", shuffle_buffer=12)
    assert run_killed(parts, 9, signal.SIGKILL).returncode == -signal.SIGKILL
    assert_same_run(train(parts, resume=True).out, whole.out)


# -- the datasets library


@pytest.fixture(scope="module")
def saved(folder, tmp_path_factory):
    """The folder as a data set on disk, with a split of its own."""
    datasets = pytest.importorskip("datasets")
    files = sorted(folder.glob("*/*.png"))
    names = ["blue", "green", "red"]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})

    def rows(chosen):
        images = [{"bytes": file.read_bytes(), "path": file.name} for file in chosen]
        labels = [names.index(file.parent.name) for file in chosen]
        return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)

    order = np.random.default_rng(0).permutation(len(files))
    train_files, test_files = [files[i] for i in order[:28]], [files[i] for i in order[28:]]
    path = tmp_path_factory.mktemp("datasets") / "colors"
    datasets.DatasetDict({"train": rows(train_files), "validation": rows(test_files)}).save_to_disk(path)
    return path


@pytest.mark.parametrize("kind", ["hf", "hf-stream"])
def test_data_set_is_read_trained_on_and_tested(saved, tmp_path, kind):
    changes = {"train_images": 28} if kind == "hf-stream" else {}
    config = settings(Path("unused"), tmp_path / "out", epochs=1, shuffle_buffer=8, **changes)
    config = dataclasses.replace(config, data=f"{kind}:{saved}")
    result = train(config)
    assert result.class_names == ("blue", "green", "red")
    model, info = load_checkpoint(result.out)
    images = load_test_data(config.data, info.preprocess, info.class_names, info.config)
    tested = evaluate(model, eval_loader(images))
    assert tested.images == 8
    assert tested.top1 == result.best_row.top1


def test_whole_data_set_and_stream_hold_the_same(saved):
    def read(kind):
        config = TrainConfig(data=f"{kind}:{saved}", model="test_efficientnet", train_images=28)
        return [(inputs, labels) for inputs, labels in eval_loader(load_data(config).test, batch_size=3)]

    for (ours, labels), (theirs, others) in zip(read("hf"), read("hf-stream"), strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(labels, others)


@pytest.mark.parametrize(("workers", "step"), [(0, 9), (2, 12)])
def test_killed_run_on_a_stream_resumes_to_the_same_bits(saved, tmp_path, workers, step):
    def config(name, workers):
        plain = settings(Path("unused"), tmp_path / name, train_images=28, shuffle_buffer=10, workers=workers)
        return dataclasses.replace(plain, data=f"hf-stream:{saved}")

    whole = train(config("whole", 0))
    parts = config("parts", workers)
    assert run_killed(parts, step, signal.SIGKILL).returncode == -signal.SIGKILL
    assert_same_run(train(parts, resume=True).out, whole.out)


def test_streams_that_end_early_or_never_are_refused(saved, tmp_path):
    config = settings(Path("unused"), tmp_path / "out", train_images=50, shuffle_buffer=10)
    with pytest.raises(DataError, match="the stream ended after 28, expected 50"):
        train(dataclasses.replace(config, data=f"hf-stream:{saved}"))
    with pytest.raises(DataError, match="give train_images"):
        load_data(dataclasses.replace(config, data=f"hf-stream:{saved}", train_images=None))


def test_rows_without_a_class_are_refused():
    index = {"0": 0, "1": 1, "2": 2}
    assert class_number(2, index, "row") == class_number("2", index, "row") == 2
    assert class_number(1, {"1": 0, "7": 1}, "row", numbered=False) == 0
    for value in (-1, 3, None, "x"):
        with pytest.raises(DataError, match=r"x/test\[5\]: has class .* expected one of 0, 1, 2"):
            class_number(value, index, "x/test[5]")


# -- generated images


@pytest.mark.parametrize("kind", ["pathfinder", "maze"])
def test_task_has_a_fixed_beginning_and_even_classes(kind):
    images, labels = generate(parse_task(f"{kind}:64"), 300, seed=5)
    assert images.shape == (300, 64, 64)
    assert images.dtype == np.uint8
    assert 0.4 < labels.mean() < 0.6
    again, same = generate(parse_task(f"{kind}:64"), 40, seed=5)
    assert np.array_equal(again, images[:40])
    assert np.array_equal(same, labels[:40])
    assert not np.array_equal(generate(parse_task(f"{kind}:64"), 40, seed=6)[0], again)


def marks(images: np.ndarray) -> np.ndarray:
    """Centres (N, 2, 2) of the two marks: the only places that are white as far as lines never are."""
    from scipy import ndimage

    found = []
    for image in images:
        reach = 3 if len(image) == 64 else 7
        eroded = ndimage.uniform_filter(image / 255, reach) > 0.88
        blobs, count = ndimage.label(eroded, np.ones((3, 3)))
        assert count == 2, "two marks"
        found.append(ndimage.center_of_mass(eroded, blobs, [1, 2]))
    return np.array(found)


@pytest.mark.parametrize("kind", ["pathfinder", "maze"])
def test_distance_of_the_marks_says_little_about_the_class(kind):
    images, labels = generate(parse_task(f"{kind}:64"), 1024, seed=1)
    places = marks(images)
    distance = np.linalg.norm(places[:, 0] - places[:, 1], axis=-1)
    best = max(np.mean((distance < cut) == labels) for cut in np.linspace(0, 80, 81))
    assert max(best, 1 - best) < 0.58


def test_maze_is_labelled_by_whether_there_is_a_way():
    from scipy import ndimage

    images, labels = generate(parse_task("maze:64"), 128, seed=2)
    for image, label, (first, second) in zip(images, labels, marks(images), strict=True):
        regions, count = ndimage.label(image > 0)
        assert count == 2
        one, other = (regions[tuple(np.round(place).astype(int))] for place in (first, second))
        assert (one == other) == bool(label)


def test_pathfinder_is_labelled_by_whether_a_contour_joins():
    """Dashes joined over the gaps between them: what touches is one contour, where contours keep apart."""
    from scipy import ndimage

    images, labels = generate(parse_task("pathfinder:64@128"), 128, seed=3)
    right = 0
    for image, label, (first, second) in zip(images, labels, marks(images), strict=True):
        reach = ndimage.distance_transform_edt(image < 100) <= 1.5
        regions, _ = ndimage.label(reach)
        one, other = (regions[tuple(np.round(place).astype(int))] for place in (first, second))
        right += (one == other) == bool(label)
    assert right >= 122, "all but a few where contours come close"


def test_larger_pixels_show_the_same_scene():
    small, labels = generate(parse_task("maze:64"), 8, seed=4)
    large, same = generate(parse_task("maze:64@128"), 8, seed=4)
    assert np.array_equal(labels, same)
    assert np.array_equal(small, large[:, ::2, ::2])


def test_task_is_data_like_any_other(tmp_path):
    config = TrainConfig(data="maze:64", train_images=600, model="test_efficientnet")
    data = load_data(config)
    assert (len(data.train), len(data.test)) == (600, 2000)
    assert data.test[0][0].shape == (1, 64, 64)
    assert data.class_names == ("apart", "joined")
    other = load_data(dataclasses.replace(config, train_images=64))
    assert torch.equal(other.test[5][0], data.test[5][0])
    with pytest.raises(DataError, match="expected pathfinder:SIZE or maze:SIZE"):
        load_data(dataclasses.replace(config, data="maze"))


# -- what cannot be read, and what makes no sense


def test_unreadable_images_are_left_out_counted_and_listed(tmp_path):
    images = make_images(tmp_path / "images")
    for name in ("blue/3.png", "red/1.png", "red/2.png"):
        (images / name).write_bytes((images / name).read_bytes()[:150])
    heard = []
    result = train(settings(images, tmp_path / "out", epochs=2), on_event=heard.append)
    lines = (tmp_path / "out" / "unreadable.txt").read_text().splitlines()
    assert len(lines) == len(result.faults) == 3
    assert all("cannot be read" in line for line in lines)
    assert any("3 images cannot be read" in getattr(event, "text", "") for event in heard)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["unreadable_images"] == 3

    again = settings(images, tmp_path / "again", epochs=2)
    assert run_killed(again, 9, signal.SIGKILL).returncode == -signal.SIGKILL
    resumed = train(again, resume=True)
    assert resumed.history == result.history
    assert resumed.faults == result.faults


def test_an_unreadable_image_that_is_a_part_of_its_own_is_replaced(tmp_path):
    images = make_images(tmp_path / "images", per_class=4)
    for name in ("blue/1.png", "blue/2.png", "red/3.png"):
        (images / name).write_text("no image")
    config = settings(images, tmp_path / "out", mixup=0.0, batch_size=3, accumulate=3, split_fraction=0.01)
    data = load_data(config)
    loader, batches = train_loader(data.train, config, torch.device("cpu"))
    assert batches.part_size == 1
    parts = list(loader)
    assert all(inputs.isfinite().all() and len(labels) == 1 for inputs, labels, _ in parts)
    named = sorted(fault for *_, faults in parts for fault in faults)
    wanted = [s for s in data.train.sources if Path(s).read_bytes() == b"no image"]
    assert named == sorted(f"{source}: not an image" for source in wanted)
    assert wanted


def test_nothing_readable_is_an_error(tmp_path):
    images = make_images(tmp_path / "images")
    for file in images.glob("*/*.png"):
        file.write_text("no image")
    with pytest.raises(DataError, match="none of 4 images in a row can be read"):
        train(settings(images, tmp_path / "out"))
    data = load_data(settings(images, tmp_path / "out"))
    with pytest.raises(DataError, match="at least one image that can be read"):
        evaluate(torch.nn.Linear(1, 1), eval_loader(data.test))


def test_batch_of_a_loss_without_sense_is_kept(folder, tmp_path):
    from safetensors import safe_open

    config = settings(folder, tmp_path / "out", lr=1e30, clip_grad=None, warmup_epochs=0, checkpoint_every=1)
    with pytest.raises(TrainingFailed, match=r"the batch is in \S*failed_batch\.safetensors"):
        train(dataclasses.replace(config, model_args={}, accumulate=2))
    with safe_open(tmp_path / "out" / "failed_batch.safetensors", framework="pt") as file:
        about = json.loads(file.metadata()["gspn2"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    assert tensors["inputs.0"].shape == tensors["inputs.1"].shape == (2, 3, 32, 32)
    assert tensors["targets.0"].shape == (2, 3), "as they were mixed"
    data = load_data(config)
    loader, batches = train_loader(data.train, dataclasses.replace(config, accumulate=2), torch.device("cpu"))
    batches.epoch, batches.start = 0, about["step"] - 1
    assert torch.equal(next(iter(loader))[1], tensors["labels.0"])


def test_image_formats_in_shards_and_folders_agree(tmp_path):
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for i in range(4):
            add(tar, f"{i}.png", buffer.getvalue())
            add(tar, f"{i}.cls", str(i % 2).encode())
    data = load_data(TrainConfig(data=str(tmp_path / "x.tar"), model="test_efficientnet", split_fraction=0.5))
    assert np.array_equal(np.asarray(data.train.image(0)), np.asarray(image))
    assert data.train.sources[0].name.endswith(".png")
