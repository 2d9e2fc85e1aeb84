"""What the comparison compares: equal models, a plan of runs, settings, learning rates."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from comparison_helpers import TINY, made_up
from gspn2.nn import Mixer
from gspn2.training import UserError
from gspn2.training.comparison import CONTENDERS, MAIN, build, document, plan, rates
from gspn2.training.comparison.plan import SIZES
from gspn2.training.state import count_parameters

# -- contenders


def test_contenders_have_equal_parameters():
    counts = {(name, 64): count_parameters(build(it, 64, 0)) for name, it in CONTENDERS.items()}
    counts |= {
        (name, size): count_parameters(build(CONTENDERS[name], size, 0)) for name in MAIN for size in SIZES
    }
    assert max(counts.values()) <= 1.05 * min(counts.values()), counts


def test_a_model_of_another_size_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("gspn2.training.comparison.contenders.CONVNET", {"dim": 128, "depth": 2})
    with pytest.raises(ValueError, match=r"convnet at 64: expected 1,321,000 parameters within 2\.5%, got"):
        build(CONTENDERS["convnet"], 64, 0)


def test_ablations_change_what_they_say():
    def mixers(name: str) -> list[Mixer]:
        return [it for it in build(CONTENDERS[name], 64, 0).modules() if isinstance(it, Mixer)]

    base = mixers("gspn2")
    assert len(base) == 6
    plain = {"directions": ("down", "up", "right", "left"), "chunk": None, "groups": 1, "proxy_dim": 8}
    plain |= {"operands_from": "input"}
    changed = {
        "gspn2": {},
        "gspn2-one-axis": {"directions": ("down", "up")},
        "gspn2-local": {"chunk": 4},
        "gspn2-still": {"chunk": 1},
        "gspn2-deep": {},
        "gspn2-diagonal": {"initial_taps": "diagonal"},
        "gspn2-straight": {"initial_taps": "straight"},
        "gspn2-per-channel": {"groups": 8},
        "gspn2-proxy-2": {"proxy_dim": 2},
        "gspn2-proxy-4": {"proxy_dim": 4},
        "gspn2-proxy-16": {"proxy_dim": 16},
        "gspn2-from-proxy": {"operands_from": "proxy"},
    }
    assert set(changed) | {"vit", "convnet"} == set(CONTENDERS)
    for name, changes in changed.items():
        for number, mixer in enumerate(mixers(name)):
            expected = plain | {"initial_taps": ("vertical", "horizontal")[number % 2]} | changes
            assert {key: getattr(mixer, key) for key in expected} == expected, name


def test_weights_are_a_function_of_the_seed():
    first, again, other = (build(CONTENDERS["gspn2"], 64, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


# -- plan


def test_the_plan_compares_everything_with_one_seed_before_the_next():
    runs = plan()
    assert len(runs) == len(set(runs)) == 3 * (3 * 3 + 3) + 3 * 3 + 3 * 11
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    assert {run.size for run in runs if run.contender not in MAIN} == {64}
    assert len(plan(extra_seeds=3)) == 3 * (2 * 3 * 3 + 3 + 3 * 11)


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"tasks": ["chess"]}, "tasks: expected some of pathfinder, maze, aligned, digits, got 'chess'"),
        ({"contenders": ["vit", "mlp"]}, "contenders: expected some of gspn2, .* got 'mlp'"),
        ({"seeds": []}, "seeds: expected at least one"),
        ({"seeds": [0, 2**63]}, "seed: expected at least 0 and at most 9223372036854775807, got 9223"),
        ({"sizes": [64, 64]}, "sizes: expected at least one, none twice"),
        ({"sizes": [16]}, "pathfinder:16@16: expected a size of at least 32"),
    ],
)
def test_what_cannot_be_planned(chosen: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        plan(**chosen)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"minutes": float("nan")}, "minutes: expected more than 0"),
        ({"steps": 0}, "steps: expected more than 0"),
        ({"amp": "fp8"}, "amp: expected auto, off or bf16"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        dataclasses.replace(TINY, **changes)


# -- learning rates


def _tried(contender: str, rate: float, accuracy: float | None, seed: int = 0) -> dict[str, Any]:
    result = made_up(contender, 0.9, 10.0, seed)
    result["run"]["lr"] = rate
    if accuracy is None:
        del result["accuracy"]
        return result | {"ended": "diverged"}
    return result | {"validation": {"accuracy": accuracy, "loss": 1 - accuracy}}


def test_each_family_takes_the_rate_that_is_best_on_validation_images():
    wanted = plan(["maze", "digits"], [64, 128], [3, 4], ["gspn2-local", "vit"])
    tried = rates.trials(wanted, (1e-3, 2e-3))
    assert [(it.task, it.size, it.contender, it.seed, it.lr) for it in tried] == [
        (task, size, contender, 3, rate)
        for task, size, contender in (("maze", 64, "gspn2"), ("maze", 64, "vit"), ("digits", 32, "vit"))
        for rate in (1e-3, 2e-3)
    ]
    assert rates.trials(wanted, (1e-3,)) == []
    results = [
        _tried("gspn2", 1e-3, 0.8),
        _tried("gspn2", 2e-3, None),
        _tried("vit", 1e-3, 0.7),
        _tried("vit", 2e-3, 0.75),
        _tried("vit", 1e-3, 0.99, seed=1),
    ]
    choice = rates.choose(results)
    assert choice == {("maze", "gspn2"): 1e-3, ("maze", "vit"): 2e-3}
    runs = rates.settle(plan(["maze"], [64, 128], [3], ["gspn2-local", "vit"]), choice)
    assert {(run.contender, run.lr) for run in runs} == {("gspn2-local", 1e-3), ("vit", 2e-3)}
    text = document.text(results)
    assert "| maze | GSPN-2 | **80.0%** | diverged |" in text
    assert "| maze | ViT | 70.0% | **75.0%** |" in text
    # What was only tried is in no other table.
    assert "| ViT | 1,243,000 | 1 | 100 | 90.0% |" in text


@pytest.mark.parametrize("chosen", [(), (1e-3, 1e-3), (0.0,), (float("nan"),)])
def test_rates_that_cannot_be(chosen: tuple[float, ...]):
    with pytest.raises(UserError, match="lr: expected at least one, above 0 and none twice, got"):
        rates.check(chosen)
