"""Models that learn to draw, in parts: equal models, pictures, the way from noise, a judge that knows."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from drawing_helpers import TINY, seeded, shrink
from gspn2.training import UserError
from gspn2.training.drawing import digits, flow, frechet, judge, models, plan
from gspn2.training.state import count_parameters

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that take a moment."""
    shrink(monkeypatch)


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
    x = torch.randn(1, 1, 24, 40, generator=seeded()).requires_grad_(True)
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
    x, t, labels = torch.randn(2, 1, 32, 32, generator=seeded()), torch.tensor([0.2, 0.7]), torch.arange(2)
    expected = teacher(x, t, labels)
    assert not torch.allclose(student(x, t, labels), expected)
    for mixer in models.mixers_of(teacher).values():
        mixer.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    torch.testing.assert_close(student(x, t, labels), teacher(x, t, labels))
    learnt = {name for name, it in student.named_parameters() if it.requires_grad}
    assert learnt == {name for name, _ in student.named_parameters() if ".mixer." in name}


def test_dilated_inner_convolutions_reach_farther_until_the_context_ends():
    model = models.build("unet", "gspn2", 0)
    x, t, labels = torch.randn(1, 1, 16, 16, generator=seeded()), torch.ones(1), torch.zeros(1).long()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=seeded(len(name)))
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


# -- digits


def test_digits_are_the_same_scene_at_any_size():
    train, held_out = digits.load(torch.device("cpu"))
    assert (len(train.labels), len(held_out.labels)) == (1438, 359)
    pictures, labels = digits.sample(train, 64, 32, seeded())
    again, _ = digits.sample(train, 64, 32, seeded())
    large, same = digits.sample(train, 64, 64, seeded())
    assert torch.equal(pictures, again)
    assert torch.equal(labels, same)
    assert -1 <= pictures.min() < -0.9 < 0.9 < pictures.max() <= 1
    assert (nn.functional.avg_pool2d(large, 2) - pictures).abs().mean() < 0.02


# -- the way from noise


def test_sampling_follows_a_known_field_to_its_picture_at_any_size():
    for scale in (1, 2):
        target = torch.rand(10, 1, 8 * scale, 8 * scale, generator=seeded()) * 2 - 1
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
        torch.testing.assert_close(flow.direct(field, labels, 8, scale, 4, seeded()), target)
        assert len(asked) == 7
        assert asked[0] == 1.0
        assert min(asked) > 0
    small = nn.functional.avg_pool2d(target, 2)
    torch.testing.assert_close(flow.enlarged(field, small, labels, 2, 8, seeded()), target)


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
        mixed = torch.linalg.qr(torch.randn(3, 3, generator=seeded(), dtype=torch.float64))[0]
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
    pictures, labels = digits.sample(held_out, 100, 64, seeded())
    assert made.right(pictures, labels) > 0.5
    assert made.distance(torch.randn(100, 1, 64, 64, generator=seeded())) > 5 * made.distance(pictures)
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
