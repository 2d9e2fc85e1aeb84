"""Models that learn to draw: equal models, equal data, a judge that knows, runs that resume, the section."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gspn2.cli.main import main
from gspn2.training import Interrupted, UserError
from gspn2.training.drawing import (
    DRAWERS,
    Progress,
    Run,
    Settings,
    digits,
    document,
    draw,
    flow,
    frechet,
    judge,
    models,
    plan,
    runner,
    samples,
)
from gspn2.training.state import count_parameters

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "generation"
TINY = Settings(
    steps=8, batch_size=8, lr=3e-3, samples=40, sampler_steps=1, judge_steps=2, tests=2, amp="off"
)
NAMES = ["unet-attention", "dit-gspn2", "unet-distilled"]


@pytest.fixture(autouse=True)
def single(threads: None) -> None:
    """Pictures this small are slower with more threads, and much slower where others compute, too."""
    torch.set_num_threads(1)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that take a moment."""
    for name, value in {"HEAD_DIM": 8, "UNET_DIMS": (8, 16, 16), "DIT_DIM": 16, "DIT_DEPTH": 1}.items():
        monkeypatch.setattr(models, name, value)
    monkeypatch.setattr(samples, "USES", ("1x", "2x", "2x-dilated", "2x-enlarged"))


def _seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- models


@pytest.mark.parametrize("architecture", ["unet", "dit"])
def test_models_of_a_kind_have_equal_parameters(architecture: str):
    attention, gspn2 = (count_parameters(models.build(architecture, it, 0)) for it in ("attention", "gspn2"))
    assert abs(gspn2 / attention - 1) < 0.001, (attention, gspn2)


@pytest.mark.parametrize("kind", ["attention", "gspn2"])
@pytest.mark.parametrize("architecture", ["unet", "dit"])
def test_any_size_comes_out_as_it_went_in_and_mixers_reach_everywhere(
    small: None, architecture: str, kind: str
):
    model = models.build(architecture, kind, 0)
    for parameter in model.parameters():
        # Nothing is closed.
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(1, 1, 24, 40, generator=_seeded()).requires_grad_(True)
    told = model(x, torch.tensor([0.5]), torch.tensor([3]))
    assert told.shape == x.shape
    # Convolutions alone do not reach from one corner of 24 x 40 to the other.
    (reach,) = torch.autograd.grad(told[..., :4, :4].sum(), x)
    assert reach[..., -4:, -4:].abs().max() > 0


def test_a_student_is_its_teacher_but_for_mixers_that_put_out_nothing(small: None):
    teacher = models.build("unet", "attention", 0)
    for parameter in teacher.parameters():
        nn.init.normal_(parameter, std=0.1)
    student = models.build_student(teacher, 1)
    x, t, labels = torch.randn(2, 1, 32, 32, generator=_seeded()), torch.tensor([0.2, 0.7]), torch.arange(2)
    expected = teacher(x, t, labels)
    assert not torch.allclose(student(x, t, labels), expected)
    for mixer in models.mixers_of(teacher).values():
        mixer.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    torch.testing.assert_close(student(x, t, labels), teacher(x, t, labels))
    learnt = {name for name, it in student.named_parameters() if it.requires_grad}
    assert learnt == {name for name, _ in student.named_parameters() if ".mixer." in name}


# -- digits


def test_dilated_inner_convolutions_reach_farther_until_the_context_ends():
    model = models.build("unet", "gspn2", 0)
    x, t, labels = torch.randn(1, 1, 16, 16, generator=_seeded()), torch.ones(1), torch.zeros(1).long()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=_seeded(len(name)))
    with torch.no_grad():
        before = model(x, t, labels)
        with models.dilated(model, 2):
            assert model.up2.conv1.dilation == model.grow2.dilation == (2, 2)
            assert model.stem.dilation == model.down1.conv1.dilation == model.shrink1.dilation == (1, 1)
            wide, inner = model(x, t, labels), model.grow2(torch.ones(1, 128, 8, 8))
            # Every second place of a dilated convolution is what the plain one makes of every second place.
            sparse = torch.nn.functional.conv2d(
                torch.ones(1, 128, 4, 4), model.grow2.weight, model.grow2.bias, padding=1
            )
        assert torch.equal(model(x, t, labels), before)
    assert wide.shape == before.shape
    assert not torch.allclose(wide, before)
    torch.testing.assert_close(inner[..., ::2, ::2], sparse)
    with models.dilated(models.build("dit", "gspn2", 0), 2):
        pass


