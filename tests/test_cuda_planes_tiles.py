"""Planes by tiles, on problems of a size that the emulator can run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cuda_emulator import compiler, run_plan
from cuda_emulator.emulator import Inputs, case_of
from cuda_emulator.problems import BF16, Small, truth
from gspn2.backends.cuda.geometry import Case as PlannedCase
from gspn2.backends.cuda.geometry import Device
from gspn2.backends.cuda.layouts import imagined
from gspn2.backends.cuda.plan import choose
from gspn2.backends.cuda.variants import planes_tiles
from gspn2.backends.cuda.variants.planes_tiles import Choice
from gspn2.backends.problem import DIRECTIONS, Problem
from helpers import max_error, relative_l2

TOLERANCE = (2.6e-3, 1.02 * 2**-8)
"""Relative in L2, and at most, of one rounding."""

RUNS = (
    (Small(32, 32, dtype=BF16), Choice()),
    (Small(37, 72, channels=5, dtype=BF16), Choice(ring=2)),
    (Small(75, 40, batch=2, chunk=7, dtype=BF16), Choice(strips=2)),
    (
        Small(50, 104, channels=8, groups=2, chunk=20, lam=False, directions=("left", "down"), dtype=BF16),
        Choice(ring=3),
    ),
    (Small(70, 48, gate=False, directions=("up", "left", "right"), dtype=BF16), Choice()),
    (Small(33, 264, lam=False, gate=False, directions=("down", "up"), chunk=16, dtype=BF16), Choice()),
    (Small(161, 56, directions=("right", "left"), chunk=9, dtype=BF16), Choice(strips=3)),
    (Small(9, 72, directions=("left", "up"), needs=(False, True, False, True), dtype=BF16), Choice()),
)


FORWARD = (
    (Small(32, 32, dtype=BF16), Choice()),
    (Small(37, 72, channels=5, dtype=BF16), Choice(ring=2, stages=3, channels=2)),
    (Small(75, 40, batch=2, chunk=7, dtype=BF16), Choice(strips=2)),
    (
        Small(50, 104, channels=8, groups=2, chunk=20, lam=False, directions=("left", "down"), dtype=BF16),
        Choice(ring=3),
    ),
    (Small(70, 48, gate=False, directions=("up", "left", "right"), dtype=BF16), Choice()),
    (Small(33, 264, lam=False, gate=False, chunk=16, dtype=BF16), Choice(stages=2)),
    (Small(161, 56, directions=("right", "left", "down"), chunk=9, dtype=BF16), Choice(strips=3)),
    (Small(9, 72, lam=False, gate=False, directions=("left", "up"), nan="restarts", dtype=BF16), Choice()),
)


@pytest.mark.skipif(compiler() is None, reason="the emulator of CUDA kernels needs g++")
@pytest.mark.parametrize(
    ("backward", "seed"),
    [(False, seed) for seed in range(len(FORWARD))] + [(True, seed) for seed in range(len(RUNS))],
)
@pytest.mark.usefixtures("threads")
def test_tiles(backward: bool, seed: int) -> None:
    torch.set_num_threads(1)  # small tensors: waking more takes longer than the work
    small, choice = (RUNS if backward else FORWARD)[seed]
    case = small.case()
    inputs = Inputs(case.x, case.logits, case.lam, case.gate, case.dy if backward else None, small.needs)
    planned, tensors = case_of(inputs, small.problem(case), small.device)
    assert planes_tiles.cannot(planned) is None
    plan = planes_tiles.plan(planned, choice)
    run_plan(plan, small.problem(case), tensors, seed=seed, device=small.device)
    l2, largest = TOLERANCE
    for name, right in truth(case, small.problem(case)).items():
        if name in tensors:
            assert max_error(tensors[name], right) <= largest, name
            assert relative_l2(tensors[name], right) <= l2, name


def reason(
    shape: tuple[int, int, int, int] = (16, 8, 1024, 1024),
    groups: int = 1,
    dtype: torch.dtype = BF16,
    directions: tuple[str, ...] = DIRECTIONS,
    backward: bool = True,
) -> str | None:
    batch, channels, height, width = shape
    problem = Problem(directions, None, True, batch, channels, groups, height, width, dtype, "cuda")
    return planes_tiles.why_not(imagined(problem, "planes", Device(), backward=backward))


def test_it_takes_large_images_whose_channels_share_logits() -> None:
    assert reason() is None
    assert reason((1, 80, 1024, 1024)) is None
    assert reason(directions=("right", "up")) is None
    assert "share their taps" in str(reason(groups=8))
    assert "bfloat16" in str(reason(dtype=torch.float32))
    assert "single direction" in str(reason(directions=("up",)))
    assert "too few" in str(reason((1, 8, 256, 256)))
    assert "outside of images" in str(reason((16, 8, 40, 1024)))
    assert "multiple of 16" in str(reason((16, 8, 1024, 1020)))
    assert "do not fit" in str(reason((16, 8, 8192, 1024)))


def test_forward_takes_few_large_images_in_both_axes() -> None:
    large = (4, 8, 2048, 2048)
    for shape in (large, (1, 80, 1024, 1024), (1, 20, 1024, 1024), (1, 32, 512, 512)):
        assert reason(shape, backward=False) is None
    assert reason(large, directions=("right", "up"), backward=False) is None
    assert "single axis" in str(reason(large, directions=("right", "left"), backward=False))
    assert "share their taps" in str(reason(large, groups=8, backward=False))
    assert "bfloat16" in str(reason(large, dtype=torch.float16, backward=False))
    assert "multiple of 16" in str(reason((4, 8, 1024, 1020), backward=False))
    for shape in ((16, 8, 1024, 1024), (1, 128, 512, 512), (1, 81, 1024, 1024)):
        assert "are many" in str(reason(shape, backward=False))
    for shape in ((8, 64, 256, 256), (1, 32, 504, 1024), (1, 32, 1024, 504)):
        assert "are small" in str(reason(shape, backward=False))


@pytest.mark.parametrize(("shape", "channels"), [((16, 8, 1024, 1024), 8), ((1, 80, 1024, 1024), 20)])
def test_forward_cuts_groups_of_few_images(shape: tuple[int, int, int, int], channels: int) -> None:
    problem = Problem(DIRECTIONS, None, True, shape[0], shape[1], 1, *shape[2:], BF16, "cuda")
    tiles = planes_tiles.plan(imagined(problem, "planes", Device())).launches[-1]
    assert tiles.knobs[-1] == channels
    assert tiles.grid == shape[0] * shape[1] // channels * 1024


def over_columns(height: int, channels: int = 8, scaled: bool = True, shared: int = 232448) -> PlannedCase:
    """What the planner sees where walks go over columns only, on a device with so much shared memory."""
    problem = Problem(("right", "left"), None, True, 16, channels, 1, height, 1024, BF16, "cuda")
    device = Device(shared_memory=shared)
    return imagined(problem, "planes", device, backward=True, lam=scaled, gate=scaled)


@pytest.mark.parametrize(
    ("case", "channels"),
    [
        (over_columns(1024), 2),
        (over_columns(1024, channels=5), 1),
        (over_columns(3840, scaled=False), 2),
        (over_columns(3840, scaled=False, shared=101376), 1),
    ],
)
def test_walks_over_columns_take_two_channels_where_they_can(case: PlannedCase, channels: int) -> None:
    assert planes_tiles.cannot(case) is None
    walks = planes_tiles.plan(case).launches[1]
    assert dict(walks.kernel.defines)["CHANNELS"] == channels
    assert walks.shared <= case.device.shared_memory


def test_walks_that_do_not_fit_in_shared_memory_are_declined() -> None:
    assert "columns of 3840" in str(planes_tiles.cannot(over_columns(3840, shared=101376)))
    problem = Problem(("down", "up"), None, True, 16, 8, 1, 1024, 8192, BF16, "cuda")
    rows = imagined(problem, "planes", Device(shared_memory=101376), backward=True)
    assert "rows of 8192" in str(planes_tiles.cannot(rows))


def test_the_planner_prefers_it_and_scratch_memory_is_little() -> None:
    problem = Problem(DIRECTIONS, None, True, 16, 8, 1, 1024, 1024, BF16, "cuda")
    plan = choose(imagined(problem, "planes", Device(), backward=True))
    assert plan.variant == "planes_tiles"
    kept = choose(imagined(problem, "planes", Device(), backward=True, keep_hidden=True))
    assert kept == plan, "kept states change nothing"
    planes = 16 * 8 * 1024 * 1024
    assert sum(plan.scratch) == 4 * planes + 4 * 4 * planes // 8
    assert choose(imagined(problem, "planes", Device())).variant == "lines"
    few = replace(problem, batch=4)
    forward = choose(imagined(few, "planes", Device()))
    assert forward.variant == "planes_tiles"
    assert sum(forward.scratch) == planes // 4 * 2 + 4 * 4 * (planes // 4) // 8
