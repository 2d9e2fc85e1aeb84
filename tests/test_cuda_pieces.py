"""Ways of cutting backward of one horizontal scan, on problems of a size that the emulator can run."""

from __future__ import annotations

import functools

import pytest
import torch

from cuda_emulator import compiler, run_plan
from cuda_emulator.emulator import Inputs, case_of
from cuda_emulator.problems import BF16, FP16, Small, truth
from gspn2.backends.cuda.geometry import Plan
from gspn2.backends.cuda.variants import planes_backward_pieces
from gspn2.backends.cuda.variants.planes_backward_pieces import Pieces
from helpers import max_error, relative_l2

TOLERANCE = {torch.float32: (3e-6, 3e-6), BF16: (2.5e-3, 1.02 * 2**-8), FP16: (4e-4, 1.02 * 2**-11)}
"""Relative in L2, and at most, of one rounding; gradients of taps come from a state rounded before."""

SCAN = functools.partial(Small, gate=False, normalize=False, hidden=True)

# Blocks exchange what lines hand on 9 times and more: they wait in another phase than before.
PROBLEMS = (
    SCAN(151, 160, channels=1, directions=("right",), dtype=BF16),
    SCAN(151, 160, channels=1, directions=("left",), chunk=47, dtype=BF16),
    SCAN(101, 164, channels=2, groups=2, directions=("right",), chunk=11, lam=False),
    SCAN(70, 148, channels=1, directions=("left",)),
    SCAN(259, 40, channels=1, directions=("left",), dtype=FP16),
    SCAN(266, 24, channels=1, directions=("right",), normalize=True, dtype=BF16),
)

RUNS = (
    (0, 1, 64, 2),
    (0, 2, 64, 2),
    (0, 3, 128, 1),
    (1, 2, 64, 2),
    (1, 3, 128, 1),
    (2, 2, 64, 2),
    (3, 2, 64, 1),
    (4, 8, 32, 2),
    (5, 8, 32, 1),
    (5, 1, 32, 2),
)
"""Problem, blocks of a line, bytes of a piece, tiles."""


def found(number: int, strips: int, piece: int, buffers: int) -> tuple[Plan, dict[str, torch.Tensor]]:
    small = PROBLEMS[number]
    case = small.case()
    h = exact(number)["y"].to(small.dtype)
    inputs = Inputs(case.x, case.logits, case.lam, None, case.dy, small.needs, h)
    planned, tensors = case_of(inputs, small.problem(case), small.device)
    cut = next(
        cut
        for cut in planes_backward_pieces.pieces(planned)
        if (cut.strips, cut.piece, cut.buffers) == (strips, piece, buffers)
    )
    return Plan("planes", (planes_backward_pieces.launch(planned, cut),)), tensors


@functools.cache
def exact(number: int) -> dict[str, torch.Tensor]:
    small = PROBLEMS[number]
    case = small.case()
    return truth(case, small.problem(case))


@pytest.mark.skipif(compiler() is None, reason="the emulator of CUDA kernels needs g++")
@pytest.mark.parametrize(
    ("number", "strips", "piece", "buffers", "seed"), [(*run, seed) for seed, run in enumerate(RUNS)]
)
@pytest.mark.usefixtures("threads")
def test_pieces(number: int, strips: int, piece: int, buffers: int, seed: int) -> None:
    torch.set_num_threads(1)  # small tensors: waking more takes longer than the work
    small = PROBLEMS[number]
    plan, tensors = found(number, strips, piece, buffers)
    run_plan(plan, small.problem(small.case()), tensors, seed=seed, device=small.device)
    l2, largest = TOLERANCE[small.dtype]
    for name, right in exact(number).items():
        if name != "y":
            roundings = 1 + (name == "dtaps")
            assert max_error(tensors[name], right) <= roundings * largest, name
            assert relative_l2(tensors[name], right) <= roundings * l2, name


def test_short_lines_take_one_block_and_long_ones_a_cluster() -> None:
    def cut(height: int) -> Pieces | None:
        small = SCAN(height, 512, channels=64, groups=64, directions=("right",), dtype=BF16)
        case = small.case()
        inputs = Inputs(case.x, case.logits, case.lam, None, case.dy, small.needs, case.x)
        return planes_backward_pieces.best(case_of(inputs, small.problem(case), small.device)[0])

    short, long = cut(32), cut(1024)
    assert short is not None
    assert short.strips == 1
    assert long is not None
    assert long.strips > 1
    assert cut(8192) is None
