"""`gspn2 distill`: losses, encodings kept, exact resume, errors before anything is done."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import diffusers
from diffusers import EulerDiscreteScheduler
from PIL import Image

import diffusion_helpers as tiny
from distill_helpers import listed, losses, settings
from gspn2.cli.main import main
from gspn2.integrations.diffusers import UNetMixers, mount, unmount
from gspn2.integrations.diffusers.distill import batches_of, distill
from gspn2.integrations.diffusers.distillation import Batch, Distiller, twin
from gspn2.integrations.diffusers.pairs import Cache, Picture, buckets, fitted, pixels_of
from gspn2.integrations.diffusers.sampling import Sampler
from gspn2.integrations.diffusers.vae import TiledVae
from gspn2.training.errors import DataError, Interrupted, UserError

SIZES = {"wide": (48, 96), "square": (64, 64), "high": (100, 60), "other": (70, 66)}


pytestmark = pytest.mark.usefixtures("one_thread", "fresh_accelerate")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Pipelines on disk, and pictures with captions."""
    root = tmp_path_factory.mktemp("distill")
    tiny.sdxl_pipeline(root).save_pretrained(root / "sdxl")
    tiny.sd15_pipeline(root).save_pretrained(root / "sd15")
    (root / "data" / "more").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i, (name, (height, width)) in enumerate(SIZES.items()):
        file = root / "data" / ("more" if i == 3 else "") / f"{name}.png"
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file)
        file.with_suffix(".txt").write_text(f"a {name}\n")
    return root


def config(folders, out, name="sdxl", **changes):
    return settings(folders / name, folders / "data", out, **{"steps": 6, "save_every": 4, **changes})


def test_a_twin_shares_every_tensor_and_no_module():
    unet = tiny.sdxl_unet()
    other = twin(unet)
    assert all(a is b for a, b in zip(unet.parameters(), other.parameters(), strict=True))
    assert not set(unet.modules()) & set(other.modules())
    mount(other)
    assert unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1.to_q is not None


@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_mixers_learn_and_unmounting_gives_the_teacher(checkpointing):
    """Whatever is recomputed, the losses are those of the layers as they ran forward."""
    unet = tiny.sdxl_unet()
    weights = {"noise": 0.0, "teacher": 1.0, "features": 1.0}
    scheduler = EulerDiscreteScheduler(**tiny.SCHEDULER)
    distiller = Distiller(unet, scheduler, weights, checkpointing=checkpointing)
    given = tiny.inputs(unet, 16, 24)
    prompt = {"embeds": given["encoder_hidden_states"], "pooled": given["added_cond_kwargs"]["text_embeds"]}
    batch = Batch(
        given["sample"],
        torch.randn_like(given["sample"]),
        torch.tensor([3, 700]),
        prompt,
        given["added_cond_kwargs"]["time_ids"],
    )
    found = distiller(batch)
    # Mixers start with outputs of 0: as far from the teacher as its outputs are from 0.
    torch.testing.assert_close(found["features"], torch.tensor(1.0))
    assert found["teacher"] > 0
    found["loss"].backward()
    assert all(parameter.grad is None for parameter in unet.parameters())
    for name, parameter in distiller.mixers.named_parameters():
        assert parameter.grad is not None, name
        if name.endswith("from_proxy.weight"):
            assert parameter.grad.abs().sum() > 0, name
    unmount(distiller.student)
    with torch.no_grad():
        assert distiller._predict(distiller.student, batch.latents, batch).equal(
            distiller._predict(unet, batch.latents, batch)
        )


@pytest.mark.parametrize("name", ["sdxl", "sd15"])
def test_losses_fall(folders, tmp_path, name):
    run = config(folders, tmp_path / "run", name, steps=24, noise=0.0)
    mixers = UNetMixers.from_pretrained(distill(run))
    found = losses(tmp_path / "run")
    assert [line["step"] for line in found] == list(range(24))
    for kind in ("features", "loss"):
        first, last = (sum(line[kind] for line in part) / 8 for part in (found[:8], found[-8:]))
        assert last < 0.97 * first, kind
    pipe = getattr(tiny, f"{name}_pipeline")(tmp_path)
    mount(pipe.unet, mixers)
    assert any(p.abs().sum() > 0 for n, p in mixers.named_parameters() if n.endswith("from_proxy.weight"))


