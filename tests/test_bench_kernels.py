"""The bench's own kernels, in the emulator: were a baseline or a rung wrong, every factor would be."""

from __future__ import annotations

import pytest
import torch

from cuda_emulator import compiler, run_plan
from gspn2.backends import Problem, reference
from gspn2.backends.cuda.geometry import Plan
from gspn2.bench import baseline, ladder_kernels
from helpers import relative_l2

pytestmark = [
    pytest.mark.skipif(compiler() is None, reason="the emulator of CUDA kernels needs g++ 12, on Linux"),
    pytest.mark.usefixtures("one_thread"),
]
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2}


def operands(size: tuple[int, int, int, int], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """x, taps with sums below one, lam, y to be written."""
    torch.manual_seed(3)
    batch, channels, height, width = size
    x, lam = torch.randn(2, *size).to(dtype)
    taps = torch.rand(batch, 1, channels, 3, height, width).to(dtype) / 3
    return {"x": x, "taps": taps, "lam": lam.unsqueeze(1), "y": torch.empty_like(x)}


def problem(size: tuple[int, int, int, int], dtype: torch.dtype, direction: str) -> Problem:
    batch, channels, height, width = size
    return Problem((direction,), None, False, batch, channels, channels, height, width, dtype, "cuda")


def exact(it: dict[str, torch.Tensor], direction: str) -> torch.Tensor:
    size = tuple(it["x"].shape)
    inputs = (it[name].double() for name in ("x", "taps", "lam"))
    return reference.propagate(*inputs, None, problem(size, torch.float64, direction))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(2, 3, 5, 7), (1, 2, 33, 20)])
def test_the_baseline_computes_forward_and_backward(
    size: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    it = operands(size, dtype)
    run_plan(baseline.plan(problem(size, dtype, "right"), False), problem(size, dtype, "right"), it)
    assert relative_l2(it["y"], exact(it, "right")) < TOLERANCE[dtype]
    gradients = {f"d{name}": torch.empty_like(it[name]) for name in ("x", "taps", "lam")}
    dy = torch.randn(size).to(dtype)
    both = {**it, "dy": dy, **gradients}
    run_plan(baseline.plan(problem(size, dtype, "right"), True), problem(size, dtype, "right"), both)
    inputs = [it[name].double() for name in ("x", "taps", "lam")]
    exactly = problem(size, torch.float64, "right")
    needs = (True, True, True, False)
    truth = reference.propagate_backward(dy.double(), *inputs, None, exactly, needs)
    for found, wanted in zip(gradients.values(), truth[:3], strict=True):
        assert relative_l2(found, wanted) < TOLERANCE[dtype]


RUNGS = {
    "fused": (ladder_kernels.fused, ("right", "down")),
    "onchip": (ladder_kernels.onchip, ("right", "down")),
    "blocks": (ladder_kernels.blocks, ("down",)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rung", "direction"), [(rung, direction) for rung, (_, all_) in RUNGS.items() for direction in all_]
)
@pytest.mark.parametrize("size", [(1, 3, 6, 40), (2, 2, 9, 296)])
def test_every_rung_computes_the_same(
    size: tuple[int, int, int, int], rung: str, direction: str, dtype: torch.dtype
) -> None:
    it = operands(size, dtype)
    case = problem(size, dtype, direction)
    plan: Plan = RUNGS[rung][0](case)
    for seed in (0, 5):
        run_plan(plan, case, it, seed=seed)
        assert relative_l2(it["y"], exact(it, direction)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels_in", "channels_out"), [(8, 2), (2, 8)])
def test_the_projections_are_matrix_products(channels_in: int, channels_out: int, dtype: torch.dtype) -> None:
    size = (2, channels_in, 6, 24)
    x, matrix = torch.randn(size).to(dtype), torch.randn(channels_out, channels_in).to(dtype)
    y = torch.empty(2, channels_out, 6, 24, dtype=dtype)
    case = problem(size, dtype, "down")
    plan = ladder_kernels.project(case, channels_in, channels_out)
    run_plan(plan, case, {"x": x, "lam": matrix[None, None], "y": y})
    truth = torch.einsum("oc,bchw->bohw", matrix.double(), x.double())
    assert relative_l2(y, truth) < TOLERANCE[dtype]


def test_blocks_say_what_they_do_not_take() -> None:
    with pytest.raises(ValueError, match="multiple of 16 bytes"):
        ladder_kernels.blocks(problem((1, 1, 4, 7), torch.float32, "down"))


def test_the_stand_in_is_the_same_recurrence() -> None:
    it = operands((2, 3, 6, 7), torch.float64)
    found = baseline.loop(it["x"], it["lam"][:, 0], it["taps"][:, 0])
    torch.testing.assert_close(found, exact(it, "right"))
