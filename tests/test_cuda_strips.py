"""Strips whose last planes are cut, by the emulator: the same bits as of planes that are not."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch

from cuda_emulator import compiler
from cuda_emulator.emulator import Inputs, case_of, run_plan
from cuda_emulator.problems import BF16, FP16, Small
from gspn2.backends.cuda.geometry import Device
from gspn2.backends.cuda.variants import strips

pytestmark = pytest.mark.skipif(
    compiler() is None, reason="the emulator of CUDA kernels needs g++ 12, on Linux"
)

CUT = {"normalize": False, "gate": False, "backward": False, "device": Device(multiprocessors=14)}
NO_LAM = CUT | {"lam": False}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("small", "cut"),
    [
        (Small(128, 136, channels=8, directions=("right",), dtype=BF16, chunk=50, nan="restarts", **CUT), 2),
        (Small(130, 200, channels=8, directions=("left",), dtype=FP16, groups=4, chunk=33, **NO_LAM), 2),
        # The first tile of a scan is the narrow one: exchanges come in the middle of tiles, also at a cut.
        (Small(136, 100, channels=8, directions=("left",), chunk=7, **CUT), 2),
        (Small(136, 92, channels=4, directions=("left",), **CUT), 1),
    ],
    ids=str,
)
def test_cuts_change_no_bit(small: Small, cut: int, seed: int) -> None:
    case = small.case()
    problem = small.problem(case)
    inputs = Inputs(case.x, case.logits, case.lam, case.gate, None, small.needs)
    found = []
    for planes in (cut, 0):
        planned, tensors = case_of(inputs, replace(problem, device="cuda"), small.device)
        layout = strips.Layout(planned, 4, 2, 2, stages=2)
        assert layout.cut == cut
        with mock.patch.object(strips.Layout, "cut", planes):
            plan = strips.plan_of(layout)
        run_plan(plan, problem, tensors, seed, small.device)
        found.append(tensors["y"])
    assert not torch.isnan(found[0]).any()
    assert torch.equal(*found)
