"""The gspn2 command: what it prints, what it leaves behind, and its exit codes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gspn2.cli.main import COMMANDS, main

SMALL = ["--model", "test_efficientnet", "--image-size", "32", "--batch-size", "8", "--device", "cpu"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for channel, name in enumerate(("blue", "green", "red")):
        (root / name).mkdir()
        for i in range(10):
            pixels = rng.integers(0, 60, (36, 40, 3), dtype=np.uint8)
            pixels[..., 2 - channel] += 180
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A run that has learned to tell three colors apart."""
    out = tmp_path_factory.mktemp("run") / "out"
    command = [
        "train",
        "--data",
        str(folder),
        *SMALL,
        "--epochs",
        "10",
        "--lr",
        "5e-3",
        "--warmup-epochs",
        "1",
    ]
    assert main([*command, "--color-jitter", "0", "--amp", "off", "--out", str(out)]) == 0
    return out


def test_train_prints_and_writes(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["train", "--data", str(folder), *SMALL, "--epochs", "2", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert "24 training and 6 test images, 3 classes; 2 epochs of 3 steps" in printed.out
    assert [line[:9] for line in lines if line.startswith("epoch")] == ["epoch 1/2", "epoch 2/2"]
    assert lines[-1] == f"best weights: {out / 'best.safetensors'}"
    assert printed.err == ""
    assert sorted(os.listdir(out)) == [
        "best.safetensors",
        "config.json",
        "last.safetensors",
        "log.csv",
        "log.jsonl",
        "summary.json",
    ]


def test_eval_agrees_with_training(run, tmp_path, capsys):
    assert main(["eval", str(run), "--out", str(tmp_path / "e"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    summary = json.loads((run / "summary.json").read_text())
    assert report["top1"] == summary["best"]["top1"]
    assert report["images"] == 6
    assert sum(map(sum, report["confusion"])) == 6
    assert json.loads((tmp_path / "e" / "evaluation.json").read_text())["confusion"] == report["confusion"]
    assert (tmp_path / "e" / "confusion.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("command", ["eval", "predict"])
def test_precision_is_that_of_the_training_unless_told(command, run, folder, capsys, monkeypatch):
    from gspn2.training import model

    asked = []
    monkeypatch.setattr(model, "amp_dtype", lambda amp, device: asked.append(amp))
    words = [command, str(run), *([str(folder / "red" / "0.png")] if command == "predict" else [])]
    for amp in ([], ["--amp", "bf16"]):
        assert main([*words, *amp]) == 0
    assert asked == ["off", "bf16"]


def test_eval_prints_speed_and_table(run, folder, capsys):
    options = ["--split", "all", "--batch-size", "7", "--device", "cpu"]
    assert main(["eval", str(run), "--data", str(folder), *options]) == 0
    printed = capsys.readouterr().out
    assert "30 images of" in printed
    assert "images/s in the model (batch 7, cpu, " in printed
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines()[-3:]}
    assert set(rows) == {"blue", "green", "red"}
    assert all(sum(int(n) for n in row if n != ".") == 10 for row in rows.values())


def test_predict_goes_on_after_damaged_files(run, folder, tmp_path, capsys):
    good = folder / "red" / "0.png"
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:300])
    (tmp_path / "text.jpg").write_text("no image")
    shutil.copy(folder / "blue" / "1.png", tmp_path / "z.png")
    assert (
        main(["predict", str(run), str(good), str(tmp_path), str(tmp_path / "none.png"), "--top-k", "2"]) == 1
    )
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert [line.split(":")[0] for line in lines] == [str(good), str(tmp_path / "z.png")]
    assert lines[0].split()[1] == "red"
    assert lines[1].split()[1] == "blue"
    errors = printed.err.splitlines()
    assert len(errors) == 3
    assert "cut.png: cannot be read" in errors[0]
    assert "text.jpg: not an image" in errors[1]
    assert "none.png: no such file" in errors[2]


def test_predict_json_and_patterns(run, folder, capsys):
    assert main(["predict", str(run), str(folder / "green" / "*.png"), "--batch-size", "4", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [Path(r["file"]).name for r in results] == [f"{i}.png" for i in range(10)]
    for result in results:
        chances = [p["probability"] for p in result["predictions"]]
        assert chances == sorted(chances, reverse=True)
        assert sum(chances) == pytest.approx(1, abs=1e-5)
        assert result["predictions"][0]["class"] == "green"
    for nothing, message in ((str(folder / "nothing*"), "no file matches"), ("", "no such file")):
        assert main(["predict", str(run), nothing]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_train_says_how_to_resume(folder, tmp_path, capsys, monkeypatch, signum, code):
    from gspn2.cli import progress

    show = progress.TrainProgress.__call__
    out = tmp_path / "out"

    def interrupt(self, event):
        show(self, event)
        if type(event).__name__ == "EpochDone" and event.row.epoch == 1:
            os.kill(os.getpid(), signum)

    monkeypatch.setattr(progress.TrainProgress, "__call__", interrupt)
    assert main(["train", "--data", str(folder), *SMALL, "--epochs", "2", "--out", str(out)]) == code
    errors = capsys.readouterr().err.splitlines()
    assert errors[0] == f"stopped at epoch 2, step 3 of 6; saved {out / 'last.safetensors'}"
    assert errors[1] == f"resume with: gspn2 train --out {out} --resume"
    monkeypatch.setattr(progress.TrainProgress, "__call__", show)
    assert main(["train", "--out", str(out), "--resume"]) == 0
    assert "resuming at step 3 of 6" in capsys.readouterr().out
    assert len((out / "log.csv").read_text().splitlines()) == 3


def test_resume_keeps_settings(run, folder, capsys):
    assert main(["train", "--out", str(run), "--resume", "--lr", "0.5"]) == 2
    assert "leave out --lr 0.5 (the run has 0.005)" in capsys.readouterr().err
    assert main(["train", "--out", str(run), "--resume", "--lr", "5e-3", "--workers", "0"]) == 0
    assert "done" in capsys.readouterr().out


def test_same_command_goes_on_where_it_was_killed(folder, tmp_path, capsys):
    """Started again by a batch system: with a recipe of one's own, tuples, weights to start from
    that are gone by then."""
    source, out = tmp_path / "source", tmp_path / "out"
    small = [*SMALL, "--model", "test_gspn2", "--model-arg", "depths=(1,)", "--model-arg", "dims=(8,)"]
    small += ["--model-arg", "chunk=(4,)", "--data", str(folder), "--epochs", "1"]
    assert main(["train", *small, "--out", str(source)]) == 0
    capsys.readouterr()
    assert main(["train", *small, "--print-config"]) == 0
    (tmp_path / "mine.json").write_text(capsys.readouterr().out)
    mine = ["train", "--recipe", str(tmp_path / "mine.json"), "--out", str(out), "--resume"]
    for command in (mine, ["train", *small, "--out", str(out), "--resume"]):
        assert main(command) == 0, capsys.readouterr().err
    tuned = ["train", "--recipe", "finetune", "--no-channels-last", "--init-from", str(source), "--resume"]
    tuned += ["--data", str(folder), "--image-size", "32", "--batch-size", "8", "--epochs", "1", "--workers"]
    tuned += ["0", "--device", "cpu", "--out", str(tmp_path / "tuned")]
    assert main(tuned) == 0
    shutil.rmtree(source)
    assert main(tuned) == 0, capsys.readouterr().err


ERRORS = [
    (["eval", "{run}", "--workers", "-1"], "workers: expected at least 0, got -1"),
    (["eval", "{run}", "--data", ""], "data: expected a name"),
    (["train", *SMALL, "--auto-augment", "odd", "--data", "{photos}", "--out", "{tmp}/new"], "take 'odd'"),
    (["train", "--model", "test_efficientne", "--out", "{tmp}/new"], "did you mean test_efficientnet"),
    (["train", *SMALL, "--data", "{tmp}/nowhere", "--out", "{tmp}/new"], "nowhere: no such folder"),
    (["train", *SMALL, "--data", "{tmp}/empty", "--out", "{tmp}/new"], "expected class folders"),
    (["train", *SMALL, "--data", "{tmp}/hollow", "--out", "{tmp}/new"], "cat: class folder without images"),
    (["train", *SMALL, "--out", "{tmp}/full"], "not empty; resume the run"),
    (["train", *SMALL, "--out", "{tmp}/full/file"], "is a file"),
    (["train", "--model", "test_vit", "--image-size", "30", "--out", "{tmp}/new"], "does not take 30 x 30"),
    (["train", *SMALL, "--model-arg", "depht=3", "--out", "{tmp}/new"], "depht"),
    (["train", *SMALL, "--epochs", "0", "--out", "{tmp}/new"], "epochs: expected at least 1, got 0"),
    (["train", *SMALL[:-1], "nowhere", "--out", "{tmp}/new"], "device: 'nowhere' cannot be used"),
    (["train", *SMALL, "--data", "", "--out", "{tmp}/new"], "data: expected a text that is not empty"),
    (["train", *SMALL, "--data", "hf:", "--out", "{tmp}/new"], "name of a data set behind hf:"),
    (["train", "--out", "{tmp}/new", "--resume"], "no run to resume"),
    (["train", *SMALL[:-1], "meta", "--out", "{tmp}/new"], "device: 'meta' cannot be used"),
    (["eval", "{tmp}/empty"], "no best.safetensors"),
    (["eval", "{tmp}/full/file"], "not a readable safetensors file"),
    (["eval", "{run}", "--out", "{tmp}/full/file"], "out: cannot write to"),
    (["predict", "{tmp}/nothing", "a.png"], "no such file"),
    (["learn", "--check"], "of docs only, got it with run"),
    (["draw", "judge", "--check"], "of docs only, got it with judge"),
    (["demo", "--gate", "nan"], "expected a number of at least 0, got 'nan'"),
    (["demo", "--gate", "970"], "expected at most 100, got '970'"),
    (["info", "--directions", "sideways"], "--directions: expected"),
    (["info", "--groups", "3"], "--groups: expected a divisor of C = 8"),
]


@pytest.mark.parametrize(("command", "message"), ERRORS, ids=[message[:24] for _, message in ERRORS])
def test_user_errors_are_one_line(command, message, folder, run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "hollow" / "cat").mkdir(parents=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    assert main([word.format(tmp=tmp_path, photos=folder, run=run) for word in command]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.err.startswith(f"gspn2 {command[0]}: error: ")
    assert printed.out == ""
    assert not (tmp_path / "new").exists()


def test_full_disk_is_one_line(folder, tmp_path, capsys, monkeypatch):
    from gspn2.training import checkpoint, engine

    def full(*args):
        raise OSError(28, "No space left on device")

    def fill_disk(self):
        monkeypatch.setattr(checkpoint, "write_safetensors", full)
        train_epoch(self)

    train_epoch = engine.Run._train_epoch
    monkeypatch.setattr(engine.Run, "_train_epoch", fill_disk)
    assert main(["train", "--data", str(folder), *SMALL, "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == "gspn2 train: error: [Errno 28] No space left on device\n"
    checkpoint.read_checkpoint(tmp_path / "out" / "last.safetensors")


def test_failed_job_is_exit_code_1(folder, tmp_path, capsys):
    command = [
        "train",
        "--data",
        str(folder),
        *SMALL,
        "--lr",
        "1e30",
        "--clip-grad",
        "none",
        "--warmup-epochs",
        "0",
    ]
    assert main([*command, "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "the checkpoint before it is kept" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "command",
    [[], ["nonsense"], ["train", "--lr", "fast"], ["train", "--resume", "--overwrite"], ["predict"]],
)
def test_usage_errors_are_exit_code_2(command, capsys):
    assert main(command) == 2
    # Without a command there is help; what is wrong with one is a line that says where help is.
    assert capsys.readouterr().err.count("\n") == (1 if command else 0)


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"demo"}))
def test_help_of_every_command_has_examples(command, capsys):
    assert main([command, "--help"]) == 0
    printed = capsys.readouterr().out
    assert f"gspn2 {command}" in printed.split("examples:")[1]


def test_interrupted_while_a_command_is_imported(capsys, monkeypatch):
    from gspn2.cli import main as entry

    def interrupt(command):
        raise KeyboardInterrupt

    monkeypatch.setattr(entry, "_module", interrupt)
    assert main(["train", "--help"]) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_output_that_cannot_be_written_is_one_line(capsys, monkeypatch):
    def full(text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys.stdout, "write", full)
    assert main(["info"]) == 1
    assert capsys.readouterr().err == "gspn2 info: error: [Errno 28] No space left on device\n"


@pytest.mark.parametrize("command", ["learn", "draw"])
def test_no_documents_of_nothing(command, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([command, "docs", "--out", "nowhere"]) == 2
    assert capsys.readouterr().err == f"gspn2 {command}: error: out: no results in nowhere\n"
    assert os.listdir(tmp_path) == []


def test_version_and_module(capsys):
    import gspn2

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"gspn2 {gspn2.__version__}\n"
    shown = subprocess.run([sys.executable, "-m", "gspn2", "--version"], capture_output=True, text=True)
    assert (shown.returncode, shown.stdout) == (0, f"gspn2 {gspn2.__version__}\n")


def test_info_names_the_backend(capsys):
    assert main(["info", "--problem", "2,6,20,30", "--dtype", "float64", "--groups", "3", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    problem = report["problem"]
    assert problem["why_not"][problem["runs"]] is None
    assert problem["shape"] == [2, 6, 20, 30]
    assert report["versions"]["torch"] is not None
    assert main(["info", "--device", "cuda", "--directions", "down", "--chunk", "4"]) == 0
    printed = capsys.readouterr().out
    assert "backends for x 1 x 8 x 224 x 224, float32 on cuda, G = 1, down, chunk 4" in printed
    assert "no: " in printed


WITHOUT_EXTRAS = """
import contextlib, io, json, sys
for name in ("timm", "torchvision", "safetensors", "sklearn", "PIL", "rich", "matplotlib"):
    sys.modules[name] = None
from gspn2.cli.main import main
ended = []
for command in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        code = main(command)
    ended.append([code, errors.getvalue()])
print(json.dumps(ended))
"""
CORE = [
    (["info"], 0, ""),
    (["train", "--help"], 0, ""),
    (["train", "--out", "unused"], 2, 'gspn2 train: needs timm: pip install "gspn2[train]"\n'),
    (["eval", "/"], 2, "gspn2 eval: error: /: no best.safetensors or last.safetensors in this folder\n"),
]


def test_core_installation_says_what_is_missing():
    commands = json.dumps([command for command, _, _ in CORE])
    shown = subprocess.run([sys.executable, "-c", WITHOUT_EXTRAS, commands], capture_output=True, text=True)
    assert shown.stderr == ""
    assert json.loads(shown.stdout) == [[code, error] for _, code, error in CORE]
