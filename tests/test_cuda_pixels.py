"""The sizes that `pixels` decides, and backward in the ways of cutting that it chooses for large images."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch

from cuda_emulator import compiler
from cuda_emulator.emulator import Inputs, case_of, run_plan
from cuda_emulator.problems import BF16, Small, truth
from gspn2.backends import Problem
from gspn2.backends.cuda.geometry import Case, Device
from gspn2.backends.cuda.layouts import imagined
from gspn2.backends.cuda.variants import pixels, pixels_backward
from gspn2.backends.cuda.variants.pixels_backward import Warps
from gspn2.backends.cuda.variants.pixels_layout import vector_of
from gspn2.backends.problem import DIRECTIONS
from helpers import relative_l2

CHANNELS = (2, 3, 4, 5, 6, 7, 8, 12, 20, 24, 33, 40)
IMAGES = ((1, 1), (5, 7), (37, 140), (63, 65), (130, 33), (301, 259))


def cases(dtype: torch.dtype) -> list[Case]:
    """Backward of everything that `pixels` takes among many odd sizes, on new and old GPUs."""
    devices = (Device(), Device((8, 6), 84, 101376, 6 * 2**20), Device(multiprocessors=2))
    found = []
    for channels, (height, width), device in itertools.product(CHANNELS, IMAGES, devices):
        for groups, directions in itertools.product({1, 2, channels}, (DIRECTIONS, ("left",))):
            if channels % groups:
                continue
            problem = Problem(directions, None, True, 2, channels, groups, height, width, dtype, "cuda")
            case = imagined(problem, "channels", device, backward=True, gate=len(directions) > 1)
            if pixels.why_not(case) is None:
                found.append(case)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_regions_of_shared_memory_are_aligned(dtype: torch.dtype) -> None:
    """A GPU stops at a vector of 16 bytes that is not at a multiple of 16."""
    taken = cases(dtype)
    assert len(taken) > 100
    for case in taken:
        tiling = pixels_backward.tiling_of(case)
        assert tiling is not None
        sizes = pixels_backward.regions(case, tiling)
        assert all(size % 16 == 0 for size in sizes), (case.problem, sizes)
        assert sum(sizes) == pixels.plan(case).launches[0].shared


def large(batch: int, channels: int, size: int) -> Case:
    """Backward of what a mixer asks for on large images."""
    problem = Problem(DIRECTIONS, None, True, batch, channels, 1, size, size, torch.bfloat16, "cuda")
    return imagined(problem, "channels", Device(), backward=True)


@pytest.mark.parametrize(("batch", "channels"), [(16, 8), (1, 80)])
def test_memory_and_blocks_of_large_images(batch: int, channels: int) -> None:
    """Scratch memory is at most a quarter of inputs and gradients; most multiprocessors have work."""
    found = pixels.plan(large(batch, channels, 1024))
    numbers = 2 * batch * 1024**2 * (2 * channels + 2 * 4 * channels + 4 * 3)  # x, dy; lam, gate; taps
    assert sum(found.scratch) <= numbers * 2 * 0.25
    assert found.launches[0].grid >= 80
    # Sums of tap gradients of an axis are done with before those of the other.
    names = ["pixels_backward", "pixels_taps"] * 2
    assert [launch.kernel.function for launch in found.launches] == names


def test_long_lines_have_narrower_vectors() -> None:
    for size in (2048, 4096, 8192):
        case = large(1, 64, size)
        assert pixels.why_not(case) is None
        tiling = pixels_backward.tiling_of(case)
        assert tiling is not None
        assert tiling.threads * tiling.places // tiling.vectors >= tiling.longest


@dataclass(frozen=True)
class Cut:
    """How a block is cut: its vectors, those of them that a warp has, places of a thread, and so on."""

    vectors: int = 1
    lanes: int = 1
    places: int = 1
    roles: int = 2
    splits: int = 1
    lines: int = 4

    def tiling(self, case: Case) -> Warps:
        vector = vector_of(case)
        assert vector is not None
        runs = (-(-case.problem.width // self.splits), -(-case.problem.height // self.splits))
        halo = self.lines if self.splits > 1 else 0
        strips = -(-(max(runs) + 2 * halo) * self.lanes // (32 * self.places))
        threads = 32 * self.vectors // self.lanes * strips
        return Warps(
            vector,
            self.vectors,
            self.places,
            self.roles,
            self.splits,
            runs,
            threads,
            halo,
            self.lines,
            self.lines,
            False,
            self.lanes,
        )


PACKED = "channel_innermost"
CUTS = (
    # Lines of several warps, and places of several lanes of a warp.
    (Small(9, 70, channels=8, dtype=BF16, layout=PACKED), Cut()),
    (Small(9, 70, channels=16, dtype=BF16, layout=PACKED, chunk=3), Cut(2, 2, 2)),
    (Small(9, 45, channels=16, dtype=BF16, layout=PACKED), Cut(2, 2, 1, roles=4)),
    (Small(21, 45, channels=32, groups=2, dtype=BF16, layout=PACKED), Cut(4, 2, 2, roles=1)),
    (Small(11, 45, channels=8, groups=8, dtype=BF16, layout=PACKED), Cut()),
    # Lines of several blocks.
    (Small(20, 45, channels=8, dtype=BF16, layout=PACKED, chunk=7), Cut(2, 2, 1, splits=3)),
    (Small(11, 40, channels=4, groups=4, layout=PACKED), Cut(splits=2, roles=4)),
    (Small(13, 75, channels=8, dtype=BF16, layout=PACKED), Cut(places=2, splits=2, roles=1, lines=2)),
    (Small(15, 50, channels=3, layout=PACKED), Cut(3, splits=2)),
    (Small(20, 34, channels=4, batch=1, dtype=BF16, layout=PACKED), Cut(splits=8, lines=2)),
)


@pytest.mark.skipif(compiler() is None, reason="the emulator of CUDA kernels needs g++ 12, on Linux")
@pytest.mark.parametrize(("small", "cut"), CUTS, ids=str)
def test_ways_of_cutting_backward(small: Small, cut: Cut) -> None:
    assert_right(small, cut)


@pytest.mark.skipif(compiler() is None, reason="the emulator of CUDA kernels needs g++ 12, on Linux")
def test_axes_that_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Directions in an order of their own, and groups of several blocks and of a part of one."""
    monkeypatch.setattr(pixels_backward, "LARGE", 0)
    order = ("left", "up", "right", "down")
    for groups in (1, 4):
        small = Small(9, 14, channels=16, batch=2, groups=groups, directions=order, dtype=BF16, layout=PACKED)
        assert_right(small, Cut(2, 2), launches=4)


def assert_right(small: Small, cut: Cut, launches: int | None = None) -> None:
    """Gradients as they should be, and the same in two orders of threads."""
    torch.set_num_threads(1)
    inputs = small.case()
    problem = small.problem(inputs)
    expected = truth(inputs, problem)
    given = Inputs(inputs.x, inputs.logits, inputs.lam, inputs.gate, inputs.dy, small.needs)
    found = []
    for seed in (0, 3):
        case, tensors = case_of(given, problem, small.device)
        plan = pixels_backward.plan(case, cut.tiling(case))
        assert launches in (None, len(plan.launches))
        run_plan(plan, problem, tensors, seed, small.device)
        found.append(tensors)
    tolerance = 3e-6 if small.dtype == torch.float32 else 2.5e-3
    for name, right in expected.items():
        if name != "y":
            assert relative_l2(found[0][name], right) <= tolerance, name
            assert torch.equal(found[0][name], found[1][name]), f"{name} depends on the order of threads"
