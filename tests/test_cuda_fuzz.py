"""Random problems for the planner and the CUDA kernels: a few here, campaigns by `cuda_emulator.fuzz`."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cuda_emulator import compiler, fuzz
from cuda_emulator.drawing import DEVICES, draw_large, draw_problem
from cuda_emulator.problems import OLD, Small
from cuda_emulator.rules import broken
from gspn2.backends.cuda import plan
from gspn2.backends.cuda.geometry import Device
from gspn2.backends.cuda.layouts import imagined
from gspn2.backends.problem import DIRECTIONS, Problem

emulated = pytest.mark.skipif(compiler() is None, reason="the emulator of CUDA kernels needs g++")


@pytest.mark.parametrize("seed", range(24))
def test_plans_are_legal(seed: int) -> None:
    """Of problems of any size, by every variant that takes them, on every kind of device."""
    case = draw_large(random.Random(seed))
    for name, variant in plan.variants().items():
        if variant.why_not(case) is None:
            assert not list(broken(variant.plan(case), case)), name


def test_columns_longer_than_a_block() -> None:
    """A block has no 33 warps, even where a line asks for them."""
    problem = Problem(("right",), None, True, 1, 1, 1, 1047, 56, torch.float16, "cuda")
    for device in DEVICES:
        case = imagined(problem, "planes", device)
        assert not list(broken(plan.choose(case), case))


def test_rules_find_what_is_not_legal() -> None:
    problem = Problem(DIRECTIONS, None, True, 1, 8, 1, 1024, 1024, torch.bfloat16, "cuda")
    case = imagined(problem, "planes", Device())
    legal = plan.choose(case)
    launch = next(launch for launch in legal.launches if launch.cluster > 1)
    assert not list(broken(legal, case))
    wrong = {
        "grid": launch.grid + 1,
        "block": launch.block + 1,
        "shared": 300_000,
        "cluster": 32,
        "knobs": (2**31,),
        "kernel": replace(launch.kernel, function="no_such_kernel"),
    }
    for name, value in wrong.items():
        assert list(broken(replace(legal, launches=(replace(launch, **{name: value}),)), case)), name
    assert list(broken(replace(legal, scratch=(-4,)), case))
    assert list(broken(legal, replace(case, device=OLD))), "clusters"


@pytest.mark.parametrize("seed", range(3))
def test_a_seed_draws_the_same(seed: int) -> None:
    assert fuzz.draw(seed, ("planes", "kept")) == fuzz.draw(seed, ("planes", "kept"))
    small = draw_problem(random.Random(seed), ("planes",))
    assert small.device in DEVICES or small.device.multiprocessors < 20


@emulated
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.usefixtures("threads")
def test_random_problems(backward: bool) -> None:
    """A few sizes for kernels that other tests compile, too."""
    torch.set_num_threads(1)
    small = Small(9, 12, directions=("down",), batch=2, dtype=torch.bfloat16)
    drawn = fuzz.Drawn(small, "generic", backward, None, False, 3)
    for one in (drawn, *fuzz.relatives(drawn, random.Random(0), 3)):
        assert fuzz.failure(one) is None


@emulated
def test_wrong_results_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = fuzz.Drawn(Small(3, 5), "generic", False, None, False, 0)
    right = fuzz.run

    def wrong(one: fuzz.Drawn, change: str) -> dict[str, Tensor]:
        found = right(one)
        if change == "largest error":
            found["y"][0, 0, 0, 0] += 0.01
        elif change == "NaN":
            found["y"][0, 0, 0, 0] = torch.nan
        elif one.order:
            found["y"][0, 0, 0, 0] += 1e-6
        return found

    for change in ("largest error", "NaN", "depends on the order"):
        monkeypatch.setattr(fuzz, "run", lambda one, change=change: wrong(one, change))
        assert change in (fuzz.failure(drawn) or "nothing")


def test_failures_are_shrunk() -> None:
    small = Small(40, 33, channels=6, batch=2, groups=2, chunk=7, layout="misaligned", device=OLD)
    drawn = fuzz.Drawn(small, "generic", True, 5, True, 4)

    def fails(one: fuzz.Drawn) -> str | None:
        return "wrong" if one.small.height >= 5 and "left" in one.small.directions and one.backward else None

    least = fuzz.shrunk(drawn, fails=fails)
    simplest = Small(5, 1, channels=1, directions=("left",), lam=False, gate=False)
    assert least == fuzz.Drawn(simplest, "generic", True, None, False, 0)
