"""Runs of the comparison: equal data, curves, interruption, runs side by side, the pace of a step."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import shutil
import signal
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from comparison_helpers import TINY, VIT, small_runs
from gspn2.training import Interrupted, TrainingFailed, UserError
from gspn2.training.comparison import (
    Progress,
    Run,
    compare,
    document,
    images,
    pace,
    pool,
    runner,
    single,
    trainer,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """One small run of each of the three, and of an ablation."""
    out = tmp_path_factory.mktemp("learn")
    return out, compare(small_runs(), TINY, out)


def test_a_result_holds_its_curve_and_what_it_was_measured_on(finished):
    out, results = finished
    for run, result in zip(small_runs(), results, strict=True):
        assert json.loads((out / f"{run.name}.json").read_text()) == result
        assert result["ended"] == "steps"
        assert [point["step"] for point in result["curve"]] == [1, 2, 3, 4, 5, 6]
        assert [point["step"] for point in result["curve"] if "accuracy" in point] == [2, 4, 6]
        seconds = [point["seconds"] for point in result["curve"]]
        assert seconds == sorted(seconds)
        assert result["curve"][-1]["accuracy"] == result["accuracy"]
        assert set(result["transfer"]) == {"scaled", "larger"}
        assert result["machine"]["commit"]
        assert result["machine"]["torch"] == version("torch")
        assert not (out / f"{run.name}.safetensors").exists()


def test_what_is_there_is_not_run_again(finished, monkeypatch: pytest.MonkeyPatch):
    out, results = finished
    monkeypatch.setattr(single, "build", None)
    events: list[Progress[Run]] = []
    assert compare(small_runs(), TINY, out, on_event=events.append) == results
    assert [event.what for event in events] == ["skipped"] * 4


def test_results_of_other_settings_are_not_mixed(finished):
    out, _ = finished
    with pytest.raises(UserError, match=r"had other settings \(weight_decay was 0.05, is 0.01\)"):
        compare(small_runs(), dataclasses.replace(TINY, weight_decay=0.01), out)


@pytest.mark.parametrize("contender", ["gspn2", "vit"])
def test_a_stopped_run_resumes_to_the_same_curve(finished, tmp_path: Path, contender: str):
    run = Run("maze", 32, contender, 0)
    whole = next(result for result in finished[1] if result["run"]["contender"] == contender)

    def stop(event: Progress[Run]) -> None:
        if event.what == "point" and event.step == 2:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted) as stopped:
        compare([run], TINY, tmp_path, on_event=stop)
    assert stopped.value.signum == signal.SIGTERM
    assert stopped.value.where == f"step 2 of 6 of {run.name}"
    events: list[Progress[Run]] = []
    (result,) = compare([run], TINY, tmp_path, on_event=events.append)
    assert [event.text for event in events if event.what == "resumes"] == ["from step 2"]

    def learnt(one: dict[str, Any]) -> list[dict[str, Any]]:
        return [{key: value for key, value in point.items() if key != "seconds"} for point in one["curve"]]

    assert learnt(result) == learnt(whole)
    assert result["transfer"] == whole["transfer"]


def test_a_checkpoint_of_other_settings_or_none_at_all_is_refused(tmp_path: Path):
    def stop(event: Progress[Run]) -> None:
        if event.what == "point":
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        compare([VIT], TINY, tmp_path, on_event=stop)
    with pytest.raises(UserError, match="steps was 6, is 8"):
        compare([VIT], dataclasses.replace(TINY, steps=8), tmp_path)
    (tmp_path / f"{VIT.name}.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="damaged, remove it"):
        compare([VIT], TINY, tmp_path)


def test_a_process_that_ended_on_its_own_signal_was_interrupted(tmp_path: Path):
    """A signal to the whole group: a process ends before it has read what it was sent."""
    ours, theirs = multiprocessing.Pipe()
    shared = pool.Pool(TINY, tmp_path, torch.device("cpu"), 1, "", lambda *word: None)
    worker = pool._Worker(SimpleNamespace(exitcode=0, join=lambda: None), ours, [VIT])
    ours.send(None)
    theirs.close()
    shared._asked = True
    assert shared._hear(worker) == ""
    assert not worker.runs
    assert ours.closed


def test_runs_side_by_side_stop_and_go_on(finished, tmp_path: Path):
    """In processes of their own; what they come to does not depend on that."""
    runs = [run for run in small_runs() if run.contender in ("vit", "convnet")]
    points: list[Progress[Run]] = []

    def stop(event: Progress[Run]) -> None:
        points.extend([event] * (event.what == "point"))
        # A second signal would end this process as it stands.
        if points == [event]:
            signal.raise_signal(signal.SIGTERM)

    made = finished[0] / "images"
    (again := tmp_path / "images").mkdir()
    for path in sorted(made.iterdir())[2:]:
        # But one, which is made beside the runs.
        shutil.copy(path, again)
    with pytest.raises(Interrupted) as stopped:
        compare(runs, TINY, tmp_path, jobs=2, on_event=stop)
    assert stopped.value.signum == signal.SIGTERM
    assert {path.name: path.read_bytes() for path in again.iterdir()} == {
        path.name: path.read_bytes() for path in made.iterdir()
    }
    events: list[Progress[Run]] = []
    results = compare(runs, TINY, tmp_path, on_event=events.append)
    assert {event.what for event in events} <= {"begins", "resumes", "point", "skipped", "ends"}
    whole = {result["run"]["contender"]: result for result in finished[1]}
    for result in results:
        # The processes have fewer threads each, which round otherwise.
        expected = whole[result["run"]["contender"]]["loss"]
        assert result["loss"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("runs", "named"), [([VIT], VIT.name), ([], "no run")])
def test_a_process_that_ends_by_itself_is_an_error_in_a_line(tmp_path: Path, runs: list[Run], named: str):
    """Also one that waits: nothing could be handed to it."""
    ours, theirs = multiprocessing.Pipe()
    theirs.close()
    process = SimpleNamespace(join=lambda: None, exitcode=-9)
    side_by_side = pool.Pool(TINY, tmp_path, torch.device("cpu"), 2, "", lambda *word: None)
    with pytest.raises(TrainingFailed, match=f"the process of {named} ended with exit code -9"):
        side_by_side._hear(pool._Worker(process, ours, runs))


def test_compiled_steps_learn_the_same(finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Traced and differentiated as for a compiler; its code generation would take minutes here."""
    calls = []
    compiled = torch.compile

    def traced(model: torch.nn.Module, **options: Any) -> Any:
        calls.append(options)
        return compiled(model, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", traced)
    shutil.copytree(finished[0] / "images", tmp_path / "images")
    (result,) = compare([Run("maze", 32, "gspn2", 0)], dataclasses.replace(TINY, compile=True), tmp_path)
    assert len(calls) == 1
    whole = next(it for it in finished[1] if it["run"]["contender"] == "gspn2")
    for point, expected in zip(result["curve"], whole["curve"], strict=True):
        assert point["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-4)


def test_a_run_whose_time_is_up_ends_and_says_so(tmp_path: Path):
    (result,) = compare([VIT], dataclasses.replace(TINY, minutes=1e-9), tmp_path)
    assert (result["ended"], result["step"]) == ("time", 1)
    assert 0 <= result["accuracy"] <= 1
    assert "time was up at step 1" in runner.summary(result)


def test_a_run_that_diverges_is_recorded_and_the_next_one_goes_on(tmp_path: Path):
    wild = dataclasses.replace(VIT, lr=1e30)
    results = compare([wild, dataclasses.replace(wild, seed=1)], TINY, tmp_path)
    assert [result["ended"] for result in results] == ["diverged", "diverged"]
    assert "accuracy" not in results[0]
    assert "no longer finite" in document.text(results)


def test_contenders_see_the_same_images_in_the_same_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[list[float]] = []
    step = trainer.Trainer.run

    def noted(self, block):
        seen[-1] += [it for table in block for it in table.flatten().tolist()]
        return step(self, block)

    monkeypatch.setattr(trainer.Trainer, "run", noted)
    for run in (VIT, dataclasses.replace(VIT, contender="convnet"), dataclasses.replace(VIT, seed=1)):
        seen.append([])
        compare([run], TINY, tmp_path)
    assert seen[0] == seen[1] != seen[2]


def test_answers_for_pixels_turn_with_the_images(finished, monkeypatch: pytest.MonkeyPatch):
    seen = []
    judged = trainer.judged

    def noted(logits, labels):
        seen.append(labels)
        return judged(logits, labels)

    monkeypatch.setattr(trainer, "judged", noted)
    monkeypatch.setattr(trainer, "inputs", lambda _, pixels: seen.append(pixels) or pixels.float())
    run = Run("maze", 32, "convnet", 0)
    held = {
        use: images.load(it, finished[0] / "images", torch.device("cpu"))
        for use, it in run.sources(TINY).items()
    }
    single.SingleRun(run, TINY, held, finished[0], torch.device("cpu"), lambda *_: None).train(
        lambda: None
    ).send(None)
    pixels, labels = seen
    assert torch.equal(pixels == 255, labels > 0)


def test_what_a_step_takes_alone_counts_where_it_was_measured(finished, tmp_path: Path):
    out, results = finished
    for run in small_runs():
        (tmp_path / f"{run.name}.json").write_text((out / f"{run.name}.json").read_text())
    told: list[str] = []
    seconds = pace.measure(
        [VIT], TINY, tmp_path, torch.device("cpu"), "", lambda name, _: told.append(name), block=1
    )
    assert told == list(seconds) == ["vit-32"]
    for result, before in zip(document.load(tmp_path), sorted(results, key=_file), strict=True):
        is_measured = result["run"]["contender"] == "vit"
        assert result["seconds"] == (seconds["vit-32"] * TINY.steps if is_measured else before["seconds"])


def _file(result: dict[str, Any]) -> str:
    return Run(**result["run"]).name
