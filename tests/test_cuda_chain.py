"""Backward of planes where channels that share taps add to each other's sums: small problems, emulated."""

from __future__ import annotations

import pytest
import torch

import gspn2
from cuda_emulator import compiler, run_plan
from cuda_emulator.emulator import Inputs, case_of
from cuda_emulator.problems import BF16, FP16, Small, truth
from cuda_helpers import draw
from gspn2.backends.cuda import launch
from gspn2.backends.cuda.geometry import Device
from gspn2.backends.cuda.layouts import imagined
from gspn2.backends.cuda.variants import planes_backward, planes_backward_memory
from gspn2.backends.problem import DIRECTIONS, Problem
from helpers import max_error, relative_l2, run

TOLERANCE = {torch.float32: (3e-6, 3e-6), BF16: (2.5e-3, 1.02 * 2**-8), FP16: (4e-4, 1.02 * 2**-11)}
"""Relative in L2, and at most, of one rounding."""

PROBLEMS = (
    Small(40, 264, channels=5, dtype=BF16, chunk=17),
    Small(70, 136, channels=8, groups=2, directions=("right", "up"), dtype=FP16, lam=False),
    Small(36, 140, channels=3, directions=("down", "left"), gate=False),
    Small(40, 264, channels=3, directions=("up",), dtype=BF16, hidden=True, gate=False),
    Small(150, 40, channels=5, directions=("left",), dtype=BF16, hidden=True, gate=False),
)


@pytest.mark.skipif(compiler() is None, reason="the emulator of CUDA kernels needs g++")
@pytest.mark.parametrize(("number", "parts"), [*((n, 0.0) for n in range(len(PROBLEMS))), (0, 1e9), (3, 1e9)])
@pytest.mark.usefixtures("threads")
def test_large_images(number: int, parts: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With chains, of two channels or all; and where there is memory for a part of each channel."""
    torch.set_num_threads(1)  # small tensors: waking more takes longer than the work
    monkeypatch.setattr(planes_backward_memory, "CHAINED_LINES", 32)
    monkeypatch.setattr(planes_backward_memory, "COLUMNS", 1)
    monkeypatch.setattr(planes_backward_memory, "PARTS", parts)
    monkeypatch.setattr(planes_backward_memory, "SUMS", 1e9)
    monkeypatch.setattr(planes_backward_memory, "LONGEST_CHAIN", 2 + 14 * (number % 2))
    monkeypatch.setattr(planes_backward_memory, "room_for_states", lambda case: 2)
    small = PROBLEMS[number]
    right = truth(small.case(), small.problem(small.case()))
    found = []
    for seed in (number, number + 7):
        case = small.case()
        hidden = right["y"].to(small.dtype) if small.hidden else None
        inputs = Inputs(case.x, case.logits, case.lam, case.gate, case.dy, small.needs, hidden)
        planned, tensors = case_of(inputs, small.problem(case), Device())
        plan = planes_backward.plan(planned)
        chained = [launch for launch in plan.launches if dict(launch.kernel.defines).get("CHAIN")]
        assert len({launch.knobs[0] for launch in chained}) == (0 if parts else len(small.directions))
        run_plan(plan, small.problem(case), tensors, seed=seed, device=Device())
        found.append(tensors)
    l2, largest = TOLERANCE[small.dtype]
    for name, tensor in right.items():
        if name != "y":
            assert torch.equal(found[0][name], found[1][name]), name
            # Gradients of taps come from a state that was rounded if it is handed in.
            roundings = 1 + (name == "dtaps" and small.hidden)
            assert max_error(found[0][name], tensor) <= roundings * largest, name
            assert relative_l2(found[0][name], tensor) <= roundings * l2, name


@pytest.mark.parametrize(
    ("batch", "channels", "groups", "bare", "directions"),
    [
        (16, 8, 1, False, DIRECTIONS),
        (1, 80, 1, True, DIRECTIONS),
        (1, 80, 80, False, DIRECTIONS),
        (1, 2176, 544, False, ("down", "left")),
    ],
)
def test_memory_of_training(
    batch: int, channels: int, groups: int, bare: bool, directions: tuple[str, ...]
) -> None:
    """What a step takes beside its inputs is at most 1.25 times these and the gradients."""
    problem = Problem(directions, None, True, batch, channels, groups, 1024, 1024, BF16, "cuda")
    case = imagined(problem, "planes", Device(), backward=True, lam=not bare, gate=not bare)
    image = batch * channels * 2**21
    scans = len(directions)
    given = image + scans * (2 * (not bare) * image + 3 * batch * groups * 2**21)  # x, or dx, and the others
    inputs, outputs = given + image, given + image
    scratch = sum(planes_backward.plan(case).scratch)
    assert outputs + scratch <= 1.25 * (inputs + given)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("keep_hidden", [False, True])
def test_chains_find_what_parts_do(keep_hidden: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU: many blocks that wait for each other, more than run at a time; the same bits each time."""
    case = draw(1, 80, 512, 576, precision="16 bits", lam=False, gate=False).to(BF16)

    def results(parts: float) -> dict[str, torch.Tensor]:
        monkeypatch.setattr(planes_backward_memory, "PARTS", parts)
        launch._ready.clear()
        return run(case, gspn2.propagate, backend="cuda", keep_hidden=keep_hidden)

    chained, again, left = results(0.0), results(0.0), results(1e9)
    launch._ready.clear()
    for name, tensor in chained.items():
        assert torch.equal(tensor, again[name]), name
        assert relative_l2(tensor, left[name].double()) <= 2**-8, name
