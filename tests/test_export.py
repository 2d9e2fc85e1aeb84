"""From a folder of images to a model that others load: the way a newcomer goes, and what export writes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from gspn2 import propagate
from gspn2.cli.main import main
from gspn2.models.onnx import export_onnx, export_program
from gspn2.training import CheckpointError, UserError, load_checkpoint, train
from gspn2.training.checkpoint import read_checkpoint
from gspn2.training.export import check_onnx, export
from training_helpers import make_images, settings

pytestmark = pytest.mark.usefixtures("one_thread")


def gspn2(*words: str) -> list[str]:
    return [sys.executable, "-m", "gspn2", *words]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

IN_A_FRESH_PROCESS = """
import json, sys
import numpy as np, timm, torch
import gspn2.models

model = timm.create_model(f"local-dir:{sys.argv[1]}", pretrained=True).eval()
images = torch.from_numpy(np.load(sys.argv[2]))
np.save(sys.argv[3], model(images).detach().numpy())
print(json.dumps([model.num_classes, list(model.pretrained_cfg["label_names"])]))
"""


def kill_after_a_checkpoint(command: list[str], last: Path) -> None:
    """Start a training and end it by SIGKILL in the middle."""
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        limit = time.monotonic() + 200
        while process.poll() is None and time.monotonic() < limit:
            # Written whole or not at all, so it can be read at any time.
            if last.exists() and read_checkpoint(last)[1].step >= 4:
                break
            # Looking without a pause would take the core that the training needs.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.02)
        assert process.poll() is None, "it came to its end before it could be killed"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_newcomer_trains_kills_resumes_evaluates_exports_and_loads(tmp_path, capsys):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    images = make_images(tmp_path / "photos", per_class=20)
    run, out = tmp_path / "run", tmp_path / "exported"
    command = ["train", "--recipe", "test", "--data", str(images), "--epochs", "4", "--out", str(run)]
    # Two stages: exporting four takes longer than all training here, and proves no more.
    small = ["depths=(1,1)", "dims=(16,32)", "chunk=(4,0)"]
    command += ["--device", "cpu", *(word for argument in small for word in ("--model-arg", argument))]

    kill_after_a_checkpoint(gspn2(*command), run / "last.safetensors")
    assert not (run / "summary.json").exists()
    subprocess.run(gspn2("train", "--out", str(run), "--resume"), env=ENVIRONMENT, check=True, timeout=200)
    uncut = tmp_path / "uncut"
    assert main([str(uncut) if word == str(run) else word for word in command]) == 0
    capsys.readouterr()
    assert (run / "log.jsonl").read_bytes() == (uncut / "log.jsonl").read_bytes(), (
        "the same losses, to the bit"
    )

    assert main(["eval", str(run), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["top1"] == json.loads((run / "summary.json").read_text())["best"]["top1"]

    assert main(["export", str(run), "--out", str(out), "--format", "timm,onnx"]) == 0
    assert capsys.readouterr().out.count("onnxruntime agrees within") == 4

    inputs = np.random.default_rng(0).standard_normal((2, 3, 40, 56), np.float32)
    np.save(tmp_path / "images.npy", inputs)
    arguments = [str(out), str(tmp_path / "images.npy"), str(tmp_path / "logits.npy")]
    fresh = [sys.executable, "-c", IN_A_FRESH_PROCESS, *arguments]
    ended = subprocess.run(fresh, env=ENVIRONMENT, check=True, capture_output=True, text=True, timeout=200)
    assert json.loads(ended.stdout) == [3, ["blue", "green", "red"]]
    model, _ = load_checkpoint(run)
    with torch.no_grad():
        expected = model(torch.from_numpy(inputs)).numpy()
    assert np.array_equal(np.load(tmp_path / "logits.npy"), expected)
    session = onnxruntime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": inputs})
    assert np.abs(logits - expected).max() < 1e-5


# -- what is written


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained GSPN-2 of every kind of mixer: shared and own taps, chunks, some directions."""
    images = make_images(tmp_path_factory.mktemp("images"))
    args = {"depths": (1, 1), "dims": (8, 16), "stem_stride": 2, "proxy_dim": 4, "groups": 2, "chunk": (5, 0)}
    changes = {"model": "test_gspn2", "model_args": {**args, "directions": ("down", "left", "right")}}
    return train(settings(images, tmp_path_factory.mktemp("run") / "out", epochs=1, **changes))


