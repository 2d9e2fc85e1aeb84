"""Forward of `pixels`, in ways of cutting that its planner chooses for large problems; and its sizes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch

from cuda_emulator import compiler
from cuda_emulator.emulator import Inputs, case_of, run_plan
from cuda_emulator.problems import BF16, OTHER_LAYOUTS, Small, truth
from gspn2.backends import Problem
from gspn2.backends.cuda.geometry import Case, Device
from gspn2.backends.cuda.layouts import imagined, record_padding
from gspn2.backends.cuda.variants import pixels, pixels_forward
from gspn2.backends.cuda.variants.pixels_layout import Tiling, rounded, vector_of
from gspn2.backends.problem import DIRECTIONS
from helpers import Case as Operands
from helpers import relative_l2

H200, A100 = Device(), Device((8, 0), 108, 166912, 40 * 2**20)


@dataclass(frozen=True)
class Cut:
    """How a block is cut: vectors, roles, splits, places of a thread, lines of the ring; where sums are."""

    vectors: int
    roles: int = 2
    splits: int = 1
    on_chip: bool = False
    places: int = 1
    depth: int = 4
    lines: int = 4

    def tiling(self, case: Case) -> Tiling:
        vector = vector_of(case)
        assert vector is not None
        runs = (-(-case.problem.width // self.splits), -(-case.problem.height // self.splits))
        halo = pixels_forward.HALO if self.splits > 1 else 0
        longest = max(runs) + halo * min(2, self.splits - 1)
        threads = rounded(-(-longest // self.places) * self.vectors)
        cluster = (self.roles, self.splits, runs, threads, halo, self.lines, self.depth, self.on_chip)
        return Tiling(vector, self.vectors, self.places, *cluster)


def records(case: Operands) -> Operands:
    """Channels innermost, and lam, gate and taps as the views into padded records that a mixer makes."""
    assert case.lam is not None
    assert case.gate is not None
    batch, scans, channels, height, width = case.lam.shape
    parts = (scans * channels, scans * channels, case.logits[0, :, :, :, 0, 0].numel())
    padding = record_padding(channels, sum(parts))
    packed = torch.full((batch, height, width, sum(parts) + padding), torch.nan, dtype=case.x.dtype)
    lam, gate, taps, _ = packed.split((*parts, padding), dim=-1)
    lam, gate = (part.unflatten(-1, (scans, channels)).permute(0, 3, 4, 1, 2) for part in (lam, gate))
    taps = taps.unflatten(-1, case.logits.shape[1:4]).permute(0, 3, 4, 5, 1, 2)
    for to, values in ((lam, case.lam), (gate, case.gate), (taps, case.logits)):
        to.copy_(values)
    return replace(OTHER_LAYOUTS["channels_last"](case), lam=lam, gate=gate, logits=taps)


WIDE = Small(21, 38, channels=32, batch=2, dtype=BF16)
CUTS = (
    # Sums on chip: quarters of the image change places between the axes.
    (WIDE, Cut(2, on_chip=True)),
    (WIDE, Cut(4, on_chip=True, lines=8)),
    (replace(WIDE, height=41, width=33, batch=1), Cut(2, on_chip=True, places=2)),
    (replace(WIDE, directions=("right", "left"), groups=2), Cut(2, on_chip=True)),
    (replace(WIDE, channels=16, groups=16, chunk=7, batch=1), Cut(1, on_chip=True)),
    (replace(WIDE, channels=16), Cut(1, on_chip=True, roles=4)),
    # Sums in scratch, in whole sectors; channel blocks that are not full.
    (replace(WIDE, channels=24), Cut(2, depth=2, lines=2)),
    (replace(WIDE, channels=24, groups=3), Cut(1, roles=4, places=2)),
    (replace(WIDE, channels=24), Cut(2, splits=2)),
    (replace(WIDE, channels=16, height=70, width=75, batch=1), Cut(1, splits=8)),
    (replace(WIDE, channels=16, batch=1, chunk=5, directions=("up",)), Cut(2, roles=1, depth=6)),
    (Small(21, 38, channels=16), Cut(4, splits=2)),
    (Small(21, 38, channels=16), Cut(4, roles=4)),
)


@pytest.mark.skipif(compiler() is None, reason="the emulator of CUDA kernels needs g++ 12, on Linux")
@pytest.mark.parametrize(("small", "cut"), CUTS, ids=str)
def test_ways_of_cutting_forward(small: Small, cut: Cut) -> None:
    torch.set_num_threads(1)
    inputs = records(small.case())
    problem = small.problem(inputs)
    expected = truth(inputs, problem)["y"]
    given = Inputs(inputs.x, inputs.logits, inputs.lam, inputs.gate, None, small.needs)
    found = []
    for seed in (0, 3):
        case, tensors = case_of(given, problem, small.device)
        plan = pixels_forward.plan(case, cut.tiling(case))
        words = small.dtype == BF16 and problem.groups < problem.channels and len(problem.directions) > 1
        assert dict(plan.launches[0].kernel.defines)["TAP_WORDS"] == words
        run_plan(plan, problem, tensors, seed, small.device)
        found.append(tensors["y"])
    assert relative_l2(found[0], expected) <= (3e-6 if small.dtype == torch.float32 else 2.5e-3)
    assert torch.equal(*found), "y depends on the order of threads"


def posed(size: tuple[int, int, int, int], dtype: torch.dtype = BF16, groups: int = 1) -> Problem:
    batch, channels, height, width = size
    return Problem(DIRECTIONS, None, True, batch, channels, groups, height, width, dtype, "cuda")


def test_wide_pieces_for_large_problems() -> None:
    """Of a pixel a block takes 64 bytes where that leaves work for the GPU, and less where it does not."""

    def width(size: tuple[int, int, int, int]) -> int:
        tiling = pixels_forward.tiling_of(imagined(posed(size), "channels", H200))
        assert tiling is not None
        return tiling.vector * tiling.vectors

    assert width((32, 64, 128, 128)) == 64
    assert width((1, 80, 1024, 1024)) == 32
    assert width((1, 64, 64, 64)) == 16


def test_plans_fit_the_device() -> None:
    sizes = itertools.product(
        (2, 3, 8, 20, 24, 64, 80), ((1, 1), (37, 140), (130, 33), (301, 259), (900, 1024))
    )
    for (channels, (height, width)), dtype in itertools.product(sizes, (BF16, torch.float32)):
        for groups, device, layout in itertools.product({1, channels}, (H200, A100), (True, False)):
            problem = posed((2, channels, height, width), dtype, groups)
            case = imagined(problem, "channels", device, lam=layout, gate=layout)
            if pixels.why_not(case) is not None:
                continue
            launch = pixels.plan(case).launches[0]
            assert launch.shared <= device.shared_memory
            assert launch.cluster <= (16 if device is H200 else 1)
