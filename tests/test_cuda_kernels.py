"""Every CUDA kernel on the CPU, by the emulator: the reference's results, whatever the order of threads."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from cuda_emulator import compiler, emulate
from cuda_emulator.emulator import Inputs, case_of
from cuda_emulator.problems import COMMON, Small, extra, truth
from gspn2.backends.cuda import plan
from helpers import max_error, relative_l2

pytestmark = pytest.mark.skipif(
    compiler() is None, reason="the emulator of CUDA kernels needs g++ 12, on Linux"
)

# Relative L2 and largest error: results are rounded once; in float32 these are the errors of the sums. Of a
# few elements all may be unlucky, and what is nearly a tie may go the other way.
TOLERANCE = {
    torch.float32: (3e-6, 3e-6),
    torch.bfloat16: (2.5e-3, 1.02 * 2**-8),
    torch.float16: (4e-4, 1.02 * 2**-11),
}


@functools.cache
def results(small: Small) -> dict[str, Tensor]:
    """What every variant should find."""
    case = small.case()
    return truth(case, small.problem(case), small.needs)


def hidden(small: Small) -> Tensor | None:
    """The state handed to backward, rounded to storage."""
    return results(small)["y"].to(small.dtype) if small.hidden else None


def takes(variant: str, small: Small, backward: bool) -> bool:
    """Does the variant take the case? One that fails to say so takes it, and fails in the test."""
    case = small.case()
    dy = case.dy if backward else None
    inputs = Inputs(case.x, case.logits, case.lam, case.gate, dy, small.needs, hidden(small))
    planned, _ = case_of(inputs, small.problem(case), small.device)
    try:
        return plan.variants()[variant].why_not(planned) is None
    except Exception:
        return True


def runs() -> Iterator[object]:
    for variant in plan.variants():
        for small in (*COMMON, *extra(variant)):
            for backward in (False, True):
                wanted = small.backward if backward else small.forward
                if wanted and takes(variant, small, backward):
                    name = f"{variant}-{'backward' if backward else 'forward'}-{small}"
                    yield pytest.param(variant, small, backward, id=name)


RUNS = list(runs()) if compiler() else []


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """Tensors are small here: waking more threads takes longer than the work."""
    torch.set_num_threads(1)


@pytest.mark.parametrize(("variant", "small", "backward"), RUNS)
def test_kernels(variant: str, small: Small, backward: bool) -> None:
    case = small.case()
    problem = small.problem(case)
    expected = results(small)
    # Two orders of threads, and two leftovers in shared memory; over the cases all six kinds of order occur.
    first = RUNS_SEED[variant, small, backward] % 6
    found = [
        emulate(
            case.x,
            case.logits,
            case.lam,
            case.gate,
            problem,
            plan.variants()[variant],
            dy=case.dy if backward else None,
            needs=small.needs,
            seed=seed,
            device=small.device,
            hidden=hidden(small),
        )
        for seed in (first, 6 + (first + 5) % 6)
    ]
    assert found[0].keys() == {name for name in expected if (name != "y") == backward}
    l2, largest = TOLERANCE[small.dtype]
    for name, tensor in found[0].items():
        same = torch.equal(tensor.nan_to_num(nan=1e30), found[1][name].nan_to_num(nan=1e30))
        assert same, f"{name} depends on the order of threads, or on what shared memory held"
        right = expected[name]
        if name == "dtaps" and small.nan:  # what is not read gets a gradient of 0 or NaN
            restarts = small.restarts()
            tensor, right = tensor.masked_fill(restarts, 0), right.masked_fill(restarts, 0)
        assert torch.equal(tensor.isnan(), right.isnan()), f"{name}: NaN where there should be none, or none"
        tensor, right = tensor.nan_to_num(nan=0.0), right.nan_to_num(nan=0.0)
        assert max_error(tensor, right) <= largest, name
        assert relative_l2(tensor, right) <= (l2 if tensor.numel() > 256 else largest), name


RUNS_SEED = {tuple(run.values): i for i, run in enumerate(RUNS)}


@pytest.mark.skipif(not RUNS, reason="nothing to run")
@pytest.mark.parametrize("variant", plan.variants())
def test_every_variant_is_tried(variant: str) -> None:
    """With all cases that were written for it: one that it declines would be left out, and nobody know."""
    tried = [run.values[1] for run in RUNS if run.values[0] == variant]
    assert tried
    assert [str(small) for small in extra(variant) if small not in tried] == []
