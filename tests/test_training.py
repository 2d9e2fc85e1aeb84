"""Training: the same numbers whatever interrupts it, and data that depend on (seed, epoch, index) alone."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gspn2.training import (
    EpochDone,
    Interrupted,
    StepDone,
    TrainConfig,
    TrainingFailed,
    UserError,
    eval_loader,
    evaluate,
    load_checkpoint,
    load_data,
    read_history,
    train,
)
from training_helpers import assert_same_run, make_images, run_killed, settings

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """The run nobody interrupts."""
    return train(settings(folder, tmp_path_factory.mktemp("run") / "out"))


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


@pytest.mark.parametrize("gone", ["log.csv", "best.safetensors"])
def test_a_part_of_a_run_is_not_resumed(folder, finished, tmp_path, gone):
    for name in {"last.safetensors", "best.safetensors", "log.csv", "log.jsonl"} - {gone}:
        shutil.copy(finished.out / name, tmp_path)
    with pytest.raises(UserError, match=f"whole folder of the run is needed; missing or cut: {gone}$"):
        train(settings(folder, tmp_path), resume=True)


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
