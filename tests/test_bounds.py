"""What the scan may do to values: it never amplifies, stays finite, and carries NaN to its cone only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import gspn2
from gspn2.backends import DIRECTIONS
from helpers import (
    CPU_BACKENDS,
    LAYOUTS,
    Case,
    assert_same_bits,
    eager_weights,
    make_case,
    max_error,
    relative_l2,
    run,
    truth,
)
from matrix_form import line_number, reach, scan_axis

pytestmark = pytest.mark.usefixtures("poisoned")


# Bounds


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_row_stochastic_taps_never_amplify(direction: str, dtype: torch.dtype, backend: str) -> None:
    """max |h_i| <= |u_0| + ... + |u_i| (maxima of lines); from the first line alone max |h| <= |u_0|."""
    height = width = 40
    case = make_case(2, 2, height, width, directions=(direction,), gate=False, dtype=dtype)
    axis, first = scan_axis(direction)
    slack = 1 + 64 * torch.finfo(dtype).eps
    along = -3 - axis

    u = (case.lam[:, 0].double() * case.x.double()).abs().amax(along)  # (B, C, L)
    total = u.cumsum(-1) if first == 0 else u.flip(-1).cumsum(-1).flip(-1)
    h = run(case, backend=backend)["y"].double().abs().amax(along)
    assert (h <= slack * total).all()

    start = torch.zeros_like(case.x)
    start.select(axis, first).copy_(case.x.select(axis, first))
    h = run(replace(case, x=start, lam=None), backend=backend)["y"].double()
    assert h.abs().max() <= slack * start.double().abs().max()
    assert h.select(axis, -1 - first).any(), "the signal does not reach the last line"


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradients_are_redistributed_not_created(direction: str, backend: str) -> None:
    """A gradient on the last line: on every other line it has the same sum, and no larger sum of magnitudes.

    The maximum is bounded by the number of places that can have added up, not by 1.
    """
    axis, first = scan_axis(direction)
    case = make_case(2, 2, 12, 14, directions=(direction,), lam=False, gate=False)
    dy = torch.zeros_like(case.dy)
    dy.select(axis, -1 - first).copy_(case.dy.select(axis, -1 - first))
    dx = run(replace(case, dy=dy), backend=backend)["dx"]
    lines = dx.movedim(axis, 0)  # (L, B, C, P)
    lines = lines.flip(0) if first == 0 else lines  # the line that received dy comes first
    assert max_error(lines.sum(-1), lines[0].sum(-1).expand(lines.shape[:-1])) <= 1e-12
    masses = lines.abs().sum(-1)
    assert (masses[1:] <= (1 + 1e-12) * masses[:-1]).all()
    collected = torch.arange(len(lines)).mul(2).add(1).view(-1, 1, 1).clamp(max=lines.shape[-1])
    assert (lines.abs().amax(-1) <= (1 + 1e-12) * collected * lines[0].abs().amax(-1)).all()


def test_the_maximum_of_a_gradient_may_grow(backend: str) -> None:
    """Taps that all point at one column collect the gradient of every place within reach: 2n + 1 of them."""
    height, width = 4, 9
    logits = torch.full((1, 1, 1, 3, height, width), -1e4, dtype=torch.float64)
    for column in range(width):
        towards = 1 + (column < width // 2) - (column > width // 2)
        logits[:, :, :, towards, :, column] = 1e4
    x = torch.zeros(1, 1, height, width, dtype=torch.float64)
    dy = torch.zeros_like(x)
    dy[:, :, -1] = 1
    dx = run(Case(x, logits, None, None, dy, ("down",)), backend=backend)["dx"]
    assert dx[0, 0, :, width // 2].tolist() == [7, 5, 3, 1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_constants_are_carried_unchanged(dtype: torch.dtype, backend: str) -> None:
    """Weights sum to 1: ones on the first line stay ones over 300 lines, borders included."""
    x = torch.zeros(1, 2, 300, 5, dtype=dtype)
    x[:, :, 0] = 1
    logits = make_case(1, 2, 300, 5, directions=("down",), dtype=dtype).logits
    h = gspn2.propagate(x, logits, directions=("down",), backend=backend)
    assert max_error(h, torch.ones_like(h)) <= 300 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("logit", [-1e4, -200.0, -20.0, 20.0, 200.0, 1e4, "mixed"])
def test_extreme_logits(logit: float | str, dtype: torch.dtype, backend: str) -> None:
    """No 0 / 0 where every sigmoid underflows, no overflow where it saturates; as accurate as elsewhere.

    At 20 the gradient is 1 - sigmoid = 2e-9, lost if computed that way; at 200 it is 1e-87, and may be 0.
    """
    case = make_case(1, 2, 6, 5, dtype=dtype)
    if logit == "mixed":
        choices = torch.tensor([-1e4, -200.0, -90.0, 0.0, 90.0, 1e4], dtype=dtype)
        which = torch.arange(case.logits.numel()).remainder(7).remainder(6)
        case = replace(case, logits=choices[which].view_as(case.logits))
    else:
        case = replace(case, logits=torch.full_like(case.logits, logit))
    found, expected = run(case, backend=backend), truth(case)
    for name, tensor in found.items():
        assert tensor.isfinite().all(), name
        error = relative_l2(tensor, expected[name].to(dtype))  # to dtype: it underflows in float16
        if logit == "mixed" or abs(logit) > 20:
            error = min(error, max_error(tensor, expected[name]))
        assert error <= 8 * torch.finfo(dtype).eps, name


# Reach: NaN goes exactly where the recurrence carries it.


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("directions", [*((name,) for name in DIRECTIONS), DIRECTIONS], ids="-".join)
@pytest.mark.parametrize("name", ["x", "lam", "gate", "logits"])
def test_nan_reaches_only_its_cone(
    name: str, directions: tuple[str, ...], chunk: int | None, backend: str
) -> None:
    height, width, row, column = 8, 9, 4, 3
    case = make_case(2, 4, height, width, 2, directions, chunk, torch.float32)
    tensor = case.tensors()[name]
    spot = torch.zeros(height, width, dtype=torch.bool)
    spot[row, column] = True
    if name == "x":
        tensor[1, 1, row, column] = torch.nan
        sources, channels = directions, [1]
    elif name == "logits":  # the middle tap of the second group, which makes all three weights NaN
        tensor[1, 0, 1, 1, row, column] = torch.nan
        sources, channels = directions[:1], [2, 3]
    else:
        tensor[1, 0, 1, row, column] = torch.nan
        sources, channels = directions[:1], [1]

    expected = torch.zeros(2, 4, height, width, dtype=torch.bool)
    for direction in sources:
        line = line_number(row, column, height, width, direction)
        unread = name == "logits" and chunk is not None and line % chunk == 0
        touched = torch.zeros_like(spot) if unread else spot
        cone = touched if name == "gate" else reach(touched, direction, chunk)
        expected[1, channels] |= cone
    y = run(case, backend=backend)["y"]
    assert torch.equal(y.isnan(), expected)


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_nan_in_the_incoming_gradient(direction: str, chunk: int | None, backend: str) -> None:
    """dx is NaN where the recurrence runs backwards to: the cone of the opposite direction."""
    height, width = 6, 7
    case = make_case(1, 2, height, width, directions=(direction,), chunk=chunk, dtype=torch.float32)
    case.dy[0, 1, 3, 2] = torch.nan
    pixels = torch.eye(height * width, dtype=torch.bool).view(-1, height, width)
    reached = torch.stack([reach(pixel, direction, chunk)[3, 2] for pixel in pixels]).view(height, width)
    results = run(case, backend=backend)
    assert torch.equal(results["dx"][0, 1].isnan(), reached)
    assert not results["dx"][0, 0].isnan().any()
    assert torch.equal(results["dgate"][0, 0, 1].isnan(), case.dy[0, 1].isnan())
    assert not results["y"].isnan().any()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_taps_that_are_never_read_may_be_nan(direction: str, backend: str) -> None:
    """Logits of missing neighbours change nothing at all, those of the first line nothing but themselves."""
    case = make_case(2, 4, 5, 6, 2, (direction,), dtype=torch.float32)
    expected = run(case, backend=backend)

    missing = eager_weights(torch.ones_like(case.logits[:, 0]), direction).unsqueeze(1) == 0
    bordered = replace(case, logits=case.logits.masked_fill(missing, torch.nan))
    assert_same_bits(run(bordered, backend=backend), expected)

    axis, first = scan_axis(direction)
    started = replace(case, logits=case.logits.clone())
    started.logits.select(axis, first).fill_(torch.nan)
    found = run(started, backend=backend)
    for results in (found, expected):
        results["dlogits"].select(axis, first).zero_()
    assert_same_bits(found, expected)


# Lines of one direction end inside a vector, those of the other with one. The taps at the spots are read: no
# line through a spot is a restart.
BATCH, CHANNELS, GROUPS, HEIGHT, WIDTH, CHUNK = 3, 6, 2, 19, 32, 7
SPOTS = ((1, 1), (HEIGHT - 2, WIDTH - 2))
REACHES = [((direction,), None) for direction in DIRECTIONS] + [(DIRECTIONS, CHUNK)]
NATIVE_BACKENDS = [name for name in CPU_BACKENDS if name != "reference"]


def line_scan(
    x: Tensor, logits: Tensor, lam: Tensor, *, directions: Sequence[str], chunk: int | None, backend: str
) -> Tensor:
    """`gspn2.line_scan` with the arguments of `propagate`."""
    return gspn2.line_scan(x, lam[:, 0], logits[:, 0], direction=directions[0], chunk=chunk, backend=backend)


OPERATORS: dict[str, Callable[..., Tensor]] = {"propagate": gspn2.propagate, "line_scan": line_scan}


def spoiled(operator: str, name: str, value: float, directions: tuple[str, ...], chunk: int | None) -> Case:
    """`value` near a corner of the first image and near another of the second, the third is clean.

    It is in channels 0 and 2 or in taps of the first group: other channels and images are scanned later.
    """
    case = make_case(BATCH, CHANNELS, HEIGHT, WIDTH, GROUPS, directions, chunk)
    if operator == "line_scan":
        case = replace(case, logits=case.logits.tanh() / 3, gate=None)
    for image, (row, column) in enumerate(SPOTS):
        if name == "logits":
            case.logits[image, :, 0, 2 * image, row, column] = value
        else:
            getattr(case, name)[image, ..., [0, 2], row, column] = value
    return case


@cache
def where_not_finite(*problem: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Masks of NaN and of infinities in the results of the reference, in float64."""
    results = run(spoiled(*problem), OPERATORS[problem[0]], backend="reference")
    return {name: (tensor.isnan(), tensor.isinf()) for name, tensor in results.items()}


