"""Strips whose last planes are cut, by the emulator: the bits of planes that are not, and nobody waits."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch

from cuda_emulator import compiler
from cuda_emulator.build import HERE
from cuda_emulator.emulator import Inputs, case_of, run_plan
from cuda_emulator.problems import BF16, FP16, Small
from gspn2.backends.cuda.geometry import Device, Kernel, Launch, Plan
from gspn2.backends.cuda.layouts import imagined
from gspn2.backends.cuda.variants import strips
from gspn2.backends.problem import Problem

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


def runs_of(planes: int) -> list[list[tuple[int, int, int]]]:
    """Of 1024 x 1024, for each cluster: planes, with the first tile and the end, one after the other."""
    problem = Problem(("right",), None, False, 1, planes, 1, 1024, 1024, torch.float32, "cuda")
    launch = strips.plan(imagined(problem, "planes", Device(), gate=False)).launches[-1]
    clusters, row = launch.knobs[0], 3 * (planes // launch.knobs[0] + 2)
    y = torch.full((1, 1, clusters, row), torch.nan)
    kernel = Kernel(str(HERE / "runs.cu"), "runs", launch.kernel.defines)
    told = Launch(kernel, clusters, 32, 0, knobs=(*launch.knobs, row))
    run_plan(Plan("runs", (told,)), problem, {"x": y, "y": y})
    lists = [[int(it) for it in found[~found.isnan()]] for found in y.view(clusters, -1)]
    return [list(zip(it[::3], it[1::3], it[2::3], strict=True)) for it in lists]


@pytest.mark.parametrize("planes", [45, 70, 77, 100, 103, 128, 160])
def test_nobody_waits_long_for_cut_planes(planes: int) -> None:
    """Every tile is scanned once, and the time that the planner expects to save is saved."""
    tiles, runs = 1024 * 4 // 64, runs_of(planes)
    scanned = sorted(run for found in runs for run in found)
    assert [run[:2] for run in scanned] == [(0, 0)] + [
        (plane, end) if end < tiles else (plane + 1, 0) for plane, _, end in scanned[:-1]
    ]
    assert scanned[-1] == (planes - 1, scanned[-1][1], tiles)
    left_off, longest = {}, 0  # when states are there, by plane and tile
    for found in runs:
        now = 0
        for plane, first, end in found:
            now = max(now, left_off.pop((plane, first)) if first else 0) + end - first
            if end < tiles:
                left_off[plane, end] = now
        longest = max(longest, now)
    assert not left_off
    rounds = -(-planes // len(runs))
    assert longest <= (1 - strips.SAVED) * rounds * tiles