def test_a_resumed_run_is_the_same(folders, tmp_path):
    """Killed after step 5, resumed from the checkpoint at 4: same losses, same weights, same encodings."""
    whole = distill(config(folders, tmp_path / "whole", cache=tmp_path / "cache"))
    encodings = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()}

    def killed(what, done, total, found):
        if what == "steps" and done == 5:
            raise MemoryError

    run = config(folders, tmp_path / "run", cache=tmp_path / "cache")
    with pytest.raises(MemoryError):
        distill(run, killed)
    assert not (tmp_path / "run" / "mixers").exists()
    resumed = distill(run, resume=True)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    theirs = dict(UNetMixers.from_pretrained(resumed).named_parameters())
    for name, parameter in UNetMixers.from_pretrained(whole).named_parameters():
        assert torch.equal(parameter, theirs[name]), name
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()} == encodings
    assert not [p for p in tmp_path.rglob("*.tmp")]
    with pytest.raises(UserError, match="seed is 1, was 0"):
        distill(config(folders, tmp_path / "run", seed=1), resume=True)
    with pytest.raises(UserError, match="holds a run"):
        distill(run)


def test_a_signal_saves_first(folders, tmp_path):
    """SIGTERM in the third step, between checkpoints."""
    cache = tmp_path / "cache"
    distill(config(folders, tmp_path / "whole", cache=cache))

    def stopped(what, done, total, found):
        if what == "steps" and done == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    run = config(folders, tmp_path / "run", cache=cache)
    with pytest.raises(Interrupted, match="SIGTERM at step 3"):
        distill(run, stopped)
    assert len(losses(tmp_path / "run")) == 3
    distill(run, resume=True)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


