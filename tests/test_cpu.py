"""What the CPU backend promises besides right results: its scratch stays in proportion to the image."""

from __future__ import annotations

import pytest
import torch

from gspn2.backends import DIRECTIONS, Problem
from gspn2.backends.cpu import backward, forward
from gspn2.backends.cpu.plan import plan
from helpers import assert_close, make_case, run, truth


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(("height", "width"), [(1, 10**6), (10**6, 1), (80, 30_000), (4096, 4096)])
def test_scratch_of_images_much_longer_one_way(height: int, width: int, format: torch.memory_format) -> None:
    """In proportion to the pixels, not to the square of the longer side: states that the adjoint keeps."""
    x = torch.empty(1, 64, height, width, device="meta").to(memory_format=format)
    problem = Problem(DIRECTIONS, None, True, 1, 64, 1, height, width, torch.float32, "cpu")
    sizes = [
        kernel.scratch_size.py_func(plan(problem, 1, x.stride(), backward=kernel is backward), False)
        for kernel in (forward, backward)
    ]
    assert max(sizes) <= 4 * x.numel()


@pytest.mark.parametrize(("height", "width"), [(2, 700), (700, 3)])
@pytest.mark.usefixtures("poisoned")
def test_images_much_longer_one_way(height: int, width: int) -> None:
    """Scans of rows and of columns take turns in the same scratch, with other lengths of its rows."""
    case = make_case(1, 20, height, width, groups=2, chunk=300, dtype=torch.float32)
    assert_close(run(case, backend="cpu"), truth(case), 1e-5)