def test_digits_are_the_same_scene_at_any_size():
    train, held_out = digits.load(torch.device("cpu"))
    assert (len(train.labels), len(held_out.labels)) == (1438, 359)
    pictures, labels = digits.sample(train, 64, 32, _seeded())
    again, _ = digits.sample(train, 64, 32, _seeded())
    large, same = digits.sample(train, 64, 64, _seeded())
    assert torch.equal(pictures, again)
    assert torch.equal(labels, same)
    assert -1 <= pictures.min() < -0.9 < 0.9 < pictures.max() <= 1
    assert (nn.functional.avg_pool2d(large, 2) - pictures).abs().mean() < 0.02


# -- the way from noise


def test_sampling_follows_a_known_field_to_its_picture_at_any_size():
    for scale in (1, 2):
        target = torch.rand(10, 1, 8 * scale, 8 * scale, generator=_seeded()) * 2 - 1
        asked: list[float] = []

        def field(
            x: torch.Tensor,
            t: torch.Tensor,
            labels: torch.Tensor,
            target: torch.Tensor = target,
            asked: list[float] = asked,
        ) -> torch.Tensor:
            # All pictures of a class are one: its velocity points straight away from it.
            asked.append(t[0].item())
            return (x - target) / t[:, None, None, None]

        labels = torch.arange(10)
        torch.testing.assert_close(flow.direct(field, labels, 8, scale, 4, _seeded()), target)
        assert len(asked) == 7
        assert asked[0] == 1.0
        assert min(asked) > 0
    small = nn.functional.avg_pool2d(target, 2)
    torch.testing.assert_close(flow.enlarged(field, small, labels, 2, 8, _seeded()), target)


def test_times_fall_from_the_start_and_lean_to_noise_for_larger_pictures():
    assert flow.times(4, 1) == [1.0, 0.75, 0.5, 0.25, 0.0]
    larger = flow.times(4, 2)
    assert larger[0] == 1.0
    assert larger[-1] == 0.0
    assert all(a > b for a, b in zip(larger[1:-1], flow.times(4, 1)[1:-1], strict=True))
    assert flow.times(2, 1, 0.4) == pytest.approx([0.4, 0.2, 0.0])


# -- the judge


def test_frechet_distance_of_known_normal_distributions():
    def normal(mean: list[float], deviations: list[float]) -> judge.Statistics:
        mixed = torch.linalg.qr(torch.randn(3, 3, generator=_seeded(), dtype=torch.float64))[0]
        covariance = mixed @ torch.tensor(deviations, dtype=torch.float64).square().diag() @ mixed.T
        return judge.Statistics(torch.tensor(mean, dtype=torch.float64), covariance)

    one, other = normal([0, 0, 0], [1, 2, 3]), normal([1, 2, 0], [2, 2, 1])
    assert frechet(one, one) == pytest.approx(0, abs=1e-9)
    # Of a common basis: squares of the differences of means and of deviations.
    assert frechet(one, other) == pytest.approx(1 + 4 + 1 + 0 + 4)
    assert frechet(one, other) == pytest.approx(frechet(other, one))