@pytest.fixture(scope="module")
def written(run, tmp_path_factory):
    """The run as ONNX."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    return export(*load_checkpoint(run.out), tmp_path_factory.mktemp("onnx"), ["onnx"])


def test_onnx_holds_standard_operators_alone_and_runs_at_any_size(run, written):
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, _ = load_checkpoint(run.out)
    proto = onnx.load(written["onnx"])
    onnx.checker.check_model(proto)
    assert {node.domain for node in proto.graph.node} == {""}
    assert not proto.functions
    assert sum(node.op_type == "Scan" for node in proto.graph.node) == 6, "a scan for each of 3 directions"
    assert str(Path(__file__).parent.parent).encode() not in written["onnx"].read_bytes(), "no paths of ours"

    session = onnxruntime.InferenceSession(str(written["onnx"]), providers=["CPUExecutionProvider"])
    for shape in ((1, 3, 32, 32), (3, 3, 17, 90), (2, 3, 64, 33), (1, 3, 200, 16)):
        images = torch.randn(shape)
        with torch.no_grad():
            expected = model(images).numpy()
        (logits,) = session.run(None, {"images": images.numpy()})
        assert np.abs(logits - expected).max() < 1e-5 * max(1, np.abs(expected).max()), shape


class Propagates(torch.nn.Module):
    """A scan of the first channel, by taps that come with it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.frozen = torch.nn.Identity().eval()

    def forward(self, images):
        logits = images[:, 1:].unflatten(1, (1, 1, 3))
        return propagate(self.scale * images[:, :1], logits, directions=["down"], chunk=3)


def test_what_is_not_finite_goes_no_further_in_onnx(tmp_path):
    """As in the operator itself: not past a restart, nor from one end of a line to the other."""
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = Propagates()
    export_onnx(export_program(model, (4, 7, 6)), tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    images = torch.randn(1, 4, 7, 6)
    for value in (np.nan, np.inf):
        images[0, 0, 1, 0] = images[0, 0, 3, 5] = value
        (found,) = session.run(None, {"images": images.numpy()})
        np.testing.assert_allclose(found, model(images).detach().numpy(), rtol=1e-5, atol=1e-6)


def test_a_model_is_left_as_it_was_by_export():
    """Which parts learn, and in what precision: nothing is put into train mode that was not."""
    model = Propagates().to(torch.bfloat16)
    export_program(model, (4, 7, 6))
    assert model.training
    assert not model.frozen.training
    assert model.scale.dtype == torch.bfloat16


def test_onnx_that_differs_is_refused(run, written):
    model, info = load_checkpoint(run.out)
    assert len(check_onnx(written["onnx"], model, info)) == 4
    with torch.no_grad():
        model.head.fc.bias[0] += 1
    with pytest.raises(UserError, match="differs from the model by"):
        check_onnx(written["onnx"], model, info)


def test_program_of_torch_export_runs_at_any_size(run, tmp_path):
    model, info = load_checkpoint(run.out)
    written = export(model, info, tmp_path, ["torch"])
    loaded = torch.export.load(written["torch"]).module()
    for shape in ((1, 3, 32, 32), (3, 3, 17, 90)):
        images = torch.randn(shape)
        assert torch.allclose(loaded(images), model(images), atol=1e-6), shape


def test_program_takes_the_size_of_the_training_where_it_is_too_small_for_any_size(run, tmp_path):
    model, info = load_checkpoint(run.out)
    small = dataclasses.replace(info, preprocess=dataclasses.replace(info.preprocess, image_size=(4, 4)))
    written = export(model, small, tmp_path, ["torch"])
    images = torch.randn(3, 3, 4, 4)
    assert torch.allclose(torch.export.load(written["torch"]).module()(images), model(images), atol=1e-6)


def test_timm_folder_has_card_config_and_plain_weights(run, tmp_path):
    timm = pytest.importorskip("timm")
    model, info = load_checkpoint(run.out)
    export(model, info, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["README.md", "config.json", "model.safetensors"]
    card = (tmp_path / "README.md").read_text()
    assert "library_name: timm" in card
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in card
    assert f"| top1 | {info.metrics['top1']:.4f} |" in card
    assert str(run.out) not in card, "nothing about somebody's folders"
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, 3, 24, 40)
    assert torch.equal(loaded(images), model(images))
    assert timm.data.resolve_model_data_config(loaded)["input_size"] == (3, 32, 32)
    tuned = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=7)
    assert tuned(images).shape == (2, 7)


