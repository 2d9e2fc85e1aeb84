"""Gradients: numerical derivatives, every subset of inputs, the adjoint's identities."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch import Tensor

import gspn2
from gspn2.backends import DIRECTIONS
from helpers import (
    INPUTS,
    Case,
    assert_close,
    make_case,
    max_error,
    run,
)
from matrix_form import scan_axis

pytestmark = pytest.mark.usefixtures("poisoned")


SUBSETS = [subset for size in range(1, 5) for subset in combinations(INPUTS, size)]


@pytest.mark.parametrize("wanted", SUBSETS, ids="-".join)
def test_gradcheck_subsets(wanted: tuple[str, ...], backend: str) -> None:
    """Numerical derivatives for every subset of inputs that require a gradient; ragged chunks on the way."""
    number = SUBSETS.index(wanted)
    direction = DIRECTIONS[number % 4]
    case = make_case(1, 2, 5, 3, 1 + number % 2, (direction,), (None, 2, 3)[number % 3])
    gradcheck(case, wanted, backend)


@pytest.mark.parametrize("directions", [DIRECTIONS, ("left", "down")], ids="-".join)
@pytest.mark.parametrize("chunk", [None, 2])
def test_gradcheck_directions(directions: tuple[str, ...], chunk: int | None, backend: str) -> None:
    gradcheck(make_case(1, 1, 3, 4, directions=directions, chunk=chunk), INPUTS, backend)


def gradcheck(case: Case, wanted: tuple[str, ...], backend: str) -> None:
    fixed = {name: tensor for name, tensor in case.tensors().items() if name not in wanted}

    def function(*leaves: Tensor) -> Tensor:
        inputs = fixed | dict(zip(wanted, leaves, strict=True))
        return gspn2.propagate(**inputs, directions=case.directions, chunk=case.chunk, backend=backend)

    leaves = tuple(case.tensors()[name].requires_grad_() for name in wanted)
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("wanted", SUBSETS, ids="-".join)
def test_gradients_asked_for_alone_are_the_same(wanted: tuple[str, ...], backend: str) -> None:
    """A backend may skip what nobody needs; what it returns must not change, and the rest must stay None."""
    case = make_case(2, 4, 5, 6, groups=2, chunk=4)
    every = run(case, backend=backend)
    leaves = {name: tensor.detach() for name, tensor in case.tensors().items()}
    for name in wanted:
        leaves[name].requires_grad_()
    gspn2.propagate(**leaves, chunk=4, backend=backend).backward(case.dy)
    assert_close(
        {f"d{name}": leaves[name].grad for name in wanted}, {f"d{n}": every[f"d{n}"] for n in wanted}
    )
    assert all(leaves[name].grad is None for name in leaves if name not in wanted)


@pytest.mark.parametrize(("lam", "gate"), [(False, False), (True, False), (False, True)])
def test_absent_scale_and_gate_mean_one(lam: bool, gate: bool, backend: str) -> None:
    case = make_case(lam=lam, gate=gate, groups=4, chunk=3)
    ones = torch.ones_like(make_case().gate)
    full = replace(case, lam=case.lam if lam else ones, gate=case.gate if gate else ones)
    found, expected = run(case, backend=backend), run(full, backend=backend)
    assert_close(found, {name: expected[name] for name in found})


def test_adjoint_identities(backend: str) -> None:
    """<y, dy> = <x, dx> = sum of <lam, dlam> = sum of <gate, dgate>: y is linear in each of the three."""
    case = make_case(2, 4, 9, 7, groups=2, chunk=4)
    results = run(case, backend=backend)
    product = (results["y"] * case.dy).sum()
    for name in ("x", "lam", "gate"):
        other = (case.tensors()[name] * results[f"d{name}"]).sum()
        assert torch.allclose(product, other, rtol=1e-11, atol=1e-11), name


def test_linear_in_x(backend: str) -> None:
    first, second = make_case(chunk=4), make_case(seed=1)
    mixed = replace(first, x=2 * first.x - 3 * second.x)
    expected = (
        2 * run(first, backend=backend)["y"] - 3 * run(replace(first, x=second.x), backend=backend)["y"]
    )
    assert max_error(run(mixed, backend=backend)["y"], expected) <= 1e-12


@pytest.mark.parametrize("chunk", [None, 3])
def test_taps_that_are_never_read_get_no_gradient(chunk: int | None, backend: str) -> None:
    """A segment's first line has no previous line, the border has missing neighbours: exactly 0 there."""
    height, width = 7, 8
    for d, direction in enumerate(DIRECTIONS):
        dlogits = run(make_case(2, 4, height, width, chunk=chunk), backend=backend)["dlogits"][:, d]
        axis, first = scan_axis(direction)
        lines = dlogits.unbind(axis)
        lines = lines if first == 0 else lines[::-1]
        for i, line in enumerate(lines):  # (B, G, 3, P)
            if i == 0 or (chunk is not None and i % chunk == 0):
                assert not line.any()
            else:
                assert not line[:, :, 0, 0].any()
                assert not line[:, :, 2, -1].any()
                assert line[:, :, :, 1:-1].all()
