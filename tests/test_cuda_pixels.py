"""The sizes that `pixels` decides: shared memory, over more of them than kernels can be run for."""

from __future__ import annotations

import itertools

import pytest
import torch

from gspn2.backends import Problem
from gspn2.backends.cuda.geometry import Case, Device
from gspn2.backends.cuda.layouts import imagined
from gspn2.backends.cuda.variants import pixels, pixels_backward
from gspn2.backends.problem import DIRECTIONS

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
