"""Checkpoint files: whole or not there, plain safetensors, and refused by name when they are not ours."""

from __future__ import annotations

import dataclasses
import errno
import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gspn2.training import CheckpointError, TrainConfig, UserError, load_checkpoint, train
from gspn2.training.checkpoint import (
    CheckpointInfo,
    read_checkpoint,
    replacing,
    save_checkpoint,
    write_safetensors,
)
from gspn2.training.transforms import Preprocess

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = TrainConfig(
        model="test_efficientnet",
        epochs=1,
        batch_size=256,
        warmup_epochs=0,
        device="cpu",
        out=str(tmp_path_factory.mktemp("run") / "out"),
    )
    return train(config)


@pytest.fixture
def info(tmp_path) -> CheckpointInfo:
    return CheckpointInfo(
        path=tmp_path / "a.safetensors",
        kind="weights",
        weights="model",
        config=TrainConfig(model="test_efficientnet"),
        class_names=("a", "b"),
        preprocess=Preprocess((32, 32), 1, (0.5,), (0.25,)),
        epoch=3,
        step=17,
        metrics={"top1": 99.5},
    )


def rewrite(path: Path, target: Path, change) -> Path:
    """A copy of a checkpoint with its description changed."""
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    described = json.loads(metadata["gspn2"])
    change(described)
    save_file(load_file(path), target, {"gspn2": json.dumps(described)})
    return target


def test_round_trip(info):
    tensors = {"a": torch.randn(3, 4), "b": torch.tensor(7), "c": torch.randn(5).bfloat16()}
    save_checkpoint(info.path, tensors, info)
    read, described = read_checkpoint(info.path)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert described == info


def test_tied_and_strided_tensors_are_stored(tmp_path):
    weight = torch.randn(4, 6)
    tensors = {"a": weight, "tied": weight, "turned": weight.t(), "row": weight[1], "empty": torch.empty(0)}
    write_safetensors(tmp_path / "a.safetensors", tensors, {})
    read = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_failed_write_leaves_the_old_file(info, monkeypatch):
    save_checkpoint(info.path, {"a": torch.ones(1000)}, info)
    before = info.path.read_bytes()
    write = Path.write_bytes

    def disk_full(path: Path, data: bytes) -> int:
        write(path, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", disk_full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(info.path, {"a": torch.zeros(1000)}, info)
    assert info.path.read_bytes() == before
    assert [path.name for path in info.path.parent.iterdir()] == [info.path.name]


def test_file_is_complete_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    target = tmp_path / "a.json"
    target.write_text("old")
    monkeypatch.setattr("os.fsync", lambda descriptor: done.append(("sync", target.read_text())))
    with replacing(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert done[0] == ("sync", "old"), "bytes reach the disk while the name still means the old file"
    assert target.read_text() == "new"


def test_best_is_plain_weights_that_timm_loads(run):
    model = timm.create_model("test_efficientnet", num_classes=10, in_chans=1, checkpoint_path=str(run.best))
    ours, info = load_checkpoint(run.out)
    assert info.path == run.best
    assert info.weights == "ema"
    assert info.metrics["top1"] == run.best_row.top1
    x = torch.randn(2, 1, 32, 32)
    assert torch.equal(model.eval()(x), ours(x))
    assert not ours.training


def test_last_holds_both_weights(run):
    averaged, info = load_checkpoint(run.last)
    assert info.weights == "ema"
    trained, info = load_checkpoint(run.last, weights="model")
    assert info.weights == "model"
    x = torch.randn(2, 1, 32, 32)
    assert not torch.equal(averaged(x), trained(x))
    with pytest.raises(CheckpointError, match="holds the ema weights only"):
        load_checkpoint(run.best, weights="model")
    with pytest.raises(UserError, match="expected ema or model"):
        load_checkpoint(run.last, weights="best")


def test_files_that_are_not_ours_are_refused(tmp_path, run):
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pt")
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "cut.safetensors").write_bytes(run.best.read_bytes()[:-100])
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    for name, reason in (
        ("a.pt", "not a readable safetensors file"),
        ("empty.safetensors", "not a readable safetensors file"),
        ("cut.safetensors", "not a readable safetensors file"),
        ("other.safetensors", "no checkpoint of gspn2"),
        ("missing.safetensors", "no such file"),
        ("", "no best.safetensors or last.safetensors"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            load_checkpoint(tmp_path / name)


def test_descriptions_that_do_not_fit_are_refused(tmp_path, run):
    target = tmp_path / "a.safetensors"
    with pytest.raises(CheckpointError, match="needs a newer gspn2"):
        load_checkpoint(rewrite(run.best, target, lambda d: d.update(format=99)))
    with pytest.raises(CheckpointError, match="damaged description"):
        load_checkpoint(rewrite(run.best, target, lambda d: d.pop("class_names")))
    with pytest.raises(CheckpointError, match="do not fit the model"):
        load_checkpoint(rewrite(run.best, target, lambda d: d["class_names"].pop()))
    with pytest.raises(CheckpointError, match="no model 'test_nothing'"):
        load_checkpoint(rewrite(run.best, target, lambda d: d["config"].update(model="test_nothing")))


def test_weights_alone_cannot_be_resumed(tmp_path, run):
    (tmp_path / "last.safetensors").write_bytes(run.best.read_bytes())
    _, info = read_checkpoint(run.best)
    with pytest.raises(CheckpointError, match="holds weights only"):
        train(dataclasses.replace(info.config, out=str(tmp_path)), resume=True)
