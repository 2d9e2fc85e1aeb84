"""Several processes train like one at the same global batch; accumulation changes nothing either."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gspn2.training import TrainConfig, UserError, load_checkpoint, read_history, train
from gspn2.training.recipes import recipe_settings
from training_helpers import make_images


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small only get slower on more, the more so beside other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def recipe(data: Path, out: Path, **changes) -> TrainConfig:
    """The ImageNet recipe in small. Each process draws for itself what to drop, so nothing is dropped."""
    settings = {**recipe_settings("test"), "epochs": 2, "image_size": (32, 32), "drop_path": 0.0}
    return TrainConfig(**{**settings, "data": str(data), "out": str(out), "device": "cpu", **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    return train(recipe(folder, tmp_path_factory.mktemp("alone") / "out"))


SCRIPT = """
import json, os, signal, sys
import torch
from gspn2.training import Interrupted, StepDone, TrainConfig, train

torch.set_num_threads(1)
resume, kill_at = sys.argv[2] == "resume", int(sys.argv[3])

def on_event(event):
    assert os.environ["RANK"] == "0", "the first process alone reports"
    if isinstance(event, StepDone) and event.step >= kill_at:
        os.kill(os.getpid(), signal.SIGTERM)

try:
    train(TrainConfig.from_json(json.loads(sys.argv[1])), on_event=on_event, resume=resume)
except Interrupted as stop:
    sys.exit(128 + stop.signum)
"""


def free_port() -> int:
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        return chosen.getsockname()[1]


def run_together(
    config: TrainConfig, processes: int, resume: bool = False, kill_at: int = 10**9
) -> list[int]:
    """Exit codes of processes with the environment that torchrun gives them."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    arguments = [json.dumps(config.to_json()), "resume" if resume else "start", str(kill_at)]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, *arguments],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        errors = [process.communicate(timeout=200)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert all(process.returncode in (0, 143) for process in started), errors
    return [process.returncode for process in started]


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


def assert_alike(out: Path, expected: Path) -> None:
    """Sums are taken in another order: equal within rounding, which training makes larger step by step."""
    assert losses(out) == pytest.approx(losses(expected), rel=2e-4)
    for ours, theirs in zip(read_history(out), read_history(expected), strict=True):
        assert ours.test_loss == pytest.approx(theirs.test_loss, rel=2e-3)


def test_two_processes_train_like_one_and_resume(folder, alone, tmp_path):
    config = recipe(folder, tmp_path / "out")
    assert run_together(config, 2, kill_at=3) == [143, 143], "one is asked to stop, both do"
    _, info = load_checkpoint(tmp_path / "out" / "last.safetensors")
    assert 3 <= info.step < 8
    assert run_together(config, 2, resume=True) == [0, 0]
    assert_alike(tmp_path / "out", alone.out)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["environment"]["processes"] == 2


def test_accumulation_changes_no_loss(folder, alone, tmp_path):
    result = train(recipe(folder, tmp_path / "out", accumulate=4, grad_checkpointing=True))
    assert_alike(result.out, alone.out)


def test_world_that_cannot_share_a_batch_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match="need a multiple of 16, got 8"):
        train(dataclasses.replace(recipe(folder, tmp_path / "out"), accumulate=8))
    assert not (tmp_path / "out").exists()


def test_torchrun_starts_the_command(folder, tmp_path):
    """The way the manual says it."""
    options = ["--recipe", "test", "--data", str(folder), "--epochs", "1", "--out", str(tmp_path / "out")]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, "-m", "gspn2", "train", *options, "--device", "cpu"]
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("cpu, mixed precision off, 2 processes") == 1, "one process reports"
    assert ended.stdout.count("best weights: ") == 1
    assert signal.SIGTERM.name not in ended.stderr