@pytest.fixture
def interruptible():
    """SIGINT raises, also in the child of a shell that runs it in the background and had it ignore that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_encoding_can_be_left_at_once(folders, tmp_path):
    run = settings(folders / "sd15", folders / "data", tmp_path / "run", steps=1)

    def interrupt(what, done, total, found):
        if what == "latents" and done == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        distill(run, interrupt)
    assert len(list((tmp_path / "run/cache").glob("latents-*.safetensors"))) == 2
    told = []
    distill(run, lambda what, done, total, found: told.append((what, done, total)))
    assert ("latents", 2, 2) in told
    assert ("prompts", 1, 1) not in told


def test_two_processes_take_the_steps_of_one(folders, tmp_path):
    """Also when each takes its share in two passes."""
    distill(config(folders, tmp_path / "one", steps=3, batch_size=4))
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "gspn2",
        "distill",
    ]
    fixed = ["--pipeline", str(folders / "sdxl"), "--data", str(folders / "data"), "--device", "cpu"]
    sizes = ["--resolution", "64", "--steps", "3", "--batch-size", "4", "--sample-every", "0"]
    rates = ["--accumulate", "2", "--warmup", "1", "--lr", "3e-3", "--out", str(tmp_path / "two")]
    done = subprocess.run(
        [sys.executable, *command, *fixed, *sizes, *rates],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 1
    assert (tmp_path / "two" / "mixers" / "config.json").is_file()
    for one, two in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, rel=1e-4)


def test_bf16_with_checkpointing_and_grids(folders, tmp_path):
    out = tmp_path / "run"
    changes = {"steps": 2, "sample_every": 2, "samples": 2, "sample_steps": 2, "checkpointing": True}
    distill(config(folders, out, bf16=True, **changes))
    assert all(np.isfinite(line["loss"]) for line in losses(out))
    with Image.open(out / "samples" / "step-0000002.png") as grid:
        assert grid.height > grid.width / 2
        assert np.asarray(grid).std() > 0
    assert {p.dtype for p in UNetMixers.from_pretrained(out / "mixers").parameters()} == {torch.float32}


STATISTICS = {"latents_mean": [0.3, -0.2, 0.1, 0.4], "latents_std": [0.5, 0.9, 1.4, 2.0]}


@pytest.mark.parametrize("told", [STATISTICS, {"shift_factor": 0.3}, {}])
def test_latents_are_scaled_as_the_vae_tells(folders, tmp_path, told):
    """What is learnt from, and the pictures of a grid, are what `gspn2 generate` makes of them."""
    vae, file = tiny.vae(**told), folders / "data" / "square.png"
    pair = fitted(Picture("square", file, "", "", "a square", 64, 64), [(64, 64)])
    cache = Cache(tmp_path, folders / "sdxl", torch.float32)
    cache.build(SimpleNamespace(vae=vae), [pair], iter([str(file)]), [], torch.device("cpu"), lambda *_: None)
    with Image.open(file) as image:
        expected = TiledVae(vae).encode(pixels_of(pair, image))
    latents = cache.latents(pair)[None]
    torch.testing.assert_close(latents, expected)

    pipe = MagicMock(vae=vae, unet=torch.nn.Linear(1, 1))
    pipe.return_value.images = latents
    cache.prompt = lambda caption: {}
    Sampler(pipe, pipe.unet, 1.0, 1, 0).grid(tmp_path / "grid.png", [pair], cache)
    picture = torch.cat(list(TiledVae(vae).decode(latents)), dim=2)[0].permute(1, 2, 0)
    with Image.open(tmp_path / "grid.png") as grid:
        difference = np.asarray(grid)[:64] - ((picture + 1) * 127.5).clamp(0, 255).numpy()
    assert np.abs(difference).max() <= 0.51


def test_buckets_and_crops(folders):
    sizes = buckets(128, 32)
    assert (128, 128) in sizes
    assert all(h % 32 == w % 32 == 0 and h * w <= 128 * 128 and max(h, w) <= 2 * min(h, w) for h, w in sizes)
    assert {(w, h) for h, w in sizes} == set(sizes)
    with pytest.raises(ValueError, match="multiple of 32, got 100"):
        buckets(100, 32)
    pairs = [fitted(picture, buckets(128, 32)) for picture in listed(folders / "data", folders)[1].pictures]
    assert [pair.caption for pair in pairs] == ["a high", "a other", "a square", "a wide"]
    for pair in pairs:
        assert pair.original == SIZES[pair.caption.removeprefix("a ")]
        assert (pair.size[0] - pair.size[1]) * (pair.original[0] - pair.original[1]) >= 0
    order = batches_of(pairs, 2, 0, 0)
    assert {i for batch in order for i in batch} == set(range(4))
    assert all(len({pairs[i].size for i in batch}) == 1 and len(batch) == 2 for batch in order)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("caption", "no caption, expected lonely.txt"),
        ("empty", "is empty"),
        ("picture", "no readable picture with a caption in .*lonely.png: not an image"),
        ("none", "no picture"),
        ("folder", "no such"),
    ],
)
def test_bad_data_is_refused(folders, tmp_path, fault, message):
    data = tmp_path / "data"
    if fault != "folder":
        data.mkdir()
    if fault in ("caption", "empty", "picture"):
        if fault == "picture":
            (data / "lonely.png").write_bytes(b"no picture")
        else:
            Image.new("RGB", (64, 64)).save(data / "lonely.png")
        if fault != "caption":
            (data / "lonely.txt").write_text(" " if fault == "empty" else "words")
    with pytest.raises(DataError, match=message):
        listed(data, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resolution", "100"], "resolution: expected a multiple of"),
        (["--drop", "1"], "drop: expected"),
        (["--lr", "inf"], "lr: expected a number of more than 0, got inf"),
        (["--seed", "99999999999999999999999"], "seed: expected a whole number of 32 bits, got 9999"),
        (["--sample-steps", "1001"], "sample_steps: expected at most the 1000 that"),
        (["--batch-size", "6", "--accumulate", "4"], "multiple of 4 (1 processes x 4 passes), got 6"),
        (["--data", "hf:nowhere/at/all"], "nowhere/at/all: cannot be loaded"),
        (["--data", "missing-{0..3}.tar"], "no such file"),
        (["--noise", "0", "--teacher", "0", "--features", "0"], "one loss"),
        (["--pipeline", "nowhere"], "no model_index.json in nowhere"),
        (["--resume"], "no last.safetensors to resume from"),
    ],
)
def test_bad_settings_leave_nothing_behind(folders, tmp_path, capsys, options, message):
    out = tmp_path / "run"
    fixed = ["--pipeline", str(folders / "sdxl"), "--data", str(folders / "data"), "--device", "cpu"]
    assert main(["distill", *fixed, "--out", str(out), *options]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_pipeline_that_predicts_something_else_is_refused(folders, tmp_path):
    shutil.copytree(folders / "sd15", tmp_path / "sd15")
    config = tmp_path / "sd15/scheduler/scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "prediction_type": "sample"}))
    with pytest.raises(UserError, match="expected prediction of epsilon or v_prediction, got 'sample'"):
        distill(settings(tmp_path / "sd15", folders / "data", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_a_teacher_trained_with_another_noise_is_refused(folders, tmp_path, capsys, name):
    """EDM's scheduler says that it predicts noise, too, but of sigmas and inputs of its own."""
    root = tmp_path / "edm"
    shutil.copytree(folders / "sd15", root)
    scheduler = getattr(diffusers, name)()
    scheduler.save_pretrained(root / "scheduler")
    index = json.loads((root / "model_index.json").read_text())
    (root / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", name]}))
    words = ["--pipeline", str(root), "--data", str(folders / "data"), "--out", str(tmp_path / "run")]
    assert main(["distill", *words, "--device", "cpu"]) == 2
    told = capsys.readouterr().err
    assert "scheduler: expected one " in told
    assert name in told
    assert os.listdir(tmp_path) == ["edm"]
    with pytest.raises(ValueError, match=f"got {name}"):
        Distiller(tiny.sd15_unet(), scheduler, {})


def test_the_command(folders, tmp_path, capsys):
    fixed = ["--pipeline", str(folders / "sd15"), "--data", str(folders / "data"), "--device", "cpu"]
    sizes = ["--resolution", "64", "--steps", "2", "--batch-size", "2", "--sample-every", "0"]
    assert main(["distill", *fixed, *sizes, "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert "latents 4/4" in printed
    assert "steps 2/2" in printed
    assert (tmp_path / "run" / "mixers" / "config.json").is_file()
