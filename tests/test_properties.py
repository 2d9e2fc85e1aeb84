"""Properties that hold for every problem, on problems that hypothesis makes up."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gspn2.backends import DIRECTIONS
from helpers import (
    LAYOUTS,
    Case,
    assert_close,
    assert_same_bits,
    eager_propagate,
    make_case,
    max_error,
    relative_l2,
    run,
    truth,
)

# Fixed examples, so that a failure is the same everywhere; no deadline, because compilers are slow once.
PROFILE = settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

pytestmark = pytest.mark.usefixtures("poisoned")

SIDES = st.integers(1, 9) | st.sampled_from([15, 16, 17, 31, 33])


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype = torch.float64) -> Case:
    """Odd sizes, direction subsets in any order, any chunk, groups that divide, inputs that may be absent."""
    height, width = draw(SIDES), draw(SIDES)
    groups, share = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return make_case(
        batch=draw(st.integers(0, 3)),
        channels=groups * share,
        height=height,
        width=width,
        groups=groups,
        directions=draw(st.permutations(DIRECTIONS))[: draw(st.integers(1, 4))],
        chunk=draw(st.none() | st.integers(1, max(height, width) + 1)),
        dtype=dtype,
        seed=draw(st.integers(0, 2**16)),
        lam=draw(st.booleans()),
        gate=draw(st.booleans()),
    )


@PROFILE
@given(case=cases(), layout=st.sampled_from(sorted(LAYOUTS)))
def test_equals_eager_in_any_layout(case: Case, layout: str, backend: str) -> None:
    assert_close(run(LAYOUTS[layout](case), backend=backend), run(case, eager_propagate), 1e-12)


@PROFILE
@given(case=cases(torch.float32), layout=st.sampled_from(sorted(LAYOUTS)))
def test_float32_is_accurate(case: Case, layout: str, backend: str) -> None:
    """Within the tolerance of the test vectors, twice that for gradients."""
    expected = truth(case)
    for name, tensor in run(LAYOUTS[layout](case), backend=backend).items():
        assert relative_l2(tensor, expected[name]) <= (1e-6 if name == "y" else 2e-6), name


@PROFILE
@given(case=cases(torch.bfloat16))
def test_sixteen_bits_are_rounded_once(case: Case, backend: str) -> None:
    """Every number of y within half a unit in the last place of the exact one, and float32 noise."""
    exact = truth(case)["y"]
    y = run(case, backend=backend)["y"].double()
    unit = torch.finfo(torch.bfloat16).eps / 2
    noise = 1e-5 * exact.abs().amax().clamp(min=1) if exact.numel() else 0
    assert ((y - exact).abs() <= unit * exact.abs() + noise).all()


@PROFILE
@given(case=cases(torch.float32))
def test_repeats_to_the_bit(case: Case, backend: str) -> None:
    assert_same_bits(run(case, backend=backend), run(case, backend=backend))


@PROFILE
@given(case=cases())
def test_bounded_by_the_input(case: Case, backend: str) -> None:
    """Without scale and gate, |y| is at most the number of directions times that of lines, times max |x|."""
    bare = replace(case, lam=None, gate=None)
    y = run(bare, backend=backend)["y"]
    if y.numel() == 0:
        return
    lines = min(case.chunk or max(y.shape[2:]), max(y.shape[2:]))
    assert y.abs().max() <= (1 + 1e-12) * len(case.directions) * lines * case.x.abs().max()


@PROFILE
@given(case=cases(), scale=st.floats(-8, 8))
def test_homogeneous_in_the_incoming_gradient(case: Case, scale: float, backend: str) -> None:
    plain = run(case, backend=backend)
    scaled = run(replace(case, dy=scale * case.dy), backend=backend)
    for name in plain.keys() - {"y"}:
        assert max_error(scaled[name], scale * plain[name]) <= 1e-12, name