@pytest.mark.parametrize("native", NATIVE_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_finite_where_the_reference_is(
    operator: str, value: float, layout: str, dtype: torch.dtype, native: str
) -> None:
    """y and every gradient are NaN or infinite where the reference is.

    Nothing gets from the end of a line into what is left of a vector, and from there to the line again, to
    other channels or to other images; gradients of the taps of missing neighbours are 0.
    """
    wrong = []
    bare = operator == "line_scan"
    names = ["x", "lam", "dy", *([] if bare else ["gate"])]
    # An infinite logit is an ordinary one: its sigmoid is 0 or 1.
    names += ["logits"] if bare or value != torch.inf else []
    for directions, chunk in REACHES:
        if bare and len(directions) > 1:
            directions = directions[:1]
        for name in names:
            problem = (operator, name, value, directions, chunk)
            case = LAYOUTS[layout](spoiled(*problem).to(dtype))
            for key, tensor in run(case, OPERATORS[operator], backend=native).items():
                nan, infinite = where_not_finite(*problem)[key]
                stray = (tensor.isnan() != nan) | (tensor.isinf() != infinite)
                if stray.any():
                    wrong.append(f"{name}, {directions}, {chunk}: {key} at {stray.nonzero()[0].tolist()}")
    assert not wrong, "\n".join(wrong)


def test_four_directions_reach_every_pixel_from_every_pixel() -> None:
    """The claim of dense pairwise connectivity, on square and oblong images: no pixel is out of reach."""
    for height, width in ((6, 6), (4, 9), (9, 4), (1, 7), (7, 1)):
        for pixel in torch.eye(height * width, dtype=torch.bool).view(-1, height, width):
            reached = torch.stack([reach(pixel, direction, None) for direction in DIRECTIONS])
            assert reached.any(0).all()
