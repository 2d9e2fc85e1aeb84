"""Runs of models that learn to draw: they resume, meet the same pictures, and are not run again."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from drawing_helpers import TINY, shrink
from gspn2.training import Interrupted, UserError
from gspn2.training.drawing import Progress, Run, document, draw, flow, plan, runner, samples

NAMES = ["unet-attention", "dit-gspn2", "unet-distilled"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that take a moment."""
    shrink(monkeypatch)


def test_runs_learn_resume_to_the_same_numbers_and_are_not_run_again(small: None, tmp_path: Path):
    runs = plan(NAMES, [0])
    results = draw(runs, TINY, tmp_path / "whole")
    for run, result in zip(runs, results, strict=True):
        assert json.loads((tmp_path / "whole" / f"{run.name}.json").read_text()) == result
        assert not (tmp_path / "whole" / f"{run.name}.safetensors").exists()
        losses = [point["loss"] for point in result["curve"] if "loss" in point]
        assert len(losses) == 8
        assert sum(losses[-3:]) < sum(losses[:3]), f"{run.name}: {losses}"
        # A DiT has no convolutions to dilate.
        dilated = {"2x-dilated"} if run.model.startswith("unet") else set()
        assert set(result["samples"]) == {"1x", "2x", "2x-enlarged"} | dilated
        assert result["judge"] == results[0]["judge"]
    # A student is judged before it learns, and its mixers put out nothing then.
    begun = results[2]["curve"]
    assert begun[0]["step"] == 0
    assert begun[1]["features"] == pytest.approx(1, abs=0.05)
    assert begun[-1]["features"] < begun[1]["features"]
    assert results[2]["learnt"] < results[2]["parameters"]

    taught = [runs[0], runs[2]]
    resumed = _stopped_and_resumed(taught, tmp_path / "resumed")
    for one, other in zip([results[0], results[2]], resumed, strict=True):
        assert _learnt(one) == _learnt(other)
        assert one["samples"] == other["samples"]

    events: list[Progress[Run]] = []
    assert draw(runs, TINY, tmp_path / "whole", on_event=events.append) == results
    assert [event.what for event in events] == ["skipped"] * 3
    with pytest.raises(UserError, match=r"had other settings \(lr was 0.003, is 0.1\): take another folder"):
        draw(runs, dataclasses.replace(TINY, lr=0.1), tmp_path / "whole")
    _check_grids(tmp_path / "whole", runs)


def _stopped_and_resumed(runs: list[Run], out: Path) -> list[dict[str, Any]]:
    """The results of runs, each of which was stopped in the middle."""

    def stop(event: Progress[Run]) -> None:
        if event.what == "point" and event.step == 3:
            signal.raise_signal(signal.SIGTERM)

    for run in runs:
        with pytest.raises(Interrupted) as stopped:
            draw([run], TINY, out, on_event=stop)
        assert stopped.value.where == f"step 3 of 8 of {run.name}"
        events: list[Progress[Run]] = []
        draw([run], TINY, out, on_event=events.append)
        assert [event.text for event in events if event.what == "resumes"] == ["from step 3"]
    return draw(runs, TINY, out)


def _learnt(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [{key: value for key, value in point.items() if key != "seconds"} for point in result["curve"]]


def _check_grids(out: Path, runs: list[Run]) -> None:
    from PIL import Image

    for run in runs:
        for use, size in {"1x": (320, 128), "2x": (640, 64), "2x-enlarged": (640, 64)}.items():
            with Image.open(out / f"{run.name}-{use}.png") as image:
                assert (image.size, image.mode) == (size, "L")


def test_a_student_without_its_teacher_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="unet-distilled-s0: its teacher unet-attention-s0 is not there"):
        draw(plan(["unet-distilled"], [0]), TINY, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_models_of_a_seed_meet_the_same_pictures_and_noise(small: None, tmp_path: Path, monkeypatch):
    seen: list[list[float]] = []
    noisy = flow.noisy

    def noted(pictures: torch.Tensor, generator: torch.Generator):
        made = noisy(pictures, generator)
        seen[-1] += [*made[0].flatten().tolist(), *made[1].tolist()]
        return made

    monkeypatch.setattr(flow, "noisy", noted)
    monkeypatch.setattr(samples, "USES", ("1x",))
    short = dataclasses.replace(TINY, steps=2, tests=1)
    for run in (Run("unet-gspn2", 0), Run("dit-attention", 0), Run("unet-gspn2", 1)):
        seen.append([])
        draw([run], short, tmp_path)
    assert seen[0] == seen[1] != seen[2]


def test_the_average_is_that_of_timm(small: None, tmp_path: Path):
    data = runner.prepare(TINY, tmp_path)
    run = runner._Training(Run("dit-gspn2", 0), TINY, data, tmp_path, lambda *_: None)
    expected = runner.make_ema(run.model, runner.EMA)
    assert expected is not None
    for step in (1, 2, 3):
        run._steps(step)
        expected.update(run.model, step=step)
    found = run.ema.module.state_dict()
    assert not torch.equal(found["stem.weight"], run.model.state_dict()["stem.weight"])
    for name, value in expected.module.state_dict().items():
        torch.testing.assert_close(found[name], value)


def test_time_that_is_up_and_a_loss_without_sense_are_recorded(small: None, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(samples, "USES", ("1x",))
    run = Run("dit-gspn2", 0)
    (cut,) = draw([run], dataclasses.replace(TINY, minutes=1e-9), tmp_path / "cut")
    assert (cut["ended"], cut["step"]) == ("time", 1)
    assert "time was up at step 1" in runner.summary(cut)
    (lost,) = draw([run], dataclasses.replace(TINY, lr=1e30), tmp_path / "lost")
    assert lost["ended"] == "diverged"
    assert "samples" not in lost
    assert "no longer finite" in document.section([lost], set())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["unet-gspn2", "dit-attention", "unet-distilled"])
def test_a_replayed_step_is_the_eager_step(small: None, tmp_path: Path, monkeypatch, name: str):
    monkeypatch.setattr(samples, "USES", ("1x",))
    if name == "unet-distilled":
        draw(plan(["unet-attention"], [0]), TINY, tmp_path, device="cuda")
    run = Run(name, 0)
    curves = []
    for graph in (True, False):
        (result,) = draw([run], dataclasses.replace(TINY, graph=graph), tmp_path, device="cuda")
        (tmp_path / f"{name}-s0.json").unlink()
        curves.append([point["loss"] for point in result["curve"] if "loss" in point])
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    assert curves[0][-1] < curves[0][0]
