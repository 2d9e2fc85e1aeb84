"""What the equations imply, checked on results alone: matrix form, symmetries, sums, chunks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import gspn2
from gspn2.backends import DIRECTIONS
from helpers import (
    DIRECTION_SUBSETS,
    Case,
    assert_close,
    assert_same_bits,
    eager_scan,
    eager_weights,
    make_case,
    max_error,
    run,
)
from matrix_form import propagation_matrix, scan_axis

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("chunk", [None, 1, 2, 3])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_line_scan_solves_the_linear_system(direction: str, chunk: int | None, backend: str) -> None:
    """h = (I - A)^-1 u, with A built pixel by pixel from the definition of the neighbours."""
    case = make_case(2, 4, 5, 4, groups=2)
    lam, w = case.lam[:, 0], case.logits[:, 0]
    h = gspn2.line_scan(case.x, lam, w, direction=direction, chunk=chunk, backend=backend)
    for b in range(2):
        for c in range(4):
            matrix = propagation_matrix(w[b, c // 2], direction, chunk)
            system = torch.eye(20, dtype=torch.float64) - matrix
            expected = torch.linalg.solve(system, (lam * case.x)[b, c].flatten())
            assert max_error(h[b, c].flatten(), expected) <= 1e-12


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("with_lam", [True, False])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_line_scan_gradients(direction: str, with_lam: bool, chunk: int | None, backend: str) -> None:
    """Against autograd through eager PyTorch; missing neighbours are not read and get gradient 0."""
    case = make_case(2, 4, 5, 6, groups=2, lam=with_lam)
    missing = eager_weights(case.logits[:, 0], direction) == 0
    assert missing.any()
    lam = case.lam[:, 0].requires_grad_() if with_lam else None
    inputs = [case.x.requires_grad_(), case.logits[:, 0].requires_grad_()] + ([lam] if with_lam else [])
    x, w = inputs[:2]

    h = gspn2.line_scan(
        x, lam, w.masked_fill(missing, torch.nan), direction=direction, chunk=chunk, backend=backend
    )
    found = torch.autograd.grad(h, inputs, case.dy)
    u = x if lam is None else x * lam
    taps = w.masked_fill(missing, 0).repeat_interleave(2, dim=1)
    eager = eager_scan(u, taps, direction, chunk)
    expected = torch.autograd.grad(eager, inputs, case.dy)

    assert max_error(h, eager) <= 1e-12
    for mine, theirs in zip(found, expected, strict=True):
        assert max_error(mine, theirs) <= 1e-12
    assert torch.equal(found[1][missing], torch.zeros_like(found[1][missing]))


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_propagate_is_line_scan_of_normalised_taps(direction: str, chunk: int | None, backend: str) -> None:
    case = make_case(directions=(direction,), chunk=chunk, groups=2)
    y = run(case, backend=backend)["y"]
    w = eager_weights(case.logits[:, 0], direction)
    h = gspn2.line_scan(case.x, case.lam[:, 0], w, direction=direction, chunk=chunk, backend=backend)
    assert max_error(y, case.gate[:, 0] * h) <= 1e-12


# Symmetries


def reflected(case: Case, axis: int) -> Case:
    """The case for the image flipped in rows (-2) or columns (-1): scans along the flip turn round, and taps
    across it swap ends."""
    along = ("down", "up") if axis == -2 else ("right", "left")
    turned = dict(zip(along, along[::-1], strict=True))
    logits = case.logits.clone()
    for d, direction in enumerate(case.directions):
        if direction not in along:
            logits[:, d] = logits[:, d].flip(2)
    names = tuple(turned.get(direction, direction) for direction in case.directions)
    return replace(replace(case, logits=logits).map(lambda tensor: tensor.flip(axis)), directions=names)


def transposed(case: Case) -> Case:
    """The case for the transposed image: "down" becomes "right"; taps keep their order."""
    turned = {"down": "right", "right": "down", "up": "left", "left": "up"}
    names = tuple(turned[direction] for direction in case.directions)
    return replace(case.map(lambda tensor: tensor.transpose(-2, -1)), directions=names)


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("directions", DIRECTION_SUBSETS, ids="-".join)
def test_symmetries(directions: tuple[str, ...], chunk: int | None, backend: str) -> None:
    """Flipping and transposing the image flips and transposes everything that comes out."""
    case = make_case(1, 4, 7, 5, 2, directions, chunk)
    plain = run(case, backend=backend)
    for axis in (-2, -1):
        # Reflecting the results of the reflected case as if they were a case undoes it.
        mirrored = run(reflected(case, axis), backend=backend)
        taps = replace(reflected(case, axis), logits=mirrored["dlogits"])
        mirrored["dlogits"] = reflected(taps, axis).logits
        others = {name: tensor.flip(axis) for name, tensor in mirrored.items() if name != "dlogits"}
        assert_close(plain, mirrored | others)
    turned = run(transposed(case), backend=backend)
    assert_close(plain, {name: tensor.transpose(-2, -1) for name, tensor in turned.items()})


@pytest.mark.parametrize("directions", [("left", "down"), ("up", "right", "down"), DIRECTIONS], ids="-".join)
def test_directions_add_up(directions: tuple[str, ...], backend: str) -> None:
    """All at once, one after the other and in another order are the same."""
    case = make_case(2, 4, 6, 7, 2, directions, chunk=4)
    together = run(case, backend=backend)
    count = len(directions)

    alone = [run(only(case, [d]), backend=backend) for d in range(count)]
    summed = {name: sum(results[name] for results in alone) for name in ("y", "dx")}
    joined = {
        name: torch.cat([results[name] for results in alone], 1) for name in ("dlogits", "dlam", "dgate")
    }
    assert_close(together, summed | joined)

    order = list(range(count))[::-1]
    turned = run(only(case, order), backend=backend)
    per_direction = {name: turned[name][:, order] for name in joined}
    assert_close(together, turned | per_direction)


def only(case: Case, which: list[int]) -> Case:
    """The case with the directions of these indices, in their order."""
    chosen = {name: case.tensors()[name][:, which] for name in ("logits", "lam", "gate")}
    return replace(case, **chosen, directions=tuple(case.directions[d] for d in which))


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_groups_are_shared_taps(groups: int, backend: str) -> None:
    """Channel c uses the taps of group c // (C / G): the same as giving every channel a copy of them."""
    case = make_case(2, 6, 5, 4, groups)
    share = 6 // groups
    copied = replace(case, logits=case.logits.repeat_interleave(share, dim=2))
    expected = run(copied, backend=backend)
    expected["dlogits"] = expected["dlogits"].unflatten(2, (groups, share)).sum(3)
    assert_close(run(case, backend=backend), expected)


