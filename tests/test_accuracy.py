"""Fresh random problems against the float64 reference, measured by what eager PyTorch achieves."""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache
from statistics import fmean

import pytest
import torch
from torch import Tensor

from helpers import DIRECTION_SUBSETS, Case, eager_propagate, make_case, max_error, relative_l2, run, truth

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# (H, W): ones, primes, one less and one more than vector lengths and tiles, very long and very short lines.
SIZES = (
    *((1, 1), (1, 2), (2, 1), (2, 2), (3, 5), (1, 37), (41, 1), (7, 13), (17, 23)),
    *((31, 33), (32, 32), (33, 31), (64, 9), (8, 65), (127, 5), (6, 128), (129, 4), (128, 127)),
)


# A few dozen numbers may be exact by luck, on either side: small problems are posed this often.
DRAWS = 8
FEW_NUMBERS = 2000


@lru_cache(maxsize=6)
def yardsticks(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the results should be, and what eager PyTorch makes of it: for long scans every backend asks."""
    return truth(case), run(case, eager_propagate)


def assert_as_accurate_as_eager(cases: list[Case], backend: str) -> None:
    """Relative L2 error at most twice that of eager PyTorch in the same dtype, for y and every gradient.

    Root mean square over the cases, and never below the dtype's epsilon, twice the error that rounding the
    exact result could make.
    """
    found_errors: dict[str, list[float]] = defaultdict(list)
    eager_errors: dict[str, list[float]] = defaultdict(list)
    for case in cases:
        found, (expected, eager) = run(case, backend=backend), yardsticks(case)
        for name, tensor in found.items():
            assert tensor.dtype == case.x.dtype, name
            found_errors[name].append(relative_l2(tensor, expected[name]))
            eager_errors[name].append(relative_l2(eager[name], expected[name]))
    epsilon = torch.finfo(cases[0].x.dtype).eps
    for name, errors in found_errors.items():
        allowed = max(2 * fmean(e**2 for e in eager_errors[name]) ** 0.5, epsilon)
        assert fmean(e**2 for e in errors) ** 0.5 <= allowed, name


def varied(height: int, width: int, dtype: torch.dtype, draw: int = 0) -> Case:
    """A case of this size; directions, chunk, groups and the optional inputs change from size to size."""
    number = SIZES.index((height, width)) + 5 * DTYPES.index(dtype)
    return make_case(
        batch=1 + number % 2,
        channels=(1, 4, 6)[number % 3],
        height=height,
        width=width,
        groups=(1, 2, 6)[number % 3] if number % 4 else 1,
        directions=DIRECTION_SUBSETS[-1 - number % len(DIRECTION_SUBSETS)],
        chunk=(None, None, 1, 3, 7, 32)[number % 6],
        lam=number % 5 != 0,
        gate=number % 7 != 0,
        dtype=dtype,
        seed=number + 1000 * draw,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_sizes(height: int, width: int, dtype: torch.dtype, backend: str) -> None:
    case = varied(height, width, dtype)
    if dtype == torch.float64:
        found, expected = run(case, backend=backend), run(case, eager_propagate)
        assert all(max_error(found[name], expected[name]) <= 1e-12 for name in expected)
    else:
        draws = DRAWS if case.x.numel() < FEW_NUMBERS else 1
        assert_as_accurate_as_eager([varied(height, width, dtype, draw) for draw in range(draws)], backend)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(("groups", "chunk"), [(1, None), (2, 5), (4, 4)])
@pytest.mark.parametrize("directions", DIRECTION_SUBSETS, ids="-".join)
def test_options(
    directions: tuple[str, ...], groups: int, chunk: int | None, dtype: torch.dtype, backend: str
) -> None:
    case = make_case(2, 4, 12, 11, groups, directions, chunk, dtype)
    assert_as_accurate_as_eager([case], backend)


@lru_cache(maxsize=6)
def long(height: int, width: int, dtype: torch.dtype) -> Case:
    return make_case(1, 2, height, width, directions=("down", "left"), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(("height", "width"), [(4096, 7), (7, 4096)])
def test_long_scans(height: int, width: int, dtype: torch.dtype, backend: str) -> None:
    """4096 lines: an error that grew with every line, as a 16-bit state has, would show."""
    assert_as_accurate_as_eager([long(height, width, dtype)], backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_state_is_not_rounded_between_lines(dtype: torch.dtype, backend: str) -> None:
    """Weights of 1/3 on 600 lines of constant input: a state of 16 bits would stop growing at 256 or 2048.

    Channel-shared taps of equal logits average a line of ones to ones, so h after line i is i + 1, exactly.
    """
    lines = 4000
    x = torch.ones(1, 1, lines, 3, dtype=dtype)
    logits = torch.zeros(1, 1, 1, 3, lines, 3, dtype=dtype)
    gate = (1 / torch.arange(1, lines + 1, dtype=torch.float64)).to(dtype).view(1, 1, 1, lines, 1)
    gate = gate.expand(1, 1, 1, lines, 3)
    found = run(Case(x, logits, None, gate, x, ("down",)), backend=backend)["y"]
    expected = gate[:, 0].double() * torch.arange(1, lines + 1).view(lines, 1)
    assert relative_l2(found, expected) <= torch.finfo(dtype).eps