def test_card_tells_no_test_of_other_weights(run, tmp_path):
    for weights in ("ema", "model"):
        model, info = load_checkpoint(run.last, weights=weights)
        export(model, info, tmp_path)
        card = (tmp_path / "README.md").read_text()
        assert f"These are its {weights} weights" in card
        assert "No test of these weights" in card
        assert "top1" not in card


@pytest.mark.parametrize(("kind", "writer"), [("torch", "torch.export.save"), ("onnx", "onnx.save_model")])
def test_a_full_disk_leaves_the_program_that_was_there(run, tmp_path, monkeypatch, kind, writer):
    pytest.importorskip("onnxscript")
    model, info = load_checkpoint(run.out)
    small = dataclasses.replace(info, preprocess=dataclasses.replace(info.preprocess, image_size=(32, 32)))
    old = tmp_path / {"torch": "model.pt2", "onnx": "model.onnx"}[kind]
    old.write_bytes(b"old")

    def full(program, path, *arguments, **named):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, full)
    with pytest.raises(UserError, match="No space left"):
        export(model, small, tmp_path, [kind])
    assert [file.name for file in tmp_path.iterdir()] == [old.name]
    assert old.read_bytes() == b"old"


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_what_onnx_lacks_is_told_before_anything_is_written(run, tmp_path, capsys, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    out = tmp_path / "exported"
    assert main(["export", str(run.out), "--out", str(out), "--format", "timm,onnx"]) == 2
    assert f'needs {missing}: pip install "gspn2[onnx]"' in capsys.readouterr().err
    assert not out.exists()


def test_exported_folder_is_a_start_for_fine_tuning(run, tmp_path, capsys):
    model, info = load_checkpoint(run.out)
    export(model, info, tmp_path / "exported")
    images = make_images(tmp_path / "images", per_class=4)
    changes = {"model": "test_gspn2", "model_args": info.config.model_args, "epochs": 1}
    train(settings(images, tmp_path / "out", init_from=str(tmp_path / "exported"), **changes))
    # The command takes the model that the weights are of, from either; a recipe's is only a default.
    for source in (tmp_path / "exported", run.out):
        capsys.readouterr()
        assert main(["train", "--recipe", "finetune", "--init-from", str(source), "--print-config"]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert {name: printed[name] for name in ("model", "model_args")} == {
            "model": "test_gspn2",
            "model_args": info.config.model_args,
        }
    assert main(["train", "--init-from", str(run.out), "--model", "test_vit", "--print-config"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "test_vit"
    with pytest.raises(CheckpointError, match="weights do not fit test_efficientnet"):
        train(settings(images, tmp_path / "other", init_from=str(tmp_path / "exported"), epochs=1))


def test_wrong_exports_are_refused(run, tmp_path, capsys):
    model, info = load_checkpoint(run.out)
    with pytest.raises(UserError, match="expected some of timm, torch, onnx, got tflite"):
        export(model, info, tmp_path, ["timm", "tflite"])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write to"):
        export(model, info, tmp_path / "file")
    assert main(["export", str(run.out), "--out", str(tmp_path), "--format", "tflite"]) == 2