def test_samples_do_not_mix(backend: str) -> None:
    case = make_case(batch=3, groups=2)
    alone = [run(case.map(lambda tensor, b=b: tensor[b : b + 1]), backend=backend) for b in range(3)]
    expected = {name: torch.cat([results[name] for results in alone]) for name in alone[0]}
    assert_close(run(case, backend=backend), expected)


# Chunks


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_chunk_of_the_whole_image_changes_nothing(dtype: torch.dtype, backend: str) -> None:
    case = make_case(2, 4, 6, 9, dtype=dtype)
    whole = run(case, backend=backend)
    for chunk in (9, 10, 2**31):
        assert_same_bits(run(replace(case, chunk=chunk), backend=backend), whole)


def test_chunk_of_one_line_is_the_input(backend: str) -> None:
    case = make_case(chunk=1, groups=2)
    results = run(case, backend=backend)
    assert max_error(results["y"], (case.gate * case.lam).sum(1) * case.x) <= 1e-12
    assert not results["dlogits"].any()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_segments_are_counted_from_where_the_scan_starts(direction: str, backend: str) -> None:
    """11 lines in chunks of 4: the short segment comes last in scan order, and each is a scan of its own."""
    case = make_case(1, 2, 11, 11, directions=(direction,))
    whole = run(replace(case, chunk=4), backend=backend)
    axis, first = scan_axis(direction)
    sizes = [4, 4, 3] if first == 0 else [3, 4, 4]
    start = 0
    for size in sizes:
        cut = case.map(lambda tensor, start=start, size=size: tensor.narrow(axis, start, size))
        part = {name: tensor.narrow(axis, start, size) for name, tensor in whole.items()}
        assert_close(run(cut, backend=backend), part)
        start += size