def test_the_judge_tells_digits_from_noise_and_is_the_same_when_read(tmp_path: Path):
    train, held_out = digits.load(torch.device("cpu"))
    path = tmp_path / "judge.safetensors"
    made = judge.load_judge(path, train, held_out, 200, steps=40)
    assert made.accuracy > 0.5
    assert made.floor < 0.1 * made.noise
    read = judge.load_judge(path, train, held_out, 200, steps=40)
    assert read.about() == made.about()
    pictures, labels = digits.sample(held_out, 100, 64, _seeded())
    assert made.right(pictures, labels) > 0.5
    assert made.distance(torch.randn(100, 1, 64, 64, generator=_seeded())) > 5 * made.distance(pictures)
    with pytest.raises(UserError, match="trained for 40 steps, expected 50"):
        judge.load_judge(path, train, held_out, 200, steps=50)
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="damaged, remove it"):
        judge.load_judge(path, train, held_out, 200, steps=40)


# -- plan


def test_the_plan_has_teachers_before_students_and_one_seed_before_the_next():
    runs = plan(["unet-distilled", "unet-attention"], [1, 0])
    assert [run.name for run in runs] == [
        "unet-attention-s1",
        "unet-distilled-s1",
        "unet-attention-s0",
        "unet-distilled-s0",
    ]
    assert len(plan()) == 15
    with pytest.raises(UserError, match=r"models: expected some of unet-attention, .* got 'gan'"):
        plan(["gan"])
    with pytest.raises(UserError, match="seeds: expected at least one, none twice"):
        plan(seeds=[0, 0])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"minutes": float("nan")}, "minutes: expected more than 0"),
        ({"steps": 0}, "steps: expected more than 0"),
        ({"samples": 20}, "samples: expected at least 40"),
        ({"amp": "fp8"}, "amp: expected auto, off or bf16"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        dataclasses.replace(TINY, **changes)


# -- runs


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


# -- the section


def test_the_section_is_in_step_with_its_results():
    for path, content in document.files(ROOT / "docs", RESULTS).items():
        again = "run `gspn2 draw docs --out benchmarks/results/generation`"
        assert path.exists(), f"{path.name} is missing: {again}"
        assert path.read_bytes() == content, f"{path.name} is out of step: {again}"
        assert len(content) < 200_000, f"{path.name}: {len(content)} bytes are too many for the documentation"


def test_without_results_the_section_claims_nothing():
    text = document.section([], set())
    assert "Nothing has been run yet" in text
    assert "|" not in text


def test_a_page_without_marks_is_refused_and_the_rest_of_a_page_is_left_alone():
    with pytest.raises(UserError, match="expected the lines"):
        document.insert("# Page\n", "text")
    page = f"# Page\n\n{document.BEGIN}\nold\n{document.END}\n\nrest\n"
    once = document.insert(page, "new")
    assert once == f"# Page\n\n{document.BEGIN}\n\nnew\n\n{document.END}\n\nrest\n"
    assert document.insert(once, "new") == once


def _made_up(model: str, distance: float, seed: int = 0) -> dict[str, Any]:
    losses = {"loss": 0.5, "noise": 0.3, "teacher": 0.1, "features": 0.25}
    machine = {"processor": "a CPU", "torch": "2", "commit": "abc", "date": "2026-01-01"}
    found = {"distance": distance, "accuracy": 0.9}
    return {
        "run": {"model": model, "seed": seed},
        "settings": dataclasses.asdict(TINY),
        "parameters": 1000,
        "learnt": 100,
        "ended": "steps",
        "step": 8,
        "seconds": 1.0,
        "curve": [{"step": 0, "seconds": 0.0, **found}, {"step": 8, "seconds": 1.0, **losses}],
        "judge": {"digest": "a", "accuracy": 0.99, "floor": 4.0, "noise": 400.0},
        "samples": dict.fromkeys(document.COLUMNS, found),
        "machine": machine | {"uncommitted_changes": False},
    }


def _some(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Samples of all sorts but one."""
    return {use: found for use, found in results[1]["samples"].items() if use != "4x-dilated"}


def _made_up_unets() -> list[dict[str, Any]]:
    return [_made_up(name, 6.0) for name in DRAWERS if name.startswith("unet")]


def test_the_section_has_means_ranges_pictures_and_curves(tmp_path: Path):
    results = [_made_up(name, value, seed) for seed, value in ((0, 6.0), (1, 8.0)) for name in DRAWERS]
    for result in results:
        path = tmp_path / f"{result['run']['model']}-s{result['run']['seed']}.json"
        path.write_text(json.dumps({"schema": runner.SCHEMA, **result}))
    (tmp_path / "unet-gspn2-s0-2x.png").write_bytes(b"a grid")
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / document.PAGE).write_text(f"{document.BEGIN}\n{document.END}\n")
    files = document.files(docs, tmp_path)
    text = files[docs / document.PAGE].decode()
    assert "| UNet, GSPN-2 | 1,000 | 2 | 8 | 7.0 (6.0 to 8.0) |" in text
    assert "| UNet, GSPN-2 | 1,000 | 2 | 8 | 90.0% (90.0% to 90.0%) |" in text
    assert "![UNet, GSPN-2, 2x direct](images/generation/unet-gspn2-s0-2x.png)" in text
    assert "draws at a distance of 7.0" in text
    assert "No run has come to its end" not in text
    assert "No samples have been judged" not in text
    del results[0]["samples"]["2x-dilated"]
    told = document.section(results, set())
    assert "8.0, 1 of the seeds" in told
    del results[5]["samples"]["2x-dilated"]
    assert "| UNet, self-attention | 1,000 | 2 | 8 | 7.0 (6.0 to 8.0) | 7.0 (6.0 to 8.0) | - |" in (
        document.section(results, set())
    )
    assert "judged yet of: 4x dilated." in document.section([results[0] | {"samples": _some(results)}], set())
    assert "No run has come to its end yet of: DiT" in document.section(_made_up_unets(), set())
    assert files[docs / document.FOLDER / "unet-gspn2-s0-2x.png"] == b"a grid"
    import xml.etree.ElementTree as tree

    root = tree.fromstring(files[docs / document.FOLDER / document.CURVES])
    # Distances of five models; losses of a single point have no line.
    assert len(root.findall(".//{http://www.w3.org/2000/svg}polyline")) == 2 * 5
    results[0]["judge"]["digest"] = "b"
    other = {"schema": runner.SCHEMA, **results[0]}
    (tmp_path / "unet-attention-s0.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match="seed 0 by different judges"):
        document.load(tmp_path)
    for result in results:
        # Another folder's seed: what is compared is still judged alike.
        result["judge"]["digest"], result["judge"]["floor"] = "ab"[result["run"]["seed"]], 4.0
    results[-1]["judge"]["floor"] = 5.0
    told = document.section(results, set())
    assert "at a distance of 4.0, 5.0" in told
    assert "all models of a seed by one" in told


# -- the command


def test_the_command_runs_lists_and_writes_the_section(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(samples, "USES", ("1x",))
    monkeypatch.setattr(document, "USES", ("1x",))
    monkeypatch.setattr(document, "COLUMNS", {"1x": "32"})
    chosen = ["--models", "dit-gspn2", "--seeds", "0", "--out", "draw"]
    scale = ["--steps", "2", "--batch-size", "4", "--samples", "40", "--sampler-steps", "1", "--tests", "1"]
    scale += ["--judge-steps", "2", "--device", "cpu"]
    assert main(["draw", "judge", *chosen, *scale]) == 0
    assert "of held-out digits" in capsys.readouterr().out
    assert main(["draw", "list", *chosen]) == 0
    assert capsys.readouterr().out == "to do    dit-gspn2-s0\n"
    assert main(["draw", *chosen, *scale]) == 0
    assert "[1/1] dit-gspn2-s0: done:" in capsys.readouterr().out
    assert main(["draw", "list", *chosen]) == 0
    assert capsys.readouterr().out == "done     dit-gspn2-s0\n"
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / document.PAGE).write_text(f"{document.BEGIN}\n{document.END}\n")
    assert main(["draw", "docs", "--out", "draw", "--check"]) == 1
    assert main(["draw", "docs", "--out", "draw"]) == 0
    assert main(["draw", "docs", "--out", "draw", "--check"]) == 0
    assert main(["draw", *chosen, *scale, "--lr", "0.5"]) == 2
    assert "had other settings" in capsys.readouterr().err
