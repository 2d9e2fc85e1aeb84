"""Parts of training: schedule, log, evaluation, settings, models."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from gspn2.training import (
    TrainConfig,
    UserError,
    build_model,
    evaluate,
    recipe_settings,
)
from gspn2.training.data import unused
from gspn2.training.log import RunLog
from gspn2.training.schedule import learning_rate
from gspn2.training.sharding import units
from gspn2.training.state import load_optimizer
from gspn2.training.transforms import preprocess_for


def test_learning_rate_warms_up_and_falls():
    rates = [learning_rate(step, 100, 10, 1.0, 0.01) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[10] == 1.0 == max(rates)
    assert rates[99] == pytest.approx(0.01)
    assert rates[:11] == sorted(set(rates[:11]))
    assert rates[10:] == sorted(set(rates[10:]), reverse=True)
    assert learning_rate(54, 100, 10, 1.0, 0.0) == pytest.approx(0.5, abs=0.02)


def test_log_is_cut_to_the_checkpoint(tmp_path):
    log = RunLog(tmp_path, None)
    log.steps([{"step": 1}])
    sizes = log.sync()
    log.steps([{"step": 2}, {"step": 3}])
    log.close()
    log = RunLog(tmp_path, sizes)
    log.steps([{"step": 2}])
    log.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1, 2]
    assert (tmp_path / "log.csv").read_text().count("epoch") == 1


def test_evaluation_counts(tmp_path):
    class Known(torch.nn.Module):
        """Logits are the input."""

        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return x

    torch.manual_seed(0)
    logits = torch.randn(50, 7)
    labels = torch.randint(0, 7, (50,))
    model = Known().train()
    result = evaluate(model, [(logits[:30], labels[:30]), (logits[30:], labels[30:])])
    ranks = logits.argsort(1, descending=True)
    assert result.top1 == pytest.approx(100 * (ranks[:, 0] == labels).float().mean().item())
    assert result.top5 == pytest.approx(100 * (ranks[:, :5] == labels[:, None]).any(1).float().mean().item())
    assert result.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item())
    expected = torch.zeros(7, 7, dtype=torch.int64)
    for label, rank in zip(labels, ranks, strict=True):
        expected[label, rank[0]] += 1
    assert torch.equal(result.confusion, expected)
    assert (result.images, result.batch_size) == (50, 30)
    assert model.training
    with pytest.raises(ValueError, match="at least one image"):
        evaluate(model, [])


def test_config_round_trip_and_refusals():
    config = TrainConfig(image_size=(32, 48), model_args={"depths": (1, 2)}, clip_grad=None)
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert TrainConfig(data=Path("photos")).data == "photos"
    assert TrainConfig(lr=1e-3, lr_base_size=512, batch_size=128).peak_lr == 2.5e-4
    with pytest.raises(UserError, match="unknown setting learning_rate"):
        TrainConfig.from_json({"learning_rate": 1})
    for wrong in (
        {"epochs": "three"},
        {"epochs": 2.5},
        {"lr": True},
        {"mixup": None},
        {"data": ""},
        {"compile": "yes"},
        {"image_size": 224},
        {"image_size": ("32", 32)},
        {"betas": (0.9,)},
        {"model_args": [("depth", 2)]},
        {"model_args": {"act": torch.nn.ReLU}},
        {"seed": 2**64},
        {"warmup_epochs": 1e308},
        {"lr": 0},
        {"lr": float("nan")},
        {"epochs": 0},
        {"amp": "fp8"},
        {"in_chans": 2},
        {"graphs": True},
        {"graphs": True, "compile": True, "accumulate": 2},
        {"batch_size": 5, "mixup": 0.1},
        {"crop_scale": (0.5, 0.2)},
        {"model_args": {"num_classes": 3}},
    ):
        with pytest.raises(UserError, match=f"^{next(iter(wrong))}: "):
            TrainConfig(**wrong)


def test_what_a_short_run_never_reaches_is_told():
    short = TrainConfig(**{**recipe_settings("in1k-tiny"), "epochs": 20})
    assert [text.split()[0] for text in short.unreached] == ["the", "MESA"]
    assert "takes 20 epochs and the run 20: the learning rate never reaches its peak" in short.unreached[0]
    assert dataclasses.replace(short, epochs=21).unreached == []
    assert len(dataclasses.replace(short, mesa=0.0).unreached) == 1


def test_a_number_of_images_that_changes_nothing_is_told() -> None:
    told = {
        data: unused(TrainConfig(data=data, train_images=9)) for data in ("digits", "maze:64", "hf-stream:x")
    }
    assert [len(texts) for texts in told.values()] == [1, 0, 0]
    assert "train_images changes nothing" in told["digits"][0]
    assert unused(TrainConfig()) == []


def test_augmentation_and_distillation_that_change_nothing_are_told() -> None:
    asked = {"auto_augment": "rand-m9", "random_erasing": 0.2}
    assert unused(TrainConfig(data="maze:64", **asked)) == [
        "maze:64 is not augmented: auto_augment, random_erasing changes nothing"
    ]
    assert unused(TrainConfig(data="digits", **asked)) == [
        "digits has an augmentation of its own: auto_augment changes nothing"
    ]
    assert unused(TrainConfig(data="photos", **asked)) == []
    assert unused(TrainConfig(data="digits", augment=False, **asked)) == []
    alone = unused(TrainConfig(teacher_hard=True))
    assert alone == ["there is no teacher: teacher_hard changes nothing"]
    assert unused(TrainConfig(teacher_hard=True, teacher="resnet18")) == []


def test_fixed_size_models_are_made_for_the_image():
    config = TrainConfig(model="test_vit", image_size=(48, 32))
    model = build_model(config, preprocess_for(config), 10)
    assert model(torch.zeros(1, 1, 48, 32)).shape == (1, 10)
    with pytest.raises(UserError, match="does not take 50 x 32"):
        build_model(config, dataclasses.replace(preprocess_for(config), image_size=(50, 32)), 10)


@pytest.mark.parametrize(("compiled", "kind"), [(False, "GSPN2Block"), (True, "GSPN2Stage")])
def test_every_block_or_stage_is_a_unit_of_its_own(compiled, kind):
    """Compiled, a stage runs its blocks without calling them: hooks of theirs would gather nothing."""
    config = TrainConfig(model="test_gspn2")
    model = build_model(config, preprocess_for(config), 10)
    found = units(model, compiled)
    assert {type(unit).__name__ for unit in found} == {kind}
    assert found == [module for module in model.modules() if type(module).__name__ == kind]
    assert units(torch.nn.Linear(2, 2), compiled) == []


def test_restored_moments_lie_in_memory_as_their_weights():
    """Files hold contiguous tensors; fused optimizers want moments laid out as the weights are."""
    torch.manual_seed(0)

    def learning() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = torch.nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model(torch.ones(1, 4, 5, 5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = learning()
    step(model, optimizer)
    stored = {
        f"{index}/{key}": tensor.clone(memory_format=torch.contiguous_format)
        for index, values in optimizer.state_dict()["state"].items()
        for key, tensor in values.items()
    }
    again, restored = learning()
    again.load_state_dict(model.state_dict())
    load_optimizer(restored, stored)
    for weights in again.parameters():
        assert restored.state[weights]["exp_avg"].stride() == weights.stride()
    step(model, optimizer)
    step(again, restored)
    assert torch.equal(again.weight, model.weight)
