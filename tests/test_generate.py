"""`gspn2 generate`: stages, files, and errors before anything is done."""

from __future__ import annotations

import json
import os
import shutil
import signal
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from PIL import Image
from safetensors.torch import load_file

import diffusion_helpers as tiny
from gspn2.cli import generate as command_module
from gspn2.cli.main import main
from gspn2.integrations.diffusers import generate as module
from gspn2.integrations.diffusers import mount
from gspn2.training.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Pipelines on disk, with mixers that do something."""
    root = tmp_path_factory.mktemp("pipelines")
    for name, pipe in (("sdxl", tiny.sdxl_pipeline(root)), ("sd15", tiny.sd15_pipeline(root))):
        pipe.save_pretrained(root / name)
        mount(pipe.unet, zero_output=False).save_pretrained(root / f"{name}-mixers")
    return root


def command(folders, out, *more, name="sdxl", size="256"):
    fixed = [
        "--pipeline",
        str(folders / name),
        "--mixers",
        str(folders / f"{name}-mixers"),
        "--device",
        "cpu",
    ]
    return ["generate", *fixed, "--steps", "3", "--size", size, "--out", str(out), *more]


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.mark.parametrize(("name", "size"), [("sdxl", "256x192"), ("sd15", "128x320"), ("sd15", "256x256")])
def test_three_aspect_ratios(folders, tmp_path, capsys, name, size):
    out = tmp_path / "image.png"
    assert main(command(folders, out, "a cat", name=name, size=size)) == 0
    height, width = map(int, size.split("x"))
    assert pixels(out).shape == (height, width, 3)
    printed = capsys.readouterr().out
    assert "peak memory: about" in printed
    assert f"stage 2: {height} x {width}, 1 steps" in printed
    told = [line for line in printed.splitlines() if line.startswith(f"stage 2/2 ({height} x {width})")]
    assert [line.rpartition(")")[2] for line in told] == [": decoding: done", ": encoding: done", ": done"]
    assert os.listdir(tmp_path) == ["image.png"]


def test_the_same_seed_gives_the_same_picture(folders, tmp_path):
    for file, more in (("a.png", []), ("b.tif", []), ("c.png", ["--seed", "1"]), ("d.png", ["--direct"])):
        assert main(command(folders, tmp_path / file, "a cat", *more)) == 0
    assert (pixels(tmp_path / "a.png") == pixels(tmp_path / "b.tif")).all()
    assert (pixels(tmp_path / "a.png") != pixels(tmp_path / "c.png")).any()
    assert (pixels(tmp_path / "a.png") != pixels(tmp_path / "d.png")).any()


def test_an_interrupted_run_goes_on_between_stages(folders, tmp_path, monkeypatch, capsys):
    whole, out = tmp_path / "whole.png", tmp_path / "image.png"
    assert main(command(folders, whole, "a cat")) == 0
    enlarge = module._enlarge
    monkeypatch.setattr(module, "plan", lambda job: module.Plan(1 << 30, 256, 65536))
    monkeypatch.setattr(module, "_enlarge", lambda *args: (_ for _ in ()).throw(OSError("no more")))
    assert main(command(folders, out, "a cat")) == 1
    assert sorted(os.listdir(tmp_path)) == ["image.png.stages", "whole.png"]
    assert os.listdir(tmp_path / "image.png.stages") == ["stage0.safetensors"]
    calls = []
    monkeypatch.setattr(module, "_enlarge", lambda *args: calls.append(args) or enlarge(*args))
    capsys.readouterr()
    assert main(command(folders, out, "a cat", "--resume")) == 0
    assert "stage 1/2" not in capsys.readouterr().out
    assert len(calls) == 1
    assert (pixels(out) == pixels(whole)).all()
    assert sorted(os.listdir(tmp_path)) == ["image.png", "whole.png"]


def test_folders_are_the_same_however_they_are_written(folders, tmp_path, monkeypatch):
    """A run is resumed, although its command is typed anew."""
    monkeypatch.chdir(folders)

    def digest(pipeline, mixers):
        return module.Job(Path(pipeline), 128, 128, mixers=mixers, steps=3).fingerprint("a cat", 0)

    expected = digest("sdxl", "sdxl-mixers")
    for name in ("sdxl-mixers/", "./sdxl-mixers", str(folders / "sdxl-mixers")):
        assert digest(folders / "sdxl", name) == expected
    assert digest("sdxl", None) != digest("sdxl", "untrained") != expected
    shutil.copytree("sdxl-mixers", tmp_path / "mixers")
    assert digest("sdxl", str(tmp_path / "mixers")) != expected


def test_memory_that_runs_out_keeps_finished_stages(folders, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(module, "plan", lambda job: module.Plan(1 << 30, 256, 65536))
    monkeypatch.setattr(module, "_enlarge", fail)
    assert main(command(folders, tmp_path / "image.png", "a cat")) == 1
    assert "more than the 1.1 GB that were foreseen" in capsys.readouterr().err
    assert os.listdir(tmp_path / "image.png.stages") == ["stage0.safetensors"]


def test_a_terminated_run_leaves_no_half_picture(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "plan", lambda job: module.Plan(1 << 30, 256, 65536))
    monkeypatch.setattr(
        module.ImageFile, "write", lambda self, rows: os.kill(os.getpid(), signal.SIGTERM) or len(self.path)
    )
    before = signal.getsignal(signal.SIGTERM)
    assert main(command(folders, tmp_path / "image.png", "a cat", size="128")) == 128 + signal.SIGTERM
    assert "--resume goes on" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["image.png.stages"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_scheduler_of_second_order_counts_every_evaluation(folders, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(command_module._Lines, "__call__", lambda self, *what: told.append(what))
    words = command(folders, tmp_path / "a.png", "a cat", "--scheduler", "HeunDiscreteScheduler", size="128")
    assert main(words) == 0
    assert told[:-1] == [("stage 1/1 (128 x 128)", i + 1, 5) for i in range(5)]


def test_weights_of_one_variant_are_loaded(folders, tmp_path):
    """As large pipelines are often fetched: in half precision only."""
    shutil.copytree(folders / "sd15", tmp_path / "half")
    for path in (tmp_path / "half").rglob("*.safetensors"):
        path.rename(path.with_name(f"{path.stem}.fp16.safetensors"))
    words = command(folders, tmp_path / "b.png", "a cat", "--pipeline", str(tmp_path / "half"), name="sd15")
    assert main(words) == 0
    assert main(command(folders, tmp_path / "a.png", "a cat", name="sd15")) == 0
    assert (pixels(tmp_path / "a.png") == pixels(tmp_path / "b.png")).all()


def test_text_encoders_count_where_they_are_loaded_with_the_rest(folders, monkeypatch):
    root = folders / "sdxl"
    count = sum(
        torch.tensor(tensor.shape).prod().item()
        for name in ("text_encoder", "text_encoder_2")
        for tensor in load_file(root / name / "model.safetensors").values()
    )
    assert module.PipelineFolder(root).text_parameters() == count > 0
    job = module.Job(root, 128, 128, memory=10**12)
    before = module.plan(job).peak
    monkeypatch.setattr(module.PipelineFolder, "text_parameters", lambda self: 10**9)
    assert module.plan(job).peak > max(before, 4e9)


def test_prompts_from_a_file(folders, tmp_path, capsys):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "pictures"
    prompts.write_text("a cat\n\na dog\n", encoding="utf-8-sig")
    assert main(command(folders, out, "--prompts", str(prompts), "--memory", "0.5", size="128")) == 2
    assert not out.exists()
    assert main(command(folders, out, "--prompts", str(prompts), size="128")) == 0
    assert sorted(os.listdir(out)) == ["0.png", "1.png", "pictures.json"]
    assert (pixels(out / "0.png") != pixels(out / "1.png")).any()
    (out / "1.png").unlink()
    capsys.readouterr()
    assert main(command(folders, out, "--prompts", str(prompts), "--resume", size="128")) == 0
    printed = capsys.readouterr().out
    assert "1 of 2 pictures are there already" in printed
    assert printed.count("wrote") == 1
    assert main(command(folders, out, "--prompts", str(prompts), "--resume", size="128")) == 0
    assert capsys.readouterr().out == "2 of 2 pictures are there already\n"
    before = pixels(out / "1.png")
    prompts.write_text("a cat\na bird\n")
    assert main(command(folders, out, "--prompts", str(prompts), "--resume", size="128")) == 0
    assert "1 of 2 pictures are there already\n1 of other prompts" in capsys.readouterr().out
    assert (pixels(out / "1.png") != before).any()


def test_a_folder_for_pictures_that_cannot_be_one(folders, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    for out, message in (
        (prompts, "expected a folder for several pictures"),
        (prompts / "a", "cannot write"),
    ):
        assert main(command(folders, out, "--prompts", str(prompts), size="128")) == 2
        assert message in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["prompts.txt"]


BAD = {
    "size": (["--size", "250"], "multiple of 8, got 250"),
    "far too large": (["--size", "100000000", "--direct"], "needs more than 40000001.1 GB, there are"),
    "no file": (["--size", "64x9999999992"], "width: expected at most 536870912, got 9999999992"),
    "scheduler": (["--scheduler", "NoScheduler"], "EulerDiscreteScheduler"),
    "flow": (["--scheduler", "FlowMatchEulerDiscreteScheduler"], "expected one of DDIMScheduler"),
    "seed": (["--seed", "99999999999999999999"], "32 bits, got 99999999999999999999"),
    "memory": (["--memory", "1.08"], "256 x 256 needs about"),
    "little memory": (["--memory", "0.5"], "needs more than 1.1 GB, there are 0.5 GB"),
    "steps": (["--steps", "1"], "less than one"),
    "too many steps": (["--steps", "1001"], "steps: expected at most the 1000 that"),
    "strengths": (["--strengths", "0.5,0.5"], "expected 1, one for each pass"),
    "pipeline": (["--pipeline", "nowhere"], "no model_index.json in nowhere"),
    "mixers": (["--mixers", "nowhere"], "no config.json in nowhere"),
    "dtype": (["--dtype", "int8"], "expected one of float32"),
    "guidance": (["--guidance", "nan"], "at least 1, got nan"),
    "endless guidance": (["--guidance", "inf"], "of at least 1, got inf"),
    "no memory": (["--memory", "-1"], "more than 0, got -1 GB"),
    "suffix": (["--out", "image.jpg"], "ends in .png"),
    "folder": (["--out", "nowhere/image.png"], "no such folder"),
    "long name": (["--out", f"{'a' * 250}.png"], "out: cannot write aaa"),
    "prompts": (["--prompts", "nowhere.txt"], "either PROMPT or --prompts"),
}

if Path("/proc").is_dir():
    BAD["unwritable"] = (["--out", "/proc/image.png"], "cannot write to /proc")
if find_spec("torchsde") is None:
    BAD["package"] = (["--scheduler", "DPMSolverSDEScheduler"], "expected one of DDIMScheduler")


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_anything_is_loaded(folders, tmp_path, monkeypatch, capsys, case):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "Generator", None)
    more, message = BAD[case]
    assert main(command(folders, tmp_path / "image.png", "a cat", *more)) == 2
    assert message in capsys.readouterr().err
    assert not os.listdir(tmp_path)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


NOT_WHOLE = {
    "weights": ("sdxl", lambda root: (root / WEIGHTS["unet"]).unlink(), "no weights"),
    "cut": ("sdxl", lambda root: cut(root / WEIGHTS["vae"]), "damaged"),
    "tokenizer": ("sdxl", lambda root: shutil.rmtree(root / "tokenizer"), "no tokenizer in"),
    "config": ("sdxl", lambda root: (root / "vae/config.json").write_text("{}"), "no block_out_channels"),
    "json": ("sdxl", lambda root: (root / "unet/config.json").write_text("{"), "cannot read"),
    "own scheduler": ("sdxl", lambda root: scheduled(root, "FlowMatchEulerDiscreteScheduler"), "flow models"),
    "no scheduler": ("sdxl", lambda root: scheduled(root, "NoScheduler"), "of diffusers in"),
    "variants": ("sdxl", lambda root: renamed(root), "same variant"),
    "mixers": ("sdxl-mixers", lambda root: cut(root / WEIGHTS["mixers"]), "damaged"),
    "no mixers": ("sdxl-mixers", lambda root: (root / "config.json").write_text("{}"), "mixers: cannot use"),
    "fit": ("sdxl-mixers", lambda root: edit(root / "config.json"), "expected 64 channels at"),
}
WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "mixers": "diffusion_pytorch_model.safetensors",
}


def scheduled(root, name):
    """A pipeline that names another scheduler."""
    index = json.loads((root / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", name]
    (root / "model_index.json").write_text(json.dumps(index))


def renamed(root):
    """Weights in different variants."""
    for name, variant in (("unet", "fp16"), ("vae", "ema")):
        path = root / WEIGHTS[name]
        path.rename(path.with_name(f"{path.stem}.{variant}.safetensors"))


def edit(path):
    """Mixers of another UNet."""
    config = json.loads(path.read_text())
    config["layers"] = {name: {"dim": 32, "proxy_dim": 4} for name in config["layers"]}
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("case", NOT_WHOLE)
def test_what_is_not_whole_is_refused_before_anything_is_loaded(folders, tmp_path, monkeypatch, capsys, case):
    which, spoil, message = NOT_WHOLE[case]
    shutil.copytree(folders / which, tmp_path / which)
    spoil(tmp_path / which)
    monkeypatch.setattr(module, "Generator", None)
    option = "--mixers" if which.endswith("mixers") else "--pipeline"
    words = command(folders, tmp_path / "image.png", "a cat", option, str(tmp_path / which), size="128")
    assert main(words) == 2
    assert message in capsys.readouterr().err
    assert os.listdir(tmp_path) == [which]


def test_a_pipeline_of_another_kind_is_refused(folders, tmp_path, capsys):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    assert main(command(folders, tmp_path / "a.png", "a cat", "--pipeline", str(tmp_path))) == 2
    assert "got FluxPipeline" in capsys.readouterr().err


def test_parts_that_are_told_of_as_nothing_are_left_out(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"unet": [], "vae": [None, None]}))
    module.PipelineFolder(tmp_path).check()
    (tmp_path / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "UNet2DConditionModel"]}))
    with pytest.raises(UserError, match="no unet in"):
        module.PipelineFolder(tmp_path).check()
