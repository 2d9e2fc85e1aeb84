"""What the tests of training share: small data, small settings, comparison of runs."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from gspn2.training import TrainConfig


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
