"""Training: the same numbers whatever interrupts it, and data that depend on (seed, epoch, index) alone."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from gspn2.training import (
    DataError,
    EpochDone,
    Interrupted,
    StepDone,
    TrainConfig,
    TrainingFailed,
    UserError,
    build_model,
    eval_loader,
    evaluate,
    load_checkpoint,
    load_data,
    load_test_data,
    open_image,
    read_history,
    train,
)
from gspn2.training.data import EpochBatches, stratified_split, train_loader
from gspn2.training.log import RunLog
from gspn2.training.schedule import learning_rate
from gspn2.training.transforms import preprocess_for


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small only get slower on more, the more so beside other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_images(root: Path, per_class: int = 12, classes: tuple[str, ...] = ("blue", "green", "red")) -> Path:
    """Noisy images, each class with a color of its own."""
    rng = np.random.default_rng(0)
    for channel, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = rng.integers(0, 120, (36, 40, 3), dtype=np.uint8)
            pixels[..., 2 - channel] += 100
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"))


def settings(folder: Path, out: Path, **changes) -> TrainConfig:
    """3 epochs of 7 steps: dropout, mixup, EMA and batch norm all have state that a resumed run needs."""
    config = TrainConfig(
        data=str(folder),
        model="test_efficientnet",
        model_args={"drop_rate": 0.3},
        image_size=(32, 32),
        epochs=3,
        batch_size=4,
        warmup_epochs=1,
        mixup=0.2,
        random_erasing=0.3,
        seed=3,
        device="cpu",
        checkpoint_every=3,
        out=str(out),
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """The run nobody interrupts."""
    return train(settings(folder, tmp_path_factory.mktemp("run") / "out"))


def assert_same_run(out: Path, expected: Path) -> None:
    for name in ("last.safetensors", "best.safetensors"):
        ours, theirs = load_file(out / name), load_file(expected / name)
        assert ours.keys() == theirs.keys()
        different = [key for key in ours if not torch.equal(ours[key], theirs[key])]
        assert not different, f"{name}: {different[:5]}"
    for name in ("log.csv", "log.jsonl"):
        assert (out / name).read_bytes() == (expected / name).read_bytes(), name


KILLED = """
import json, os, signal, sys
import torch
from gspn2.training import Interrupted, StepDone, TrainConfig, train

torch.set_num_threads(int(sys.argv[2]))

sent = []

def on_event(event):
    # Steps 9 and 12 are reported before they are saved: work since the checkpoint before is lost.
    # Once: the step on which the run stops is reported too, and a second signal ends the process.
    if isinstance(event, StepDone) and event.step >= int(sys.argv[3]) and not sent:
        sent.append(event.step)
        os.killpg(0, int(sys.argv[4]))

try:
    train(TrainConfig.from_json(json.loads(sys.argv[1])), on_event=on_event)
except Interrupted as stop:
    sys.exit(128 + stop.signum)
"""


def run_killed(config: TrainConfig, step: int, signum: int) -> subprocess.CompletedProcess:
    """A run in a process group of its own that gets a signal, workers and all."""
    arguments = [json.dumps(config.to_json()), torch.get_num_threads(), step, int(signum)]
    command = [sys.executable, "-c", KILLED, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, start_new_session=True, timeout=120)


@pytest.mark.parametrize(("workers", "workers_then", "step"), [(0, 0, 9), (2, 0, 12), (0, 2, 1)])
def test_killed_run_resumes_to_the_same_bits(folder, finished, tmp_path, workers, workers_then, step):
    config = settings(folder, tmp_path / "out", workers=workers)
    killed = run_killed(config, step, signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "out" / "summary.json").exists()

    result = train(dataclasses.replace(config, workers=workers_then), resume=True)
    assert_same_run(result.out, finished.out)
    assert result.history == finished.history
    assert [row.epoch for row in read_history(result.out)] == [1, 2, 3]


def test_batch_system_ending_the_whole_group_leaves_a_checkpoint(folder, finished, tmp_path):
    config = settings(folder, tmp_path / "out", workers=2)
    stopped = run_killed(config, 9, signal.SIGTERM)
    assert stopped.returncode == 143, stopped.stderr
    assert stopped.stderr == ""
    _, info = load_checkpoint(tmp_path / "out" / "last.safetensors")
    assert info.step >= 9
    assert_same_run(train(config, resume=True).out, finished.out)


def test_process_ends_although_somebody_holds_on_to_workers(folder):
    script = f"""
