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
import timm
import torch
from safetensors.torch import load_file

from gspn2.training import (
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
from gspn2.training.checkpoint import read_checkpoint
from gspn2.training.distributed import World
from gspn2.training.export import export
from gspn2.training.recipes import recipe_settings
from training_helpers import assert_same_run, settings

pytestmark = pytest.mark.usefixtures("one_thread")


def recipe(data: Path, out: Path, **changes) -> TrainConfig:
    """The ImageNet recipe in small. Each process draws for itself what to drop, so nothing is dropped."""
    small = {"depths": (1, 2), "dims": (8, 16), "chunk": (4, 0)}
    settings = {**recipe_settings("test"), "epochs": 2, "model_args": small, "drop_path": 0.0}
    return TrainConfig(**{**settings, "data": str(data), "out": str(out), "device": "cpu", **changes})


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    return train(recipe(folder, tmp_path_factory.mktemp("alone") / "out"))


SCRIPT = """
import json, os, shutil, signal, sys
from pathlib import Path
import torch
import torch.distributed as dist
from gspn2.training import Interrupted, StepDone, TrainConfig, train

torch.set_num_threads(1)
legs = json.loads(sys.argv[1])
if len(legs) > 1:
    dist.init_process_group("gloo")
for settings, resume, kill_at in legs:
    sent = []

    def on_event(event):
        assert os.environ["RANK"] == "0", "the first process alone reports"
        # Once: a second signal would end the process.
        if isinstance(event, StepDone) and event.step >= kill_at and not sent:
            sent.append(event.step)
            os.kill(os.getpid(), signal.SIGTERM)

    code = 0
    try:
        train(TrainConfig.from_json(settings), on_event=on_event, resume=resume)
    except Interrupted as stop:
        code = 128 + stop.signum
        if os.environ["RANK"] == "0":
            shutil.copytree(settings["out"], settings["out"] + "-stopped")
        # With frames of the run still at hand: a group that they kept would be destroyed with the GIL held.
        running = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
        assert len(legs) > 1 or "pt_gloo_runloop" not in running, running
if len(legs) > 1:
    dist.destroy_process_group()
sys.exit(code)
"""
NEVER = 10**9


def free_port() -> int:
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        return chosen.getsockname()[1]


def run_together(*legs: tuple[TrainConfig, bool, int], processes: int = 2) -> list[int]:
    """Exit codes of processes with the environment that torchrun gives them.

    Args:
        legs: settings, whether to resume, and the step at which the first process is asked to stop; several
            run one after the other in a group that they find, and the codes are those of the last.
    """
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    arguments = [json.dumps([(config.to_json(), resume, kill_at) for config, resume, kill_at in legs])]
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
        errors = [process.communicate(timeout=100)[1] for process in started]
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
        assert ours.test_loss == pytest.approx(theirs.test_loss, rel=2e-4)


def test_two_processes_train_like_one_and_resume_copies_and_shards(folder, alone, tmp_path):
    """`copies` (DDP) is interrupted and resumed; `parts` is `whole` (FSDP), interrupted and resumed.

    One test, and all but the first run in one launch: starting processes takes most of the time.
    """
    copies = recipe(folder, tmp_path / "copies")
    assert run_together((copies, False, 3)) == [143, 143], "one is asked to stop, both do"
    _, info = load_checkpoint(tmp_path / "copies" / "last.safetensors")
    assert 3 <= info.step < 6
    # Everything that touches parameters is on: clipping, average, MESA, recomputed activations.
    whole = recipe(folder, tmp_path / "whole", shard=True, grad_checkpointing=True, accumulate=2)
    parts = dataclasses.replace(whole, out=str(tmp_path / "parts"))
    # Batch norms of each process's own on a CPU, an average with buffers, dropout. Rounding grows fast there:
    # unclipped, there is none, as halves are added.
    norms = settings(folder, tmp_path / "norms", epochs=1, clip_grad=None)
    sharded_norms = dataclasses.replace(norms, shard=True, out=str(tmp_path / "sharded_norms"))
    legs = [(copies, True, NEVER), (whole, False, NEVER), (parts, False, 3), (parts, True, NEVER)]
    assert run_together((norms, False, NEVER), (sharded_norms, False, NEVER), *legs) == [0, 0]

    assert_alike(tmp_path / "copies", alone.out)
    summary = json.loads((tmp_path / "copies" / "summary.json").read_text())
    assert summary["environment"]["processes"] == 2

    assert_alike(tmp_path / "whole", alone.out)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    tensors, expected = (load_file(out / "last.safetensors") for out in (tmp_path / "whole", alone.out))
    assert {name: it.shape for name, it in tensors.items()} == {k: v.shape for k, v in expected.items()}

    assert losses(tmp_path / "sharded_norms") == losses(tmp_path / "norms")
    goes_on_alone(tmp_path / "parts-stopped", alone.out)
    is_evaluated_and_exported(tmp_path / "whole", tmp_path / "exported")


def goes_on_alone(stopped: Path, expected: Path) -> None:
    """What two processes began in shares, one ends."""
    _, info = read_checkpoint(stopped / "last.safetensors")
    assert info.step < 6
    assert info.state["environment"]["sharded"]
    told = []
    here = dataclasses.replace(info.config, shard=False, out=str(stopped))
    train(here, on_event=told.append, resume=True)
    assert any("sharded is False, was True" in str(event) for event in told)
    assert_alike(stopped, expected)


def is_evaluated_and_exported(run: Path, out: Path) -> None:
    """The last state of a sharded run is a checkpoint like any other."""
    model, info = load_checkpoint(run / "last.safetensors")
    evaluation = evaluate(model, eval_loader(load_data(info.config).test))
    last = read_history(run)[-1]
    assert (evaluation.top1, evaluation.loss) == (last.top1, pytest.approx(last.test_loss, rel=1e-5))
    export(model, info, out)
    loaded = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    assert all(map(torch.equal, loaded.state_dict().values(), model.state_dict().values()))


def test_accumulation_changes_no_loss(folder, alone, tmp_path):
    result = train(recipe(folder, tmp_path / "out", accumulate=4, grad_checkpointing=True))
    assert_alike(result.out, alone.out)


def test_world_that_cannot_share_a_batch_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match="need a multiple of 16, got 8"):
        train(dataclasses.replace(recipe(folder, tmp_path / "out"), accumulate=8))
    assert not (tmp_path / "out").exists()


def test_process_that_others_left_says_so_in_a_line(monkeypatch):
    def lost(*args, **kwargs):
        raise RuntimeError("Connection closed by peer\nand more")

    for name in ("all_reduce", "all_gather_object"):
        monkeypatch.setattr(torch.distributed, name, lost)
    world = World(rank=1, size=2)
    for ask in (world.wait, lambda: world.sum(torch.zeros(1)), lambda: world.gather(["x"])):
        with pytest.raises(TrainingFailed, match=r"another process of this run has ended.*by peer$"):
            ask()


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
