"""Ways of cutting backward of horizontal scans, on problems of a size that the emulator can run."""

from __future__ import annotations

import functools

import pytest
import torch

from cuda_emulator import compiler, run_plan
from cuda_emulator.emulator import Inputs, case_of
from cuda_emulator.problems import BF16, FP16, Small, truth
from gspn2.backends.cuda.geometry import Case, Device
from gspn2.backends.cuda.layouts import imagined
from gspn2.backends.cuda.variants import planes_backward, planes_backward_pieces
from gspn2.backends.problem import Problem
from helpers import max_error, relative_l2

TOLERANCE = {torch.float32: (3e-6, 3e-6), BF16: (2.5e-3, 1.02 * 2**-8), FP16: (4e-4, 1.02 * 2**-11)}
"""Relative in L2, and at most, of one rounding."""

SCAN = functools.partial(Small, gate=False, normalize=False, hidden=True)

# Blocks exchange what lines hand on 9 times and more: they wait in another phase than before.
PROBLEMS = (
    SCAN(151, 160, channels=1, directions=("right",), dtype=BF16),
    SCAN(151, 160, channels=1, directions=("left",), chunk=47, dtype=BF16),
    SCAN(101, 164, channels=2, groups=2, directions=("right",), chunk=11, lam=False),
    SCAN(70, 148, channels=1, directions=("left",)),
    SCAN(259, 40, channels=1, directions=("left",), dtype=FP16),
    Small(266, 24, channels=1, directions=("right",), dtype=BF16),
    Small(67, 160, channels=1, directions=("left", "right"), dtype=BF16),
    Small(70, 72, channels=3, directions=("right", "down", "left"), chunk=21, dtype=BF16),
    Small(66, 44, channels=2, directions=("left", "right"), chunk=13),
    Small(40, 72, channels=2, directions=("right",), gate=False, dtype=FP16),
)

RUNS = (
    (0, 1, 64, 2),
    (0, 3, 128, 1),
    (1, 2, 64, 2),
    (2, 2, 64, 2),
    (3, 2, 64, 1),
    (4, 8, 32, 2),
    (5, 8, 32, 1),
    (6, 2, 64, 2),
    (7, 2, 64, 1),
    (8, 2, 32, 1),
    (9, 1, 64, 1),
)
"""Problem, blocks of a line, bytes of a piece, tiles."""


def planned(number: int) -> tuple[Case, dict[str, torch.Tensor]]:
    small = PROBLEMS[number]
    case = small.case()
    h = exact(number)["y"].to(small.dtype) if small.hidden else None
    inputs = Inputs(case.x, case.logits, case.lam, case.gate, case.dy, small.needs, h)
    return case_of(inputs, small.problem(case), small.device)


@functools.cache
def exact(number: int) -> dict[str, torch.Tensor]:
    small = PROBLEMS[number]
    case = small.case()
    return truth(case, small.problem(case))


def assert_right(number: int, tensors: dict[str, torch.Tensor]) -> None:
    small = PROBLEMS[number]
    l2, largest = TOLERANCE[small.dtype]
    for name, right in exact(number).items():
        if name != "y":
            # Gradients of taps come from a state that was rounded if it is handed in.
            roundings = 1 + (name == "dtaps" and small.hidden)
            assert max_error(tensors[name], right) <= roundings * largest, name
            assert relative_l2(tensors[name], right) <= roundings * l2, name


@pytest.mark.skipif(compiler() is None, reason="the emulator of CUDA kernels needs g++")
@pytest.mark.parametrize(
    ("number", "strips", "piece", "buffers", "seed"), [(*run, seed) for seed, run in enumerate(RUNS)]
)
@pytest.mark.usefixtures("threads")
def test_pieces(number: int, strips: int, piece: int, buffers: int, seed: int) -> None:
    torch.set_num_threads(1)  # small tensors: waking more takes longer than the work
    small = PROBLEMS[number]
    case, tensors = planned(number)
    choice = {}
    for direction in {"right", "left"} & set(small.directions):
        choice[direction] = tuple(
            next(
                cut
                for cut in planes_backward_pieces.pieces(case, walk)
                if (cut.strips, cut.piece, cut.buffers) == (strips, piece, buffers)
            )
            for walk in planes_backward.walks(case, direction)
        )
    plan = planes_backward.plan(case, choice)
    assert sum("planes_backward_states" in launch.kernel.source for launch in plan.launches) == (
        0 if small.hidden else len(choice)
    )
    run_plan(plan, small.problem(small.case()), tensors, seed=seed, device=small.device)
    assert_right(number, tensors)


@pytest.mark.skipif(compiler() is None, reason="the emulator of CUDA kernels needs g++")
@pytest.mark.parametrize(("number", "strips"), [(1, 2), (5, 1), (7, 1), (8, 2)])
@pytest.mark.usefixtures("threads")
def test_short_pieces(number: int, strips: int) -> None:
    """What runs where long pieces do not fit."""
    torch.set_num_threads(1)
    small = PROBLEMS[number]
    case, tensors = planned(number)
    choice = {
        direction: next(cut for cut in planes_backward.cuts(case, direction) if cut.strips == strips)
        for direction in {"right", "left"} & set(small.directions)
    }
    plan = planes_backward.plan(case, choice)
    run_plan(plan, small.problem(small.case()), tensors, seed=number, device=small.device)
    assert_right(number, tensors)


def test_short_lines_take_one_block_and_long_ones_a_cluster() -> None:
    def strips(height: int) -> int | None:
        problem = Problem(("right",), None, False, 1, 64, 64, height, 512, BF16, "cuda")
        case = imagined(problem, "planes", Device(), backward=True)
        found = planes_backward_pieces.best(case, planes_backward.walks(case, "right"))
        return None if found is None else found[-1].strips

    assert strips(32) == 1
    assert (strips(1024) or 0) > 1
    assert strips(8192) is None


def test_many_planes_with_taps_of_their_own_have_the_registers_of_a_multiprocessor() -> None:
    def back(channels: int, groups: int, dtype: torch.dtype = BF16) -> planes_backward_pieces.Pieces:
        directions = ("down", "up", "right", "left")
        problem = Problem(directions, None, True, 1, channels, groups, 1024, 1024, dtype, "cuda")
        case = imagined(problem, "planes", Device(), backward=True)
        found = planes_backward_pieces.best(case, planes_backward.walks(case, "right"))
        assert found is not None
        return found[-1]

    assert back(128, 128).threads == 256
    assert back(128, 1).threads == back(8, 8).threads == back(128, 128, torch.float32).threads == 160