from gspn2.training import TrainConfig, eval_loader, load_data
data = load_data(TrainConfig(data={str(folder)!r}, model="test_efficientnet"))
held = iter(eval_loader(data.test, workers=2))
next(held)
raise KeyError("held")
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert ended.stderr.rstrip().endswith("KeyError: 'held'")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_leaves_a_checkpoint_at_the_current_step(folder, finished, tmp_path, signum):
    config = settings(folder, tmp_path / "out", checkpoint_every=5)
    sent = []

    def send(event):
        if isinstance(event, StepDone) and event.step >= 10 and not sent:
            sent.append(event.step)
            os.kill(os.getpid(), signum)

    before = signal.getsignal(signum)
    with pytest.raises(Interrupted) as stop:
        train(config, on_event=send)
    assert signal.getsignal(signum) == before
    assert stop.value.signum == signum
    _, info = load_checkpoint(stop.value.checkpoint)
    assert info.step in (sent[0], sent[0] + 1)
    assert_same_run(train(config, resume=True).out, finished.out)


def test_signal_while_testing_keeps_the_epoch(folder, finished, tmp_path):
    config = settings(folder, tmp_path / "out")
    evaluations = []

    def send(event):
        if type(event).__name__ == "EvalProgress" and not evaluations:
            evaluations.append(event)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        train(config, on_event=send)
    assert_same_run(train(config, resume=True).out, finished.out)


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_resume_on_cuda(folder, tmp_path, monkeypatch, workers):
    """Dropout draws on the device there, and mixed precision is on."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)

    def give_up(event):
        if isinstance(event, StepDone) and event.step >= 9:
            raise KeyboardInterrupt

    config = settings(folder, tmp_path / "whole", device="cuda", amp="auto", channels_last=True)
    whole = train(config)
    parts = dataclasses.replace(config, out=str(tmp_path / "parts"), workers=workers)
    with pytest.raises(KeyboardInterrupt):
        train(parts, on_event=give_up)
    assert_same_run(train(parts, resume=True).out, whole.out)
    assert json.loads((whole.out / "summary.json").read_text())["amp"] == "bf16"
    model, info = load_checkpoint(whole.out, device="cuda")
    evaluation = evaluate(model, eval_loader(load_data(info.config).test, device="cuda"), amp=torch.bfloat16)
    assert evaluation.device == "cuda"
    assert evaluation.top1 == pytest.approx(whole.best_row.top1, abs=20)


def test_finished_run_resumes_to_itself(folder, finished):
    before = (finished.out / "last.safetensors").read_bytes()
    again = train(settings(folder, finished.out), resume=True)
    assert (finished.out / "last.safetensors").read_bytes() == before
    assert again.history == finished.history


def test_run_reports_itself(finished):
    summary = json.loads((finished.out / "summary.json").read_text())
    assert summary["best"] == vars(finished.best_row)
    assert summary["class_names"] == ["blue", "green", "red"]
    assert finished.best_row.top1 == max(row.top1 for row in finished.history)
    steps = [json.loads(line) for line in (finished.out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps] == list(range(1, 22))
    for row in finished.history:
        losses = [line["loss"] for line in steps if line["epoch"] == row.epoch]
        assert row.train_loss == pytest.approx(sum(losses) / len(losses), rel=1e-12)
    assert not list(finished.out.glob(".*"))


def test_draws_of_others_change_nothing(folder, finished, tmp_path):
    def draw(event):
        random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002

    assert_same_run(train(settings(folder, tmp_path / "out"), on_event=draw).out, finished.out)


def test_dropout_differs_from_step_to_step(monkeypatch, folder, tmp_path):
    drawn = []
    dropout = torch.nn.functional.dropout

    def note(x, *args, **kwargs):
        out = dropout(x, *args, **kwargs)
        drawn.append((out == 0).flatten())
        return out

    monkeypatch.setattr(torch.nn.functional, "dropout", note)
    train(settings(folder, tmp_path / "out", epochs=1))
    masks = {tuple(mask.tolist()) for mask in drawn if mask.sum() > 0.1 * mask.numel()}
    assert len(masks) >= 7


def test_other_seed_other_weights(folder, finished, tmp_path):
    result = train(settings(folder, tmp_path / "out", seed=4, epochs=1))
    ours, theirs = load_file(result.best), load_file(finished.best)
    assert any(not torch.equal(ours[key], theirs[key]) for key in ours)


def test_resume_refuses_other_settings_and_other_data(folder, finished, tmp_path):
    with pytest.raises(UserError, match=r"lr is 0\.5, was 0\.001"):
        train(settings(folder, finished.out, lr=0.5), resume=True)
    images = make_images(tmp_path / "images")
    config = settings(images, tmp_path / "out", epochs=1)
    train(config)
    (images / "red" / "0.png").unlink()
    with pytest.raises(UserError, match="not what it was"):
        train(config, resume=True)


def test_occupied_folder_is_refused_and_overwritten_on_request(folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    config = settings(folder, out, epochs=1)
    with pytest.raises(UserError, match="not empty"):
        train(config)
    assert os.listdir(out) == ["notes.txt"]
    train(config, overwrite=True)
    train(config, overwrite=True)
    assert len(read_history(out)) == 1
    assert (out / "notes.txt").read_text() == "mine"


def test_loss_without_sense_stops_and_keeps_the_checkpoint(folder, tmp_path):
    config = settings(folder, tmp_path / "out", lr=1e30, clip_grad=None, warmup_epochs=0, checkpoint_every=1)
    with pytest.raises(TrainingFailed, match=r"at step \d+ \(epoch 1"):
        train(config)
    tensors = load_file(tmp_path / "out" / "last.safetensors")
    assert all(t.isfinite().all() for name, t in tensors.items() if name.startswith("optimizer/"))
    _, info = load_checkpoint(tmp_path / "out")
    steps = (tmp_path / "out" / "log.jsonl").read_text().splitlines()
    assert info.step == len(steps)


def test_trained_gspn2_on_digits(tmp_path):
    config = TrainConfig(
        epochs=1, batch_size=256, warmup_epochs=0, ema_decay=None, device="cpu", out=str(tmp_path)
    )
    rows = []
    result = train(config, on_event=lambda e: rows.append(e.row) if isinstance(e, EpochDone) else None)
    assert rows == result.history
    steps = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps[-1] < steps[0]
    model, info = load_checkpoint(result.out)
    evaluation = evaluate(model, eval_loader(load_data(info.config).test))
    assert evaluation.top1 == rows[0].top1
    assert evaluation.loss == pytest.approx(rows[0].test_loss, rel=1e-5)


# -- data


def test_folder_is_split_by_class_and_stays_so(folder):
    config = TrainConfig(data=str(folder), model="test_efficientnet", split_fraction=0.25)
    data = load_data(config)
    assert data.class_names == ("blue", "green", "red")
    assert [data.test.labels.count(label) for label in range(3)] == [3, 3, 3]
    assert not set(data.train.sources) & set(data.test.sources)
    assert len(data.train) + len(data.test) == 36
    assert load_data(dataclasses.replace(config, seed=9)).test.sources == data.test.sources
    assert load_data(dataclasses.replace(config, split_seed=1)).test.sources != data.test.sources


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
def test_damaged_training_image_is_named(tmp_path, workers):
    images = make_images(tmp_path / "images", per_class=3)
    (images / "red" / "1.png").write_bytes((images / "red" / "1.png").read_bytes()[:200])
    data = load_data(TrainConfig(data=str(images), model="test_efficientnet", split_fraction=0.01))
    with pytest.raises(DataError, match=r"^\S+1\.png: cannot be read") as error:
        list(eval_loader(dataclasses.replace(data, test=data.train).test, workers=workers))
    assert "\n" not in str(error.value)


def test_stratified_split_keeps_one_image_of_each_class_for_training():
    kept, held_out = stratified_split([0, 0, 1, 2, 2, 2, 2], 0.5, seed=0)
    assert sorted(kept + held_out) == list(range(7))
    assert 2 in kept, "the only image of a class"
    assert len([i for i in held_out if i > 2]) == 2


def test_order_depends_on_seed_and_epoch_alone():
    def order(epoch, start=0, seed=0):
        batches = EpochBatches(22, 5, seed)
        batches.epoch, batches.start = epoch, start
        return list(batches)

    assert len(order(0)) == 4
    assert order(1) == order(1)
    assert order(1, start=2) == order(1)[2:]
    assert [i for batch in order(0) for _, i in batch] != [i for batch in order(1) for _, i in batch]
    assert order(0, seed=1) != order(0)
    assert len(EpochBatches(3, 8, 0)) == 1, "a set smaller than a batch is one batch"


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


def test_workers_change_no_image(folder):
    def epoch(workers):
        config = settings(folder, Path("unused"), workers=workers)
        loader, batches = train_loader(load_data(config).train, config, torch.device("cpu"))
        batches.epoch = 2
        return [inputs for inputs, _ in loader]

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


# -- parts


def test_learning_rate_warms_up_and_falls():
    rates = [learning_rate(step, 100, 10, 1.0, 0.01) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[10] == 1.0 == max(rates)
    assert rates[99] == pytest.approx(0.01)
    assert rates[:11] == sorted(set(rates[:11]))
    assert rates[10:] == sorted(set(rates[10:]), reverse=True)
    assert learning_rate(54, 100, 10, 1.0, 0.0) == pytest.approx(0.5, abs=0.02)


def test_log_is_cut_to_the_checkpoint(tmp_path):
    log = RunLog(tmp_path, None)
    log.steps([{"step": 1}])
    sizes = log.sync()
    log.steps([{"step": 2}, {"step": 3}])
    log.close()
    log = RunLog(tmp_path, sizes)
    log.steps([{"step": 2}])
    log.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1, 2]
    assert (tmp_path / "log.csv").read_text().count("epoch") == 1


def test_evaluation_counts(tmp_path):
    class Known(torch.nn.Module):
        """Logits are the input."""

        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return x

    torch.manual_seed(0)
    logits = torch.randn(50, 7)
    labels = torch.randint(0, 7, (50,))
    model = Known().train()
    result = evaluate(model, [(logits[:30], labels[:30]), (logits[30:], labels[30:])])
    ranks = logits.argsort(1, descending=True)
    assert result.top1 == pytest.approx(100 * (ranks[:, 0] == labels).float().mean().item())
    assert result.top5 == pytest.approx(100 * (ranks[:, :5] == labels[:, None]).any(1).float().mean().item())
    assert result.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item())
    expected = torch.zeros(7, 7, dtype=torch.int64)
    for label, rank in zip(labels, ranks, strict=True):
        expected[label, rank[0]] += 1
    assert torch.equal(result.confusion, expected)
    assert (result.images, result.batch_size) == (50, 30)
    assert model.training
    with pytest.raises(ValueError, match="at least one batch"):
        evaluate(model, [])


def test_config_round_trip_and_refusals():
    config = TrainConfig(image_size=(32, 48), model_args={"depth": 2}, clip_grad=None)
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert TrainConfig(lr=1e-3, lr_base_size=512, batch_size=128).peak_lr == 2.5e-4
    with pytest.raises(UserError, match="unknown setting learning_rate"):
        TrainConfig.from_json({"learning_rate": 1})
    for wrong in (
        {"lr": 0},
        {"lr": float("nan")},
        {"epochs": 0},
        {"amp": "fp8"},
        {"in_chans": 2},
        {"mixup": 0.1, "batch_size": 5},
        {"crop_scale": (0.5, 0.2)},
        {"model_args": {"num_classes": 3}},
    ):
        with pytest.raises(UserError):
            TrainConfig(**wrong)


def test_fixed_size_models_are_made_for_the_image():
    config = TrainConfig(model="test_vit", image_size=(48, 32))
    model = build_model(config, preprocess_for(config), 10)
    assert model(torch.zeros(1, 1, 48, 32)).shape == (1, 10)
    with pytest.raises(UserError, match="does not take 50 x 32"):
        build_model(config, dataclasses.replace(preprocess_for(config), image_size=(50, 32)), 10)
